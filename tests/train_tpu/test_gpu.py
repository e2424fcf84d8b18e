"""Whole runs on an NVIDIA GPU."""

import pytest

from tests.train_tpu.processes import TINY, losses, make_text, run, without

pytestmark = pytest.mark.gpu

GPU = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": ""}
WIDE = (*without(without(TINY, "--d-model"), "--n-heads"), "--d-model", "128", "--n-heads", "2")


def test_a_deterministic_run_resumes_to_the_bit(tmp_path):
    text = make_text(tmp_path)
    arguments = (*WIDE, "--data", text, "--deterministic", "--decay", "0")
    out, _ = run(tmp_path, *arguments, "--out", tmp_path / "whole", environ=GPU)
    assert "xla: the reference, since cudnn cannot be used" in out
    for steps in ("7", "12"):
        more = ("--steps", steps, "--allow-change", "steps", "--out", tmp_path / "parts")
        run(tmp_path, *arguments, *more, environ=GPU)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_trains_with_cudnn_in_bfloat16(tmp_path):
    out, _ = run(tmp_path, *WIDE, "--data", make_text(tmp_path), "--out", tmp_path / "run", environ=GPU)
    assert "cudnn: the fastest on a GPU" in out and "bfloat16" in out
    first, *_, last = losses(tmp_path / "run")
    assert last[1] < first[1]
