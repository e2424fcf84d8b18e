"""Every test here may use runs that were trained for all of them, and remote code is removed."""

from pathlib import Path

import pytest
import torch

from tests.port_torch.trained import KINDS, train
from tests.port_torch.tuned import Tuned, tune
from tests.train_tpu.processes import run_here

torch.set_num_threads(1)  # small products: threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def remote_code(modules: Path) -> None:
    """The code of exported folders is copied to where it is removed again."""


@pytest.fixture(scope="session", params=["llama", pytest.param("gpt", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, cache: Path, text: Path) -> Path:
    """The folder of a run, of both kinds of model in turn."""
    return train(cache, text, request.param)


@pytest.fixture(scope="session", params=["llama", pytest.param("gpt", marks=pytest.mark.slow)])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A model that learned to converse, of both kinds in turn."""
    return tune(tmp_path_factory.mktemp(f"tuned-{request.param}"), request.param)


@pytest.fixture(scope="session")
def exported(trained: Path, cache: Path) -> Path:
    """Its export, as the command makes it."""
    return export(cache, trained)


@pytest.fixture(scope="session", params=KINDS)
def trained_1024(request: pytest.FixtureRequest, cache: Path, text: Path) -> Path:
    """The same over 1024 positions."""
    return train(cache, text, request.param, context=1024)


@pytest.fixture(scope="session")
def exported_1024(trained_1024: Path, cache: Path) -> Path:
    """Its export."""
    return export(cache, trained_1024)


def export(cache: Path, source: Path) -> Path:
    """What the command makes of a run."""
    folder = cache / f"export-{source.name}"
    run_here(source, folder, module="port_torch.convert")
    return folder
