"""`python -m kernels_cuda.build`: the CUDA kernels compiled into the package."""

import dataclasses
import importlib.util
import sys
import time
from typing import Annotated

import tyro

from core import cli
from core.errors import run_command
from kernels_cuda.compiler import ARCHITECTURES, BINDINGS, CompilerError, build


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """Compile the CUDA kernels into the package, for PyTorch and for JAX. Needs nvcc, but no GPU."""

    architectures: Annotated[tuple[str, ...], tyro.conf.arg(metavar="X.Y [X.Y ...]")] = ARCHITECTURES
    """Compute capabilities to compile for; with +PTX newer GPUs, too."""


def main() -> None:
    """The command."""
    config = cli.parse(BuildConfig, prog="python -m kernels_cuda.build")
    for binding in BINDINGS:
        if importlib.util.find_spec(binding.module) is None:
            print(f"not built: {binding.built.name}, since {binding.module} is not installed")
            continue
        start = time.monotonic()
        try:
            build(binding.built, config.architectures, binding)
        except CompilerError as error:
            print(error.output, file=sys.stderr)
            raise
        seconds, size = time.monotonic() - start, binding.built.stat().st_size / 2**20
        print(f"built {binding.built} for {' '.join(config.architectures)}: {size:.1f} MiB, {seconds:.0f} s")


if __name__ == "__main__":
    run_command(main)
