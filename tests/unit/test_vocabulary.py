"""Names that neither help a reader nor can be searched for are absent, tests included; a class name is defined once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import ROOT

VAGUE = {
    "Place",
    "WAYS",
    "Way",
    "asked",
    "at",
    "found",
    "given",
    "here",
    "kept",
    "place",
    "said",
    "there",
    "told",
    "way",
}
FOLDERS = ("sgtm", "kernels", "benchmarks", "examples", "tests")
# Class names that several modules may define.
SHARED = {
    "Config": "the schema's, and inside a class of torchtitan what builds it, which torchtitan finds by this name",
    "Tile": "the launch parameters of an op's kernels: each op has its own, chosen by its own tuned table",
    "_Step": "the AdamW step of a backend: the backends of an op have the same names",
}


def names(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that the source defines or assigns to."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.alias(asname=str(name)):
                yield node.lineno, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_vague_names_are_absent(folder):
    files: list[Path] = sorted((ROOT / folder).rglob("*.py"))
    vague = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in files
        for line, name in names(file.read_text("utf-8"))
        if name in VAGUE
    ]
    assert files and vague == []


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "for at in []: pass",
        "def f(kept): pass",
        "def said(): pass",
        "self.found = 1",
        "lambda there: 1",
        "import os as at",
        "try: pass\nexcept OSError as said: pass",
        "if (kept := 1): pass",
    ],
)
def test_every_binding_is_seen(source):
    assert VAGUE & {name for _, name in names(source)}


def test_a_class_name_is_defined_once():
    files_of: dict[str, set[str]] = {}
    for folder in ("sgtm", "kernels", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    files_of.setdefault(node.name, set()).add(file.relative_to(ROOT).as_posix())
    several = {name: files for name, files in files_of.items() if len(files) > 1}
    assert {name: files for name, files in several.items() if name not in SHARED} == {}
    assert several.keys() == SHARED.keys(), "a name that only one module defines needs no exception"
