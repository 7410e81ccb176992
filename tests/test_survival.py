import errno
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from drill import drill
from filelock import FileLock

import musota
from musota.errors import MusotaError
from musota.files import read_sealed, sentence, write_sealed
from musota.models import base
from musota.models import sharing as lm_room
from musota.models.base import CausalLM
from musota.plan.config import TrainConfig
from musota.plan.profiles import Profile
from musota.training import evaluate as evaluate_room
from musota.training import remedies, runs, schedule, trainer
from musota.training import runs as runs_room
from musota.training import trainer as training_room
from musota.training.trainer import Diverged
from musota.workbook.pages import write_report
from musota.workbook.records import load_runs, pack

EXPERIMENT = musota.Experiment(
    musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=1, dropout=0.0),
    TrainConfig(epochs=2, learning_rate=3e-3, warmup_steps=5, batch_size=4, accumulation_steps=4),
)


@pytest.fixture(scope="module")
def short(corpus):
    return corpus.limited(Profile("short", 512, 4000, 1200))


@pytest.fixture(scope="module")
def finished(short, tmp_path_factory):
    return musota.train(EXPERIMENT, short, tmp_path_factory.mktemp("run"))


def _losses(run):
    return [record["loss"] for record in run.records if record["kind"] == "step"]


def _events(run):
    return [event for _, event in run.events]


def _break(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.write_bytes(data)


# --- killed ---


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the drill forks")
def test_killed_runs_end_as_if_nothing_had_been(text_folder):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import drill; "
        f"print(drill.drill({str(text_folder)!r}, 3))"
    )  # in a process of its own: forks of this one would inherit its threads
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "['same', 'same', 'same']" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count(": killed") >= 2
    assert drill.__doc__


def test_checkpoints_come_by_the_clock_too_and_two_are_kept(short, tmp_path, monkeypatch):
    monkeypatch.setattr(training_room, "CHECKPOINT_SECONDS", 0)
    seen = []
    save = runs.RunFolder.save_checkpoint

    def watched(folder, tensors, state):
        save(folder, tensors, state)
        seen.append((state["step"], len([*folder.checkpoints.glob("step-*")])))

    monkeypatch.setattr(runs.RunFolder, "save_checkpoint", watched)
    run = musota.train(EXPERIMENT.with_(epochs=1), short, tmp_path)
    assert [step for step, _ in seen] == list(range(1, run.history.step[0] + 1))
    assert max(kept for _, kept in seen) == 2


# --- damaged ---


def test_a_flipped_bit_in_any_file_of_a_finished_run_is_seen(finished, tmp_path):
    names = ["config.json", "summary.json", "metrics.jsonl", "checkpoints/best/model.safetensors",
             "checkpoints/best/config.json", "checkpoints/best/tokenizer.json"]  # fmt: skip

    def read(folder):
        run = musota.Run(folder)
        _ = run.summary, run.history
        run.load_model()

    read(finished.path)
    for name in names:
        for place in (0, 1, 57, 333, 1021, 7777, -2, -1):
            folder = tmp_path / "copy"
            shutil.copytree(finished.path, folder)
            _break(folder / name, place)
            with pytest.raises(MusotaError, match=r"damaged|does not describe"):
                read(folder)
            shutil.rmtree(folder)


@pytest.fixture
def half_way(short, tmp_path, monkeypatch):
    """A run stopped in its second epoch, with two checkpoints."""
    monkeypatch.setattr(training_room, "CHECKPOINT_SECONDS", 0)
    run = musota.train(EXPERIMENT, short, tmp_path / "half", stop_at=0.7)
    monkeypatch.undo()
    newest, older = sorted((run.path / "checkpoints").glob("step-*"), reverse=True)
    return run.path, newest, older


@pytest.mark.parametrize("place", [0, 9, 500, 40_000, -1])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    half_way, place, finished, short, capsys
):
    folder, newest, _ = half_way
    _break(newest, place)
    run = musota.train(EXPERIMENT, short, folder)
    assert f"{newest} is damaged and is skipped" in capsys.readouterr().out
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]
    assert _losses(run) == _losses(finished)


