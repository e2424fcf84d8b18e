"""Checkpoints and the world: processes that die while saving, disks that fill, other devices."""

import contextlib
import dataclasses
import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core.checkpoint.checkpointer
from core.checkpoint.checkpointer import Checkpointer, restore, save_params
from core.checkpoint.manifest import Manifest, verify
from core.checkpoint.steps import Keep, find_step, list_steps, newest_intact
from core.errors import UserError

CHILD = Path(__file__).with_name("checkpoint_child.py")
ROOT = Path(__file__).parents[3]


def child_state(step: int) -> dict:
    """What checkpoint_child.py saves as `step`."""
    ramp = np.arange(512 * 1024, dtype=np.float32).reshape(512, 1024)
    return {
        "params": {"w": ramp + np.float32(step)},
        "moments": {"w": ramp * np.float32(step)},
        "count": np.asarray(step, np.int32),
    }


def make_manifest(step: int) -> Manifest:
    return Manifest(kind="train", step=step, sequences=8 * step, tokens=64 * step, config={}, tokenizer={})


def save_state(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(step, jax.tree.map(jnp.asarray, child_state(step)), make_manifest(step))


def assert_holds(step_dir: Path, step: int) -> None:
    """The folder verifies and holds exactly the bits of that step."""
    expected = child_state(step)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    restored = restore(step_dir, abstract)
    assert jax.tree.map(lambda x: np.asarray(x).tobytes(), restored) == jax.tree.map(
        lambda x: x.tobytes(), expected
    )


def child_command(mode: str, folder: Path) -> list[str]:
    return [sys.executable, str(CHILD), mode, str(folder)]


def child_environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}


