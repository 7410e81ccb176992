import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT

import musota
from musota.errors import MusotaError
from musota.lab.grid_runs import print_run
from musota.workbook import run_notebooks
from musota.workbook.notebook import PARAMETERS, refuse_unknown_parameters
from musota.workbook.results import Results

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUNS = ("optimized", "baseline", "simplified", "simplified_twin", "redesigned", "modern_twin")


def _cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean(path):
    raw = json.loads(path.read_text())
    assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 5)
    nbformat.validate(raw)
    assert raw["metadata"]["accelerator"] == "GPU"
    assert raw["metadata"]["colab"] == {"gpuType": "T4", "provenance": []}
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in raw["metadata"]
    assert len({cell["id"] for cell in raw["cells"]}) == len(raw["cells"])
    code = _cells(path)
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    trees = [ast.parse(cell.source) for cell in code]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    for package in ("musota", r"musota\.lab", r"musota\.workbook"):
        assert len([line for line in lines if re.match(rf"from {package} import", line)]) <= 1
    setup, parameters = code[:2]
    assert code[-1].id == "headline" and "show_card(" in code[-1].source
    assert setup.metadata == {"jupyter": {"source_hidden": True}, "cellView": "form"}
    assert parameters.metadata.tags == ["parameters"]
    assigned = {
        statement.targets[0].id: ast.literal_eval(statement.value)  # fails unless a literal
        for statement in ast.parse(parameters.source).body
    }
    extra = ("runs",) if path.stem == run_notebooks.COMPARES_RUNS else ()
    assert tuple(assigned) == PARAMETERS + extra


def test_setup_is_the_same_everywhere_and_badges_agree_with_the_one_address():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner_and_name = address.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/"
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"0{n}" for n in range(1, 9)]
    for path in NOTEBOOKS:
        title = _cells(path, "markdown")[0].source
        assert f"{link}{path.name})" in title and "colab-badge.svg" in title
    (setup,) = {_cells(path)[0].source for path in NOTEBOOKS}
    assert f'url = "{address}"' in setup


def test_parameters_are_known_however_they_are_assigned(monkeypatch):
    for own in (
        "import os\nprofile: str = 'a'\nseed: int = os.getpid()",
        "profile, seed = 'a', 0\nprint(profile)",
        "# Parameters\nprofile = 'a'\nseed = 0",  # as a person may title it
    ):
        shell = type("Shell", (), {"user_ns": {"In": ["", "import sys", own, ""]}})()
        monkeypatch.setattr("musota.workbook.notebook.get_ipython", lambda shell=shell: shell)
        refuse_unknown_parameters()
        shell.user_ns["In"][3] = "# Parameters\nprofile = 'b'\nseed = 1\n"
        refuse_unknown_parameters()
        shell.user_ns["In"][3] = "# Parameters\nprofil = 'b'\n"
        with pytest.raises(MusotaError, match="parameter 'profil': did you mean 'profile'"):
            refuse_unknown_parameters()