def test_damaged_metrics_are_restored_from_the_checkpoint(half_way, finished, short, capsys):
    folder, _, _ = half_way
    _break(folder / "metrics.jsonl", 100)
    run = musota.train(EXPERIMENT, short, folder)
    assert "metrics.jsonl was damaged: it is restored" in capsys.readouterr().out
    assert _losses(run) == _losses(finished)


def test_where_no_checkpoint_can_be_read_nothing_is_thrown_away(half_way, short):
    folder, *checkpoints = half_way
    for path in checkpoints:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MusotaError, match="No checkpoint in .* can be read .*: start over") as kept:
        musota.train(EXPERIMENT, short, folder)
    assert all(path.exists() for path in checkpoints) and (folder / "metrics.jsonl").exists()
    # What it advises works while the error is kept, as a notebook keeps the last one.
    assert kept.value and musota.train(EXPERIMENT, short, folder, resume=False).finished


def test_damaged_checkpoints_do_not_push_good_ones_out(half_way, finished, short, monkeypatch):
    folder, newest, _ = half_way
    for number in ("000000900", "000000901"):  # of later steps than any that is to come
        shutil.copy(newest, newest.with_name(f"step-{number}-0123456789abcdef.safetensors"))
    monkeypatch.setattr(training_room, "CHECKPOINT_SECONDS", 0)
    musota.train(EXPERIMENT, short, folder, stop_at=0.9)
    kept = [*(folder / "checkpoints").glob("step-*.safetensors")]
    assert len(kept) == 2 and not any("-0123" in path.name for path in kept)
    run = musota.train(EXPERIMENT, short, folder)
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]


def test_flipped_or_lost_metrics_of_an_unfinished_run_are_seen(half_way):
    folder, *_ = half_way
    path, whole = folder / "metrics.jsonl", (folder / "metrics.jsonl").read_bytes()
    known = musota.Run(folder).summary["metrics_bytes"]
    assert 0 < known < len(whole) and musota.Run(folder).records
    for place in range(0, known, 97):
        _break(path, place)
        with pytest.raises(MusotaError, match="damaged"):
            _ = musota.Run(folder).records
        path.write_bytes(whole)
    path.unlink()
    with pytest.raises(MusotaError, match="damaged"):
        _ = musota.Run(folder).records


@pytest.mark.parametrize("other", [{"seed": 1}, {"learning_rate": 1e-3}, {"n_layer": 2}])
def test_without_its_config_a_checkpoint_still_knows_its_run(half_way, short, finished, other):
    folder, *_ = half_way
    (folder / "config.json").unlink()
    seed = other.pop("seed", 0)
    with pytest.raises(MusotaError, match=r"checkpoint .* belongs to another run"):
        musota.train(EXPERIMENT.with_(**other), short, folder, seed=seed)
    run = musota.train(EXPERIMENT, short, folder, resume=False)
    assert run.history.step.tolist() == finished.history.step.tolist()
    assert run.steps.step.iloc[0] == 1


def test_a_summary_without_a_run_is_not_believed(finished, short, tmp_path):
    shutil.copy(finished.path / "summary.json", tmp_path)
    run = musota.train(EXPERIMENT, short, tmp_path, stop_at=0.3)
    assert not run.finished and not musota.Run(tmp_path).summary


def test_nothing_here_unpickles():
    for path in (ROOT / "musota").glob("*.py"):
        text = path.read_text()
        for harmless in ("Nothing is unpickled", "allow_pickle=False"):
            text = text.replace(harmless, "")
        assert "pickle" not in text, path
        assert "torch.load" not in text and "torch.save" not in text, path


