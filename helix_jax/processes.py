"""Several processes that run one program on all their devices, on one host or many: how they start, how they agree.

Every process makes the same calls in the same order; the first one alone prints and writes. What only one of them can
know, a file that it opened, the free memory of its devices, is told to the others here.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import jax
import numpy as np
from jax._src import distributed  # for the count before a backend starts: jax.process_count() would start it
from jax.experimental import multihost_utils

LOST_PROCESS = 3  # the exit status of a process whose others are gone
_LOST_AFTER_S = 30  # of silence: JAX's own 100, and 300 in the end, are longer than anyone waits
_OF_OTHERS = ("gloo", "nccl", "coordination", "heartbeat", "connection", "unavailable", "another task", "peer")


@dataclass(frozen=True)
class Processes:
    """This one among the others. What is None JAX finds out: of Slurm, Kubernetes, Open MPI, Cloud TPU.

    coordinator: the host and port of the first process, where they meet. number: of this one, from 0.

    Raises:
        ValueError: a count below 1, a number outside of it, an address without a port.
    """

    coordinator: str | None = None
    count: int | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"the coordinator is '{self.coordinator}': give HOST:PORT of the first process")
        if self.count is not None and self.count < 1:
            raise ValueError(f"there are {self.count} processes: give at least 1")
        if self.number is not None and not 0 <= self.number < (self.count or self.number + 1):
            raise ValueError(f"process {self.number} is not one of {self.count}: they are counted from 0")


def initialize(processes: Processes) -> None:
    """Waits until all of them are there. Before any backend of JAX starts.

    Raises:
        ValueError: nothing tells where the others are, or they do not come.
    """
    told = (processes.coordinator, processes.process_count, processes.process_index)
    try:
        jax.distributed.initialize(
            *told,
            cluster_detection_method=None if None in told else "deactivate",  # it would give a process one GPU of all
            heartbeat_timeout_seconds=_LOST_AFTER_S,
            shutdown_timeout_seconds=_LOST_AFTER_S,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"nothing tells where the other processes are ({error}): start them with srun or mpirun, in a job of "
            f"Kubernetes, or give --coordinator HOST:PORT --processes N --process I"
        ) from None
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            f"the processes did not meet ({_short(error)}): start all of them, with one address and count"
        ) from None


def barrier() -> None:
    """Waits until all are here: what one refuses after this, none takes for its loss while it still connects."""
    if process_count() > 1:
        cast(Any, distributed.global_state.client).wait_at_barrier("helix_jax", timeout_in_ms=1000 * _LOST_AFTER_S)


def process_count() -> int:
    return distributed.global_state.num_processes or 1


def process_index() -> int:
    return distributed.global_state.process_id or 0


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return process_index() == 0


def on_first_process(do: Callable[[], Any]) -> Any:
    """What the first process alone does, and all are told: anything that JSON can say; or its error.

    A collective call. On a CPU nothing else may be under way.

    Raises:
        ValueError: in all of them, where it failed in the first.
    """
    if process_count() == 1:
        return do()
    told: dict[str, Any] = {}
    if is_first():
        try:
            told["value"] = do()
        except (ValueError, OSError) as error:
            told["error"] = str(error)
    told = json.loads(_broadcast(json.dumps(told).encode()))
    if "error" in told:
        raise ValueError(told["error"])
    return told["value"]


def min_over_processes(value: int) -> int:
    """The smallest of what they give. A collective call."""
    return int(np.min(multihost_utils.process_allgather(np.int32(value)))) if process_count() > 1 else value


def lost_process_message(error: Exception) -> str | None:
    """What to say, if the error is that another process is gone; else None."""
    if process_count() == 1 or not any(word in str(error).lower() for word in _OF_OTHERS):
        return None
    return f"another process is gone ({_short(error)}): start all of them again"


def exit_now(status: int) -> NoReturn:
    """Ends at once: the usual way out waits for the others, and they for this one."""
    sys.stdout.flush()
    os._exit(status)


def _broadcast(text: bytes) -> bytes:
    """Of the first process; what the others give does not count."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    room = np.zeros(size, np.uint8)
    if is_first():
        room[:] = np.frombuffer(text, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(room)).tobytes()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
