"""Built files on a GPU: one of older code that is translated for it; memory that runs out inside an op."""

import subprocess
import sys

import pytest
import torch

from tests.several_devices import ROOT

pytestmark = pytest.mark.gpu

# In a process of its own, since ops are registered once: a step's kernels of PTX for 8.0, and the references.
TRANSLATED = """
import sys, torch
from pathlib import Path
from kernels_cuda import compiler, library
from kernels_cuda.registry import reference
from tests.checks import require
from tests.kernels_cuda.gpu import assert_as_good
file = Path(sys.argv[1])
compiler.build(file, ("8.0+PTX",))
require(compiler.serves(["8.0+PTX"], torch.cuda.get_device_capability()))
torch.ops.load_library(file)
torch.manual_seed(0)
bf16 = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
for batch in (1, 33):  # few rows take clusters of blocks where there are any
    q, k, v = bf16(batch, 768), bf16(batch, 300, 12, 64), bf16(batch, 300, 12, 64)
    weight, at = bf16(768, 768) * 0.03, torch.full((batch,), 299, device="cuda")
    results = []
    for ops, widen in ((torch.ops.mtlm, False), (reference, False), (reference, True)):
        given = [t.double() if widen else t for t in (q, k, v, weight)]
        y, x = torch.empty_like(given[0]), torch.ones_like(given[0])
        torch.cuda.synchronize()
        for _ in range(20):  # one behind the other: a kernel that did not wait would read too early
            ops.decode_attention_(*given[:3], at, y)
            ops.decode_add_projection_(y, given[3], None, x)
            given[0] = x
        results.append((y, x))
    assert_as_good(*results, f"batch {batch}")
"""


def test_code_of_8_0_is_right_wherever_it_is_translated(tmp_path):
    command = [sys.executable, "-c", TRANSLATED, tmp_path / "kernels.so"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_memory_that_runs_out_in_an_op_is_pytorchs_own_error():
    torch.cuda.empty_cache()
    x = torch.zeros(2**21, 768, device="cuda", dtype=torch.bfloat16)  # 3 GiB
    weight = torch.ones(768, device="cuda", dtype=torch.bfloat16)
    heads = x.view(1, 2**21, 12, 64)
    angle = torch.zeros(1, 2**21, 32, device="cuda")
    rstd = torch.ones(2**21, device="cuda")
    of_all = torch.ones(3 * 768, 768, device="cuda", dtype=torch.bfloat16)
    ops = torch.ops.mtlm
    calls = (
        lambda: ops.rms_norm(x, weight, 1e-6, torch.bfloat16),
        lambda: ops.add_rms_norm(x, x, weight, 1e-6),
        lambda: ops.rms_norm_backward(x, None, x, rstd, weight, False),
        lambda: ops.rotary_pack(heads, heads, heads, angle, angle, False),
        lambda: ops.qkv_product(x[None], of_all, None, angle, angle, (12, 12, 12)),
        lambda: ops.rms_norm(x.T.contiguous().T, weight, 1e-6, torch.bfloat16),  # its copy
    )
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        for call in calls:
            with pytest.raises(torch.OutOfMemoryError):
                call()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