def test_a_second_process_is_refused_while_the_first_trains(short, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with (
        FileLock(tmp_path / "checkpoints" / ".lock"),
        pytest.raises(MusotaError, match="Another process is training in"),
    ):
        musota.train(EXPERIMENT, short, tmp_path)
    assert musota.train(EXPERIMENT.with_(epochs=1), short, tmp_path).finished


@pytest.mark.parametrize(
    ("error", "end"),
    [(NotImplementedError("use SoftFileLock"), None), (OSError(errno.ENOLCK, "No locks"), None),
     (PermissionError(errno.EACCES, "Permission denied"), "Permission denied.: choose another")],
)  # fmt: skip
def test_a_disk_without_locks_is_told_and_used(error, end, short, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    if end:
        with pytest.raises(MusotaError, match=end):
            musota.train(EXPERIMENT, short, tmp_path)
    else:
        assert musota.train(EXPERIMENT.with_(epochs=1), short, tmp_path).finished
        assert "knows no locks" in capsys.readouterr().out


# --- the disk ---


def test_files_are_the_same_where_text_has_other_line_ends(short, tmp_path, monkeypatch):
    """Windows writes \\r\\n in text mode: what is hashed must not go through it."""
    write_bytes = Path.write_bytes

    def write_text(path, text, *_, **__):
        return write_bytes(path, text.replace("\n", "\r\n").encode())

    monkeypatch.setattr(Path, "write_text", write_text)
    run = musota.train(EXPERIMENT.with_(epochs=1), short, tmp_path / "run", profile="tiny")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "away")
    write_report(tmp_path)
    pack(tmp_path)
    assert (
        load_runs(tmp_path)[0].records
        == musota.Run.from_records(
            run.path, run.config, run.summary, load_runs(tmp_path)[0].records
        ).records
    )
    for path in tmp_path.rglob("*"):
        assert path.suffix not in (".json", ".jsonl", ".md") or b"\r" not in path.read_bytes()


def test_a_full_disk_leaves_packed_records_as_they_were(short, tmp_path, monkeypatch):
    for seed in (0, 1):
        musota.train(EXPERIMENT.with_(epochs=1), short, tmp_path / f"run-seed{seed}", seed=seed)
        shutil.rmtree(tmp_path / f"run-seed{seed}" / "checkpoints")
        if seed == 0:
            pack(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*") if path.is_file()}
    write_bytes = Path.write_bytes

    def write(path, data):
        if "probes" in path.name:  # the last but one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError) as full:
        pack(tmp_path)
    said = r"probes.json cannot be used .No space left on device.: make room there"
    assert re.search(said, sentence(full.value))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == kept
    assert len(load_runs(tmp_path)) == 2


def _full(monkeypatch, is_full):
    """Let writing fail while `is_full()` says so."""
    write, rename = runs_room.write_whole, os.replace

    def failing(path, content):
        if is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    for room in (runs_room, lm_room):
        monkeypatch.setattr(room, "write_whole", failing)
    monkeypatch.setattr("musota.files.os.replace", lambda a, b: None if is_full() else rename(a, b))


def test_a_full_disk_is_told_and_made_good_later(finished, short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_room, "CHECKPOINT_SECONDS", 0)
    seen = []
    monkeypatch.setattr(trainer.Trainer, "say", lambda trainer, text: seen.append(trainer.step))
    full = {"now": False}
    step = trainer.Trainer.one_step

    def one_step(trainer):
        step(trainer)
        full["now"] = 4 <= trainer.step <= trainer.steps_per_epoch + 2

    monkeypatch.setattr(trainer.Trainer, "one_step", one_step)
    _full(monkeypatch, lambda: full["now"])
    run = musota.train(EXPERIMENT, short, tmp_path)
    out = capsys.readouterr().out
    assert "Not saved" in out and "No space left on device" in out
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]
    assert _losses(musota.Run(tmp_path)) == _losses(finished)
    assert musota.Run(tmp_path).load_model()


def test_an_end_that_cannot_be_saved_is_an_error_and_goes_on_later(
    finished, short, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        full = {"now": False}
        step = trainer.Trainer.one_step

        def one_step(trainer):
            step(trainer)
            full["now"] = trainer.step > trainer.steps_per_epoch

        patch.setattr(trainer.Trainer, "one_step", one_step)
        _full(patch, lambda: full["now"])
        with pytest.raises(MusotaError, match="end of the run could not be saved .* No space"):
            musota.train(EXPERIMENT, short, tmp_path)
    assert not musota.Run(tmp_path).finished
    run = musota.train(EXPERIMENT, short, tmp_path)
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]
    assert run.load_model()


@pytest.mark.parametrize("watched", [False, True])
def test_a_folder_that_vanishes_does_not_stop_training(finished, short, tmp_path, watched):
    place, steps = tmp_path / "disk" / "run", []
    step = trainer.Trainer.one_step

    def one_step(trainer):
        step(trainer)
        steps.append(trainer.step)
        if trainer.step == 4:
            shutil.move(tmp_path / "disk", tmp_path / "away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "one_step", one_step)
        with pytest.raises(MusotaError, match="end of the run could not be saved"):
            musota.train(
                EXPERIMENT, short, place, auto_remedy=watched,
                watch=(lambda run: run.history) if watched else None,
            )  # fmt: skip
    assert len(steps) == finished.history.step.iloc[-1] and not place.exists()
    shutil.move(tmp_path / "away", tmp_path / "disk")
    run = musota.train(EXPERIMENT, short, place, auto_remedy=watched)
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]


def test_no_room_for_the_first_file_gets_one_sentence(short, tmp_path, monkeypatch):
    _full(monkeypatch, lambda: True)
    monkeypatch.setattr("musota.files.write_whole", runs_room.write_whole)
    with pytest.raises(MusotaError, match="cannot be used .No space left on device.: make room"):
        musota.train(EXPERIMENT, short, tmp_path)


def test_a_line_lost_to_a_full_disk_is_made_good_before_the_end(short, tmp_path, monkeypatch):
    append, lost = runs.RunFolder.append, []

    def losing(folder, record):
        before = folder.path / "metrics.jsonl"
        kept = before.read_bytes() if before.exists() else b""
        append(folder, record)
        if record["kind"] == "epoch" and record["epoch"] == 2:
            before.write_bytes(kept)
            lost.append(record)

    monkeypatch.setattr(runs.RunFolder, "append", losing)
    musota.train(EXPERIMENT, short, tmp_path)
    assert lost and list(musota.Run(tmp_path).history.epoch) == [1, 2]


# --- memory ---


def _too_large(monkeypatch, sequences=None, length=None, said="CUDA out of memory"):
    """Out of memory for more than so many sequences, or tokens a sequence."""
    forward = CausalLM.forward

    def limited(model, ids, targets=None):
        if targets is not None and (len(ids) > (sequences or 99) or ids.shape[1] > (length or 999)):
            raise RuntimeError(said)
        return forward(model, ids, targets)

    monkeypatch.setattr(CausalLM, "forward", limited)


@pytest.mark.parametrize(
    "said", ["MPS backend out of memory (MPS allocated", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
             "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"],
)  # fmt: skip
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(
    finished, short, tmp_path, monkeypatch, said
):
    _too_large(monkeypatch, sequences=4, said=said)
    run = musota.train(EXPERIMENT, short, tmp_path, micro_batch=16)
    assert _events(run) == [
        "out of memory: micro-batch 16 → 8", "out of memory: micro-batch 8 → 4",
    ]  # fmt: skip
    assert _losses(run) == pytest.approx(_losses(finished), rel=1e-5)
    assert len(_losses(run)) == len(_losses(finished))
    weights = finished.load_model().state_dict()
    for name, value in run.load_model().state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)


