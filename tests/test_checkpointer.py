"""Checkpoints of training: restored on any mesh, and ignored if they are damaged."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.training import Checkpointer, abstract_state, init_state, make_optimizer
from tests.conftest import ROOT
from tests.reference import tiny_model
from tests.test_cli import ENVIRONMENT
from tests.training_cases import CONFIG, train_plan

OPTIMIZER = make_optimizer(CONFIG)


def damage(folder: Path) -> None:
    """Cut every file in the folder in half."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        os.truncate(file, file.stat().st_size // 2)


def restored(folder: Path, abstract):
    found = Checkpointer(folder).restore(abstract)
    assert found is not None
    return found


def test_a_state_is_restored_on_another_mesh_and_a_damaged_checkpoint_is_ignored(tmp_path: Path, caplog):
    plan, other = train_plan(1, 4), train_plan(2, 2, 2)
    like, like_other = abstract_state(plan, OPTIMIZER), abstract_state(other, OPTIMIZER)
    state = init_state(plan, OPTIMIZER, tiny_model().weights())
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpointer(folder)
    assert checkpoints.restore(like) is None
    for step in (3, 7):
        checkpoints.save(step, state._replace(step=state.step + step))
    checkpoints.finish()
    damage(folder / "7")
    step, found = restored(folder, like_other)
    assert (step, int(found.step)) == (3, 3)
    assert "checkpoint 7 in" in caplog.text
    assert "an earlier one is used" in caplog.text
    for ours, theirs, wanted in zip(*map(jax.tree.leaves, (state, found, like_other)), strict=True):
        assert theirs.sharding == wanted.sharding
        if theirs.ndim:
            np.testing.assert_array_equal(ours, theirs)
    checkpoints.save(7, state)  # the damaged one is replaced
    checkpoints.finish()
    assert restored(folder, like)[0] == 7
    for name in ("3", "7"):
        damage(folder / name)
    with pytest.raises(ValueError, match=r"none of the checkpoints \[7, 3\] in .* can be read: restore one"):
        Checkpointer(folder).restore(like)


def test_a_checkpoint_in_which_a_bit_has_changed_is_ignored(tmp_path: Path, caplog):
    state = {"x": jnp.arange(10_000.0)}
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(3, state)
    checkpoints.save(7, state)
    checkpoints.finish()
    file = max((path for path in (tmp_path / "7").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    for index in np.linspace(0, len(content) - 1, 12).astype(int):
        file.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        step, found = restored(tmp_path, state)
        assert step in (3, 7)  # some bytes have no meaning
        np.testing.assert_array_equal(found["x"], state["x"])
    assert "its checksums differ" in caplog.text


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch):
    state = {"x": jnp.arange(100_000.0)}
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(3, state)
    checkpoints.finish()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
    message = (
        r"cannot be written to '.*' \(it has 0.4 MB, and 0.1 MB are free\): free some space and run the same command"
    )
    with pytest.raises(OSError, match=message):
        checkpoints.save(7, state)
    assert restored(tmp_path, state)[0] == 3


LIMITED_TO_A_KILOBYTE = """
import pathlib, resource, sys
import jax.numpy as jnp
from helix_jax.training.checkpointer import Checkpointer
checkpoints = Checkpointer(pathlib.Path(sys.argv[1]))
checkpoints.save(3, {"x": jnp.arange(10.0)})
checkpoints.finish()
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    checkpoints.save(7, {"x": jnp.arange(10_000) ** 2.0})
    checkpoints.finish()
except OSError as error:
    print(error)
checkpoints.close()
print(Checkpointer(pathlib.Path(sys.argv[1])).restore({"x": jnp.zeros(10)}))
"""


def test_a_write_that_the_system_stops_is_reported_and_the_last_checkpoint_stays(tmp_path: Path):
    command = [sys.executable, "-c", LIMITED_TO_A_KILOBYTE, str(tmp_path)]  # orbax's threads write to stderr
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)
    error, found = done.stdout.splitlines()
    assert "cannot be written" in error
    assert "free some space and run the same command again" in error
    assert found.startswith("(3, {'x': Array([0., 1.")
