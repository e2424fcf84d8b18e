"""The built-in corpus: the English prose that every installation carries, docstrings.

Harvested with `ast` from the sources of the standard library and of the project's dependencies, without
importing any of them: several megabytes of technical English, enough for a first run without a network.
It differs a little between versions of these packages; `identity` says which corpus it is.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Import names of the base dependencies and of what they bring along that have prose to offer.
PACKAGES = (
    "jax", "flax", "optax", "orbax", "grain", "numpy", "scipy", "matplotlib", "pyarrow", "pydantic", "PIL",
    "huggingface_hub", "mistral_common", "tokenizers", "etils", "absl", "chex", "tyro", "treescope",
    "jaxtyping", "tensorboardX", "dateutil", "pyparsing", "requests", "click", "attr", "anyio", "urllib3",
)  # fmt: skip
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "_vendor"}

SHORTEST = 200  # characters; what is shorter is a label, not prose
MIN_PROSE = 0.3  # of a docstring's characters must stand in paragraphs of prose
LIST = re.compile(  # of names, each with half a sentence
    r"(args|arguments|attributes|parameters|params|raises|keyword args|kwargs|fields|examples?)\b.{0,20}:",
    re.IGNORECASE,
)
LICENCE = re.compile(r"licen[cs]ed under|permission is hereby granted|without warrant(y|ies)", re.IGNORECASE)
LONG_STRING = re.compile(rb'^[ \t]*[rRuU]?"""(?:(?!""").){200}', re.DOTALL | re.MULTILINE)


def documents() -> Iterator[tuple[str, int]]:
    """The corpus, one docstring per document: cleaned, without repetitions, in a fixed order.

    Each with the number of source files read until then (of `n_files()`).
    """
    seen = set()
    for position, path in enumerate(_files(), start=1):
        for prose in _harvest(path):
            key = hashlib.sha256(prose.encode()).digest()
            if key not in seen:
                seen.add(key)
                yield prose, position


def n_files() -> int:
    """Number of source files that are read."""
    return len(_files())


def identity() -> str:
    """The versions that determine the documents; much quicker to have than a hash of them."""
    versions = [f"python {platform.python_version()}"]
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        for distribution in sorted(set(owners.get(package, ()))):
            versions.append(f"{distribution} {importlib.metadata.version(distribution)}")
    return ", ".join(versions)


@cache
def _files() -> tuple[Path, ...]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in PACKAGES:
        # find_spec of a name without a dot imports nothing
        spec = importlib.util.find_spec(package)
        roots += sorted(Path(p) for p in (spec.submodule_search_locations or ())) if spec else []
    return tuple(path for root in roots for path in sorted(root.rglob("*.py")) if _wanted(path, root))


def _wanted(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return not SKIPPED_FOLDERS.intersection(parts) and not path.stem.endswith("_test")


@cache
def _harvest(path: Path) -> tuple[str, ...]:
    """The prose in one source file; kept, since the corpus is read more than once and is small."""
    source = path.read_bytes()
    if not LONG_STRING.search(source):  # parsing is what takes time here
        return ()
    collecting = gc.isenabled()
    gc.disable()  # a tree has very many objects and no garbage: collecting doubles the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ()  # a template, or a sample of another Python
    finally:
        if collecting:
            gc.enable()
    docstrings = (ast.get_docstring(node, clean=False) for node in _definitions(tree))
    return tuple(filter(None, (clean(text) for text in docstrings if text and len(text) >= SHORTEST)))


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """The module, its classes and functions, outermost first; expressions are not looked into."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for block in ("body", "orelse", "handlers", "finalbody"):
        for statement in getattr(node, block, ()):
            if isinstance(statement, ast.stmt | ast.ExceptHandler):
                yield from _definitions(statement)


def clean(docstring: str) -> str:
    """The prose of a docstring: its paragraphs, each on one line; "" where there is too little of it.

    Code, doctests, tables, headings' underlines and markup are left out.
    """
    text = inspect.cleandoc(docstring)
    if LICENCE.search(text) or "\x00" in text:
        return ""
    text = re.sub(r":[a-z:]+:`~?([^`<]*)(?:\s*<[^`]*>)?`", r"\1", text)  # :func:`jax.jit` -> jax.jit
    text = text.replace("``", "").replace("`", "")
    paragraphs = [_paragraph(block) for block in re.split(r"\n\s*\n", text)]
    prose = "\n\n".join(p for p in paragraphs if p)
    return prose if len(prose) >= max(SHORTEST, MIN_PROSE * len(text)) else ""


def _paragraph(block: str) -> str:
    """The block as one line, or "" unless it reads like sentences."""
    lines = [line.strip() for line in block.splitlines()]
    if any(
        line.startswith((">>>", "...", "+-", "==", "--", "~~", "|", ".. ", "$", "#", "@")) for line in lines
    ):
        return ""
    line = re.sub(r"\s+", " ", " ".join(lines))
    letters = sum(c.isalpha() or c == " " for c in line)
    words = line.split()
    if LIST.match(line):
        return ""
    is_prose = len(words) >= 6 and letters >= 0.85 * len(line) and line[-1] in ".:!?)\"'"
    return line if is_prose else ""