def run_child(mode: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        child_command(mode, folder),
        env=child_environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("writer, reader", [("save-sharded", "here"), ("here", "restore-sharded")])
def test_another_number_of_devices_opens_it(tmp_path: Path, writer: str, reader: str) -> None:
    if writer == "here":
        with Checkpointer(tmp_path, Keep()) as checkpointer:
            save_state(checkpointer, 3)
    for mode in {writer, reader} - {"here"}:
        child = run_child(mode, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
        assert (child.returncode, child.stderr) == (0, "")  # and Orbax says nothing
    assert_holds(find_step(tmp_path), 3)


def kill_while_saving(folder: Path, kills: int, seed: int) -> int:
    """Starts and kills a process that saves without end; returns how often it died with a step half done."""
    rng, unfinished = random.Random(seed), 0
    for _ in range(kills):
        child = subprocess.Popen(
            child_command("forever", folder), env=child_environment(), stdout=subprocess.PIPE, text=True
        )
        first = child.stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
        said = [int(line) for line in [first, *child.stdout.read().splitlines()]]
        child.wait()
        unfinished += any(path.name.startswith(".") for path in folder.iterdir())

        newest = find_step(folder)
        step = int(newest.name)
        # The child may die between the rename and saying so, but what it said is there.
        assert said[-1] <= step <= said[-1] + 1
        assert_holds(newest, step)
        for older in list_steps(folder):
            verify(folder / f"{older:08d}")
    return unfinished


@pytest.mark.slow
def test_newest_step_is_whole_after_kill(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, kills=1, seed=0)


@pytest.mark.slow
def test_newest_step_is_whole_after_many_kills(tmp_path: Path) -> None:
    # A save is most of what the child does, so most kills hit one; were it fewer, this would test nothing.
    assert kill_while_saving(tmp_path, kills=25, seed=1) >= 5


def assert_refused_for_room(child: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert child.returncode == 2
    assert f"error: {folder} has no room for a checkpoint (" in child.stderr
    assert [p.name for p in folder.iterdir()] == ["00000001"]  # the old one kept, nothing half-written
    restored = restore(find_step(folder), {"params": jax.ShapeDtypeStruct((100,), jnp.float32)})
    np.testing.assert_array_equal(restored["params"], np.arange(100, dtype=np.float32))


@pytest.mark.slow
def test_file_size_limit_leaves_the_old_step(tmp_path: Path) -> None:
    child = run_child("file-size-limit", tmp_path)
    assert_refused_for_room(child, tmp_path)
    assert child.stderr.count("\n") == 1  # one sentence, no traceback of Orbax's


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB for at most 400 files and folders."""
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=400", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path / "checkpoints"
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_disk_too_small_is_not_filled(small_disk: Path) -> None:
    child = run_child("big-leaves", small_disk)
    assert_refused_for_room(child, small_disk)
    assert child.stderr.count("\n") == 1 and "(0.012 GB needed, 0.008 GB free)" in child.stderr


@pytest.mark.slow
def test_disk_that_fills_leaves_the_old_step(small_disk: Path) -> None:
    # The bytes of 300 leaves fit, but each takes three of the disk's 400 inodes. When several writes fail
    # at once, TensorStore may print tracebacks from its own threads, which cannot be caught.
    assert_refused_for_room(run_child("many-leaves", small_disk), small_disk)


@pytest.mark.parametrize("broken", ["seal", "save"])
def test_failed_save_is_raised_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpointer(tmp_path, Keep(1)) as checkpointer:
        save_state(checkpointer, 1)
        checkpointer.wait()
        with monkeypatch.context() as patch, pytest.raises(UserError, match="no room for a checkpoint"):
            patch.setattr(
                *(
                    (core.checkpoint.checkpointer, "seal")
                    if broken == "seal"
                    else (checkpointer._orbax, "save")
                ),
                no_room,
            )
            save_state(checkpointer, 2)
            checkpointer.wait()
        assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
        save_state(checkpointer, 2)
    assert list_steps(tmp_path) == [2]


@pytest.mark.parametrize("lacking", [0, 1])
def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: int) -> None:
    """4,000 bytes and 16 KiB of two leaves each."""
    free = 2 * (4000 + 2**14) - lacking
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    manifest = dataclasses.replace(make_manifest(0), kind="params")
    refused = pytest.raises(UserError, match="has no room for a checkpoint")
    with refused if lacking else contextlib.nullcontext():
        save_params(tmp_path / "params", {"a": jnp.zeros(1000), "b": jnp.zeros(1000)}, manifest)
    assert [path.name for path in tmp_path.iterdir()] == ([] if lacking else ["params"])


def test_an_error_of_ours_is_not_laid_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(core.checkpoint.checkpointer, "seal", broken)
    with (
        pytest.raises(RuntimeError, match="a fault of ours"),
        Checkpointer(tmp_path, Keep(1)) as checkpointer,
    ):
        save_state(checkpointer, 1)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=f"{tmp_path}/file/checkpoints does not take a checkpoint"):
        Checkpointer(tmp_path / "file/checkpoints", Keep())
    params_manifest = dataclasses.replace(make_manifest(0), kind="params")
    with pytest.raises(UserError, match="does not take a checkpoint"):
        save_params(tmp_path / "file/imported", {"w": jnp.zeros(1)}, params_manifest)


@pytest.mark.parametrize("target", ["nowhere", "."])
def test_a_link_that_leads_nowhere_is_a_damaged_checkpoint(tmp_path: Path, target: str) -> None:
    """A file replaced by a dangling link, or one to itself, is refused by name; --fallback passes it over."""
    with Checkpointer(tmp_path, Keep()) as checkpointer:
        save_state(checkpointer, 1)
        save_state(checkpointer, 2)
    file = next(path for path in (tmp_path / "00000002").rglob("0.0"))
    file.unlink()
    file.symlink_to(file.name if target == "." else target)
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        verify(tmp_path / "00000002")
    step_dir, skipped = newest_intact(tmp_path)
    assert step_dir.name == "00000001" and [path.name for path, _ in skipped] == ["00000002"]
