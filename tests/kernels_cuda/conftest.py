"""Tests marked gpu run here when PyTorch sees a GPU, with the CUDA kernels loaded or not at all."""

import pytest
import torch

from kernels_cuda import library


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    """Plain PyTorch must never be taken for a kernel."""
    if request.node.get_closest_marker("gpu"):
        library.load("cuda")
        torch.cuda.set_device(0)  # JAX, which draws weights here, leaves the last GPU current
        torch.manual_seed(0)
