"""The messages that the package logs as warnings or raises, read from its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "smartfrz_hf"
GAP = "…"  # stands for what is filled in


def template(node: ast.expr) -> str:
    """A string or f-string, with a gap for each value; an empty string for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def raised(path: Path) -> Iterator[str]:
    """Messages of the exceptions that a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error") and node.args:
            yield template(node.args[0])


def warned(path: Path) -> Iterator[str]:
    """Messages of the warnings that a file logs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("warning", "warning_once"):
            yield template(node.args[0])


def first_sentence(message: str) -> str:
    """A message up to its first full stop, colon or semicolon."""
    for end in (". ", ": ", "; "):
        message = message.partition(end)[0]
    return message.rstrip(".:;")
