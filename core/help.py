"""What `--help` prints: a command's options by subject, those one needs first at the top, in 80 columns."""

import ast
import dataclasses
import inspect
import itertools
import re
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro

Groups = dict[str, Sequence[str]]
"""Titles with names of fields, in the order in which --help lists them. A field that several titles name is
listed under the first; one that none names, under "options" or its nested dataclass. What a title that begins
with "advanced" holds is listed by --help-all alone."""

_MARGIN = 24  # column at which descriptions begin


class Option(NamedTuple):
    """An option or a positional argument of a command."""

    field: str
    group: str
    """The title it is listed under if no group names it."""
    names: tuple[str, ...]
    """Its spellings; none for a positional argument."""
    usage: str
    """How it is typed: `FOLDER`, `--steps INT`, `--[no-]deterministic`."""
    required: bool
    help: str


def options_of(kind: type, default: Any = None, group: str = "options") -> list[Option]:
    """The options of a dataclass and of those nested in it. Help shows the values of `default`."""
    hints, documented = get_type_hints(kind, include_extras=True), _docstrings(kind)
    options: list[Option] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        hint, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if tyro.conf.Suppress in marks:
            continue
        value = _default(field) if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(hint):
            options += options_of(hint, value, field.name)
            continue
        given = next((mark for mark in marks if hasattr(mark, "metavar")), tyro.conf.arg())
        name = f"--{given.name or field.name}".replace("_", "-")
        names, usage = (
            (name,),
            f"{name} {given.metavar or _metavar(hint, tyro.conf.UseAppendAction in marks)}",
        )
        if hint is bool:
            names, usage = (name, f"--no-{name[2:]}"), f"--[no-]{name[2:]}"
        elif tyro.conf.Positional in marks:
            names, usage = (), given.metavar or field.name.upper()
        required = value is dataclasses.MISSING
        silent = required or value in (None, "", (), []) or (hint is bool and not value)
        text = documented.get(field.name, "") + ("" if silent else f" (default: {_shown(value)})")
        options.append(Option(field.name, group, names, usage, required, text.strip()))
    return options


def format_help(
    prog: str, description: str, options: Sequence[Option], groups: Groups, everything: bool
) -> str:
    """The text of --help or, with `everything`, of --help-all."""
    width = min(80, shutil.get_terminal_size().columns)
    needed = [option.usage for option in options if option.required or not option.names]
    more = ["[options]"] if len(needed) < len(options) else []
    parts = [f"usage: {' '.join([prog, *needed, *more])}"]
    parts += [_filled(paragraph, width) for paragraph in description.split("\n\n")]
    sections = _sections(options, groups)
    hidden = [title for title in sections if title.startswith("advanced") and not everything]
    for title, members in sections.items():
        if members and title not in hidden:
            parts.append("\n".join([f"{title}:", *(_entry(option, width) for option in members)]))
    if any(sections[title] for title in hidden):
        parts.append(
            f"--help-all lists {sum(len(sections[title]) for title in hidden)} advanced options too."
        )
    return "\n\n".join(parts) + "\n"


def _sections(options: Sequence[Option], groups: Groups) -> dict[str, list[Option]]:
    """The options under their titles, in the order of both."""
    sections = {"arguments": [option for option in options if not option.names]}
    left = {option.field: option for option in options if option.names}
    for title, fields in groups.items():
        sections[title] = [left.pop(field) for field in fields if field in left]
    for option in left.values():
        sections.setdefault(option.group, []).append(option)
    return sections


def _entry(option: Option, width: int) -> str:
    """One option: how it is typed, and next to it or below what it does."""
    typed, text = f"  {option.usage}", _filled(option.help, width, " " * _MARGIN)
    if len(typed) <= _MARGIN - 2:
        return (typed.ljust(_MARGIN) + text[_MARGIN:]).rstrip()
    return f"{typed}\n{text}".rstrip()


class _Wrapper(textwrap.TextWrapper):
    """Breaks lines at spaces and after commas: a list that has no spaces may be longer than a line."""

    wordsep_simple_re = re.compile(r"([\t\n ]+|(?<=,)(?=\w))")


def _filled(paragraph: str, width: int, indent: str = "") -> str:
    """A paragraph broken into lines anew; an indented one, a table or a command, as it is."""
    if paragraph.startswith(" "):
        return paragraph
    wrapper = _Wrapper(width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return wrapper.fill(" ".join(paragraph.split()))


def _metavar(hint: Any, repeated: bool = False) -> str:
    """What a value of the type looks like: INT, {a,b}, [STR ...]; None, the option left out, is no value."""
    kinds = [kind for kind in get_args(hint) if kind not in (NoneType, Ellipsis)]
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, kinds))}}}"
    if get_origin(hint) in (tuple, list):
        return _metavar(kinds[0]) if repeated else f"[{_metavar(kinds[0])} ...]"
    if kinds:
        return "|".join(map(_metavar, kinds))
    return "{True,False}" if hint is bool else hint.__name__.upper()


def _default(field: dataclasses.Field) -> Any:
    """The default of a field; MISSING if it has none."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _shown(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass, its own or that of a class that it extends."""
    documented = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, below in itertools.pairwise(body.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    documented[name] = " ".join(text.split())
    return documented
