import ast
import errno
import json
import os
import subprocess
import sys
import tomllib

import nbformat
import pytest
from click.testing import CliRunner
from conftest import ROOT

import musota
from musota.errors import MusotaError
from musota.plan.registry import experiments
from musota.workbook import cli
from musota.workbook.headless import TAKES_RUNS, _execute
from musota.workbook.session import PARAMETERS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "01_data", "02_train_optimized", "03_train_baseline", "04_compare", "05_simplify",
    "06_root_causes", "07_redesign", "08_your_model",
]  # fmt: skip


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
    assert len(lines) <= 100
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0] is code[1]
    assigned = {
        statement.targets[0].id: ast.literal_eval(statement.value)  # fails unless a literal
        for statement in ast.parse(tagged[0].source).body
    }
    assert tuple(assigned) == PARAMETERS + (("runs",) if path.stem == TAKES_RUNS else ())


def test_setup_is_the_same_everywhere_and_badges_agree_with_the_one_address():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner_and_name = address.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/"
    assert [path.stem for path in NOTEBOOKS] == NAMES
    for path in NOTEBOOKS:
        title = _cells(path, "markdown")[0].source
        assert f"{link}{path.name})" in title and "colab-badge.svg" in title
    (setup,) = {_cells(path)[0].source for path in NOTEBOOKS}
    assert f'url = "{address}"' in setup


# --- executed: minutes, run by `pytest -m slow` ---

RUNS = ("optimized", "baseline", "simplified", "simplified_twin")


