"""Kills, damage, full disks, too little memory, bad numbers."""

import errno
import gc
import math
import os
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EXPERIMENT, ROOT, STILL, each_step, flip_bit, in_a_process
from filelock import FileLock

import musota
from musota.errors import MusotaError
from musota.models.base import CausalLM
from musota.training import checkpoint
from musota.training.trainer import Diverged, RunOptions

SHA = "weights_sha256"


@pytest.fixture
def always_due(monkeypatch):
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the drill forks")
def test_killed_runs_end_the_same(text_folder):
    # In a process of its own: forks of this one would inherit its threads.
    code = "import drill, sys; print(drill.drill(sys.argv[1], 3))"
    done = in_a_process(code, text_folder, PYTHONPATH=str(ROOT / "tests"))
    assert "['same', 'same', 'same']" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count(": killed") >= 2


@pytest.mark.parametrize(
    "name", ["config.json", "summary.json", "metrics.jsonl", "checkpoints/best/model.safetensors",
             "checkpoints/best/config.json", "checkpoints/best/tokenizer.json"],
)  # fmt: skip
def test_a_flipped_bit_in_any_file_of_a_finished_run_is_seen(finished, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(finished.path, folder)
    whole = (folder / name).read_bytes()
    for place in (0, 1, 57, 333, 1021, 7777, -2, -1):
        flip_bit(folder / name, place)
        with pytest.raises(MusotaError, match=r"damaged|does not describe"):
            run = musota.Run(folder)
            _ = run.summary, run.history, run.load_model()
        (folder / name).write_bytes(whole)
    assert musota.Run(folder).load_model()


@pytest.fixture
def half_way(short, tmp_path, monkeypatch):
    """A run stopped in its second epoch, with two checkpoints by the clock."""
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    folder, copied = tmp_path / "half" / "checkpoints", []
    options = RunOptions(stop_at=0.7, copy=lambda: copied.append(max(folder.glob("step-*"))))
    run = musota.train(EXPERIMENT, short, tmp_path / "half", options=options)
    monkeypatch.undo()
    newest, older = sorted(folder.glob("step-*"), reverse=True)
    assert copied[-1] == newest
    return run.path, newest, older


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(half_way, finished, short, capsys):
    folder, newest, _ = half_way
    flip_bit(newest, 500)
    flip_bit(folder / "metrics.jsonl", 100)
    run = musota.train(EXPERIMENT, short, folder)
    said = capsys.readouterr().out
    assert f"{newest} is damaged and is skipped" in said
    assert run.summary[SHA] == finished.summary[SHA]
    assert run.steps.loss.equals(finished.steps.loss)


def test_where_no_checkpoint_can_be_read_nothing_is_deleted(half_way, short):
    folder, *checkpoints = half_way
    for path in checkpoints:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MusotaError, match="no checkpoint that can be read: start over") as kept:
        musota.train(EXPERIMENT, short, folder)
    assert all(path.exists() for path in checkpoints) and len(musota.Run(folder).history) == 1
    # The advice works while the error is kept, as a notebook keeps the last one.
    assert kept.value and musota.train(EXPERIMENT, short, folder, resume=False).finished


def test_a_run_recorded_without_weights_is_trained_from_the_start(half_way, short, capsys):
    folder, *checkpoints = half_way
    for path in checkpoints:
        path.unlink()
    with pytest.raises(MusotaError, match="no checkpoint that can be read"):
        musota.train(EXPERIMENT, short, folder)  # its best weights would be lost
    shutil.rmtree(folder / "checkpoints")
    options = RunOptions(micro_batch=1, stop_at=0.7)
    run = musota.train(EXPERIMENT, short, folder, options=options)
    assert "recorded without checkpoints: it is trained from the start" in capsys.readouterr().out
    assert run.config["micro_batch"] == 1 and len(run.history) == 1
    assert musota.train(EXPERIMENT, short, folder).finished


def test_a_call_that_trains_nothing_more_keeps_the_records(short, tmp_path):
    options = RunOptions(stop_at=0.2)
    first, again = (musota.train(EXPERIMENT, short, tmp_path, options=options) for _ in range(2))
    assert len(again.steps) == len(first.steps) > 1


