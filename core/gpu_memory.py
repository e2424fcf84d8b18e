"""Whether other processes have left a GPU enough memory, asked before JAX takes its own.

JAX takes three quarters of a GPU's memory at its first allocation. Where others hold most of it, XLA ends the
process in C++, with exit code 134 and nothing that a user could act on.
"""

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Mapping

from core.errors import UserError

FRACTION = 0.75  # of a GPU's memory that JAX takes where the environment does not say
NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # in which it may; the second is older
ENOUGH = 0.5  # of what JAX would take: a desktop, or a small neighbour, leaves more than this
QUERY = ("--query-gpu=index,memory.free,memory.total", "--format=csv,noheader,nounits")


def require_free_memory() -> None:
    """Refuses to start on a GPU whose memory other processes hold; nothing is asked where JAX uses no GPU.

    Raises:
        UserError: says how much is free, and how to do with it.
    """
    environ = os.environ
    tool = shutil.which("nvidia-smi")
    if tool is None or not uses_gpus(environ):
        return
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    chosen = ("-i", visible) if visible else ()
    try:
        asked = subprocess.run([tool, *QUERY, *chosen], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return  # a driver that does not answer is JAX's to tell
    if asked.returncode == 0:
        check_free_memory(asked.stdout, environ)


def uses_gpus(environ: Mapping[str, str]) -> bool:
    """Whether JAX would take memory of NVIDIA GPUs at its first allocation here."""
    platforms = environ.get("JAX_PLATFORMS", "").split(",")
    if platforms != [""] and not {"cuda", "gpu"} & set(platforms):
        return False
    grows = environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    if grows or environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        return False
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    names = (found.metadata["Name"] or "" for found in importlib.metadata.distributions())
    return any(name.startswith("jax-cuda") and name.endswith("-plugin") for name in names)


def check_free_memory(listing: str, environ: Mapping[str, str]) -> None:
    """Refuses what `nvidia-smi` lists ("index, free, total" per line, MiB) if JAX could not take its share.

    Raises:
        UserError: of the first GPU with too little.
    """
    try:
        name = next((name for name in NAMES if environ.get(name)), NAMES[0])
        fraction = float(environ.get(name) or FRACTION)
        gpus = [tuple(map(int, line.split(","))) for line in listing.splitlines() if line.strip()]
    except ValueError:
        return  # "[N/A]" where the memory is the host's
    for index, free, total in gpus:
        if free < ENOUGH * fraction * total:
            share = max(0.01, FRACTION * free / total)
            raise UserError(
                f"GPU {index} has {free / 1024:.1f} of its {total / 1024:.1f} GiB free, as other processes "
                "hold the rest: stop them (nvidia-smi lists them), choose another GPU with "
                f"CUDA_VISIBLE_DEVICES, or use a fraction of what is free with {name}={share:.2f}"
            )
