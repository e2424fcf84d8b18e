"""Run by test_attention.py: compiles the training step for eight chips of a TPU v5e, without one.

The compiler comes with the libtpu wheel; `v5e:2x4` is one host of eight.
"""

import re
import sys

import jax
import numpy as np

from core.attention import choose
from core.config import ModelConfig
from core.documents import DocumentMark
from core.lora import LoraConfig
from core.model import Compute
from core.run.schedule import OptimizerConfig
from core.sharding import make_mesh, parse_mesh
from tests.checks import require
from train_tpu.aot.hlo import Module
from train_tpu.aot.topology import open_slice
from train_tpu.step import GuardConfig, StepConfig, abstract_state, compile_step

CHUNK, ROWS, VOCAB, CONTEXT = 512, 32, 32_000, 512
heads, kv_heads, shape = int(sys.argv[1]), int(sys.argv[2]), parse_mesh(sys.argv[3], 8)
what = sys.argv[4]
documents = DocumentMark(1, twice=False) if what == "several" else None
lora = LoraConfig(lora_rank=8) if what == "adapters" else None
optim = OptimizerConfig(optimizer="adamw") if lora else OptimizerConfig()

mesh = make_mesh(shape, open_slice("v5e:2x4"))
require(mesh.size == 8 and mesh.devices.flat[0].platform == "tpu", mesh)
model = ModelConfig(
    vocab_size=VOCAB, context=CONTEXT, d_model=256, n_layers=2, n_heads=heads, n_kv_heads=kv_heads, d_mlp=512
)
attention = choose("auto", platform="tpu", dtype="bfloat16", head_dim=model.head_size, context=model.context)
require(attention.name == "splash", attention)
config = StepConfig(
    model, optim, GuardConfig(), Compute("bfloat16", attention.name, mesh=mesh),
    z_loss=0.0, loss_chunk=CHUNK, documents=documents, packed=what in ("rows", "adapters"), lora=lora,
)  # fmt: skip
text = compile_step(config, ROWS, 1, mesh).as_text()

require("tpu_custom_call" in text, text[:500])  # the splash kernel is in it
# Every leaf of the state is given back in its own memory.
n_leaves, n_donated = len(jax.tree.leaves(abstract_state(config, mesh))), Module(text).n_donated
require(n_donated == n_leaves, n_donated, n_leaves)

# A chip holds the scores of one chunk of rows, of all its own sequences of 512 or of all 32 never; and of its
# part of the vocabulary.
part = VOCAB // shape.tensor
arrays = [
    (name, tuple(map(int, dims.split(",")))) for name, dims in re.findall(r"\b(\w+)\[([0-9,]+)\]", text)
]
scores = {dims for name, dims in arrays if name == "f32" and part in dims and not {256, 64} & {*dims}}
sizes = {int(np.prod(dims)) // part for dims in scores}
require(max(sizes) == CHUNK, scores)
print(f"compiled for {mesh.size} x {mesh.devices.flat[0].device_kind}")