def test_damaged_checkpoints_do_not_push_good_ones_out(half_way, finished, short, always_due):
    folder, newest, _ = half_way
    for number in ("000000900", "000000901"):  # of later steps than any that is to come
        shutil.copy(newest, newest.with_name(f"step-{number}-0123456789abcdef.safetensors"))
    musota.train(EXPERIMENT, short, folder, options=RunOptions(stop_at=0.9))
    kept = [*(folder / "checkpoints").glob("step-*.safetensors")]
    assert len(kept) == 2 and not any("-0123" in path.name for path in kept)
    assert musota.train(EXPERIMENT, short, folder).summary[SHA] == finished.summary[SHA]


def test_flipped_or_lost_metrics_of_an_unfinished_run_are_seen(half_way):
    path, run = half_way[0] / "metrics.jsonl", musota.Run(half_way[0])
    assert 0 < run.summary["metrics_bytes"] <= path.stat().st_size and run.records
    for spoil in (lambda: flip_bit(path, 97), path.unlink):
        spoil()
        with pytest.raises(MusotaError, match="damaged"):
            _ = musota.Run(run.path).records


def test_without_its_config_a_checkpoint_still_knows_its_run(half_way, short):
    folder, *_ = half_way
    (folder / "config.json").unlink()
    with pytest.raises(MusotaError, match=r"checkpoint .* belongs to another run: its n_layer"):
        musota.train(EXPERIMENT.with_(n_layer=2), short, folder)


def test_nothing_here_unpickles():
    for path in (ROOT / "musota").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"import pickle|pickle\.|torch\.(load|save)\b", text), path


