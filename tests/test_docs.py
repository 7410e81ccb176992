"""The documentation: its Python parses and runs; its commands, files, links and numbers exist."""

import ast
import re
import sys
from contextlib import ExitStack
from types import ModuleType
from unittest.mock import patch

import pytest
from conftest import ROOT

import musota
from musota.config import KINDS
from musota.data.sources import SOURCES
from musota.lab.profiles import scaled
from musota.models.hub import build_model
from musota.registry import REGISTRY, find_experiment
from musota.training.optim import OPTIMIZERS, SCHEDULES
from musota.workbook.cli import cli

PATHS = {path.name: path for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md")}
PAGES = {name: path.read_text("utf-8") for name, path in PATHS.items()}
BLOCK = re.compile(r"(<!-- runnable -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
PROSE = {name: BLOCK.sub("", page) for name, page in PAGES.items()}
FILE = re.compile(r"`(?:python )?((?:[\w.]+/)+[\w.]+\.(?:py|csv|json|ipynb))\b")
COMMAND = re.compile(r"(?:^|-m |&& )musota (\w+)([^\n#&]*)", re.MULTILINE)


def blocks(name: str, language: str, runnable: bool = False) -> list[str]:
    found = BLOCK.findall(PAGES[name])
    return [code for marked, kind, code in found if kind == language and (marked or not runnable)]


def anchors(name: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", PROSE[name].lower(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def rows(columns: int) -> dict[str, list[str]]:
    """Rows of the tables with so many columns in docs/model.md, by first cell."""
    lines = re.findall(r"^\| (.*) \|$", PAGES["model.md"], re.MULTILINE)
    cells = [[cell.strip(" `").replace(",", "") for cell in line.split("|")] for line in lines]
    return {first: rest for first, *rest in cells if len(rest) == columns - 1}


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_parse_and_runnable_ones_run(name, monkeypatch, tmp_path, short):
    for code in blocks(name, "python"):
        ast.parse(code)
    page = ModuleType("musota.models.shared")  # the file in which developing.md puts its model
    monkeypatch.setitem(sys.modules, page.__name__, page)
    monkeypatch.chdir(tmp_path)
    with ExitStack() as restored:
        for table in (KINDS, OPTIMIZERS, REGISTRY, SCHEDULES, SOURCES):
            restored.enter_context(patch.dict(table))
        for code in blocks(name, "python", runnable=True):
            exec(compile(code, name, "exec"), vars(page))
        if name == "developing.md":
            check_added_rows(short)


def check_added_rows(short):
    """What developing.md adds works: a corpus, an optimizer, a schedule, an architecture."""
    assert set(SOURCES["my-notes"]()[1]) == {"train", "valid", "test"}
    experiment = scaled("shared", "tiny", epochs=1, optimizer="nadam", schedule="linear")
    run = musota.train(experiment, short, "run")
    assert run.finished and musota.Run("run").experiment == experiment  # read again by its kind
    held = sum(parameter.numel() for parameter in run.load_model().parameters())
    assert held == experiment.model.n_parameters and SCHEDULES["linear"](0.25) == 0.75
    with pytest.raises(musota.MusotaError, match="Unknown optimizer 'nada': did you mean 'nadam'"):
        musota.train(experiment.with_(optimizer="nada"), short, "other")


@pytest.mark.parametrize("name", PAGES)
def test_commands_options_files_and_links_exist(name):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", PROSE[name]):
        to, _, anchor = target.partition("#")
        linked = PATHS[name].parent / to if to else PATHS[name]
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.name), target
    if name == "log.md":  # it has commands and files of older commits
        return
    for path in FILE.findall(PAGES[name]):
        assert (ROOT / path).exists() or (ROOT / "musota" / path).exists(), path
    spans = re.findall(r"`([^`\n]+)`", PROSE[name])
    for command, rest in COMMAND.findall("\n".join([*blocks(name, "sh"), *spans])):
        assert command in cli.commands, f"musota {command}"
        parameters = cli.commands[command].params
        known = {o for p in parameters for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)) <= known, f"musota {command}{rest}"


def test_links_of_executed_notebooks_exist():
    for path in (executed := [*ROOT.glob("results/*/executed/*.ipynb")]):
        for target in re.findall(r"\]\(([\w./]+\.ipynb)\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path}: {target}"
    assert executed


def test_parameter_tables_equal_the_built_models():
    documented = rows(columns=4)
    for column, name in enumerate(("optimized", "simplified")):
        built = build_model(find_experiment(name).model).parameter_ledger()
        built["total"] = sum(built.values())
        assert {group: int(documented[group][column]) for group in built} == built
    for name in ("original", "optimized", "simplified", "redesigned"):
        experiment = find_experiment(name)
        models = experiment.model, musota.twin(experiment).model
        built = [(model.n_parameters, round(model.flops_per_token / 1e6, 1)) for model in models]
        count, flops, _, matched_count, matched_flops = rows(columns=6)[name]
        assert [(int(count), float(flops)), (int(matched_count), float(matched_flops))] == built
