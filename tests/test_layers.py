"""The structure of the package: imports go one way, and everything stays small."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "musota"
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
EXPORTS = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}  # these know every layer
LAYERS = ("core", "lab", "workbook")  # each imports itself and those before it
NOT_IN_CORE = {"matplotlib", "ipywidgets", "IPython", "click", "papermill", "jinja2"}
KEPT_OUT = (NOT_IN_CORE, NOT_IN_CORE - {"matplotlib"}, set())


def layer_of(module: str) -> int:
    """The position in LAYERS of a module, given as "musota.lab.audit"."""
    part = [*module.split("."), ""][1]
    return LAYERS.index(part) if part in LAYERS else 0


def imported(tree: ast.AST) -> set[str]:
    """Modules that a file imports, anywhere in it, and modules that it names in a string."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.level == 0, names
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = node.value.partition(":")[0]
            if named.startswith("musota.") and named.replace(".", "").isidentifier():
                names.add(named)
    return names


def test_imports_go_one_way():
    for path in TREES.keys() - EXPORTS:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imported(TREES[path]):
            package, part = [*name.split("."), ""][:2]
            assert package not in KEPT_OUT[layer_of(own)], f"{own} imports {name}"
            whole = package == "musota" and not part and own != "musota.workbook.run_notebooks"
            assert not whole, f"{own} imports all of musota"
            assert package != "musota" or layer_of(name) <= layer_of(own), f"{own} imports {name}"


@pytest.mark.parametrize("package", ["musota", "musota.lab", "musota.workbook"])
def test_exports_exist_and_no_module_is_named_like_one(package):
    module = import_module(package)
    modules = {path.stem for path in Path(module.__file__).parent.iterdir()}
    assert not modules & set(module._MODULE_OF)
    assert all(getattr(module, name) is not None for name in module._MODULE_OF)


def test_files_classes_functions_and_the_whole_stay_small():
    lines = {path: path.read_text("utf-8").count("\n") for path in TREES}
    tests = sum(path.read_text("utf-8").count("\n") for path in (ROOT / "tests").glob("*.py"))
    assert max(lines.values()) <= 380 and sum(lines.values()) <= 9121 and tests <= 5700
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            limit = 200 if isinstance(node, ast.ClassDef) else 60
            assert node.end_lineno - first < limit, node.name