def test_a_second_process_is_refused_while_the_first_trains(short, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    refused = pytest.raises(MusotaError, match="Another process is training in")
    with FileLock(tmp_path / "checkpoints" / ".lock"), refused:
        musota.train(EXPERIMENT, short, tmp_path)
    assert musota.train(EXPERIMENT.with_(epochs=1), short, tmp_path).finished


def _full(patch, is_full):
    """Let writing fail while `is_full(path)` says so."""
    write = Path.write_bytes

    def failing(path, data):
        if is_full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    patch.setattr(Path, "write_bytes", failing)


def test_a_full_disk_is_reported_and_saved_later(finished, short, tmp_path, capsys, always_due):
    now = {"step": 0}
    counted = each_step(after=lambda state: now.update(step=state.step))
    with counted, pytest.MonkeyPatch.context() as patch:
        _full(patch, lambda _: 4 <= now["step"] <= finished.history.step[0] + 2)
        run = musota.train(EXPERIMENT, short, tmp_path)
    assert re.search("could not be saved.*No space left on device", capsys.readouterr().out)
    assert run.summary[SHA] == finished.summary[SHA]
    assert run.steps.loss.equals(finished.steps.loss) and run.load_model()


def test_best_weights_that_could_not_be_written_are_kept_with_the_checkpoint(short, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        _full(patch, lambda path: path.parent.name == "best")
        with pytest.raises(MusotaError, match="end of the run .* could not be saved"):
            musota.train(EXPERIMENT, short, tmp_path, options=RunOptions(stop_at=0.7))
    # No epoch ends on the way from here.
    run = musota.train(EXPERIMENT, short, tmp_path, options=RunOptions(stop_at=0.9))
    scored = musota.evaluate(run.load_model(), short.valid)["loss"]
    assert run.summary["best_epoch"] == 1 and scored == pytest.approx(run.summary["valid_loss"])


def test_a_folder_that_vanishes_does_not_stop_training(finished, short, tmp_path):
    place, steps = tmp_path / "disk" / "run", []

    def after(state):
        steps.append(state.step)
        if state.step == 4:
            shutil.move(tmp_path / "disk", tmp_path / "away")

    said = pytest.raises(MusotaError, match="end of the run .* could not be saved")
    with each_step(after=after), said:
        options = RunOptions(watch=lambda run: run.history)
        musota.train(EXPERIMENT, short, place, options=options)
    assert len(steps) == finished.history.step.iloc[-1] and not place.exists()
    shutil.move(tmp_path / "away", tmp_path / "disk")
    run = musota.train(EXPERIMENT, short, place)
    assert run.summary[SHA] == finished.summary[SHA]


def _too_large(patch, sequences):
    """Out of memory for more than so many sequences; gives the sizes of all training batches."""
    forward, sizes = CausalLM.forward, []

    def limited(model, ids, targets=None):
        sizes.append(len(ids))
        if sizes[-1] > sequences:
            raise RuntimeError("CUDA out of memory")
        return forward(model, ids, targets)

    patch.setattr(CausalLM, "forward", limited)
    return sizes


def test_out_of_memory_halves_the_micro_batch_and_nothing_else(short, still, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        _too_large(patch, 4)
        options = RunOptions(micro_batch=16, stop_at=0.5)
        musota.train(STILL, short, tmp_path, options=options)
    with pytest.MonkeyPatch.context() as patch:
        sizes = _too_large(patch, 99)
        run = musota.train(STILL, short, tmp_path)
    assert max(sizes) == 4  # which is remembered
    events = [event for _, event in run.events]
    assert events == [f"out of memory: micro-batch {n} → {n // 2}" for n in (16, 8)]
    assert list(run.steps.loss) == pytest.approx(list(still.steps.loss), rel=1e-5)
    assert list(run.history.ppl) == pytest.approx(list(still.history.ppl), rel=1e-4)


def test_where_not_even_one_sequence_fits_the_plans_remedy_is_named(short, tmp_path, monkeypatch):
    _too_large(monkeypatch, 0)
    with pytest.raises(MusotaError, match="plan's remedy is max_seq_len=160"):
        musota.train(EXPERIMENT, short, tmp_path)


def test_nothing_holds_on_to_the_state_of_an_ended_run(short, tmp_path):
    """On a GPU its model and optimizer would stay and count in the next run's peak memory."""
    alive = []
    gc.disable()
    try:
        with each_step(after=lambda state: alive.append(weakref.ref(state))):
            musota.train(EXPERIMENT.with_(epochs=1), short, tmp_path)
        assert alive[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("value", "stop_at"), [(math.nan, 1), (1e3, 1), (math.nan, 0.6)])
def test_broken_weights_are_seen_in_the_next_loss_and_never_saved(short, tmp_path, value, stop_at):
    def spoil(state):
        if state.step == 14:
            state.model.output.weight.data *= value

    stops = pytest.raises(Diverged, match=r"loss is (nan|[\d.]+) at step 1[45]: .*last good")
    with each_step(after=spoil), stops:
        musota.train(EXPERIMENT, short, tmp_path, options=RunOptions(stop_at=stop_at))
    assert musota.Run(tmp_path).diverged
    assert musota.train(EXPERIMENT, short, tmp_path).finished  # from the checkpoint


def test_valid_text_far_from_the_training_text_is_no_divergence(short, tmp_path):
    unseen = int(short.valid.max())
    seen = torch.where(short.train == unseen, 0, short.train)
    far = replace(short, train=seen, valid=torch.full_like(short.valid, unseen))
    run = musota.train(EXPERIMENT.with_(learning_rate=0.05), far, tmp_path)
    assert run.finished and run.summary["valid_loss"] > math.log(512) + 2


def test_a_valid_token_without_a_finite_loss_is_named(short, tmp_path):
    valid, unseen = short.valid.clone(), next(t for t in range(512) if t not in short.train)
    valid[17] = unseen

    def spoil(state):
        state.model.output.bias.data[unseen] = -math.inf

    named = pytest.raises(Diverged, match=r"^1 tokens of valid .* epoch 1: .* token 17\.")
    with each_step(after=spoil), named:
        musota.train(EXPERIMENT, replace(short, valid=valid), tmp_path)
    run = musota.Run(tmp_path)
    assert run.diverged_at == 11 and run.valid_loss == math.inf and len(run.steps) == 11