def test_validation_out_of_memory_goes_on_a_window_at_a_time(
    finished, short, tmp_path, monkeypatch
):
    score = base.score

    def limited(model, tokens, stride=None, batch_size=None):
        if batch_size is None and len(tokens) == len(short.valid):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return score(model, tokens, stride, batch_size)

    monkeypatch.setattr(evaluate_room, "score", limited)
    run = musota.train(EXPERIMENT, short, tmp_path)
    assert _events(run) == ["out of memory in validation: one window at a time"] * 2
    assert list(run.history.valid_loss) == pytest.approx(list(finished.history.valid_loss))
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]


def test_another_error_of_a_step_keeps_its_name_and_place(short, tmp_path, monkeypatch):
    _too_large(monkeypatch, sequences=1, said="an index is out of bounds")
    with pytest.raises(RuntimeError, match="out of bounds") as caught:
        musota.train(EXPERIMENT, short, tmp_path)
    assert caught.traceback[-1].name == "limited"


def test_memory_may_run_out_between_unscaling_and_the_step():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu")
    for _ in range(2):
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)  # an error where it was done before
        trainer = SimpleNamespace(
            choices={"micro_batch": 4}, experiment=EXPERIMENT, optimizer=optimizer,
            accelerator=SimpleNamespace(num_processes=1, scaler=scaler),
            device=torch.device("cpu"), tell=lambda _: None,
        )  # fmt: skip
        remedies.mend(trainer, torch.OutOfMemoryError("CUDA out of memory"))


