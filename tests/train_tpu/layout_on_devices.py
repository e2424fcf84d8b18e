"""Run by test_meshes.py in a process of 8 devices: what lies where, and that a checkpoint does not care."""

import re
import sys
from pathlib import Path

import jax
import numpy as np

from core.checkpoint.checkpointer import restore, save_tree
from core.checkpoint.manifest import Manifest
from core.config import ModelConfig
from core.model import Compute
from core.run.schedule import OptimizerConfig
from core.sharding import layouts, make_mesh, parse_mesh
from tests.checks import require
from train_tpu.step import GuardConfig, StepConfig, abstract_state, fresh_state, lower_step

LAYERS, WIDTH, MLP, VOCABULARY = 3, 64, 176, 320
MODEL = ModelConfig(
    vocab_size=VOCABULARY, context=16, d_model=WIDTH, n_layers=LAYERS, n_heads=4, d_mlp=MLP,
)  # fmt: skip
MATRICES = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP) + VOCABULARY * WIDTH
SMALL = (2 * LAYERS + 1) * WIDTH  # the norms
WINDOWS = 2 * 128 * 4 + 3 * 4 + 4  # the guard's and Adam's counter, in bytes


def config_for(mesh) -> StepConfig:
    return StepConfig(MODEL, OptimizerConfig(optimizer="adamw"), GuardConfig(), Compute(mesh=mesh), 0.0, 64)


require(jax.device_count() == 8, jax.devices())

# Parameters and both moments, in bytes that each device has.
for text, parts in (
    ("data=8", 1),
    ("fsdp=8", 8),
    ("data=2,fsdp=4", 4),
    ("fsdp=4,tensor=2", 8),
    ("data=4,tensor=2", 2),
):
    mesh = make_mesh(parse_mesh(text, 8))
    state = fresh_state(config_for(mesh), mesh, 0)
    held = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    expected = 3 * 4 * (MATRICES // parts + SMALL) + WINDOWS
    require(set(held.values()) == {expected}, text, held, expected)
    require(sum(row.device_bytes for row in layouts(mesh, state)) == expected, text)

# A device holds the weights of all layers whole (or their gradients, or moments) only along `data`: what the
# backward pass needs of them is gathered again, not kept.
whole = {f"{LAYERS},{a},{b}" for a, b in ((WIDTH, WIDTH), (WIDTH, MLP), (MLP, WIDTH))}
for text in ("data=8", "fsdp=8"):
    mesh = make_mesh(parse_mesh(text, 8))
    compiled = lower_step(config_for(mesh), 16, 1, mesh).compile().as_text()
    found = whole.intersection(re.findall(r"\bf32\[([0-9,]+)\]", compiled))
    require(found == (whole if text == "data=8" else set()), text, found)

# A checkpoint of one mesh is one of any.
folder = Path(sys.argv[1])
mesh = make_mesh(parse_mesh("fsdp=4,tensor=2", 8))
state = fresh_state(config_for(mesh), mesh, 5)
manifest = Manifest(kind="train", step=0, sequences=0, tokens=0, config={}, tokenizer={}, data={})
saved = save_tree(folder / "saved", state, manifest)
for text, n in (("data=8", 8), ("fsdp=8", 8), ("data=1", 1), ("fsdp=4,tensor=2", 8)):
    mesh = make_mesh(parse_mesh(text, n), jax.devices()[:n])
    abstract = abstract_state(config_for(mesh), mesh)
    found = restore(saved, abstract)
    for a, b, wanted in zip(*map(jax.tree.leaves, (found, state, abstract)), strict=True):
        np.testing.assert_array_equal(a, b)
        require(a.sharding == wanted.sharding, text, a.sharding, wanted.sharding)
