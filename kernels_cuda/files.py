"""Which file of kernels serves a GPU: the built one, one compiled on the spot and kept, or none."""

import sys
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError, os_error
from kernels_cuda import compiler
from kernels_cuda.compiler import Binding


@dataclass(frozen=True)
class Source:
    """Where the CUDA implementations come from."""

    file: Path | None
    """None: from nowhere, the framework's own operations run."""
    reason: str
    """One line: which it is and why."""


def find_file(
    binding: Binding, capability: tuple[int, int], instead: str, compile_missing: bool = True
) -> Source:
    """The file for a GPU of this compute capability.

    Args:
        instead: what runs without one, in words.
        compile_missing: whether to compile (half a minute, once) where a compiler is; else it is only said.
    """
    missing = _why_not(binding, binding.built, capability)
    if missing is None:
        return Source(binding.built, f"the built file {binding.built.name}")
    if capability < (8, 0):
        return Source(None, f"{instead}, because the GPU's architecture {capability} is older than (8, 0)")
    kept = compiler.kept_file(capability, binding)
    if _why_not(binding, kept, capability) is not None:
        if compiler.find_nvcc() is None:
            return Source(None, f"{instead}, because {missing} and there is no nvcc to compile one")
        if not compile_missing:
            return Source(kept, f"a file to be compiled at first use, because {missing}")
        print(f"compiling the CUDA kernels, because {missing} (about half a minute, once)", file=sys.stderr)
        try:
            compiler.build_kept(kept, capability, binding)
        except UserError as error:
            return Source(None, f"{instead}, because {missing} and none could be compiled: {error}")
        except OSError as error:
            why = os_error(error) or f"{kept}: {error}"
            return Source(None, f"{instead}, because {missing} and none could be kept: {why}")
    return Source(kept, f"compiled here, because {missing}")


def _why_not(binding: Binding, file: Path, capability: tuple[int, int]) -> str | None:
    """Why a built file cannot serve this GPU, None if it can."""
    if not file.exists():
        return "no file is built"
    facts = compiler.made_of(file)
    if facts is None:
        return f"{file.name} or {file.with_suffix('.json').name} is damaged or unfinished"
    if facts["sources"] != compiler.sources_hash(binding):
        return f"{file.name} was built from other sources"
    if not compiler.serves(facts["architectures"], capability):
        return f"{file.name} is for {' '.join(facts['architectures'])}, not for {capability}"
    return binding.why_not(facts)
