"""Run by test_finetune.py in a process of 8 devices: tuning on any mesh is tuning on one device."""

import sys
from pathlib import Path

import jax
import numpy as np

from tests.checks import require
from tests.train_tpu.processes import losses, run_here

root, *command = sys.argv[1:]
require(jax.device_count() == 8, jax.devices())
expected = losses(Path(root) / "one")
for mesh in ("data=8", "fsdp=4,tensor=2", "data=2,tensor=4"):
    out = Path(root) / mesh.replace(",", "-")
    run_here(*command, "--mesh", mesh, "--out", out, module="train_tpu.finetune")
    # Sums over rows in another order: see TOLERANCE of tests/port_torch/test_train.py.
    np.testing.assert_allclose(losses(out), expected, rtol=2e-5, err_msg=mesh)
    print(mesh, np.abs(np.array(losses(out)) / np.maximum(expected, 1e-9) - 1).max(0))
