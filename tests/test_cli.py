"""A researcher's own experiments: changed, named, continued, copied, compared, scored."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT, in_a_process, interrupted_at

import musota
from musota.errors import MusotaError
from musota.lab import sweep
from musota.lab.grid_runs import add_row, read_table
from musota.lab.profiles import PROFILES, scaled
from musota.workbook import cli, evidence, notebook
from musota.workbook.naming import results_root, safe_name
from musota.workbook.notebook import Interrupted, Workbook
from musota.workbook.saved_copy import SavedCopy

FAST = {"max_seq_len": 24, "n_layer": 1, "warmup_steps": 5, "batch_size": 32}  # seconds a run
NAME = "optimized,max_seq_len=24,n_layer=1,warmup_steps=5,batch_size=32"
LONGER = NAME.replace("warmup", "epochs=4,warmup")


@pytest.fixture(scope="module")
def made(text_folder, tmp_path_factory):
    """Makes workbooks on one results folder."""
    base = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("musota.workbook.naming.results_root", lambda: base)
        yield lambda **changes: Workbook("tiny", str(text_folder), changes=FAST | changes)


@pytest.fixture(scope="module")
def results(made):
    """A results folder with a model, a longer one, and the matched transformer of that."""
    made().train("optimized")
    made(epochs=4).train("optimized")
    made(epochs=4).train("optimized_twin")
    return made().folder


def invoke(*arguments):
    return CliRunner().invoke(cli.cli, [*map(str, arguments)], catch_exceptions=False)


def test_a_run_is_named_titled_and_repeated_by_its_changes(results, text_folder):
    run = musota.Run(results / f"{LONGER}-seed0")
    assert run.experiment == scaled("optimized", "tiny", **FAST, epochs=4)
    assert run.title.startswith("MU-SOTA, optimized settings, max seq len 24, ")
    assert "4 epochs" in run.title and run.profile == "tiny"
    assert run.config["changes"] == {**FAST, "epochs": 4}
    assert "--set epochs=4" in run.config["command"] and str(text_folder) in run.config["command"]
    twin = musota.Run(results / f"{LONGER.replace('optimized', 'baseline')}-seed0")
    assert twin.experiment == musota.twin(run.experiment)
    assert twin.title.startswith("Transformer matched to optimized (GPT-2 style), ")


def test_a_run_that_is_recorded_under_another_name_is_loaded(made):
    part = made().train("modern_twin", stop_at=0.1)
    done = made(blocks=False, gate=False).train("redesigned")
    assert made().train("modern_twin").path == done.path != part.path
    shutil.rmtree(done.path)
    shutil.rmtree(part.path)


def test_only_changes_that_make_a_difference_are_in_the_name(made):
    book = made(epochs=3, n_head=4, learning_rate=0.002)
    fast = NAME.partition(",")[2].replace("warmup", "learning_rate=0.002,warmup")
    assert book.named("optimized") == f"optimized,{fast}".replace("1,", "1,n_head=4,", 1)
    assert book.named("baseline") == f"baseline,{fast}"  # whose heads follow from its width
    assert made(matrix_size=16).named("baseline").endswith("matrix_size=16")  # matched anew
    for text in ("a/b", "..", "x" * 300, "pr$ice$", "a b"):  # any text makes a safe file name
        name, other = (safe_name(f"optimized,optimizer={value}") for value in (text, f"{text}-"))
        assert "/" not in name and len(name) < 200 and name != other


def test_a_finished_run_counts_whatever_its_folder_is_called(made, results, capsys):
    renamed = shutil.move(results / f"{NAME}-seed0", results / "my best-seed0")
    found = made().train("optimized").path
    shutil.move(renamed, results / f"{NAME}-seed0")
    assert found == renamed and "already finished" in capsys.readouterr().out


def test_a_module_is_trained_and_its_matched_transformer(made, tmp_path):
    file = tmp_path / "net.py"
    layers = "nn.Sequential(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))"
    file.write_text(f"from torch import nn\ndef build(vocab_size):\n    return {layers}\n")
    book = made()
    with pytest.raises(MusotaError, match="has its own sizes: leave n_layer out of changes"):
        book.train(f"{file}:build")
    del book.changes["n_layer"]
    run, twin = book.train(f"{file}:build"), book.train(f"{file}:build_twin")
    assert run.path.name.startswith("net.build@") and "_twin," in twin.path.name
    assert abs(twin.summary["parameters"] / run.summary["parameters"] - 1) < 0.05
    file.write_text(file.read_text() + "\n# changed\n")
    assert book.named(f"{file}:build") != run.name


def test_a_stopped_run_ends_the_cell_and_goes_on(made):
    with interrupted_at(20), pytest.raises(Interrupted, match="run this again to continue"):
        made(dropout=0.2).train("optimized")
    assert made(dropout=0.2).train("optimized").finished
    book = made(dropout=0.2)
    book.fresh = True
    with interrupted_at(20), pytest.raises(Interrupted, match="to continue, without --fresh"):
        book.train("optimized")


def test_one_experiment_of_two_names_is_one_run(made):
    book = made(dropout=0.3)
    part = book.train("baseline", stop_at=0.5)
    run = book.train("optimized_twin")
    assert run.path == part.path and run.finished and book.trained("baseline")
    renamed = part.path.rename(part.path.with_name("renamed"))
    book.fresh = True
    again = book.train("baseline")
    assert again.path == renamed and book.trained("baseline")[0].path == renamed


def test_ablations_are_measured_on_the_text_of_the_run_alone(made, results, tmp_path):
    (run,) = made().trained("optimized")
    (tmp_path / "other.txt").write_text("Another text of a few words. " * 2000)
    other = Workbook("tiny", str(tmp_path / "other.txt"))
    assert other.ablations(run) == {} and not (run.path / "ablations.json").exists()
    (tmp_path / "drive").mkdir()
    saved = Workbook("tiny", made().corpus_name, save_to=str(tmp_path / "drive"), changes=FAST)
    assert saved.ablations(run)["gate"].mean and (run.path / "ablations.json").exists()
    there = shutil.copytree(run.path, tmp_path / "drive" / "study" / "mine-seed0")
    assert saved.find_runs("study/mine-seed0")[0][0].path == there


@pytest.fixture
def machine(text_folder, tmp_path, monkeypatch):
    """Makes a workbook on one of several machines that save to one drive."""

    def open_on(name):
        monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path / name))
        save_to = str(tmp_path / "drive")
        return Workbook("tiny", str(text_folder), save_to=save_to, changes=FAST)

    return open_on


def test_a_run_goes_on_on_another_machine_and_a_third_leaves_it_alone(machine):
    def checkpoints(folder: Path) -> list[str]:
        return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))

    first = machine("a")
    part = first.train("optimized", stop_at=0.5)
    assert checkpoints(first.home / part.path.name) == checkpoints(part.path)
    second, third = machine("b"), machine("c")  # with copies of the run as it is now
    assert second.folder != first.folder
    assert musota.Run(second.folder / part.path.name).history.equals(part.history)
    run, copy = second.train("optimized"), second.home / part.path.name
    assert run.finished and musota.Run(copy).finished
    assert musota.Run(machine("a").folder / part.path.name).finished  # it takes over the rest
    assert checkpoints(copy) == checkpoints(run.path)
    third.copy.push()
    assert musota.Run(copy).finished
    newest = max((copy / "checkpoints").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:100])
    second.save()  # mends it
    assert newest.stat().st_size > 100


def test_machines_that_share_a_drive_keep_each_others_rows(machine, monkeypatch):
    rows = iter(read_table(ROOT / "results" / "study" / "grid.csv"))

    def add_one(runs, seeds, profile, corpus, table, folder, each, **_):
        assert len(read_table(table)) == len(read_table(drive))
        add_row(drive, next(rows))  # by a third machine
        add_row(table, row := next(rows))
        if row.seed:  # else its copy failed
            each(row, {}, 0)
        return {name: {} for name in runs}

    monkeypatch.setattr(notebook, "run_many", add_one)
    drive = machine("a").home / "grid.csv"
    for name in "abab":
        book = machine(name)
        book.run_table("grid")
    assert [len(read_table(path)) for path in (drive, book.folder / "grid.csv")] == [8, 8]


def test_a_run_that_was_continued_is_taken_over_one_started_over_is_not(tmp_path, monkeypatch):
    def write(folder, start, step):
        (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "run" / "checkpoints" / f"step-{step:09d}-hash").touch()
        (folder / "run" / "metrics.jsonl").write_text(f"{start}\n{step}")

    def here():
        copy = SavedCopy(tmp_path / "drive").local / "run"
        steps = sorted(int(path.name[5:14]) for path in copy.glob("checkpoints/step-*"))
        return (copy / "metrics.jsonl").read_text(), steps

    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "drive", "a", 20)
    assert here() == ("a\n20", [20])
    write(tmp_path / "drive", "a", 30)
    assert here() == ("a\n30", [20, 30])
    local = SavedCopy(tmp_path / "drive").local
    shutil.rmtree(local / "run")
    write(local, "b", 10)
    assert here() == ("b\n10", [10])
    copy = SavedCopy(tmp_path / "drive")
    copy.own.add(copy.local / "run")
    (there := tmp_path / "drive" / "run" / "summary.json").touch()  # of the run before
    copy.push()
    assert not there.exists() and not here()[0].startswith("a")
    monkeypatch.setattr("musota.workbook.saved_copy.DRIVE", unmounted := tmp_path / "content")
    with pytest.raises(MusotaError, match="content is not mounted"):
        SavedCopy(unmounted / "MyDrive")
    assert not unmounted.exists()


def test_the_plans_numbers_are_of_its_whole_text(made, monkeypatch):
    whole = made().whole_corpus
    monkeypatch.setattr(notebook, "CORPUS", whole.name)
    monkeypatch.setattr(notebook, "VOCAB_SIZE", made().profile.vocab_size)
    monkeypatch.setattr(notebook, "WORDS", whole.words["valid"])
    assert made().corpus.words != whole.words and not made().at_plan_size
    monkeypatch.setattr(notebook, "WORDS", made().corpus.words["valid"])
    assert made().at_plan_size


def test_a_vanished_drive_fails_the_run_that_it_should_hold(machine, capsys):
    book = machine("a")
    shutil.rmtree(book.home)
    with pytest.raises(MusotaError, match="could not be copied"):
        book.train("optimized")
    assert not book.home.exists()  # nothing is written where the drive was mounted
    book.home.mkdir()
    book.copy = SavedCopy(book.home)
    book.copy.own.add(book.folder / f"{NAME}-seed0")
    assert book.train("optimized").finished and musota.Run(book.home / f"{NAME}-seed0").finished


def test_runs_are_compared_and_scored(results, tmp_path):
    (tmp_path / "note.txt").write_text("Return the name of the file.\n")
    where = ["--save-to", results.parent, "--profile", results.name]
    answer = invoke("compare", NAME, LONGER, *where).output
    assert "epochs" in answer and "better than" in answer and "one seed" in answer
    assert (results.parent / "compared" / "curves.png").stat().st_size > 10_000
    answer = invoke("score", NAME, tmp_path / "note.txt", *where).output
    assert "bits per byte" in answer and (results / f"{NAME}-seed0" / "score-note.csv").exists()
    (tmp_path / "same.txt").write_bytes(b"\xef\xbb\xbfReturn the name of the file.  \r\n")
    again = invoke("score", NAME, tmp_path / "same.txt", *where).output  # read as corpora are
    assert again.splitlines()[:2] == answer.splitlines()[:2]
    with pytest.raises(MusotaError, match="two models or more"):
        invoke("compare", NAME, f"{NAME}-seed0", *where)


def test_the_report_is_written_of_all_results_or_of_some(results, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results" / "redesign", tmp_path / "results" / "redesign")
    shutil.copytree(results, tmp_path / "results" / "full", ignore=lambda *_: {"checkpoints"})
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(cli, "checkout", lambda: tmp_path)
    monkeypatch.setattr(cli, "results_root", lambda: tmp_path / "results")
    assert (results / "README.md").samefile(invoke("report", results).output.strip())
    assert not (tmp_path / "results" / "full" / "README.md").exists()
    assert all(os.path.getsize(file) > 1000 for file in invoke("report").output.splitlines())
    assert (tmp_path / "results" / "redesign" / "path.png").exists()
    assert "MU-SOTA, optimized settings" in (tmp_path / "README.md").read_text("utf-8")


def test_a_fresh_run_at_the_usual_rate_is_trained_once(made, text_folder, monkeypatch):
    usual = scaled("optimized", "tiny").training.learning_rate
    both = [("optimized", {"learning_rate": rate}, {}) for rate in (usual, 2 * usual)]
    monkeypatch.setattr(evidence, "_models", lambda part, _: both if part == "tuned" else [])
    trained = []
    monkeypatch.setattr(Workbook, "train", lambda book, _: trained.append(book.changes))
    for parts in (["models", "tuned"], ["tuned"]):
        evidence.carry_out(parts, 1, profile="tiny", corpus=str(text_folder), fresh=True)
    faster = both[1][1]
    assert trained == [faster, {}, faster]  # {}: the model itself


@pytest.mark.slow
def test_evidence_lists_the_runs_that_are_left_and_trains_them(made, text_folder, monkeypatch):
    monkeypatch.setattr(sweep, "FIRST_RATES", (1e-3, 3e-3))  # of six
    where = ["evidence", "--profile", "tiny", "--corpus", text_folder, "--only"]
    for part, count in (("grid", 4), ("sweep", 4)):
        first, *others = invoke(*where, part, "--list").stdout.splitlines()
        assert first.startswith(f"musota train {part}/") and len(others) == count - 1
        invoke(*shlex.split(first)[1:])
        assert invoke(*where, part, "--list").stdout.splitlines() == others
        assert invoke(*where, part).output.rstrip().endswith("report.html")
        assert not invoke(*where, part, "--list").stdout
    losses = [*sweep.swept(read_table(made().folder / "sweep.csv"), PROFILES["tiny"]).values()]
    assert [*losses[0]] == [*losses[1]] and not any(map(sweep.next_rates, losses))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "tinny"], "Unknown profile 'tinny': did you mean 'tiny'?"),
        (["run", "-p", "sed", "1"], "Unknown notebook parameter 'sed': did you mean 'seed'?"),
        (["train", "optimised"], "Unknown experiment 'optimised': did you mean 'optimized'?"),
        (["train", "optimized", "--set", "epoch=2"], "Unknown field 'epoch'"),
        (["compare", "nosuch", "other"], "There is no run 'nosuch'"),
        (["train", "nofile.py:M_twin"], "There is no file"),
        (["train", "baseline", "--seed", "-1"], "Invalid value for '--seed'"),
        (["train", "baseline", "--corpus", "nosuch"], "Unknown corpus 'nosuch'"),
        (["train", "baseline", "--corpus", ""], "Name a corpus: auto, wikitext-2"),
        (["train", "optimized", "--set", "epochs={[]: 1}"], "epochs must be a whole number"),
        (["run", "--only", ""], "Unknown notebook number '00'"),
        (["evidence", "--only", "xyz"], "Unknown part 'xyz'"),
        (["--help"], "bench"),
    ],
)
def test_mistakes_get_one_sentence_without_slow_imports(arguments, message):
    code = (
        "import atexit, sys; from musota.workbook import cli; sys.argv[0] = 'musota'\n"
        "slow = {'torch', 'datasets', 'pandas', 'matplotlib'}\n"
        "atexit.register(lambda: print('SLOW' * bool(slow & {*sys.modules}), file=sys.stderr))\n"
        "cli.main()"
    )
    answer = in_a_process(code, *arguments)
    assert message in answer.stdout + answer.stderr
    assert "SLOW" not in answer.stderr and "Traceback" not in answer.stderr
    assert len(answer.stdout.splitlines()) < 24


def test_outside_a_repository(text_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("musota.workbook.naming.__file__", str(tmp_path / "a" / "b" / "naming.py"))
    monkeypatch.chdir(tmp_path)
    assert results_root() == tmp_path / "results"
    with pytest.raises(MusotaError, match="no notebooks here: clone the repository"):
        invoke("run", "--profile", "tiny")
    command = f"musota train optimized --corpus {text_folder} --save-to /dev/null/x"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):  # what the system refuses is a sentence
        cli.main()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_parameters_reach_the_notebooks_as_they_are_meant(monkeypatch):
    given, place = {}, "musota.workbook.run_notebooks.run_notebooks"
    monkeypatch.setattr(place, lambda _, values, runs: given.update(values, runs=runs))
    text = ["-p", "corpus", "2024", "-p", "save_to", "007", "-p", "seed", "3"]
    invoke("run", *text, "-p", "runs", "optimized", "-p", "runs", "['a', 'b']")
    assert (given["corpus"], given["save_to"], given["seed"]) == ("2024", "007", 3)
    assert given["runs"] == ["optimized", "a", "b"]
