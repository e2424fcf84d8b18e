"""A row of a benchmark in a process of its own: a fresh allocator, and nothing that was compiled before."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
MARK = "ROW "
COMPILED = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")
"""Where PyTorch, Triton and JAX keep what they have compiled, for the next process."""


def print_row(row: Row) -> None:
    """What a row's process ends with."""
    print(MARK + json.dumps(row))


def taken_row(argv: list[str]) -> tuple[str | None, list[str]]:
    """The row that this process was started for by `in_process`, or None, and the command's own arguments."""
    return (argv[1], argv[2:]) if argv[:1] == ["--row"] else (None, argv)


def compiled_anew(folder: str) -> dict[str, str]:
    """The environment in which nothing is found compiled; folder: a new one."""
    return {name: f"{folder}/{name.lower()}" for name in COMPILED}


def exit_code(rows: Sequence[Row]) -> int:
    """Of a benchmark with these rows: 1 where one failed, which its table says."""
    return int(any("failed" in row for row in rows))


def in_process(
    module: str, row: str, argv: Sequence[str], environment: dict[str, str], processes: int = 1
) -> Row:
    """The figures of `python -m MODULE --row ROW ARGV`, or {"failed": why, in one line}; then its stderr is
    shown.

    processes: that torchrun starts, of which one prints the row.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), "-m", module, "--row", row, *argv]
    with tempfile.TemporaryDirectory() as folder:
        environment = environment | compiled_anew(folder)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.rpartition(MARK)[2].split("\n")[0])
    print(done.stderr, file=sys.stderr)
    lines = done.stderr.split("\n")
    said = [line for line in lines if line.strip()] or [f"ended with {done.returncode}"]
    return {"failed": said[-1].strip()[:200]}
