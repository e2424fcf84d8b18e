"""Command lines: how ours are parsed, and how those that we print for the user are written."""

import contextlib
import difflib
import inspect
import io
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

from core.errors import UserError
from core.help import Groups, format_help, options_of

Config = TypeVar("Config")
HELP = ("-h", "--help", "--help-all")

# How Python and tyro say that a value does not fit, and what a user is told.
_IN_OTHER_WORDS = {
    r"^Error parsing ": "",
    r"invalid literal for int\(\) with base 10: ('.*')": r"\1 is not an integer",
    r"could not convert string to float: ('.*')": r"\1 is not a number",
    r"no type matching \{None\}\|INT could be instantiated from \[(.*)\]": r"\1 is not an integer",
    r"no type matching \{None\}\|FLOAT could be instantiated from \[(.*)\]": r"\1 is not a number",
    r"Could not find valid parse for arguments: \[(.*)\]": r"\1 is not a valid value",
    r"^invalid choice ('.*') for argument '(.*)'\. Expected one of \((.*)\)": r"\2: \1 is not one of \3",
    r"'None', |, 'None'": "",
    r"^Missing value for argument '(.*)'\. Expected \d+ values": r"\1 needs a value",
}


def parse(
    kind: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    default: Config | None = None,
    description: str | None = None,
    groups: Groups | None = None,
) -> Config:
    """The dataclass `kind` as the command line `argv` (default: this process's) fills it.

    `--help` and `--help-all` are printed and end the process with 0; options have their fields' names.

    Args:
        description: what the command does. Default: the docstring of `kind`.
        groups: how the help lists the options.

    Raises:
        UserError: one sentence for a command line that cannot be parsed, where tyro prints a box. It names
            the option that was probably meant.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    ours = argv[: argv.index("--") if "--" in argv else None]
    if asks_for_help(ours):
        options, text = options_of(kind, default), description or kind.__doc__ or ""
        print(format_help(prog, inspect.cleandoc(text), options, groups or {}, HELP[-1] in ours), end="")
        sys.exit(0)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config, unknown = tyro.cli(
                kind, prog=prog, args=argv, return_unknown_args=True, add_help=False,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName),
                **({} if default is None else {"default": default}),
            )  # fmt: skip
    except SystemExit as end:
        if not end.code:
            raise
        unknown = None
    if unknown == []:
        sys.stderr.write(box.getvalue())  # a warning, where there is one
        return config
    known = [name for option in options_of(kind) for name in option.names]
    advice = f"{prog} {HELP[-1]} lists all options"
    for token in ours:
        name = token.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in (*HELP, *known):
            # Without the dashes, by which short names that have nothing else in common would be near.
            near = difflib.get_close_matches(name[2:], [one[2:] for one in known], n=1)
            meant = f"did you mean --{near[0]}?" if near else advice
            raise UserError(f"there is no option {token.partition('=')[0]}: {meant}")
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}: {advice}")
    raise UserError(f"{_sentence(box.getvalue())} ({advice})")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line is to be answered with the command's options."""
    return not set(HELP).isdisjoint(argv)


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
    return " ".join(["python", "-m", module, *(shell_quoted(str(argument)) for argument in arguments)])


def shell_quoted(text: str) -> str:
    """The text as one word of a bash command line, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else _escape(c) for c in escaped) + "'"


def _escape(character: str) -> str:
    """A character as bash writes it in $'...'."""
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return known.get(character) or f"\\U{ord(character):08x}"