def _musota(*arguments, module="musota", cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def _only(results):
    """The one folder of results made there: named by its profile and what the text is."""
    (folder,) = results.glob("tiny-docs-*")
    return folder


@pytest.fixture(scope="session")
def headless(text_folder, tmp_path_factory):
    """`python -m musota run --profile tiny` on a folder of text, given by a relative path."""
    results = tmp_path_factory.mktemp("headless")
    corpus = os.path.relpath(text_folder, ROOT)
    done = _musota("run", "--profile", "tiny", "--corpus", corpus, "--save-to", results)
    assert done.returncode == 0, done.stdout + done.stderr
    return _only(results), done.stdout


def _read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_run_learns_and_leaves_its_measurements(headless):
    folder, output = headless
    report, rungs = (folder / "README.md").read_text(), _read(folder / "ladder.json")["ppl"]
    summaries = {name: _read(folder / f"{name}-seed0" / "summary.json") for name in RUNS}
    for name, summary in summaries.items():
        assert summary["finished"] and 0 < summary["accuracy"] < 1
        assert {"word_ppl", "bits_per_byte", "test_ppl", "weights_sha256"} <= set(summary)
        lines = (folder / f"{name}-seed0" / "metrics.jsonl").read_text().splitlines()
        ppl = [record["ppl"] for record in map(json.loads, lines) if record["kind"] == "epoch"]
        assert ppl[0] > ppl[1] > ppl[2] > 1 and ppl[2] < rungs["unigram"], name
        assert f"{summary['ppl']:.1f}" in report
    sizes = {name: summary["parameters"] for name, summary in summaries.items()}
    assert abs(sizes["baseline"] / sizes["optimized"] - 1) < 0.02
    assert abs(sizes["simplified_twin"] / sizes["simplified"] - 1) < 0.05
    for said in ("dense baseline", "against its dense twin", str(folder / "README.md")):
        assert said in output
    assert "## Verdict" in report and "Which suspect holds the model back?" in report


@pytest.mark.slow
def test_every_notebook_records_what_it_found(headless):
    folder, _ = headless
    found = {
        name: _read(folder / ("root_causes" if name[:2] == "06" else "") / f"{name}.json")
        for name in NAMES
    }
    rules = [finding["rule"] for finding in found["04_compare"]["findings"]]
    assert "MU-SOTA optimized against its dense twin" in rules
    drawn = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.png")}
    assert all(path.stat().st_size > 10_000 for path in drawn.values())
    for name in ("explorer", "root_causes/anneal", "optimized-seed0/blocks", "compare_verdict"):
        assert f"{name}.png" in drawn


@pytest.mark.slow
def test_the_grid_is_kept_and_judged(headless, text_folder):
    kept = headless[0] / "root_causes"
    found = _read(kept / "root_causes.json")
    (cause,) = found["causes"]
    assert cause["suspect"]["confidence"] == "60 %" and found["advice"]
    assert cause["verdict"] in ("cause", "not a cause", "undecided")
    base, mended = (
        sum(_read(kept / f"{name}-seed{n}" / "summary.json")["valid_loss"] for n in (0, 1)) / 2
        for name in ("original", "learning_rate")
    )
    assert cause["effect"]["mean"] == pytest.approx(mended - base)


@pytest.mark.slow
def test_run_again_trains_and_measures_nothing_anew(headless, text_folder):
    folder, _ = headless
    before = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    before |= {path: path.read_bytes() for path in folder.glob("root_causes/a*.json")}
    where = ["--corpus", text_folder, "--save-to", folder.parent]
    done = _musota("run", "--profile", "tiny", *where, "--only", "2,6")
    assert done.returncode == 0 and "[1/2] 02_train_optimized" in done.stdout, done.stderr
    assert len(before) > 6 and {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("cwd", [ROOT, ROOT / "notebooks"], ids=["root", "notebooks"])
def test_papermill_alone_works_from_the_root_and_from_notebooks(
    cwd, headless, text_folder, tmp_path
):
    parameters = {"profile": "tiny", "corpus": text_folder, "save_to": headless[0].parent}
    flags = [part for item in parameters.items() for part in ("-p", *map(str, item))]
    notebook = os.path.relpath(ROOT / "notebooks" / "04_compare.ipynb", cwd)
    done = _musota(notebook, tmp_path / "out.ipynb", *flags, module="papermill", cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    said = str([cell.get("outputs") for cell in _cells(tmp_path / "out.ipynb")])
    assert "Nobody can turn controls here" in said and "widget-view" not in said
    assert "image/png" in said
    done = _musota(
        notebook, tmp_path / "no.ipynb", "-p", "profil", "x", module="papermill", cwd=cwd
    )
    assert done.returncode != 0
    assert "Unknown notebook parameter 'profil': did you mean 'profile'?" in done.stderr


@pytest.mark.slow
def test_a_missing_earlier_result_is_one_sentence(text_folder, tmp_path):
    where = ["--corpus", text_folder, "--save-to", tmp_path]
    done = _musota("run", "--profile", "tiny", *where, "--only", "04")
    assert done.returncode == 0, done.stderr
    assert "not yet trained" in (_only(tmp_path) / "executed" / "04_compare.ipynb").read_text()


@pytest.mark.slow
def test_a_failing_notebook_stops_the_run_and_is_named(headless, text_folder, tmp_path):
    folder = tmp_path / headless[0].name
    (folder / "optimized-seed0").mkdir(parents=True)
    (folder / "optimized-seed0" / "config.json").write_text("{broken")
    done = _musota("run", "--profile", "tiny", "--corpus", text_folder, "--save-to", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "02_train_optimized stopped in cell" in done.stderr and "is damaged" in done.stderr
    assert str(folder / "executed" / "02_train_optimized.ipynb") in done.stderr
    assert "03_train_baseline" not in done.stdout


# --- the command line ---


@pytest.fixture
def refused(monkeypatch, capsys):
    """What `python -m musota` says when it refuses its arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["musota", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        (said,) = capsys.readouterr().err.strip().splitlines()
        return said

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "tinny"], "Unknown profile 'tinny': did you mean 'tiny'?"),
        (["run", "--corpus", "wikitext"], "Unknown corpus 'wikitext': did you mean 'wikitext-2'?"),
        (["run", "-p", "sed", "1"], "Unknown notebook parameter 'sed': did you mean 'seed'?"),
        (["run", "--only", "9"], "Unknown notebook number '09'"),
        (["run", "-p", "seed", "-3"], "seed must be a whole number from 0 to 2147483647, not -3."),
        (["train", "optimised"], "Unknown experiment 'optimised': did you mean 'optimized'?"),
        (["train", "optimized", "--save-to", "/dev/null/x"], "cannot be used"),
    ],
)
def test_mistakes_on_the_command_line_get_one_sentence(arguments, message, text_folder, refused):
    if "--corpus" not in arguments:
        arguments = [*arguments, "--corpus", text_folder]
    assert message in refused(*arguments)


def test_what_the_system_refuses_is_a_sentence_on_the_command_line(monkeypatch, refused):
    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "/results/full")

    monkeypatch.setattr(cli, "cli", forbidden)
    said = "/results/full cannot be used (Permission denied): choose another folder (save_to)."
    assert said in refused()


def test_a_terminal_that_cannot_show_a_sign_shows_another():
    code = "import musota; print('a → b')"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment)
    assert said.strip() == b"a ? b"


def test_a_parameter_that_is_text_stays_text(monkeypatch):
    asked = {}
    monkeypatch.setattr("musota.workbook.session.Workbook", lambda **given: asked.update(given))
    command = ["run", "-p", "corpus", "2024", "-p", "save_to", "007", "-p", "seed", "3"]
    CliRunner().invoke(cli.cli, command)
    assert (asked["corpus"], asked["save_to"], asked["seed"]) == ("2024", "007", 3)


def test_the_kernel_is_this_python_and_its_death_is_a_sentence(tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    other = {"argv": ["/bin/false"], "display_name": "another Python", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))

    def run(source):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(notebook, tmp_path / "in.ipynb")
        _execute(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {}, "")
        return _cells(tmp_path / "out.ipynb")[0].outputs[0].text.strip()

    assert run("import sys\nprint(sys.executable)") == sys.executable
    with pytest.raises(MusotaError, match="its kernel died or does not answer.*goes on from here"):
        run("import os\nos._exit(1)")


def test_help_is_quick_and_imports_no_torch():
    code = "import sys, musota.__main__; assert 'torch' not in sys.modules, 'torch was imported'"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert "report" in CliRunner().invoke(cli.cli, ["--help"]).output


def test_public_names_are_what_they_say():
    for name in musota.__all__:
        assert getattr(musota, name) is not None
    assert callable(musota.train) and musota.experiments is experiments


def test_no_large_file_is_committed():
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        assert not (ROOT / name).exists() or (ROOT / name).stat().st_size < 1_000_000, name
