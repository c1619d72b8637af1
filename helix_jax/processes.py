"""Several processes that run one program on all their devices, on one host or many: start, agreement, and loss.

Every process makes the same calls in the same order. The first process alone prints and writes. What only it can know,
such as what a file contains, it sends to the others with `on_first_process`.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import jax
import numpy as np
from jax._src import distributed  # jax.process_count() would start a backend, but the count is needed before that
from jax.experimental import multihost_utils

LOST_PROCESS = 3  # the exit code of a process that has lost another one
# Without a heartbeat for this long, a process counts as lost. JAX's defaults are 100 s, and 300 s for the shutdown.
_HEARTBEAT_TIMEOUT_S = int(os.environ.get("HELIX_JAX_HEARTBEAT_TIMEOUT_S", "30"))
_BARRIER_TIMEOUT_S = 30
_LOSS_WORDS = ("gloo", "nccl", "coordination", "heartbeat", "connection", "unavailable", "another task", "peer")


@dataclass(frozen=True)
class Processes:
    """The address, count and index of processes that run one program. JAX detects whatever is None.

    JAX detects them under Slurm, Kubernetes, Open MPI and on Cloud TPUs.

    Args:
        coordinator: The host and port of the first process, where all processes meet.
        count: The number of processes.
        index: The index of this process, from 0.

    Raises:
        ValueError: The count is below 1, the index is not below the count, or the address has no port.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"coordinator is '{self.coordinator}': give HOST:PORT of the first process")
        if self.count is not None and self.count < 1:
            raise ValueError(f"processes is {self.count}: give at least 1")
        if self.index is not None and not 0 <= self.index < (self.count or self.index + 1):
            raise ValueError(f"process is {self.index}: give an index from 0 to processes - 1, of {self.count}")


def initialize(processes: Processes) -> None:
    """Connect this process to the others. Call it before anything starts a backend of JAX.

    Args:
        processes: Where the others are. JAX detects whatever is None.

    Raises:
        ValueError: JAX cannot detect the other processes, or they do not connect.
    """
    known = (processes.coordinator, processes.count, processes.index)
    try:
        jax.distributed.initialize(
            *known,
            # With all three given, detection would only restrict the process to one of its GPUs.
            cluster_detection_method=None if None in known else "deactivate",
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the other processes are not known ({error}): start them with srun or mpirun, or in a Kubernetes JobSet, "
            f"or give --coordinator HOST:PORT --processes N --process I"
        ) from None
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            f"the processes did not connect ({_shorten(error)}): start all of them, with the same address and count"
        ) from None


def barrier() -> None:
    """Wait for all processes.

    A process that exits with an error while others still connect would look lost to them.
    """
    if process_count() > 1:
        cast(Any, distributed.global_state.client).wait_at_barrier("helix_jax", timeout_in_ms=1000 * _BARRIER_TIMEOUT_S)


def process_count() -> int:
    """Return the number of processes. Does not start a backend."""
    return distributed.global_state.num_processes or 1


def process_index() -> int:
    """Return the index of this process. Does not start a backend."""
    return distributed.global_state.process_id or 0


def is_first() -> bool:
    """Return whether this is the process that prints and writes."""
    return process_index() == 0


def on_first_process(call: Callable[[], Any]) -> Any:
    """Call a function on the first process only, and return its result on all of them.

    A collective call. On a CPU no other computation may be in progress.

    Args:
        call: Returns a value that JSON can represent.

    Raises:
        ValueError: On all processes, if the call raised ValueError or OSError on the first.
    """
    if process_count() == 1:
        return call()
    result: dict[str, Any] = {}
    if is_first():
        try:
            result["value"] = call()
        except (ValueError, OSError) as error:
            result["error"] = str(error)
    result = json.loads(_broadcast(json.dumps(result).encode()))
    if "error" in result:
        raise ValueError(result["error"])
    return result["value"]


def min_over_processes(value: int) -> int:
    """Return the smallest of the processes' values. A collective call."""
    return int(np.min(multihost_utils.process_allgather(np.int32(value)))) if process_count() > 1 else value


def lost_process_message(error: Exception) -> str | None:
    """Return an error message if `error` means that another process was lost, else None."""
    if process_count() == 1 or not any(word in str(error).lower() for word in _LOSS_WORDS):
        return None
    return f"another process was lost ({_shorten(error)}): start all of them again"


def exit_now(status: int) -> NoReturn:
    """End this process at once. A normal exit would wait for the other processes, and they for this one."""
    sys.stdout.flush()
    os._exit(status)


def _broadcast(data: bytes) -> bytes:
    """Return the first process's `data` on all processes. That of the others is ignored."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    buffer = np.zeros(size, np.uint8)
    if is_first():
        buffer[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
