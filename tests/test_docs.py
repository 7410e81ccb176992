"""The documentation: its Python parses and runs; its commands, files, links and numbers exist."""

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from musota.config import KINDS
from musota.data.sources import SOURCES
from musota.lab.profiles import scaled
from musota.matching import twin
from musota.models.hub import ARCHITECTURES, build_model
from musota.registry import REGISTRY, find_experiment
from musota.training.optim import OPTIMIZERS, SCHEDULES
from musota.workbook.cli import cli

ROOT = Path(__file__).parents[1]
PATHS = [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
PAGES = {path.name: path.read_text("utf-8") for path in PATHS}
CURRENT = sorted(PAGES.keys() - {"log.md"})  # the log has commands of older commits
BLOCK = re.compile(r"(<!-- runnable -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
FILE = re.compile(r"`(?:python )?((?:[\w.]+/)+[\w.]+\.(?:py|csv|json|ipynb))\b")
COMMAND = re.compile(r"(?:^|-m |&& )musota (\w+)([^\n#&]*)", re.MULTILINE)


def blocks(name: str, language: str, runnable: bool = False) -> list[str]:
    found = BLOCK.findall(PAGES[name])
    return [code for marked, kind, code in found if kind == language and (marked or not runnable)]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(columns: int) -> dict[str, list[str]]:
    """Rows of the tables with so many columns in docs/model.md, by first cell."""
    lines = re.findall(r"^\| (.*) \|$", PAGES["model.md"], re.MULTILINE)
    cells = [[cell.strip(" `").replace(",", "") for cell in line.split("|")] for line in lines]
    return {first: rest for first, *rest in cells if len(rest) == columns - 1}


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_parse(name):
    for code in blocks(name, "python"):
        ast.parse(code)


@pytest.mark.parametrize("name", [name for name in PAGES if blocks(name, "python", True)])
def test_runnable_blocks_run(name, monkeypatch, tmp_path):
    tables = ARCHITECTURES, KINDS, OPTIMIZERS, REGISTRY, SCHEDULES, SOURCES
    before = [dict(table) for table in tables]
    page = ModuleType("musota.models.shared")  # the file in which developing.md puts its model
    monkeypatch.setitem(sys.modules, page.__name__, page)
    monkeypatch.chdir(tmp_path)
    try:
        for code in blocks(name, "python", runnable=True):
            exec(compile(code, name, "exec"), vars(page))
        if name == "developing.md":
            check_added_rows()
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)


def check_added_rows():
    """What developing.md adds works: a corpus, an optimizer, a schedule, an architecture."""
    config = scaled("shared", "tiny").model
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters
    assert OPTIMIZERS["nadam"](model.optimizer_groups(0.01), False).param_groups
    assert SCHEDULES["linear"](0.25) == 0.75
    assert set(SOURCES["my-notes"]()[1]) == {"train", "valid", "test"}


@pytest.mark.parametrize("name", CURRENT)
def test_commands_and_options_exist(name):
    spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", PAGES[name]))
    for command, rest in COMMAND.findall("\n".join([*blocks(name, "sh"), *spans])):
        assert command in cli.commands, f"musota {command}"
        parameters = cli.commands[command].params
        known = {o for p in parameters for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)) <= known, f"musota {command}{rest}"


@pytest.mark.parametrize("name", CURRENT)
def test_named_files_exist(name):
    for path in FILE.findall(PAGES[name]):
        assert (ROOT / path).exists() or (ROOT / "musota" / path).exists(), path


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_links_resolve(path):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", BLOCK.sub("", PAGES[path.name])):
        to, _, anchor = target.partition("#")
        linked = path.parent / to if to else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_parameter_tables_equal_the_built_models():
    documented = rows(columns=4)
    for column, name in enumerate(("optimized", "simplified")):
        built = build_model(find_experiment(name).model).parameter_ledger()
        built["total"] = sum(built.values())
        assert {group: int(documented[group][column]) for group in built} == built


@pytest.mark.parametrize("name", ["original", "optimized", "simplified", "redesigned"])
def test_matched_models_are_as_documented(name):
    experiment = find_experiment(name)
    models = experiment.model, twin(experiment).model
    built = [(model.n_parameters, round(model.flops_per_token / 1e6, 1)) for model in models]
    count, flops, _, matched_count, matched_flops = rows(columns=6)[name]
    assert [(int(count), float(flops)), (int(matched_count), float(matched_flops))] == built
