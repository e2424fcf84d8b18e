"""Run by test_meshes.py in a process of 8 devices: every preset's step lowers on every mesh that fits it."""

import dataclasses

import jax
import pytest

from core.config import PRESETS
from core.errors import UserError
from core.model import Compute
from core.run.schedule import OptimizerConfig
from core.sharding import check_mesh, make_mesh, parse_mesh
from tests.checks import require
from train_tpu.step import GuardConfig, StepConfig, lower_step

MESHES = ("data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "tensor=2", "fsdp=2,tensor=4")
ROWS = 16

lowered = refused = 0
for name, preset in PRESETS.items():
    for text in MESHES:
        shape = parse_mesh(text, 2 if text == "tensor=2" else 8)
        if preset.n_heads % shape.tensor:
            refusal = f"heads {preset.n_heads} cannot be divided over tensor={shape.tensor}"
            with pytest.raises(UserError, match=refusal):
                check_mesh(preset, shape, ROWS)
            refused += 1
            continue
        check_mesh(preset, shape, ROWS, 2)
        mesh = make_mesh(shape, jax.devices()[: 2 if text == "tensor=2" else 8])
        model = dataclasses.replace(preset, dropout=0.1)
        config = StepConfig(
            model,
            OptimizerConfig(),
            GuardConfig(),
            Compute("bfloat16", mesh=mesh),
            z_loss=0.0,
            loss_chunk=512,
        )
        module = lower_step(config, ROWS, 2, mesh).as_text()
        axes = ", ".join(f'"{axis}"={size}' for axis, size in shape._asdict().items())
        require(f"sdy.mesh @mesh = <[{axes}]" in module, name, text)
        lowered += 1
print(f"{lowered} lowered, {refused} refused")
