"""The structure of the package: imports go one way, and files, classes and functions stay small."""

import ast
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import musota
from musota.config import KINDS, DenseConfig
from musota.data import sources
from musota.models.dense import DenseTransformer
from musota.models.hub import ARCHITECTURES
from musota.training.optim import OPTIMIZERS, SCHEDULES

PACKAGE = ROOT / "musota"
FILES = sorted(PACKAGE.rglob("*.py"))
EXPORTS = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}  # these know every layer
LAYERS = ("core", "lab", "workbook")  # each imports itself and those before it
NOT_IN_CORE = {"matplotlib", "ipywidgets", "IPython", "click", "papermill", "jinja2"}
NOT_IN_LAB = NOT_IN_CORE - {"matplotlib"}


def layer_of(module: str) -> int:
    """The position in LAYERS of a module, given as "musota.lab.audit"."""
    part = [*module.split("."), ""][1]
    return LAYERS.index(part) if part in LAYERS else 0


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it, and modules that it names in a string."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = node.value.partition(":")[0]
            if named.startswith("musota.") and named.replace(".", "").isidentifier():
                names.add(named)
    return names


@pytest.mark.parametrize("path", [p for p in FILES if p not in EXPORTS], ids=module_of)
def test_imports_go_one_way(path):
    own = module_of(path)
    layer = layer_of(own)
    kept_out = (NOT_IN_CORE, NOT_IN_LAB, set())[layer]
    for name in imported(path):
        package, part = [*name.split("."), ""][:2]
        assert package not in kept_out, f"{own} imports {name}"
        if package != "musota":
            continue
        assert part or own == "musota.workbook.run_notebooks", f"{own} imports all of musota"
        assert layer_of(name) <= layer, f"{own} imports {name}"


@pytest.mark.parametrize("package", ["musota", "musota.lab", "musota.workbook"])
def test_exports_exist_and_no_module_is_named_like_one(package):
    module = import_module(package)
    modules = {path.stem for path in Path(module.__file__).parent.iterdir()}
    assert not modules & set(module._MODULE_OF)
    assert all(getattr(module, name) is not None for name in module._MODULE_OF)


def lines_of(node: ast.AST) -> int:
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return node.end_lineno - first + 1


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_classes_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 380
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert lines_of(node) <= 200, node.name
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert lines_of(node) <= 60, node.name
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert len(arguments) <= 12, node.name


def test_the_package_and_its_tests_stay_small():
    def lines(paths):
        return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)

    assert lines(FILES) <= 8300
    assert lines((ROOT / "tests").glob("*.py")) <= 4800


@dataclass(frozen=True)
class ToyConfig(DenseConfig):
    """An architecture of the user's own, with a field of its own."""

    window: int = 3


class Toy(DenseTransformer):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        assert config.window == 3


def test_a_corpus_an_optimizer_a_schedule_and_an_architecture_are_a_row_each(
    text_folder, tmp_path, monkeypatch
):
    read, plain = sources._read_folder, torch.optim.SGD
    monkeypatch.setitem(sources.SOURCES, "notes", lambda: ("my notes", read(text_folder)))
    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda groups, _: plain(groups, lr=0.0))
    monkeypatch.setitem(SCHEDULES, "linear", lambda progress: 1 - progress)
    monkeypatch.setitem(KINDS, "toy", ToyConfig)
    monkeypatch.setitem(ARCHITECTURES, ToyConfig, f"{__name__}:Toy")

    corpus = musota.load_corpus("notes", 300).limited(4000, 1200)
    model = ToyConfig(vocab_size=300, max_seq_len=24, n_layer=1, d_model=32, n_head=2)
    training = musota.TrainConfig(1, 0.1, 2, 32, 1, optimizer="sgd", schedule="linear")
    experiment = musota.Experiment(model, training)
    run = musota.train(experiment, corpus, tmp_path / "toy")
    assert run.finished and run.config["corpus"]["name"] == "notes"
    assert musota.Run(tmp_path / "toy").experiment == experiment  # read again by its kind
    assert isinstance(run.load_model(), Toy)
    falling = run.steps[run.steps.step >= 2].learning_rate
    np.testing.assert_allclose(np.diff(falling, 2), 0, atol=1e-9)
    with pytest.raises(musota.MusotaError, match="Unknown optimizer 'sgdd': did you mean 'sgd'"):
        musota.train(experiment.with_(optimizer="sgdd"), corpus, tmp_path / "other")
