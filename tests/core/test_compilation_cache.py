"""What is compiled once is found by the next process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from core import compilation_cache
from core.compilation_cache import keep_compiled, programs_found

compilation_cache.WORTH_KEEPING = 0.0  # every program, however fast this machine compiles it

def long_to_compile(x):
    for size in range(8, 12):
        x = jnp.tanh(x @ jnp.ones((x.shape[1], size))) + jnp.sort(x, axis=0).sum()
    return x

keep_compiled()
y = jax.jit(long_to_compile)(jnp.ones((7, 8)))
total = float(y.sum())
print(programs_found(), total.hex())
"""


def start(cache: Path, **environ: str) -> tuple[int, str]:
    """How many programs a new process found, and what it computed; it must say nothing else."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environ = own | {"JAX_PLATFORMS": "cpu", "MTLM_CACHE": str(cache)} | environ
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=environ
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    number, value = done.stdout.split()
    return int(number), value


def kept(cache: Path) -> int:
    """How many programs the cache holds."""
    return len(list(cache.glob("compiled/*/*-cache")))


@pytest.mark.slow
def test_the_second_start_finds_what_the_first_compiled(tmp_path: Path):
    number, value = start(tmp_path)
    assert number == 0
    assert start(tmp_path) == (kept(tmp_path), value)


@pytest.mark.slow
def test_an_entry_half_written_is_made_again(tmp_path: Path):
    """As a process leaves it that is killed while JAX writes: cut short, and without its time of use."""
    _, value = start(tmp_path)
    entry = max(tmp_path.glob("compiled/*/*-cache"), key=lambda path: path.stat().st_size)
    entry.write_bytes(entry.read_bytes()[:1000])
    entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    whole = kept(tmp_path)
    assert start(tmp_path) == (whole - 1, value)
    assert start(tmp_path) == (whole, value)


@pytest.mark.slow
def test_the_environment_can_keep_it_elsewhere_or_not_at_all(tmp_path: Path):
    start(tmp_path / "none", JAX_ENABLE_COMPILATION_CACHE="false")
    elsewhere = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "elsewhere")}
    start(tmp_path / "ours", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", **elsewhere)
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*-cache")} == {"elsewhere"}


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_said_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    own = os.environ | {"MTLM_CACHE": str(tmp_path / "file"), "JAX_COMPILATION_CACHE_DIR": ""}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=120)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("the compilation cache cannot be written"), done.stderr
