"""Every test here may use runs that were trained for all of them, and remote code is removed."""

import os
from pathlib import Path

import pytest
import torch

from tests.port_torch.trained import KINDS, train
from tests.train_tpu.processes import run

torch.set_num_threads(1)  # small products: threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers copies a folder's code before it imports it."""
    import transformers.dynamic_module_utils as dynamic

    folder = tmp_path_factory.mktemp("modules")
    dynamic.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", params=KINDS)
def trained(request: pytest.FixtureRequest, cache: Path, text: Path) -> Path:
    """The folder of a run, of both kinds of model in turn."""
    return train(cache, text, request.param)


@pytest.fixture(scope="session")
def exported(trained: Path, cache: Path) -> Path:
    """Its export, as the command makes it."""
    folder = cache / f"export-{trained.name}"
    run(cache, trained, folder, module="port_torch.convert")
    return folder
