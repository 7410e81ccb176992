"""Experiment trackers: what they get, a resumed run, and trackers that fail."""

import math
import sys
from functools import partial

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from click.testing import CliRunner
from conftest import EXPERIMENT, each_step

import musota
from musota.errors import MusotaError
from musota.training.trackers import NAMES
from musota.workbook import cli
from musota.workbook.notebook import Workbook


class Recorder(GeneralTracker):
    """A tracker that keeps what it gets, and raises in the call `breaks`."""

    requires_logging_directory, tracker = False, None

    def __init__(self, breaks="", name="recorder"):
        self.breaks, self.name = breaks, name
        self.settings, self.logged, self.finished = {}, [], 0

    def _break_in(self, call):
        if call == self.breaks:
            raise RuntimeError("no\nconnection.")

    def start(self):
        self._break_in("start")

    def store_init_configuration(self, values):
        self._break_in("settings")
        self.settings = values

    def log(self, values, step=None, **kwargs):
        self._break_in(f"step {step}")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1
        self._break_in("finish")


def train(corpus, folder, log_with, **options):
    options = musota.RunOptions(log_with=log_with, **options)
    return musota.train(EXPERIMENT, corpus, folder, name="finished", options=options)


def test_a_tracker_gets_the_records_the_samples_and_the_settings(short, finished, tmp_path):
    recorder = Recorder()
    run = train(short, tmp_path / "run", recorder)
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]  # changes nothing
    records = [record for record in run.records if record["kind"] in ("step", "epoch")]
    assert [step for step, _ in recorder.logged] == [record["step"] for record in records]
    for record, (_, values) in zip(records, recorder.logged, strict=True):
        numbers = {name: record[key] for key, name in NAMES.items() if key in record}
        assert values.items() >= numbers.items() and len(numbers) in (3, 4)
        assert ("samples" in values) == (record["kind"] == "epoch")
    first = run.samples["prompt"][0].split()
    assert recorder.logged[-1][1]["samples"].split()[: len(first)] == first
    assert recorder.settings.items() >= EXPERIMENT.fields().items() and recorder.finished == 1
    known = {"name": "finished", "seed": 0, "corpus": short.name, "precision": "no", "processes": 1}
    assert recorder.settings.items() >= known.items()
    train(short, tmp_path / "run", recorder)  # has finished: nothing is sent
    assert len(recorder.logged) == len(records) and recorder.finished == 1


@pytest.mark.parametrize("breaks", ["start", "settings", "step 1", "step 11", "finish"])
def test_a_tracker_that_fails_is_dropped(short, finished, tmp_path, capsys, breaks):
    broken, good = Recorder(breaks, "broken"), Recorder()
    run = train(short, tmp_path / "run", [broken, good])
    assert run.finished
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]
    said = "Training goes on without the tracker broken: RuntimeError: no connection.\n"
    assert capsys.readouterr().out.count(said) == 1
    assert good.finished == 1 and good.logged[-1][0] == run.steps["step"].iloc[-1]
    assert broken.finished == (breaks == "finish") and len(broken.logged) <= len(good.logged)


def test_a_tracker_that_is_not_installed_is_one_sentence(short, tmp_path, capsys, monkeypatch):
    for name in ("tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert train(short, tmp_path / "run", ("tensorboard", "wandb")).finished
    said = capsys.readouterr().out
    for name in ("tensorboard", "wandb"):
        missing = f"the tracker {name}: it is not installed (pip install {name})."
        assert said.count(f"Training goes on without {missing}\n") == 1


def test_a_tracker_is_closed_when_training_ends_early(short, tmp_path):
    recorder = Recorder()
    spoiled = each_step(lambda state: state.model.output.bias.data.fill_(math.nan))
    with pytest.raises(MusotaError, match="The training loss is nan"), spoiled:
        train(short, tmp_path / "run", recorder)
    assert recorder.finished == 1


@pytest.mark.parametrize("wrong", ["tensorbord", ["wandb", "tensorbord"], 3, [["wandb"]], None])
def test_an_unknown_tracker_is_a_user_facing_error(wrong):
    with pytest.raises(MusotaError, match="Unknown tracker"):
        musota.RunOptions(log_with=wrong)


def test_the_command_line_takes_trackers(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("musota.workbook.naming.results_root", lambda: tmp_path)
    wrong = CliRunner().invoke(cli.cli, ["train", "optimized", "--log-with", "tensorbord"])
    assert "did you mean 'tensorboard'?" in str(wrong.exception) and not [*tmp_path.iterdir()]
    seen = []
    monkeypatch.setattr(Workbook, "train", lambda book, *_, **__: seen.append(book.log_with))
    where = ["--profile", "tiny", "--corpus", str(text_folder)]
    options = ["--log-with", "wandb", "--log-with", "trackio"]
    CliRunner().invoke(cli.cli, ["train", "optimized", *where, *options])
    assert seen == [("wandb", "trackio")]


def test_services_get_the_same_run_when_it_is_resumed(short, tmp_path, monkeypatch):
    made = []

    def make(service, project, **options):
        made.append((service, project, options))
        return Recorder(name=service)

    for name in ("wandb", "trackio", "mlflow"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, partial(make, name))
    for stop_at in (0.5, 1):
        train(short, tmp_path / "run", ("wandb", "trackio", "mlflow"), stop_at=stop_at)
    assert made[:3] == made[3:] and {project for _, project, _ in made} == {"musota"}
    again = {"resume": False, "options": musota.RunOptions(log_with="wandb")}
    musota.train(EXPERIMENT, short, tmp_path / "run", **again)
    assert made[6][2]["id"] != made[0][2]["id"] and made[6][2]["name"] == "run"


def test_tensorboard_shows_each_step_once_after_a_kill(short, finished, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def killed(state):
        if state.step == 14:  # three steps after the checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), each_step(killed):
        train(short, tmp_path / "run", "tensorboard")
    run = train(short, tmp_path / "run", "tensorboard")
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]
    seen = EventAccumulator(str(run.path / "trackers"), {"tensors": 0, "scalars": 0}).Reload()
    assert set(seen.Tags()["scalars"]) == {*NAMES.values()}
    for frame, columns in ((run.steps, ("loss", "grad_norm")), (run.history, ("ppl", "accuracy"))):
        for column in columns:
            events = seen.Scalars(NAMES[column])
            assert [event.step for event in events] == list(frame["step"])
            assert [event.value for event in events] == pytest.approx(list(frame[column]), 1e-6)
    assert [event.step for event in seen.Tensors("samples/text_summary")] == [11, 22]
    assert len({path.parent for path in run.path.rglob("events.*")}) == 1  # one run in its list
    assert "_hparams_/session_start_info" in str(seen.summary_metadata)
