"""A GPU whose memory others hold is refused before JAX starts; a stand-in for nvidia-smi is on the PATH."""

import re
import sys

import pytest

from core import gpu_memory
from core.errors import UserError


def test_a_gpu_that_others_hold_is_refused_with_what_can_be_done():
    with pytest.raises(
        UserError, match=r"GPU 1 has 34\.2 of its 140\.4 GiB free.*MEM_FRACTION=0\.18"
    ) as refusal:
        gpu_memory.check_free_memory("0, 143000, 143771\n1, 35000, 143771\n", {})
    # What the message advises is accepted.
    (name, value) = re.search(r"(XLA_\w+)=([\d.]+)", str(refusal.value)).groups()
    gpu_memory.check_free_memory("1, 35000, 143771\n", {name: value})
    # A desktop, a run that shares the GPU by its own setting, and what cannot be read, are no trouble.
    gpu_memory.check_free_memory("0, 5600, 8192\n", {})
    gpu_memory.check_free_memory("0, 70000, 143771\n", {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"})
    gpu_memory.check_free_memory("0, [N/A], [N/A]\n", {})


def test_it_asks_only_where_jax_uses_a_gpu(monkeypatch):
    monkeypatch.setattr(
        gpu_memory.importlib.metadata, "distributions", lambda: [Distribution("jax-cuda13-plugin")]
    )
    assert gpu_memory.uses_gpus({}) and gpu_memory.uses_gpus({"JAX_PLATFORMS": "cuda,cpu"})
    for environ in (
        {"JAX_PLATFORMS": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
    ):  # fmt: skip
        assert not gpu_memory.uses_gpus(environ)
    monkeypatch.setattr(gpu_memory.importlib.metadata, "distributions", lambda: [Distribution("jax")])
    assert not gpu_memory.uses_gpus({})


def test_nvidia_smi_is_asked_for_the_visible_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    answer = "'3, 100, 1000' if '-i' in sys.argv else '0, 9, 10'"
    tool.write_text(f"#!{sys.executable}\nimport sys\nprint({answer})\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_memory, "uses_gpus", lambda environ: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in gpu_memory.NAMES:
        monkeypatch.delenv(name, raising=False)
    gpu_memory.require_free_memory()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match="GPU 3"):
        gpu_memory.require_free_memory()
    tool.write_text("#!/bin/sh\nexit 9\n")
    gpu_memory.require_free_memory()  # the driver is down: JAX says what is wrong
    monkeypatch.setenv("PATH", "")
    gpu_memory.require_free_memory()


class Distribution:
    """An installed package."""

    def __init__(self, name: str):
        self.metadata = {"Name": name}
