"""Commands without the packages of their extra, started as users start them."""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from core.extras import install_command
from tests.several_devices import ROOT


def start(tmp_path: Path, missing: str, *arguments: str) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` where a package is not to be found."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest)\n"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("command", "missing", "needs"),
    [
        ("port_torch.convert", "torch", "PyTorch, safetensors and transformers: "),
        ("kernels_cuda.bench", "torch", "PyTorch, safetensors and transformers: "),
        ("bench.train", "transformers", "PyTorch, safetensors and transformers: "),
        ("bench.ladder", "torch", "PyTorch, safetensors and transformers: "),
        ("bench.eval", "lm_eval", "lm-eval: "),
        ("eval.run", "lm_eval", "lm-eval: "),
    ],
)
def test_one_sentence_says_what_to_install(tmp_path: Path, command: str, missing: str, needs: str):
    done = start(tmp_path, missing, "-m", command, "a", "b")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: this command needs {needs}pip install")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["train_tpu.run", "core.generate", "kernels_cuda.doctor"])
def test_an_environment_that_is_not_activated_is_said(tmp_path: Path, command: str):
    done = start(tmp_path, "tyro", "-m", command)
    assert done.returncode == 2 and done.stderr.endswith("or pip install -c constraints.txt -e .\n")
    assert done.stderr.startswith("error: this command needs JAX, Flax, rich and tyro: activate the environ")


def test_what_needs_no_extra_is_left_alone(tmp_path: Path):
    """A benchmark of the loader, and a program that imports a package whose commands need one."""
    done = start(tmp_path, "torch", "-m", "bench.loader", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m bench.loader")
    assert start(tmp_path, "torch", "-c", "import bench, eval, kernels_cuda, port_torch").returncode == 0


def test_what_to_type_where_there_is_no_checkout(tmp_path: Path):
    """A wheel's packages lie in site-packages: what the extra needs is named, as pyproject.toml has it."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["torch"]
    command = shlex.split(install_command("torch", root=tmp_path))
    assert command[:2] == ["pip", "install"]
    assert set(map(Requirement, command[2:])) == set(map(Requirement, listed))


def test_what_to_type_in_another_folder_than_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    command = shlex.split(install_command("eval", root=ROOT))
    assert command == ["pip", "install", "-c", f"{ROOT}/constraints.txt", "-e", f"{ROOT}[eval]"]
