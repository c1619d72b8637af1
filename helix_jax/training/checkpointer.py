"""Checkpoints of a training run (orbax): written while training continues, and restored on any mesh."""

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
    """The last few checkpoints in a folder. Incomplete and damaged ones are ignored.

    Args:
        folder: Where the checkpoints are. It is created.
        keep: How many checkpoints are kept.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Start to write a checkpoint. The state is copied at once. A damaged checkpoint of the step is replaced.

        Raises:
            OSError: This checkpoint, or the one before it, cannot be written, for instance because the disk is full.
        """
        needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self._folder).free
        if needed > free:  # before orbax writes a part of it, and its threads report the failure at length
            raise self._write_error(f"it has {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

        def start_writing() -> None:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            content = {"state": state, "sums": _checksums(state)}
            self._manager.save(step, args=ocp.args.StandardSave(content), force=True)

        self._write(start_writing)

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """Restore the newest checkpoint that can be read.

        Args:
            abstract: The state as shapes, types and shardings.

        Returns:
            The step and the state, or None if nothing was ever saved.

        Raises:
            ValueError: There are checkpoints, and none can be read. Nothing may be written over them.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return step, self._read(step, abstract)
            except jax.errors.JaxRuntimeError:  # an error of the devices, such as out of memory: the files are good
                raise
            except Exception as error:  # tensorstore, orbax and json raise many types for a damaged file
                reason = " ".join(str(error).split())[:200]
                _log.warning(
                    "checkpoint %d in '%s' cannot be read (%s): an earlier one is used", step, self._folder, reason
                )
        if steps:
            raise ValueError(
                f"none of the checkpoints {steps} in '{self._folder}' can be read: restore one, or move them away"
            )
        return None

    def _read(self, step: int, abstract: Any) -> Any:
        content = {"state": abstract, "sums": np.zeros(len(jax.tree.leaves(abstract)), np.uint32)}
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(content))
        if (restored["sums"] != _checksums(restored["state"])).any():
            raise ValueError("its checksums differ")
        return restored["state"]

    def finish(self) -> None:
        """Wait until everything is written. Raises like `save`."""
        self._write(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait until everything is written that can be. Unlike `finish`, it ignores what cannot."""
        with suppress(Exception):
            self._manager.close()

    def _write(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            raise self._write_error(" ".join(str(error).split())[:200]) from None

    def _write_error(self, reason: str) -> OSError:
        return OSError(
            f"a checkpoint cannot be written to '{self._folder}' ({reason}): free some space and run the same command "
            f"again, which continues from the last complete checkpoint"
        )


def last_saved_step(folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint in a folder, or None. Incomplete ones have other names."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def _checksums(state: Any) -> np.ndarray:
    """Return the sum of the bits of each array, modulo 2^32. It does not depend on the mesh."""
    return np.asarray(_sum_bits(jax.tree.leaves(state)))


@jax.jit
def _sum_bits(arrays: list[jax.Array]) -> jax.Array:
    bits = [jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")) for x in arrays]
    return jnp.stack([x.sum(dtype=jnp.uint32) for x in bits])
