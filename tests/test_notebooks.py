import ast
import errno
import json
import os
import subprocess
import sys

import nbformat
import pytest
from click.testing import CliRunner
from conftest import ROOT

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


def test_all_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


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


def test_the_setup_cell_is_the_same_everywhere():
    assert len({_cells(path)[0].source for path in NOTEBOOKS}) == 1


def test_badges_and_setup_agree_with_the_one_address():
    import tomllib

    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner_and_name = address.removeprefix("https://github.com/")
    for path in NOTEBOOKS:
        link = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/"
        title = _cells(path, "markdown")[0].source
        assert f"{link}{path.name})" in title and "colab-badge.svg" in title
        assert f'url = "{address}"' in _cells(path)[0].source


# --- executed: minutes, run by `pytest -m slow` ---


@pytest.fixture(scope="session")
def headless(text_folder, tmp_path_factory):
    """`python -m musota run --profile tiny` on a folder of text, given by a relative path."""
    results = tmp_path_factory.mktemp("headless")
    corpus = os.path.relpath(text_folder, ROOT)
    done = _musota("run", "--profile", "tiny", "--corpus", corpus, "--save-to", results)
    assert done.returncode == 0, done.stdout + done.stderr
    return _only(results), done.stdout


def _only(results):
    """The one folder of results made there: named by its profile and what the text is."""
    (folder,) = results.glob("tiny-docs-*")
    return folder


