"""Command lines: how ours are parsed, and how those that we print for the user are written."""

import contextlib
import difflib
import inspect
import io
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from core.errors import UserError

Config = TypeVar("Config")
T = TypeVar("T")

# A setting that may be left out; --help says what its default is where there is one, and never "None".
Maybe = Annotated[
    T | None,
    tyro.conf.arg(help_behavior_hint=lambda value: "" if value == "None" else f"(default: {value})"),
]

# How Python and tyro say that a value does not fit, and what a user is told.
_IN_OTHER_WORDS = {
    r"^Error parsing ": "",
    r"invalid literal for int\(\) with base 10: ('.*')": r"\1 is not an integer",
    r"could not convert string to float: ('.*')": r"\1 is not a number",
    r"no type matching (\S+) could be instantiated from \[(.*)\]": r"\2 is not of the form \1",
    r"^invalid choice ('.*') for argument '(.*)'\. Expected one of \((.*)\)": r"\2: \1 is not one of \3",
    r"^Missing value for argument '(.*)'\. Expected \d+ values": r"\1 needs a value",
}


def parse(
    kind: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    default: Config | None = None,
    description: str | None = None,
) -> Config:
    """The dataclass `kind` as the command line `argv` (default: this process's) fills it.

    `--help` is printed and ends the process with 0, as tyro has it; options have their fields' names.

    Raises:
        UserError: one sentence for a command line that cannot be parsed, where tyro prints a box. It names
            the option that was probably meant.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options: dict[str, Any] = {"prog": prog, "description": inspect.cleandoc(description or "") or None}
    if default is not None:
        options["default"] = default
    kind = tyro.conf.OmitArgPrefixes[kind]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config, unknown = tyro.cli(kind, args=argv, return_unknown_args=True, **options)
    except SystemExit as end:
        if not end.code:
            raise
        unknown = None
    if unknown == []:
        sys.stderr.write(box.getvalue())  # a warning, where there is one
        return config
    known = _options_of(kind, options)
    for token in argv[: argv.index("--") if "--" in argv else None]:
        name = token.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"{prog} --help lists all options"
            raise UserError(f"there is no option {token.partition('=')[0]}: {advice}")
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}: {prog} --help lists all options")
    raise UserError(f"{_sentence(box.getvalue())} ({prog} --help lists all options)")


def _options_of(kind: Any, options: dict[str, Any]) -> list[str]:
    """All options of a command, out of its help: each begins a line, and descriptions are further right."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **options)
    entries = re.findall(r"^[│ ]{1,3}(--?\w.*?)(?:  |$)", text.getvalue(), re.MULTILINE)
    return [name for entry in entries for name in re.findall(r"--[\w-]+", entry)]


def _sentence(box: str) -> str:
    """What tyro's box with an error says, in one line."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip("│ ")
        if not text.strip("─-╰╯"):
            if lines:
                break
            continue
        lines.append((len(line) - len(line.lstrip("│ ")), text))
    if lines and lines[0][1].startswith("Missing from"):
        # "Missing from PROG:", then every option, and under each its help, further to the right.
        margin = min(indent for indent, _ in lines[1:])
        return f"missing {', '.join(text for indent, text in lines[1:] if indent == margin)}"
    sentence = " ".join(text for _, text in lines).rstrip(".")
    for theirs, ours in _IN_OTHER_WORDS.items():
        sentence = re.sub(theirs, ours, sentence)
    return sentence


def command(module: str, *arguments: object) -> str:
    """A command to type, `python -m MODULE ARGUMENTS`, quoted for a shell."""
    return shlex.join(["python", "-m", module, *map(str, arguments)])