def test_nothing_holds_on_to_a_trainer_that_has_ended(short, tmp_path, monkeypatch):
    """On a GPU it would keep its model and optimizer there, and count in the next run's peak."""
    alive, begin = [], trainer.Trainer.__init__

    def __init__(self, *given, **named):
        alive.append(weakref.ref(self))
        begin(self, *given, **named)

    monkeypatch.setattr(trainer.Trainer, "__init__", __init__)
    gc.disable()
    try:
        musota.train(EXPERIMENT, short, tmp_path, auto_remedy=True, watch=lambda run: None)
        assert alive[0]() is None
    finally:
        gc.enable()


def test_the_smaller_micro_batch_is_remembered(short, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _too_large(patch, sequences=4)
        musota.train(EXPERIMENT, short, tmp_path, micro_batch=16, stop_at=0.5)
    sizes = []
    forward = CausalLM.forward

    def watched(model, ids, targets=None):
        sizes.append(len(ids) if targets is not None else 0)
        return forward(model, ids, targets)

    monkeypatch.setattr(CausalLM, "forward", watched)
    musota.train(EXPERIMENT, short, tmp_path)
    assert max(sizes) == 4


def test_where_one_sequence_is_too_long_160_tokens_are_another_experiment(
    short, tmp_path, monkeypatch
):
    _too_large(monkeypatch, length=160)
    longer = EXPERIMENT.with_(max_seq_len=192, epochs=1, batch_size=2, accumulation_steps=1)
    with pytest.raises(MusotaError, match="plan's remedy is max_seq_len=160"):
        musota.train(longer, short, tmp_path / "asked")
    run = musota.train(longer, short, tmp_path / "remedied", auto_remedy=True)
    assert run.experiment == longer.with_(max_seq_len=160)
    assert run.summary["instead_of"] == longer.to_dict()
    assert "160 tokens a sequence, not 192, which is another experiment" in _events(run)[0]
    described = read_sealed(run.path / "config.json")
    del described["instead_of"]["training"]["grad_clip"]  # as if older than that field
    write_sealed(run.path / "config.json", described)
    again = musota.train(longer, short, run.path, auto_remedy=True)
    assert again.finished and again.summary == run.summary


# --- bad numbers ---


def _spoil(monkeypatch, steps, value=math.nan):
    """Let the loss of some steps be multiplied by `value`, as often as `steps` holds the step."""
    left, one_step = list(steps), trainer.Trainer.one_step
    forward = CausalLM.forward
    now = {"bad": False}

    def step(trainer):
        now["bad"] = trainer.step + 1 in left
        if now["bad"]:
            left.remove(trainer.step + 1)
        one_step(trainer)

    def spoiled(model, ids, targets=None):
        logits, loss = forward(model, ids, targets)
        return logits, loss * value if loss is not None and now["bad"] else loss

    monkeypatch.setattr(trainer.Trainer, "one_step", step)
    monkeypatch.setattr(CausalLM, "forward", spoiled)


@pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (9.0, r"[\d.]+")])
def test_a_bad_loss_stops_with_step_batch_and_checkpoint(short, tmp_path, monkeypatch, value, said):
    _spoil(monkeypatch, [14], value)
    message = rf"training loss is {said} at step 14 \(batch [0-9a-f]{{12}}\).*last good checkpoint"
    with pytest.raises(Diverged, match=message):
        musota.train(EXPERIMENT, short, tmp_path)
    assert musota.Run(tmp_path).diverged
    monkeypatch.undo()
    assert musota.train(EXPERIMENT, short, tmp_path).finished  # from the checkpoint


