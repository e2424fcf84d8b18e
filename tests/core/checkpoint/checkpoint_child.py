"""Processes that test_checkpoint_faults.py starts, to kill them, starve them of disk or give them 8 devices.

python checkpoint_child.py MODE FOLDER
"""

import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from core.checkpoint.checkpointer import Checkpointer, restore
from core.checkpoint.manifest import Manifest
from core.checkpoint.steps import Keep, find_step
from core.errors import run_command
from tests.checks import require

ROWS, COLUMNS = 512, 1024  # one leaf is 2 MiB of float32


def manifest(step: int) -> Manifest:
    return Manifest(kind="train", step=step, sequences=8 * step, tokens=64 * step, config={}, tokenizer={})


def state_of(step: int) -> dict:
    """A state that is a function of its step; the test computes the same values with NumPy."""
    ramp = jnp.arange(ROWS * COLUMNS, dtype=jnp.float32).reshape(ROWS, COLUMNS)
    return {
        "params": {"w": ramp + step},
        "moments": {"w": ramp * step},
        "count": jnp.asarray(step, jnp.int32),
    }


def save_forever(folder: Path) -> None:
    """Goes on from the newest step; says each step that it knows to be committed."""
    checkpointer = Checkpointer(folder, Keep())
    step = checkpointer.latest_committed or 0
    while True:
        step += 1
        checkpointer.save(step, state_of(step), manifest(step))
        checkpointer.wait()
        print(step, flush=True)


def save_two_with_little_room(folder: Path, shape: tuple[int, ...], limit: int | None) -> None:
    """The first step is small; the second has as many leaves of `shape[1:]` as `shape[0]`, and no file
    of this process may then exceed `limit` bytes."""
    with Checkpointer(folder, Keep(1)) as checkpointer:
        checkpointer.save(1, {"params": jnp.arange(100.0)}, manifest(1))
        checkpointer.wait()
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpointer.save(2, {str(i): jnp.ones(shape[1:]) for i in range(shape[0])}, manifest(2))


def mesh_shardings() -> dict:
    """A 4 x 2 mesh that splits each axis of one leaf, one axis of another, and copies the third."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    return {
        "params": {"w": NamedSharding(mesh, P("a", "b"))},
        "moments": {"w": NamedSharding(mesh, P(None, "b"))},
        "count": NamedSharding(mesh, P()),
    }


def save_sharded(folder: Path) -> None:
    with Checkpointer(folder, Keep()) as checkpointer:
        checkpointer.save(3, jax.device_put(state_of(3), mesh_shardings()), manifest(3))


def restore_sharded(folder: Path) -> None:
    """Opens what one device wrote (or eight, laid out alike) on eight devices."""
    expected, shardings = state_of(3), mesh_shardings()
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), expected, shardings
    )
    state = restore(find_step(folder), abstract)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    found = jax.tree.map(lambda x: x.sharding, state)
    require(found == shardings, found, shardings)
    shard = state["params"]["w"].addressable_shards[0].data
    require(shard.shape == (ROWS // 4, COLUMNS // 2), shard.shape)


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "forever":
        save_forever(folder)
    elif mode == "save-sharded":
        save_sharded(folder)
    elif mode == "restore-sharded":
        restore_sharded(folder)
    elif mode == "file-size-limit":
        save_two_with_little_room(folder, (1, 1000, 1000), limit=2**20)
    elif mode == "big-leaves":
        save_two_with_little_room(folder, (3, 1000, 1000), limit=None)
    else:
        require(mode == "many-leaves", mode)
        save_two_with_little_room(folder, (300, 1), limit=None)


if __name__ == "__main__":
    run_command(main)
