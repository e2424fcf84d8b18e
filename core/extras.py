"""What a command needs of the optional packages: one sentence where they are missing, no traceback."""

import importlib.util
import sys
from collections.abc import Collection

from core.errors import UserError, tell

# Of pyproject.toml: the modules to be found, and what they are called.
EXTRAS = {
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
        install = f"pip install -c constraints.txt -e '.[{extra}]'"
        sys.exit(tell(UserError(f"this command needs {needed}: {install}")))
