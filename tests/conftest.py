"""How the tests run: on the CPU unless told otherwise, with the shapes in the signatures checked.

`make test-gpu` runs the tests that need a GPU, with JAX_PLATFORMS=cuda; those of kernels_cuda and port_torch
need PyTorch alone to see one. `-n auto` are as many processes as a machine's GPUs have room for.
"""

import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.several_devices import devices_flags

# Importing and collecting makes millions of objects that stay: nothing there is for the garbage collector.
gc.disable()

signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` in a script would pass on "ignored"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products: threads only wait for each other
ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # of pytest-xdist
HAS_WORKERS = not IS_WORKER and "-n auto" in " ".join(sys.argv)  # and runs no test itself

GPUS = 0 if ON_CPU else len(list(Path("/dev").glob("nvidia[0-9]*")))
WORKERS = 7  # on a GPU; of 139 GiB, 49 were too few for them
if not ON_CPU:  # tests of PyTorch, and processes that tests start, need memory, too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if IS_WORKER and GPUS > 1:  # one for each worker in turn, unless it is told which to see
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", str(worker % GPUS))

# What a test prepares or compiles is kept for all later ones of this session, in whichever process they run.
# The kernels of a machine with a GPU stay where they are: building them takes minutes.
_kept = None
if ON_CPU and not IS_WORKER:
    _kept = tempfile.TemporaryDirectory(prefix="mtlm-tests-")
    if not Path("/dev/nvidiactl").exists():
        os.environ["MTLM_CACHE"] = f"{_kept.name}/data"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_kept.name}/compiled"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # less is not worth its file

if not HAS_WORKERS:
    _flags = os.environ.get("XLA_FLAGS", "")
    if ON_CPU:
        os.environ["XLA_FLAGS"] = f"{_flags} {devices_flags(1)}"

    import jax

    from tests.types_of_calls import check_types

    jax.devices()  # reads the flags, once
    jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of the time that lowering takes
    os.environ["XLA_FLAGS"] = _flags  # so that the processes which tests start are the real thing

    check_types()  # before the first import of what is checked


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """How many processes `-n auto` are; None: one for each core."""
    if ON_CPU:
        return None
    return WORKERS * (1 if "CUDA_VISIBLE_DEVICES" in os.environ else max(1, GPUS))  # WSL has no such files


def pytest_collection_finish() -> None:
    """From here on garbage is collected again, but not looked for in what importing made, and less often."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    if _kept:
        _kept.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs a GPU, or two, says so where there is none."""
    import torch

    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        if item.get_closest_marker("two_gpus") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two GPUs, not {torch.cuda.device_count()}"))
        if {"kernels_cuda", "port_torch"} & set(item.path.parts):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU; PyTorch sees none"))
        elif jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU; JAX runs on a {jax.default_backend()}"))


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers copies a folder's code before importing it: one place for all tests of a process."""
    import transformers.dynamic_module_utils as dynamic

    folder = tmp_path_factory.mktemp("modules")
    dynamic.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs lie that several tests of this process look at."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def text(cache: Path) -> Path:
    """The text they train on."""
    from tests.train_tpu.processes import make_text

    return make_text(cache)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hugging Face Hub (`tests.hub.Hub`) that the client asks, with its cache in tmp_path / "cache"."""
    from tests.hub import Hub, point_at

    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    point_at(monkeypatch, hub.address, tmp_path / "cache")
    yield hub
    hub.shutdown()
    hub.server_close()