def test_a_remedy_goes_back_at_half_the_rate_twice_at_most(short, tmp_path, monkeypatch):
    _spoil(monkeypatch, [14, 15])
    run = musota.train(EXPERIMENT, short, tmp_path / "twice", auto_remedy=True)
    epoch = run.history.step[0]
    assert _events(run) == [
        f"bad loss at step 14: back to step {epoch}, learning rate × 0.5",
        f"bad loss at step 15: back to step {epoch}, learning rate × 0.25",
    ]
    steps = run.steps.set_index("step").learning_rate
    total = 2 * epoch
    for step in steps.index:
        planned = schedule.learning_rate_at(step, EXPERIMENT.training, total)
        assert steps[step] == pytest.approx(planned * (1 if step <= epoch else 0.25))
    assert list(steps.index) == sorted(set(steps.index))  # no line doubled
    monkeypatch.undo()
    _spoil(monkeypatch, [14, 15, 16])
    with pytest.raises(Diverged):
        musota.train(EXPERIMENT, short, tmp_path / "thrice", auto_remedy=True)


def test_a_bad_loss_in_the_first_epoch_goes_back_to_the_start(short, tmp_path, monkeypatch):
    _spoil(monkeypatch, [3])
    run = musota.train(EXPERIMENT, short, tmp_path, auto_remedy=True)
    assert _events(run) == ["bad loss at step 3: back to step 0, learning rate × 0.5"]


def test_an_oscillating_loss_halves_the_rate_once_it_is_seen(short, tmp_path, monkeypatch):
    from musota.rules.findings import Finding

    seen = []

    def oscillation(steps, since):
        seen.append(since)
        return Finding("Oscillation", "oscillating", "", "", "the loss oscillates")

    monkeypatch.setattr(remedies, "oscillation", oscillation)
    run = musota.train(EXPERIMENT.with_(epochs=4), short, tmp_path, auto_remedy=True)
    assert _events(run) == [
        "the loss oscillates: learning rate × 0.5", "the loss oscillates: learning rate × 0.25",
    ]  # fmt: skip
    assert seen == [5, run.history.step[0]]  # after warm-up, then after the first remedy
    calm = musota.train(EXPERIMENT, short, tmp_path / "calm")
    assert not _events(calm)


# --- several processes ---


def test_two_processes_train_as_one(text_folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, musota\n"
        "from musota.plan.config import TrainConfig\nfrom musota.plan.profiles import Profile\n"
        "corpus = musota.load_corpus(sys.argv[1], 512).limited(Profile('s', 512, 3000, 1200))\n"
        "model = musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=1, dropout=0.0)\n"
        "training = TrainConfig(2, 3e-3, 5, 5, 3)\n"  # 15 sequences: shares of 8 and 7
        "musota.train(musota.Experiment(model, training), corpus, sys.argv[2], micro_batch=3)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--standalone"]  # on a port that is free
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    for name, command in {"two": launch, "one": [sys.executable]}.items():
        done = subprocess.run(
            [*command, str(script), str(text_folder), str(tmp_path / name)],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = musota.Run(tmp_path / "one"), musota.Run(tmp_path / "two")
    assert (one.config["processes"], two.config["processes"]) == (1, 2)
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-5)
    assert two.history.valid_loss.tolist() == pytest.approx(one.history.valid_loss.tolist(), 1e-4)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines())
    assert json.loads(lines[0])["step"] == 1 and two.finished
