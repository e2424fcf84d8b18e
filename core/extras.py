"""What a command needs of the optional packages: one sentence where they are missing, no traceback."""

import importlib.util
import shlex
import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

from core.errors import UserError, tell

BASE = ""
"""What every command needs: pyproject.toml's dependencies."""
# Of pyproject.toml: the modules to be found, and what they are called.
EXTRAS = {
    BASE: {"jax": "JAX", "flax": "Flax", "rich": "rich", "tyro": "tyro"},
    "torch": {"torch": "PyTorch", "safetensors": "safetensors", "transformers": "transformers"},
    "eval": {"lm_eval": "lm-eval"},
}


def require_extra(extra: str, commands: Collection[str] | None = None) -> None:
    """Ends a command, `python -m PACKAGE.MODULE`, that lacks what an extra installs: exit code 2.

    To be called by the package's __init__, before anything imports what may be missing; a program that
    imports the package is left alone.

    Args:
        extra: one of `EXTRAS`.
        commands: the modules that need it, if not all of the package's do.
    """
    # While `python -m` imports the package of its module, argv[0] is "-m".
    if sys.argv[:1] != ["-m"] or not (commands is None or set(commands) & set(sys.orig_argv)):
        return
    modules = EXTRAS[extra]
    if not all(map(importlib.util.find_spec, modules)):
        *names, last = modules.values()
        needed = f"{', '.join(names)} and {last}" if names else last
        how = install_command(extra)
        if extra == BASE:
            how = f"activate the environment that has them (source .venv/bin/activate), or {how}"
        sys.exit(tell(UserError(f"this command needs {needed}: {how}")))


def require_package(name: str, why: str) -> None:
    """A UserError if a package of the extra `torch` is not installed, told without importing it.

    why: what it is needed for, in a sentence of its own.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{why}: {install_command('torch')}")


def require_peft() -> None:
    """Of the package `peft`, `require_package`."""
    require_package("peft", "LoRA adapters are saved and opened with peft")


def install_command(extra: str, root: Path = Path(__file__).parents[1]) -> str:
    """What to type to install an extra: from the checkout with its pinned versions, where there is one.

    Args:
        extra: one of `EXTRAS`.
        root: the folder that holds our packages: a checkout, or where a wheel was installed.
    """
    if (root / "pyproject.toml").exists():
        project = "." if root == Path.cwd() else str(root)
        constraints = "constraints.txt" if project == "." else str(root / "constraints.txt")
        wanted = f"{project}[{extra}]" if extra else project
        return f"pip install -c {shlex.quote(constraints)} -e {shlex.quote(wanted)}"
    needed = [text.partition(";") for text in metadata.requires("mtlm") or ()]
    ours = [
        package.strip()
        for package, _, marker in needed
        if (f'extra == "{extra}"' in marker if extra else "extra ==" not in marker)
    ]
    return shlex.join(["pip", "install", *ours])
