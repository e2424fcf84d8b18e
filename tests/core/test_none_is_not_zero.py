"""None means "not given" and 0 is a value: no optional number is asked for its truth, in any package."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "train_tpu", "stacking", "port_torch", "kernels_cuda", "eval", "bench")
OPTIONAL = {f"{number} | None" for number in ("int", "float")}
Nodes = list[ast.AST]  # of a file


def test_no_optional_number_is_asked_for_its_truth():
    """`x or y`, `if x` and `not x` take a 0 for nothing; `x is None` says what is meant."""
    paths = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    files = {path: list(ast.walk(ast.parse(path.read_text()))) for path in paths}
    fields = {name for nodes in files.values() for name in optional_fields(nodes)}
    assert {"steps", "stop_at", "context", "n_heads"} <= fields
    found = []
    for path, nodes in files.items():
        attributes, names = fields - other_fields(nodes), optional_arguments(nodes)
        found += [
            f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
            for node in asked(nodes)
            if (isinstance(node, ast.Attribute) and node.attr in attributes)
            or (isinstance(node, ast.Name) and node.id in names)
        ]
    assert not found, "\n".join(found)


def optional_fields(nodes: Nodes) -> set[str]:
    """Fields of classes that are a number or None."""
    return {field.target.id for field in fields_of(nodes) if is_optional(field.annotation)}


def other_fields(nodes: Nodes) -> set[str]:
    """Fields of the file's own classes that are something else, whatever has their name elsewhere."""
    return {field.target.id for field in fields_of(nodes)} - optional_fields(nodes)


def fields_of(nodes: Nodes) -> Iterator[ast.AnnAssign]:
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            yield from (field for field in node.body if isinstance(field, ast.AnnAssign))


def optional_arguments(nodes: Nodes) -> set[str]:
    """Arguments of functions that are a number or None."""
    arguments = (node for node in nodes if isinstance(node, ast.arg) and node.annotation)
    return {node.arg for node in arguments if is_optional(node.annotation)}


def is_optional(annotation: ast.AST) -> bool:
    return isinstance(annotation, ast.BinOp) and ast.unparse(annotation) in OPTIONAL


def asked(nodes: Nodes) -> Iterator[ast.expr]:
    """Every expression of which a statement or an operator wants to know whether it is true."""
    for node in nodes:
        if isinstance(node, ast.BoolOp):
            yield from node.values[:-1]
        elif isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            yield node.test
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand
