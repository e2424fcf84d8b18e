"""What is built, for which GPUs, and what will be used here and why: `python -m kernels_cuda.doctor`."""

import dataclasses
import importlib.util

from core import cli
from core.errors import run_command
from kernels_cuda import compiler


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Say what is built, for which GPUs, and what will be used here and why."""


def main() -> None:
    """The command."""
    cli.parse(DoctorConfig, prog="python -m kernels_cuda.doctor")
    for name, value in facts():
        print(f"{name:<10} {value}")


def facts() -> list[tuple[str, str]]:
    """What there is, one line per fact; the last ones say what will be used."""
    lines = [("nvcc", str(compiler.find_nvcc() or "none"))]
    lines += [(binding.module, _built(binding)) for binding in compiler.BINDINGS]
    if importlib.util.find_spec("torch") is not None:
        lines += _pytorch()
    return [*lines, *_jax()]


def _pytorch() -> list[tuple[str, str]]:
    import torch  # slow

    from kernels_cuda import library

    lines = [("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, architecture {major}.{minor}"))
    if len(lines) == 1:
        lines.append(("GPU", "none visible"))
    return [*lines, ("used", library.find(compile_missing=False).reason)]


def _jax() -> list[tuple[str, str]]:
    import jax  # slow

    from kernels_cuda import xla

    device = jax.devices()[0]
    source = xla.find(device, compile_missing=False)
    return [("JAX", f"{jax.__version__}, {device.device_kind}"), ("used", source.reason)]


def _built(binding: compiler.Binding) -> str:
    """A framework's file in the package, and what it is made of."""
    if not binding.built.exists():
        return "no file (python -m kernels_cuda.build makes it)"
    made_of = compiler.made_of(binding.built)
    if made_of is None:
        return f"{binding.built}, which is damaged, unfinished or built from unknown sources: build it again"
    same = made_of["sources"] == compiler.sources_hash(binding)
    others = [f"{name} {made_of[name]}" for name in ("nvcc", "torch", "jaxlib") if name in made_of]
    return (
        f"{binding.built} for {' '.join(made_of['architectures'])}, of "
        f"{'these sources' if same else 'OTHER SOURCES: build it again'}, {', '.join(others)}"
    )


if __name__ == "__main__":
    run_command(main)
