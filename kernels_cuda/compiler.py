"""Compiles the kernels into one file, for `kernels_cuda.build`. Needs nvcc and PyTorch, but no GPU.

The file is in the package (a wheel takes it with it) and serves every PyTorch from 2.10 on: it uses the
stable ABI of LibTorch and carries its own CUDA runtime. A .json next to it says what it is made of and seals
both: it holds the file's sha256 and its own, and nothing is loaded that they do not fit.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from core.errors import UserError
from core.folders import CACHE

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "csrc"
BUILT = PACKAGE / "mtlm_kernels.so"
ARCHITECTURES = ("8.0", "9.0+PTX")  # A100; H100 and H200; newer ones compile the PTX when they load it
COMPILER_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "--threads", "1")
# The oldest PyTorch that the file will serve, in the ABI's notation: 2.10.
TORCH_FLAGS = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, of the PATH, of /usr/local/cuda or of the wheel nvidia-cuda-nvcc; None without."""
    candidates = [
        Path(home) / "bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home
    ]
    if on_path := shutil.which("nvcc"):
        candidates.insert(0 if "CUDA_HOME" not in os.environ else 1, Path(on_path))
    candidates += (Path(folder) / "nvidia/cu13/bin/nvcc" for folder in sys.path)
    return next((path for path in candidates if path.is_file()), None)


def sources_hash() -> str:
    """Of everything that is compiled, and how."""
    digest = hashlib.sha256(json.dumps([COMPILER_FLAGS, TORCH_FLAGS]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def generate_code(architectures: tuple[str, ...]) -> list[str]:
    """nvcc's flags for architectures as PyTorch writes them: "9.0", "9.0+PTX".

    Raises:
        UserError: one is none, or older than 8.0.
    """
    flags = []
    for architecture in architectures:
        number, _, suffix = architecture.partition("+")
        major, _, minor = number.partition(".")
        if not (major.isdigit() and minor.isdigit() and suffix in ("", "PTX")):
            raise UserError(f"{architecture!r} is not an architecture: write 8.0, 9.0 or 9.0+PTX")
        if int(major) < 8:
            raise UserError(f"architecture {architecture} is older than 8.0, the first with bfloat16")
        name = major + minor
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        if suffix:
            flags += ["-gencode", f"arch=compute_{name},code=compute_{name}"]
    return flags


def serves(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of this compute capability."""
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        major, minor = map(int, number.split("."))
        if (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability):
            return True
    return False


def build(output: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> None:
    """Compiles and links csrc into `output`, and writes what it is made of next to it.

    Raises:
        UserError: no nvcc, an architecture that is none, or (`CompilerError`) nvcc fails.
    """
    code = generate_code(architectures)
    nvcc = find_nvcc()
    if nvcc is None:
        raise UserError(
            "no nvcc found: install the CUDA toolkit 12.4 or newer, and put its bin folder on PATH "
            "or set CUDA_HOME"
        )
    import torch  # slow, and only here

    torch_folder = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        objects = []
        commands = []
        for source in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")]):
            objects.append(Path(folder) / f"{source.name}.o")
            specific = code if source.suffix == ".cu" else [*TORCH_FLAGS, "-I", torch_folder / "include"]
            commands.append([nvcc, *COMPILER_FLAGS, *specific, "-c", source.name, "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder) / output.name
        # libtorch.so names the libraries that the symbols are in; which those are differs between builds.
        torch_library = ["-L", torch_folder / "lib", "-Xlinker", "--no-as-needed", "-ltorch"]
        _run([nvcc, "-shared", *objects, "-o", linked, *torch_library])
        facts = {
            "architectures": list(architectures),
            "sources": sources_hash(),
            "nvcc": _version(nvcc),
            "torch": torch.__version__,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        put_sealed(linked.read_bytes(), facts, output)


def put_sealed(code: bytes, facts: dict[str, Any], output: Path) -> None:
    """Writes a built file and its .json. Between the two, and if one is all that is ever written, they do not
    fit each other, and `made_of` refuses them."""
    _put(code, output)
    _put(_sealed({**facts, "file": hashlib.sha256(code).hexdigest()}), output.with_suffix(".json"))


def made_of(file: Path) -> dict[str, Any] | None:
    """What a built file's .json says of it: architectures, sources, nvcc, torch.

    None if one of the two is missing, or has another byte than `put_sealed` wrote.
    """
    try:
        written = file.with_suffix(".json").read_bytes()
        facts = json.loads(written)
        facts.pop("seal")
        if written == _sealed(facts) and facts["file"] == hashlib.sha256(file.read_bytes()).hexdigest():
            return facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not what we wrote
    return None


def _sealed(facts: dict[str, Any]) -> bytes:
    """The text of a .json, its last field the sha256 of all others."""
    seal = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return json.dumps({**facts, "seal": seal}, indent=1).encode()


def kept_file(capability: tuple[int, int]) -> Path:
    """Where a file compiled for one GPU and these sources is kept."""
    return CACHE / "kernels" / f"{sources_hash()[:16]}-sm_{capability[0]}{capability[1]}.so"


def build_kept(output: Path, capability: tuple[int, int]) -> None:
    """`build` for one GPU; of several processes that ask at once, one compiles and the others wait."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made_of(output) is None:
            build(output, (f"{capability[0]}.{capability[1]}",))


class CompilerError(UserError):
    """nvcc failed; `output` is the command and all that it said."""

    def __init__(self, message: str, output: str):
        super().__init__(message)
        self.output = output


def _run(command: list) -> None:
    """Runs a compiler among the sources; what it says is shown only if it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=SOURCES, capture_output=True, text=True)
    except OSError as error:
        raise CompilerError(f"{words[0]} cannot be run: {error.strerror}", " ".join(words)) from None
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        why = next((line for line in said if "error" in line.lower()), said[-1] if said else "no output")
        raise CompilerError(
            f"{words[0]} fails with exit code {done.returncode} ({why}); python -m kernels_cuda.build shows "
            "its whole output",
            f"{' '.join(words)}\n{done.stdout}{done.stderr}",
        )


def _version(nvcc: Path) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return next((word.rstrip(",") for word in said.split() if word.startswith("V")), "unknown").removeprefix(
        "V"
    )


def _put(data: bytes, path: Path) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
