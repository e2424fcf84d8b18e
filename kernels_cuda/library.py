"""Which file has the CUDA implementations of the ops: the built one, or one compiled on the spot.

`load` makes the ops run on it and says which it is; without one they run in plain PyTorch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import kernels_cuda.ops  # noqa: F401  declares them
from core.errors import UserError, os_error
from kernels_cuda import compiler, registry

Backend = Literal["auto", "cuda", "torch"]


@dataclass(frozen=True)
class Source:
    """Where the CUDA implementations come from."""

    file: Path | None
    """None: from nowhere, plain PyTorch runs."""
    reason: str
    """One line: which it is and why."""


_loaded: Source | None = None  # what `load` found, once a process


def find(compile_missing: bool = True) -> Source:
    """The file to use here: the built one, else one compiled for this GPU and kept, else none.

    Args:
        compile_missing: whether to compile (half a minute, once) where a compiler is; else it is only said.
    """
    if not torch.cuda.is_available():
        why = "PyTorch is built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU was found"
        return Source(None, f"plain PyTorch, because {why}")
    if torch.__version__ < torch.torch_version.TorchVersion("2.10"):
        return Source(None, f"plain PyTorch, because PyTorch {torch.__version__} is older than 2.10")
    capability = torch.cuda.get_device_capability()
    missing = _why_not(compiler.BUILT, capability)
    if missing is None:
        return Source(compiler.BUILT, f"the built file {compiler.BUILT.name}")
    if capability < (8, 0):
        return Source(
            None, f"plain PyTorch, because the GPU's architecture {capability} is older than (8, 0)"
        )
    kept = compiler.kept_file(capability)
    if _why_not(kept, capability) is not None:
        if compiler.find_nvcc() is None:
            return Source(None, f"plain PyTorch, because {missing} and there is no nvcc to compile one")
        if not compile_missing:
            return Source(kept, f"a file to be compiled at first use, because {missing}")
        print(f"compiling the CUDA kernels, because {missing} (about half a minute, once)", file=sys.stderr)
        try:
            compiler.build_kept(kept, capability)
        except UserError as error:
            return Source(None, f"plain PyTorch, because {missing} and none could be compiled: {error}")
        except OSError as error:
            why = os_error(error) or f"{kept}: {error}"
            return Source(None, f"plain PyTorch, because {missing} and none could be kept: {why}")
    return Source(kept, f"compiled here, because {missing}")


def load(backend: Backend = "auto") -> Source:
    """Makes `torch.ops.mtlm` run on CUDA kernels where it can; says on stderr, once, what will run.

    Args:
        backend: "cuda" must get them; "torch" leaves them; "auto" takes them where they are.

    Raises:
        UserError: "cuda", and none are available.
    """
    global _loaded
    if backend == "torch":
        return Source(None, "plain PyTorch, as requested")
    if _loaded is None:
        found = find()
        if found.file is not None:
            try:
                registry.load_kernels(found.file)
            except OSError as error:
                cause = error.__cause__ or error
                found = Source(None, f"plain PyTorch, because {found.file} does not load: {cause}")
        _loaded = found
        print(f"kernels: {found.reason}", file=sys.stderr)
    if backend == "cuda" and _loaded.file is None:
        raise UserError(
            f"cannot use the CUDA kernels: {_loaded.reason.removeprefix('plain PyTorch, because ')} "
            "(details: `python -m kernels_cuda.doctor`)"
        )
    return _loaded


def _why_not(file: Path, capability: tuple[int, int]) -> str | None:
    """Why a built file cannot serve this GPU, None if it can."""
    if not file.exists():
        return "no file is built"
    facts = compiler.made_of(file)
    if facts is None:
        return f"{file.name} or {file.with_suffix('.json').name} is damaged or unfinished"
    if facts["sources"] != compiler.sources_hash():
        return f"{file.name} was built from other sources"
    if not compiler.serves(facts["architectures"], capability):
        return f"{file.name} is for {' '.join(facts['architectures'])}, not for {capability}"
    return None
