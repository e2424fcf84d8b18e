"""What is built, for which GPUs, and what will be used here and why: `python -m kernels_cuda.doctor`."""

import dataclasses

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
    """What there is, one line per fact; the last says what will be used."""
    import torch  # slow

    from kernels_cuda import library

    lines = [("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(
                (f"GPU {index}", f"{torch.cuda.get_device_name(index)}, architecture {major}.{minor}")
            )
    else:
        lines.append(("GPU", "none visible"))
    lines.append(("nvcc", str(compiler.find_nvcc() or "none")))
    lines.append(("built", _built()))
    lines.append(("used", library.find(compile_missing=False).reason))
    return lines


def _built() -> str:
    """The file in the package, and what it is made of."""
    if not compiler.BUILT.exists():
        return "no file (python -m kernels_cuda.build makes it)"
    made_of = compiler.made_of(compiler.BUILT)
    if made_of is None:
        return f"{compiler.BUILT}, which is damaged, unfinished or built from unknown sources: build it again"
    current = (
        "these sources" if made_of["sources"] == compiler.sources_hash() else "OTHER SOURCES: build it again"
    )
    return (
        f"{compiler.BUILT} for {' '.join(made_of['architectures'])}, of {current}, "
        f"nvcc {made_of['nvcc']}, PyTorch {made_of['torch']}"
    )


if __name__ == "__main__":
    run_command(main)
