"""Divides the heads of a model among the devices of a mesh: which heads weights and caches have there, in which order.

tp divides the heads of queries, keys and values. If there are more devices of tp than key/value heads, each of these is
stored on several devices, which share its queries. After attention, cp divides the heads of each tp rank. Where a
number of heads cannot be divided evenly, weights of zeros take the place of the missing ones.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from helix_jax.config import ModelConfig
from helix_jax.mesh import CP, FLAT, TP, WEIGHTS, AnyMesh, flat_size

PADDING = -1  # in the place of a head


@dataclass(frozen=True)
class HeadLayout:
    """The heads of a model on a mesh.

    Args:
        heads: The query heads of the model.
        kv_heads: Its key/value heads. None: attention is latent.
        tp: Devices that share the heads of attention.
        cp: Devices that share the heads of a tp rank after attention.
    """

    heads: int
    kv_heads: int | None
    tp: int
    cp: int

    @classmethod
    def of(cls, config: ModelConfig, mesh: AnyMesh) -> "HeadLayout":
        """Return the layout of a model on a mesh.

        Raises:
            ValueError: tp cannot share the heads, see `check_heads`.
        """
        kv_heads = None if config.latent else config.kv_heads
        check_heads(mesh, config.heads, kv_heads)
        return cls(config.heads, kv_heads, mesh.shape[TP], mesh.shape[CP])

    @property
    def copies(self) -> int:
        """The devices of tp that store the same key/value head."""
        return stored_kv_heads(self.kv_heads, self.tp) // self.kv_heads if self.kv_heads else 1

    @cached_property
    def keys_K(self) -> np.ndarray:
        """The key/value head at each place, in the order of the devices of tp."""
        assert self.kv_heads is not None
        return np.repeat(np.arange(self.kv_heads), self.copies)

    @cached_property
    def queries_N(self) -> np.ndarray:
        """The query head at each place, before attention. A head is beside the key/value head that it uses."""
        if self.copies == 1:
            return np.arange(self.heads)
        heads_KG = np.arange(self.heads).reshape(self.kv_heads or 1, -1)
        group = heads_KG.shape[1]
        return _pad(heads_KG, -(-group // self.copies) * self.copies).ravel()

    @cached_property
    def outputs_N(self) -> np.ndarray:
        """The query head at each place after attention, where a tp rank has as many for each of its cp ranks."""
        heads_TN = self.queries_N.reshape(self.tp, -1)
        return _pad(heads_TN, -(-heads_TN.shape[1] // self.cp) * self.cp).ravel()

    def heads_on(self, name: str, axis: int) -> np.ndarray | None:
        """Return the head at each place of an axis of a parameter. None: the axis has no heads.

        Args:
            name: The name of the parameter, such as "q_DNH".
            axis: The axis.
        """
        letter = name.split("_")[-1][axis]
        if letter == "K":
            return self.keys_K
        if letter != "N":
            return None
        return self.outputs_N if WEIGHTS[name][axis] == FLAT else self.queries_N

    def padded_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a parameter on the mesh, given that without padding and copies of heads."""
        heads = (self.heads_on(name, axis) for axis in range(len(shape)))
        return tuple(size if ids is None else len(ids) for size, ids in zip(shape, heads, strict=True))


def unsupported_tp_reason(tp: int, heads: int, kv_heads: int | None) -> str | None:
    """Return why `tp` devices cannot share the heads of attention, or None if they can."""
    if kv_heads is None:
        return f"tp {tp} does not divide the {heads} query heads" if heads % tp else None
    if kv_heads % tp and tp % kv_heads:
        return f"tp {tp} neither divides the {kv_heads} key/value heads nor is a multiple of them"
    return f"tp {tp} is larger than the {heads} query heads" if tp > heads else None


def check_heads(mesh: AnyMesh, heads: int, kv_heads: int | None) -> None:
    """Check that tp can share the heads of attention. cp can always share them.

    Args:
        mesh: The mesh.
        heads: Query heads.
        kv_heads: Key/value heads. None for latent attention, where one cached vector serves all heads.

    Raises:
        ValueError: It cannot. The message lists the meshes of as many devices that can.
    """
    reason, devices = unsupported_tp_reason(mesh.shape[TP], heads, kv_heads), flat_size(mesh)
    if reason:
        sizes = [tp for tp in range(1, devices + 1) if not unsupported_tp_reason(tp, heads, kv_heads)]
        meshes = ", ".join(f"{tp} x {devices // tp}" for tp in sizes)
        raise ValueError(f"{reason}: choose one of these meshes (tp x cp) of up to {devices} devices: {meshes}")


def stored_kv_heads(kv_heads: int, tp: int) -> int:
    """Return the key/value heads that the devices of tp store together, copies included."""
    return max(kv_heads, tp)


def first_places(heads: np.ndarray, count: int) -> np.ndarray:
    """Return the first place of each of `count` heads."""
    return np.asarray([np.flatnonzero(heads == head)[0] for head in range(count)])


def _pad(heads_XN: np.ndarray, size: int) -> np.ndarray:
    return np.pad(heads_XN, ((0, 0), (0, size - heads_XN.shape[1])), constant_values=PADDING)