def _musota(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "musota", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


RUNS = ("optimized", "baseline", "simplified", "simplified_twin")


@pytest.mark.slow
def test_every_run_leaves_its_measurements(headless):
    folder, _ = headless
    for name in RUNS:
        summary = json.loads((folder / f"{name}-seed0" / "summary.json").read_text())
        assert summary["finished"] and 1 < summary["ppl"] < 512 and 0 < summary["accuracy"] < 1
        assert {"word_ppl", "bits_per_byte", "test_ppl", "weights_sha256"} <= set(summary)
        for figure in ("curves", "training"):
            assert (folder / f"{name}-seed0" / f"{figure}.png").stat().st_size > 10_000
    sizes = {
        name: json.loads((folder / f"{name}-seed0" / "summary.json").read_text())["parameters"]
        for name in RUNS
    }
    assert abs(sizes["baseline"] / sizes["optimized"] - 1) < 0.02
    assert abs(sizes["simplified_twin"] / sizes["simplified"] - 1) < 0.05


@pytest.mark.slow
def test_validation_perplexity_falls_below_the_unigram(headless):
    folder, _ = headless
    rungs = json.loads((folder / "ladder.json").read_text())["ppl"]
    for name in RUNS:
        lines = (folder / f"{name}-seed0" / "metrics.jsonl").read_text().splitlines()
        ppl = [record["ppl"] for record in map(json.loads, lines) if record["kind"] == "epoch"]
        assert ppl[0] > ppl[1] > ppl[2] and ppl[2] < rungs["unigram"], name


@pytest.mark.slow
def test_every_notebook_records_what_it_found(headless):
    folder, _ = headless
    for name in NAMES:
        place = folder / "root_causes" if name == "06_root_causes" else folder
        found = json.loads((place / f"{name}.json").read_text())
        assert "findings" in found
    rules = [f["rule"] for f in json.loads((folder / "04_compare.json").read_text())["findings"]]
    assert "MU-SOTA optimized against its dense twin" in rules
    for figure in [
        "zipf",
        "ladder",
        "ledger_optimized",
        "layout_optimized",
        "causality_optimized",
        "ledger_baseline",
        "causality_baseline",
        "compare_curves",
        "compare_verdict",
        "layout_simplified",
        "sizes",
        "verdict_simplified",
        "explorer",
        "optimized-seed0/explorer",
        "optimized-seed0/blocks",
        *(f"root_causes/{name}" for name in ("root_causes", "clean_gap", "anneal", "ablations")),
    ]:
        assert (folder / f"{figure}.png").stat().st_size > 10_000, figure


@pytest.mark.slow
def test_the_grid_is_kept_and_judged(headless, text_folder):
    folder, _ = headless
    found = json.loads((folder / "root_causes" / "root_causes.json").read_text())
    (cause,) = found["causes"]
    assert cause["suspect"]["confidence"] == "60 %" and found["advice"]
    assert cause["verdict"] in ("cause", "not a cause", "undecided")
    kept = folder / "root_causes"
    losses = {
        (name, seed): json.loads((kept / f"{name}-seed{seed}" / "summary.json").read_text())
        for name in ("original", "learning_rate")
        for seed in (0, 1)
    }
    by_hand = sum(losses["learning_rate", s]["valid_loss"] - losses["original", s]["valid_loss"]
                  for s in (0, 1)) / 2  # fmt: skip
    assert cause["effect"]["mean"] == pytest.approx(by_hand)
    assert "Which suspect holds the model back?" in (folder / "README.md").read_text()
    before = {path: path.read_bytes() for path in kept.glob("*/metrics.jsonl")}
    probes = {path: path.read_bytes() for path in kept.glob("a*.json")}
    assert len(before) == 4 and len(probes) == 2
    done = _musota(
        "run", "--profile", "tiny", "--corpus", text_folder, "--save-to", folder.parent,
        "--only", "6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.read_bytes() for path in probes} == probes


@pytest.mark.slow
def test_the_command_ends_with_table_verdict_and_report(headless):
    folder, output = headless
    assert "dense baseline" in output and "against its dense twin" in output
    assert str(folder / "README.md") in output
    report = (folder / "README.md").read_text()
    assert "## Verdict" in report and "compare" not in report.split("## Measured")[0][:10]
    for name in RUNS:
        summary = json.loads((folder / f"{name}-seed0" / "summary.json").read_text())
        assert f"{summary['ppl']:.1f}" in report


@pytest.mark.slow
def test_run_again_trains_nothing_anew(headless, text_folder):
    folder, _ = headless
    before = {path: path.read_bytes() for path in folder.glob("*/metrics.jsonl")}
    done = _musota(
        "run", "--profile", "tiny", "--corpus", text_folder, "--save-to", folder.parent,
        "--only", "2",
    )  # fmt: skip
    assert done.returncode == 0 and "[1/1] 02_train_optimized" in done.stdout
    assert {path: path.read_bytes() for path in folder.glob("*/metrics.jsonl")} == before


@pytest.mark.slow
@pytest.mark.parametrize("where", ["root", "notebooks"])
def test_papermill_alone_works_from_the_root_and_from_notebooks(
    where, headless, text_folder, tmp_path
):
    folder, _ = headless
    cwd, prefix = (ROOT, "notebooks/") if where == "root" else (ROOT / "notebooks", "")
    parameters = {"profile": "tiny", "corpus": text_folder, "save_to": folder.parent}
    flags = [part for item in parameters.items() for part in ("-p", *map(str, item))]
    files = [f"{prefix}04_compare.ipynb", str(tmp_path / "out.ipynb")]
    command = [sys.executable, "-m", "papermill", *files, *flags]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert any("image/png" in str(cell.get("outputs")) for cell in cells)
    said = str([cell.get("outputs") for cell in cells])
    assert "Nobody can turn controls here" in said and "widget-view" not in said


@pytest.mark.slow
def test_a_missing_earlier_result_is_one_sentence(text_folder, tmp_path):
    done = _musota(
        "run", "--profile", "tiny", "--corpus", text_folder, "--save-to", tmp_path, "--only", "04"
    )
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(_only(tmp_path) / "executed" / "04_compare.ipynb", as_version=4)
    said = " ".join(str(cell.get("outputs", "")) for cell in executed.cells)
    assert "not yet trained" in said


@pytest.mark.slow
def test_an_unknown_parameter_is_an_error(text_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "notebooks/01_data.ipynb", tmp_path / "out.ipynb",
         "-p", "profil", "tiny"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Unknown notebook parameter 'profil': did you mean 'profile'?" in done.stderr


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
def test_mistakes_on_the_command_line_get_one_sentence(arguments, message, text_folder):
    if "--corpus" not in arguments:
        arguments = [*arguments, "--corpus", text_folder]
    done = _musota(*arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_failing_notebook_stops_the_run_and_is_named(headless, text_folder, tmp_path):
    folder = tmp_path / headless[0].name
    (folder / "optimized-seed0").mkdir(parents=True)
    (folder / "optimized-seed0" / "config.json").write_text("{broken")
    done = _musota("run", "--profile", "tiny", "--corpus", text_folder, "--save-to", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "02_train_optimized stopped in cell" in done.stderr and "cannot be read" in done.stderr
    assert str(folder / "executed" / "02_train_optimized.ipynb") in done.stderr
    assert "03_train_baseline" not in done.stdout


@pytest.mark.slow
def test_one_experiment_can_be_trained_alone(text_folder, tmp_path):
    done = _musota(
        "train", "simplified_twin", "--profile", "tiny", "--corpus", text_folder,
        "--save-to", tmp_path, "--seed", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((_only(tmp_path) / "simplified_twin-seed3" / "summary.json").read_text())
    assert summary["finished"]
    done = _musota("report", _only(tmp_path))
    assert done.returncode == 0 and "README.md" in done.stdout


def test_a_terminal_that_cannot_show_a_sign_shows_another():
    code = "import musota; print('a → b')"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                          capture_output=True)  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, b"a ? b"), done.stderr


def test_a_parameter_that_is_text_stays_text(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("musota.workbook.session.Workbook", lambda **given: asked.update(given))
    command = ["run", "-p", "corpus", "2024", "-p", "save_to", "007", "-p", "seed", "3"]
    CliRunner().invoke(cli.cli, command)
    assert (asked["corpus"], asked["save_to"], asked["seed"]) == ("2024", "007", 3)


@pytest.fixture
def one_cell(tmp_path, monkeypatch):
    """Runs a notebook of one cell where the kernel called python3 is none of ours."""
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

    return run


def test_the_kernel_is_this_python_and_its_death_is_a_sentence(one_cell):
    assert one_cell("import sys\nprint(sys.executable)") == sys.executable
    with pytest.raises(MusotaError, match="its kernel died or does not answer.*goes on from here"):
        one_cell("import os\nos._exit(1)")


def test_what_the_system_refuses_is_a_sentence_on_the_command_line(monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "/results/full")

    monkeypatch.setattr(cli, "cli", refused)
    with pytest.raises(SystemExit):
        cli.main()
    said = "/results/full cannot be used (Permission denied): choose another folder (save_to)."
    assert said in capsys.readouterr().err


def test_help_is_quick_and_imports_no_torch():
    code = "import sys, musota.__main__; assert 'torch' not in sys.modules, 'torch was imported'"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    done = _musota("--help")
    assert done.returncode == 0 and "report" in done.stdout


def test_public_names_are_what_they_say():
    import musota
    import musota.training

    for name in musota.__all__:
        assert getattr(musota, name) is not None
    assert callable(musota.train) and musota.experiments is experiments


def test_no_large_file_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        assert not (ROOT / name).exists() or (ROOT / name).stat().st_size < 1_000_000, name
