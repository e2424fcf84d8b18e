"""Scripts in processes of their own, where JAX sees several devices: their number is fixed at start-up."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.checks import require

ROOT = Path(__file__).parents[1]
# Nearly all the time of small tests goes into compiling; this makes it several times as fast (a step of
# two layers in 0.5 s instead of 4.4 s on two cores).
FAST_COMPILE = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # a version that does not know a flag ends the process
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def devices_flags(devices: int) -> str:
    """XLA_FLAGS of a process that simulates so many devices and compiles quickly.

    The same in all tests: what is kept of compilations is looked up by them."""
    return f"{FAST_COMPILE} --xla_force_host_platform_device_count={devices}"


def run_on_devices(devices: int, script: Path, *arguments: str, **environment: str) -> str:
    """Runs a script with `devices` simulated CPU devices; what it requires is the test.

    Returns:
        What it printed.
    """
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": devices_flags(devices),
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    require(done.returncode == 0, f"{script.name} failed:\n{done.stdout}\n{done.stderr[-6000:]}")
    return done.stdout
