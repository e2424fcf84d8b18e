"""Under `python -O` every check is still made: only asserts that pytest rewrites are executed there."""

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checks import require

TESTS = Path(__file__).parent
PLACES = ("core", "train_tpu", "stacking", "port_torch", "kernels_cuda", "eval", "bench", "tests")


def test_require():
    require(True, "nothing to say")
    with pytest.raises(AssertionError) as error:
        require(1 > 2, "a comparison", 1, 2)
    assert error.value.args == ("a comparison", 1, 2)


def test_asserts_are_only_where_pytest_executes_them():
    """In test modules and conftest.py, and in no program that one of them hands to `python -c`."""
    files = [path for place in PLACES for path in (TESTS.parent / place).rglob("*.py")]
    assert len(files) > 200
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        rewritten = path.name == "conftest.py" or path.name.startswith("test_")
        if "assert " not in text or (rewritten and '"-c"' not in text):
            continue
        tree = ast.parse(text)
        lines = [] if rewritten else list(asserts(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "assert " in node.value:
                with contextlib.suppress(SyntaxError):  # prose
                    lines += [node.lineno for _ in asserts(ast.parse(node.value))]
        found += [f"{path.relative_to(TESTS.parent)}:{line}" for line in lines]
    assert not found, f"use tests.checks.require: {found}"


def asserts(tree: ast.AST) -> Iterator[int]:
    """The lines of the assert statements of a program."""
    return (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert))