def test_errors_of_a_notebook_are_sentences_but_not_those_of_the_users_own_code(tmp_path):
    source = f"""
from musota.workbook.show import show_errors_as_sentences
show_errors_as_sentences()
_ = get_ipython().run_cell("open({str(tmp_path / "no")!r})")
_ = get_ipython().run_cell("def mine(): raise ConnectionError(7)\\nmine()")
"""
    shell = [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", source]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(shell, capture_output=True, text=True, env=here).stdout
    sentence, mine = shown.split("\n", 1)
    assert sentence.endswith("no cannot be used (No such file or directory): check the path.")
    assert "def mine()" in mine and mine.strip().endswith("ConnectionError: 7")


def test_the_progress_of_notebooks_is_relayed(capsys):
    row = SimpleNamespace(name="original", seed=0, diverged=False, best_valid_loss=5.0)
    print_run(row, {"original": {0: row}}, 0)
    run_notebooks._Relay().write(f"tables\n10 tokens/s\n{capsys.readouterr().out}")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_kernel_is_this_python_and_its_death_is_a_sentence(tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    other = {"argv": ["/bin/false"], "display_name": "another Python", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))

    def run(source):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(notebook, tmp_path / "in.ipynb")
        run_notebooks.execute(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {}, "")
        return _cells(tmp_path / "out.ipynb")[0].outputs[0].text.strip()

    assert run("import sys\nprint(sys.executable)") == sys.executable
    with pytest.raises(MusotaError, match="its kernel died or does not answer.*to continue"):
        run("import os\nos._exit(1)")


# --- executed: minutes, run by `pytest -m slow` ---


def _musota(*arguments, module="musota", cwd=ROOT, path=str(ROOT)):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


@pytest.fixture(scope="session")
def headless(text_folder, tmp_path_factory):
    """`musota run --profile tiny` on a folder of text, given by a relative path."""
    results = tmp_path_factory.mktemp("headless")
    corpus = os.path.relpath(text_folder, ROOT)
    done = _musota("run", "--profile", "tiny", "--corpus", corpus, "--save-to", results)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = results.glob("tiny-docs-*")  # named by its profile and its text
    return folder, done.stdout


@pytest.mark.slow
def test_every_run_learns_and_is_reported(headless):
    folder, output = headless
    report = (folder / "README.md").read_text()
    ngrams = Results(folder).ngrams
    runs = {run.name: run for run in musota.load_runs(folder)}
    for name in RUNS:
        run = runs[name]
        assert run.finished and 0 < run.summary["accuracy"] < 1
        assert run.history.ppl.iloc[-1] < ngrams["unigram"]
        assert f"{run.summary['ppl']:,.1f}" in report and run.title in output
    assert len([name for name in runs if "@" in name]) == 2  # a module and its transformer
    assert str(folder / "report.html") in output
    for number in range(1, 9):  # a headline each
        assert re.search(rf"^0{number}  ([✓✗?=] )?.+[:?] .+", output, re.MULTILINE), output
    assert len((folder / "grid.csv").read_text().splitlines()) == 5
    assert (runs["redesigned"].path / "ablations.json").exists()
    drawn = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.png")}
    assert all(path.stat().st_size > 3_000 for path in drawn.values())
    assert {"figures/explorer.png", "root_causes.png", "optimized-seed0/blocks.png"} <= {*drawn}
    executed = "".join(path.read_text("utf-8") for path in folder.glob("executed/*.ipynb"))
    assert not re.search(r'"(papermill|execution|widgets)": {', executed)


@pytest.mark.slow
def test_run_again_trains_nothing_anew(headless, text_folder):
    folder, _ = headless
    files = [*folder.rglob("metrics.jsonl"), *folder.glob("*.csv")]
    before = {path: path.read_bytes() for path in files}
    where = ["--corpus", text_folder, "--save-to", folder.parent]
    done = _musota("run", "--profile", "tiny", *where, "--only", "2,6")
    assert done.returncode == 0 and "[1/2] 02_train_optimized" in done.stdout, done.stderr
    assert len(before) > 8 and {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_papermill_works_from_any_folder(headless, text_folder, tmp_path):
    parameters = {"profile": "tiny", "corpus": text_folder, "save_to": headless[0].parent}
    flags = [part for item in parameters.items() for part in ("-p", *map(str, item))]
    notebook, out = ROOT / "notebooks" / "04_compare.ipynb", tmp_path / "out.ipynb"
    given = [notebook, out, "-k", "python3", "-p", "runs", "optimized"]
    done = _musota(*given, *flags, module="papermill", cwd=tmp_path, path="")
    assert done.returncode == 0, done.stderr[-2000:]
    shown = str([cell.get("outputs") for cell in _cells(out)])
    assert "image/png" in shown and "widget-view" not in shown
    assert not (tmp_path / "mu-sota-workbook").exists()
    done = _musota(*given[:4], "-p", "profil", "x", module="papermill", cwd=tmp_path, path="")
    assert done.returncode != 0
    assert "Unknown notebook parameter 'profil': did you mean 'profile'?" in done.stderr


@pytest.mark.slow
def test_a_failing_notebook_is_a_sentence(headless, text_folder, tmp_path):
    where = ["--profile", "tiny", "--corpus", text_folder, "--save-to", tmp_path]
    folder = tmp_path / headless[0].name
    (folder / "optimized-seed0").mkdir(parents=True)
    (folder / "optimized-seed0" / "config.json").write_text("{broken")
    done = _musota("run", *where)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "02_train_optimized stopped in cell" in done.stderr and "is damaged" in done.stderr
    assert str(folder / "executed" / "02_train_optimized.ipynb") in done.stderr
    assert "03_train_baseline" not in done.stdout
