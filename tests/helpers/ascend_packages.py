"""The pinned wheels of torch_npu and vllm-ascend, read as text, because they cannot be imported without an NPU."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "contracts"  # scripts/setup.sh


def read(file: str) -> str:
    """Return the text of a file in the wheels; the path starts at site-packages."""
    if not FOLDER.is_dir():
        pytest.skip(f"no wheels in {FOLDER}: scripts/setup.sh puts them there for the profile cpu")
    return (FOLDER / file).read_text()


def node(file: str, *path: str) -> Any:
    """Return the syntax tree of a class or function, found by its name and the names of its parents."""
    found: Any = ast.parse(read(file))
    for name in path:
        found = next(child for child in found.body if getattr(child, "name", None) == name)
    return found


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    """Return every call of a function with this last name."""
    for child in ast.walk(tree):
        if isinstance(child, ast.Call) and getattr(child.func, "attr", getattr(child.func, "id", None)) == name:
            yield child


def definitions(file: str, *names: str, inside: str | None = None) -> dict[str, Any]:
    """Return functions and tables of a vllm-ascend module without importing it."""
    tree = ast.parse(read(f"vllm_ascend/{file}"))
    body = tree.body
    if inside:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == inside).body
    wanted: list[ast.stmt] = []
    for node in body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        named = {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
        if named & set(names):
            wanted.append(node)
    namespace: dict[str, Any] = {"Any": Any, "Mapping": dict, "MappingProxyType": dict, "torch": torch}
    exec(compile(ast.Module(wanted, []), file, "exec"), namespace)
    return {name: namespace[name] for name in names}


def pins(lock: str) -> dict[str, str]:
    """Return package → version from a requirements file in scripts/."""
    lines = [line for line in (ROOT / "scripts" / lock).read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split("==") for line in lines)
