"""bench/gpu.sh with a stand-in for Python: what it starts, and what it makes of failures; `make test-gpu`."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
STAND_IN = """#!/bin/sh
case "$*" in
*is_available*) exit $NO_GPU ;;
*device_count*) echo 2; exit ;;
*bench.decode*) exit 3 ;;
esac
echo "$@, JAX on $JAX_PLATFORMS"
"""


def start(tmp_path: Path, *arguments: str | Path, no_gpu: int = 0) -> subprocess.CompletedProcess:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environ = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "NO_GPU": str(no_gpu)}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environ, timeout=60
    )


def test_a_step_that_fails_is_named_and_the_rest_goes_on(tmp_path):
    done = start(tmp_path, tmp_path / "out", "data", "rows")
    assert done.returncode == 1 and done.stdout.endswith("\nfailed: decode\n"), done.stdout
    logs = {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.log")}
    steps = "build decode devices doctor jax kernels ladder mirror tests train two-gpus"
    assert set(logs) == set(steps.split())
    assert logs["mirror"].startswith("-m bench.train_mirror --data data --rows rows")
    # As make starts the tests; this test may be run by another make, which hands its options down.
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    make = ["make", "-n", "--no-print-directory", "test-gpu", "ARGS="]
    made = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    options = shlex.split(made.stdout.splitlines()[-1])
    assert logs["tests"] == "-m pytest -q --dist worksteal -n auto -m gpu and not two_gpus, JAX on cuda\n"
    assert "JAX_PLATFORMS=cuda" in options
    assert " ".join(options).endswith(
        "/bin/python -m pytest -n auto --dist worksteal -m gpu and not two_gpus"
    )


@pytest.mark.parametrize(
    ("on_cpu", "gpus", "visible", "processes"),
    [
        (True, 0, None, None),
        (False, 1, None, 7),
        (False, 4, None, 28),
        (False, 4, "2", 7),
        (False, 0, None, 7),
    ],
)
def test_processes_of_the_tests(pytestconfig, monkeypatch, on_cpu, gpus, visible, processes):
    """Seven to a GPU, of which there may be no files; on a CPU as many as it has cores."""
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(conftest, "ON_CPU", on_cpu)
    monkeypatch.setattr(conftest, "GPUS", gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert conftest.pytest_xdist_auto_num_workers() == processes


@pytest.mark.parametrize(
    ("arguments", "no_gpu", "message"),
    [((), 0, "give OUT"), (("out", "data"), 0, "give OUT"), ((".",), 0, "exists already"),
     (("out",), 1, "sees no GPU")],
)  # fmt: skip
def test_refusals(tmp_path, arguments, no_gpu, message):
    done = start(tmp_path, *(tmp_path / name for name in arguments), no_gpu=no_gpu)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()
