"""The states of a training run on disk (orbax): written beside the training, read back on any mesh."""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

_log = logging.getLogger("helix_jax")


class Checkpointer:
    """The last few states in a folder. One that is half written, or was harmed since, is as if it were not there."""

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Begins to write: the state is copied at once, and lies on disk some time later. A harmed one is replaced.

        Raises:
            OSError: this state, or the one before it, cannot be written: a full disk, say.
        """

        needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self._folder).free
        if needed > free:  # before half of it is written, and orbax's threads have told at length that the rest is not
            raise self._unwritten(f"it has {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

        def begin() -> None:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            held = {"state": state, "sums": _sums(state)}
            self._manager.save(step, args=ocp.args.StandardSave(held), force=True)

        self._written(begin)

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """The newest step and state that can be read, laid out as `abstract` says; None if nothing was ever saved.

        Raises:
            ValueError: there are states, and none can be read: nothing may be written in their place.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return step, self._read(step, abstract)
            except jax.errors.JaxRuntimeError:  # of the devices, out of memory, say: the state is whole
                raise
            except Exception as error:  # of tensorstore, of orbax, of json: whatever a harmed file leads to
                why = " ".join(str(error).split())[:200]
                _log.warning("state %d in '%s' cannot be read (%s): an earlier one is taken", step, self._folder, why)
        if steps:
            raise ValueError(
                f"none of the states {steps} in '{self._folder}' can be read: bring one back, or move them away"
            )
        return None

    def _read(self, step: int, abstract: Any) -> Any:
        held = {"state": abstract, "sums": np.zeros(len(jax.tree.leaves(abstract)), np.uint32)}
        found = self._manager.restore(step, args=ocp.args.StandardRestore(held))
        if (found["sums"] != _sums(found["state"])).any():
            raise ValueError("its numbers are not those that were written")
        return found["state"]

    def finish(self) -> None:
        """Waits until all is written. Raises as `save`."""
        self._written(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits until all is written that can be. Says nothing of what cannot: `finish` does."""
        with suppress(Exception):
            self._manager.close()

    def _written(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            raise self._unwritten(" ".join(str(error).split())[:200]) from None

    def _unwritten(self, why: str) -> OSError:
        return OSError(
            f"a state of the run cannot be written to '{self._folder}' ({why}): make room and run the same command "
            f"again; it goes on from the last state that was"
        )


def _sums(state: Any) -> np.ndarray:
    """Of the bits of each array, modulo 2^32: by them it is known again, on whatever mesh it is."""
    return np.asarray(_sums_of(jax.tree.leaves(state)))


@jax.jit
def _sums_of(arrays: list[jax.Array]) -> jax.Array:
    bits = [jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")) for x in arrays]
    return jnp.stack([x.sum(dtype=jnp.uint32) for x in bits])
