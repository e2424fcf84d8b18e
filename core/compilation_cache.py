"""What XLA has compiled is kept on the disk, for every later start on the same kind of machine."""

import hashlib
import os
import sys
from pathlib import Path

import filelock
import jax

from core.cache import CACHE

VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own
MOST_BYTES = 4 * 2**30  # beyond it, what has not been used for longest goes
WORTH_KEEPING = 0.2  # seconds that compiling took
LOCK_TIMEOUT = 10  # seconds; JAX holds the lock while it reads or writes an entry, and waits as long
FOUND = "/jax/compilation_cache/cache_hits"

_found = 0


def keep_compiled() -> None:
    """Has JAX keep what it compiles from now on, under `CACHE`, unless the environment says where.

    JAX's key is the program, the compiler's version and options, and the devices; code for a CPU is also made
    for the processor's kind, which the key leaves out. So each kind has a folder of its own.
    """
    jax.monitoring.register_event_listener(_count_found)
    if os.environ.get(VARIABLE):
        return
    folder = CACHE / "compiled" / hashlib.sha256(processor_features().encode()).hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_half_written(folder)
    except OSError as error:
        print(
            f"the compilation cache cannot be written, so the next start compiles again ({error})",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def remove_half_written(folder: Path) -> None:
    """Removes what a process was writing into JAX's cache when it was killed or the disk was full.

    JAX would read such an entry at every start, warn, and never write it again. It writes an entry, and then
    the time of its last use next to it, holding the lock.
    """
    with filelock.FileLock(folder / ".lockfile", timeout=LOCK_TIMEOUT):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()


def programs_found() -> int:
    """How many programs this process has found compiled by an earlier one, since `keep_compiled`."""
    return _found


def processor_features() -> str:
    """The instructions that this machine's processor knows, as Linux lists them; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _count_found(event: str, **_: str | int) -> None:
    global _found
    _found += event == FOUND
