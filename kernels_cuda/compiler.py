"""Compiles the kernels into one file per framework, for `kernels_cuda.build`. Needs nvcc and the framework,
but no GPU.

The files are in the package (a wheel takes them with it) and carry their own CUDA runtime. PyTorch's serves
every PyTorch from 2.10 on, over the stable ABI of LibTorch; XLA's every jaxlib from the one on that it was
built with. A .json next to each says what it is made of and seals both: it holds the file's sha256 and its
own, and nothing is loaded that they do not fit.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from core.cache import CACHE
from core.errors import UserError

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "csrc"
ARCHITECTURES = ("8.0", "9.0+PTX")  # A100; H100 and H200; newer ones compile the PTX when they load it
COMPILER_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "--threads", "1")


class Facts(NamedTuple):
    """What a framework adds to a build."""

    compile: list[str]
    """nvcc's options for its binding."""
    link: list[str]
    made_of: dict[str, Any]
    """For the .json: its version."""


class Binding(NamedTuple):
    """A framework that kernels are linked for."""

    name: str
    """Of the file, without .so."""
    source: str
    module: str
    """The framework's."""
    kernels: tuple[str, ...] | None
    """The .cu files that it binds; None: all."""
    facts: Callable[[], Facts]
    """Imports the framework, which takes seconds."""
    version: Callable[[], str] = lambda: ""
    """That of the interface which a file is loaded by, here; "" if every supported one loads it."""

    @property
    def built(self) -> Path:
        """The file in the package."""
        return PACKAGE / f"{self.name}.so"

    def why_not(self, facts: dict[str, Any]) -> str | None:
        """Why a file made of `facts` cannot be loaded by the framework as it is installed, None if it can."""
        here, needed = (version.partition(".") for version in (self.version(), facts.get("interface", "")))
        if needed[0] == here[0] and int(needed[2] or 0) <= int(here[2] or 0):
            return None
        needed, here = "".join(needed), "".join(here)
        return f"the built file needs version {needed} of the framework's interface, and {here} is here"

    @property
    def sources(self) -> list[Path]:
        """What is compiled."""
        kernels = SOURCES.glob("*.cu") if self.kernels is None else (SOURCES / k for k in self.kernels)
        return [*sorted(kernels), SOURCES / self.source]


# The oldest PyTorch that the file will serve, in the ABI's notation: 2.10.
TORCH_FLAGS = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def _torch_facts() -> Facts:
    import torch

    folder = Path(torch.__file__).parent
    # libtorch.so names the libraries that the symbols are in; which those are differs between builds.
    link = ["-L", str(folder / "lib"), "-Xlinker", "--no-as-needed", "-ltorch"]
    compile = [*TORCH_FLAGS, "-I", str(folder / "include")]
    return Facts(compile, link, {"torch": torch.__version__})


def _xla_facts() -> Facts:
    import jax
    import jaxlib

    made_of = {"jaxlib": jaxlib.__version__, "interface": ffi_version()}
    return Facts(["-I", jax.ffi.include_dir()], [], made_of)


def ffi_version() -> str:
    """That of XLA's interface for custom calls here, "0.3": a file is loaded where it is no newer."""
    import jax

    text = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", text))


TORCH = Binding("mtlm_kernels", "binding_torch.cpp", "torch", None, _torch_facts)
XLA = Binding(
    "mtlm_kernels_xla", "binding_xla.cpp", "jax",
    (
        "adamw.cu", "gelu.cu", "loss_product.cu", "qkv_product.cu", "rms_norm.cu", "rotary.cu",
        "softmax_loss.cu", "swiglu.cu",
    ),
    _xla_facts, ffi_version,
)  # fmt: skip
BINDINGS = (TORCH, XLA)


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, of the PATH, of /usr/local/cuda or of the wheel nvidia-cuda-nvcc; None without."""
    home = os.environ.get("CUDA_HOME")
    candidates = [home and Path(home) / "bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    candidates += [Path(folder) / "nvidia/cu13/bin/nvcc" for folder in sys.path]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def sources_hash(binding: Binding = TORCH) -> str:
    """Of everything that is compiled, and how."""
    flags = [COMPILER_FLAGS, TORCH_FLAGS] if binding is TORCH else [COMPILER_FLAGS]
    digest = hashlib.sha256(json.dumps(flags).encode())
    for path in sorted([*binding.sources, *SOURCES.glob("*.h"), *SOURCES.glob("*.cuh")]):
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
        # Hopper's own instructions are only in its machine code, under a name of their own.
        own = f"{name}a" if name == "90" else name
        flags += ["-gencode", f"arch=compute_{own},code=sm_{own}"]
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


def build(output: Path, architectures: tuple[str, ...] = ARCHITECTURES, binding: Binding = TORCH) -> None:
    """Compiles and links what a framework binds into `output`, and writes what it is made of next to it.

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
    facts = binding.facts()
    with TemporaryDirectory() as folder:
        objects = []
        commands = []
        for source in binding.sources:
            objects.append(Path(folder) / f"{source.name}.o")
            specific = code if source.suffix == ".cu" else facts.compile
            commands.append([nvcc, *COMPILER_FLAGS, *specific, "-c", source.name, "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder) / output.name
        # Launchers have the same names in both files: each uses its own, also where both are loaded.
        _run([nvcc, "-shared", "-Xlinker", "-Bsymbolic", *objects, "-o", linked, *facts.link])
        made_of = {
            "architectures": list(architectures),
            "sources": sources_hash(binding),
            "nvcc": _version(nvcc),
            **facts.made_of,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        put_sealed(linked.read_bytes(), made_of, output)


def put_sealed(code: bytes, facts: dict[str, Any], output: Path) -> None:
    """Writes a built file and its .json. Between the two, and if one is all that is ever written, they do not
    fit each other, and `made_of` refuses them."""
    _put(code, output)
    _put(_sealed({**facts, "file": hashlib.sha256(code).hexdigest()}), output.with_suffix(".json"))


def made_of(file: Path) -> dict[str, Any] | None:
    """What a built file's .json says of it: architectures, sources, nvcc, the framework.

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


def has_hopper(file: Path) -> bool:
    """Whether a built file has Hopper's own instructions, not only code that also runs there."""
    facts = made_of(file) or {"architectures": []}
    return any(architecture.partition("+")[0] == "9.0" for architecture in facts["architectures"])


def kept_file(capability: tuple[int, int], binding: Binding = TORCH) -> Path:
    """Where a file compiled for one GPU and these sources is kept."""
    parts = (sources_hash(binding)[:16], f"sm_{capability[0]}{capability[1]}", binding.version())
    return CACHE / "kernels" / f"{'-'.join(filter(None, parts))}.so"


def build_kept(output: Path, capability: tuple[int, int], binding: Binding = TORCH) -> None:
    """`build` for one GPU; of several processes that ask at once, one compiles and the others wait."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made_of(output) is None:
            build(output, (f"{capability[0]}.{capability[1]}",), binding)


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
