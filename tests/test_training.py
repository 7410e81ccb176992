import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import musota
from musota.data.corpus import Corpus, window_starts
from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError
from musota.models.base import score
from musota.plan.config import TrainConfig
from musota.training import keeping, machine, trainer
from musota.training import trainer as training_room
from musota.training.optimizer import update_ratios
from musota.training.runs import read_metrics
from musota.training.schedule import learning_rate_at

MODEL = musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=1)
EXPERIMENT = musota.Experiment(
    MODEL,
    TrainConfig(epochs=2, learning_rate=3e-3, warmup_steps=5, batch_size=4, accumulation_steps=4),
)
CLOCKS = {"seconds", "tokens_per_second", "peak_memory_bytes", "date", "metrics_sha256"}
CLOCKS |= {"metrics_bytes"}  # as many as the digits of seconds


@pytest.fixture(scope="module")
def short(corpus):
    """The first tokens of the corpus: runs of a second."""
    from musota.plan.profiles import Profile

    return corpus.limited(Profile("short", 512, 4000, 1200))


@pytest.fixture(scope="module")
def finished(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return musota.train(EXPERIMENT, short, folder, name="finished")


def _history(run):
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in run.records]


# --- schedule ---


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    config = TrainConfig(learning_rate=1e-3, warmup_steps=100)
    rates = [learning_rate_at(step, config, 1100) for step in range(1101)]
    assert rates[0] == 0
    assert rates[1] == pytest.approx(1e-5)
    assert rates[50] == pytest.approx(5e-4)
    assert rates[100] == pytest.approx(1e-3) == pytest.approx(max(rates))
    assert rates[600] == pytest.approx(5e-4)  # half way down
    assert rates[350] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[1100] == pytest.approx(0, abs=1e-12)
    assert all(low > high for low, high in pairwise(rates[100:]))
    assert learning_rate_at(1, TrainConfig(warmup_steps=0), 10) <= 1e-4


def test_the_run_uses_that_schedule_in_optimizer_steps(finished, short):
    windows = (len(short.train) - 24) // 24
    per_epoch = math.ceil(windows / 16)
    assert finished.history.step.tolist() == [per_epoch, 2 * per_epoch]
    for row in finished.steps.itertuples():
        wanted = learning_rate_at(row.step, EXPERIMENT.training, 2 * per_epoch)
        assert row.learning_rate == pytest.approx(wanted)
    assert finished.steps.step.tolist() == list(range(1, 2 * per_epoch + 1))
    assert finished.history.tokens.tolist() == [windows * 24, 2 * windows * 24]


# --- one step ---


def test_at_dropout_0_micro_batches_change_nothing(short, tmp_path):
    still = EXPERIMENT.with_(dropout=0.0)
    runs = [
        musota.train(still, short, tmp_path / str(size), micro_batch=size) for size in (16, 5, 1)
    ]
    for other in runs[1:]:
        np.testing.assert_allclose(other.steps.loss, runs[0].steps.loss, rtol=2e-5)
        np.testing.assert_allclose(other.steps.grad_norm, runs[0].steps.grad_norm, rtol=1e-3)
        np.testing.assert_allclose(other.history.ppl, runs[0].history.ppl, rtol=1e-4)
    assert len(runs[0].steps) > 10


def test_choices_of_speed_are_kept_and_a_resume_repeats_them(short, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 14)
        musota.train(EXPERIMENT, short, tmp_path, micro_batch=3)
    assert json.loads((tmp_path / "config.json").read_text())["micro_batch"] == 3
    sizes = set()
    forward = musota.CausalLM.forward

    def watched(self, input_ids, targets=None):
        sizes.add(len(input_ids))
        return forward(self, input_ids, targets)

    monkeypatch.setattr(musota.CausalLM, "forward", watched)
    musota.train(EXPERIMENT, short, tmp_path)
    assert max(sizes) == 3


@pytest.mark.parametrize("model", [MODEL, musota.DenseConfig(512, 24, 1, 3, d_model=48)])
def test_a_compiled_run_is_the_same_run(model, short, tmp_path, monkeypatch):
    # Traced and differentiated ahead of time as on a GPU; generating code would take a minute.
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    experiment = musota.Experiment(model, EXPERIMENT.training).with_(dropout=0.0, epochs=1)
    plain = musota.train(experiment, short, tmp_path / "plain")
    compiled = musota.train(experiment, short, tmp_path / "compiled", compile=True)
    np.testing.assert_allclose(compiled.steps.loss, plain.steps.loss, rtol=1e-5)
    assert compiled.config["compile"] and not plain.config["compile"]
    assert not [record for record in compiled.records if record["kind"] == "event"]


def test_where_compiling_fails_the_run_says_so_and_goes_on(short, tmp_path, monkeypatch, capsys):
    def broken(body, **_):
        def call(*_):
            raise torch._dynamo.exc.InternalTorchDynamoError("no compiler here\nand more")

        return call

    plain = musota.train(EXPERIMENT, short, tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", broken)
    run = musota.train(EXPERIMENT, short, tmp_path / "broken", compile=True)
    assert run.summary["weights_sha256"] == plain.summary["weights_sha256"]
    assert (
        "torch.compile failed, training goes on without it (no compiler here)"
        in capsys.readouterr().out
    )
    events = [record for record in run.records if record["kind"] == "event"]
    assert [event["event"] for event in events] == [
        "torch.compile failed, training goes on without it (no compiler here)"
    ]


def test_between_two_log_lines_nothing_waits_for_a_value(short, tmp_path, monkeypatch):
    """On a GPU, reading a number back stops everything. Looks at values are counted here, but for
    those that only a CPU takes: ids out of range, and the optimizer's step count."""
    monkeypatch.setattr(musota.CausalLM, "check_tokens", lambda *_: None)
    monkeypatch.setattr(training_room, "LOG_LINES", 1)
    trainer = training_room.Trainer(
        EXPERIMENT, short, tmp_path, True, 0, "run", None, {"micro_batch": 16}
    )
    trainer.progress = machine.progress_bar(1, 0)
    trainer.one_step()  # the first step is logged
    looked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
                looked.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        trainer.one_step()
    assert not looked
    with Watch():
        float(trainer.epoch_nats)
    assert looked  # the watch does see it


def test_health_is_recorded_each_epoch(finished, short):
    assert [epoch["epoch"] for epoch in finished.health] == [1, 2]
    groups = set(finished.summary["parameter_ledger"])
    for epoch in finished.health:
        assert set(epoch["update_ratio"]) == groups
        assert all(1e-6 < ratio < 1 for ratio in epoch["update_ratio"].values())
        assert 1 < epoch["effective_rank"] <= 64
        assert len(epoch["gate_mean"]) == 16
    # Nearly all of so short a text is scored in training too; without dropout it is known better.
    last = finished.health[-1]
    assert last["clean_train_loss"] == pytest.approx(finished.history.train_loss.iloc[-1], abs=1.0)
    assert "health" not in finished.history and "valid_block_nats" not in finished.history
    nats = np.array(finished.valid_block_nats).sum(1) / (len(short.valid) - 1)
    np.testing.assert_allclose(nats, finished.history.valid_loss, rtol=1e-5)


def test_update_ratios_are_those_of_the_weights(short, tmp_path):
    trainer = training_room.Trainer(EXPERIMENT, short, tmp_path, True, 0, "run", None, {})
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter *= 1.01
        trainer.model.embedding.weight *= 1.02 / 1.01
    ratios = update_ratios(trainer.model, before)
    assert ratios.pop("embedding") == pytest.approx(0.02, rel=1e-3)
    assert set(ratios) == set(trainer.ledger) - {"embedding"}
    assert all(ratio == pytest.approx(0.01, rel=1e-3) for ratio in ratios.values())


def test_a_run_equals_the_plain_loop(short, tmp_path):
    """The trainer against twenty obvious lines: same windows, AdamW, clipping and schedule."""
    run = musota.train(EXPERIMENT.with_(dropout=0.0), short, tmp_path / "run")
    torch.manual_seed(0)
    model = musota.build_model(run.experiment.model)
    groups = model.optimizer_groups(0.01)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    losses, norms, step = [], [], 0
    total = 2 * math.ceil(((len(short.train) - 24) // 24) / 16)
    for epoch in range(2):
        for batch in window_starts(len(short.train), 24, 0, epoch).split(16):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, EXPERIMENT.training, total)
            windows = torch.stack([short.train[s : s + 25] for s in batch.tolist()]).long()
            logits = model(windows[:, :-1])[0]
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(run.steps.loss, losses, rtol=1e-4)
    np.testing.assert_allclose(run.steps.grad_norm, norms, rtol=5e-3)


def test_mixed_precision_learns_the_same_to_rounding(text_folder, tmp_path):
    """What a GPU does, on a CPU: bf16 autocast; in a process of its own, where it is set once."""
    code = f"""
import numpy, musota
import torch
from musota.training import machine
from musota.plan.profiles import Profile
machine.dtype_of = lambda device: torch.bfloat16
corpus = musota.load_corpus({str(text_folder)!r}, 512).limited(Profile("short", 512, 4000, 1200))
experiment = musota.Experiment(
    musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=1, dropout=0.0),
    musota.TrainConfig(2, 3e-3, 5, 4, 4),
)
run = musota.train(experiment, corpus, {str(tmp_path / "bf16")!r})
assert run.config["precision"] == "bf16"
print(*run.history.valid_loss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    from musota.plan.profiles import Profile

    corpus = musota.load_corpus(str(text_folder), 512).limited(Profile("short", 512, 4000, 1200))
    plain = musota.train(EXPERIMENT.with_(dropout=0.0), corpus, tmp_path / "plain")
    rounded = [float(loss) for loss in done.stdout.splitlines()[-1].split()]
    np.testing.assert_allclose(rounded, plain.history.valid_loss, rtol=5e-3)
    assert rounded != plain.history.valid_loss.tolist()


def test_the_same_seed_gives_the_same_history_and_another_does_not(finished, short, tmp_path):
    again = musota.train(EXPERIMENT, short, tmp_path / "again", name="finished")
    assert _history(again) == _history(finished)
    assert again.summary["weights_sha256"] == finished.summary["weights_sha256"]
    other = musota.train(EXPERIMENT, short, tmp_path / "other", seed=1)
    assert other.summary["weights_sha256"] != finished.summary["weights_sha256"]


def test_a_learned_source_comes_near_its_entropy_and_not_below(tmp_path):
    """A Markov chain over twelve tokens, whose conditional probabilities are known."""
    generator = np.random.default_rng(0)
    chain = generator.dirichlet(np.full(12, 0.3), size=12)
    tokens = [0]
    for draw in generator.random(40_000):
        tokens.append(int(np.searchsorted(chain[tokens[-1]].cumsum(), draw)))
    tokens = torch.tensor(tokens, dtype=torch.int32).clamp(max=11)
    train, valid, test = tokens[:32_000], tokens[32_000:36_000], tokens[36_000:]
    counts = dict.fromkeys(("train", "valid", "test"), 1000)
    tokenizer = TextTokenizer.train(["abc\n" * 9], 258)
    corpus = Corpus(
        "chain", train, valid, test, counts, counts, tokenizer, "chain", "chain", "made up"
    )
    for config in (
        musota.MuConfig(vocab_size=258, max_seq_len=32, n_layer=2, dropout=0.0),
        musota.DenseConfig(
            vocab_size=258, max_seq_len=32, n_layer=2, d_model=64, n_head=4, dropout=0.0
        ),
    ):
        training = TrainConfig(6, 5e-3, 20, 32, 1)
        folder = tmp_path / type(config).__name__
        run = musota.train(musota.Experiment(config, training), corpus, folder)
        source = -np.log(chain[valid[:-1], valid[1:]])
        floor = source.mean()
        assert run.summary["valid_loss"] < 1.03 * floor
        # On the very same tokens no model beats the source by more than the luck of the draw.
        excess = score(run.load_model(), valid)[0].numpy() - source
        assert excess.mean() > -3 * excess.std() / math.sqrt(len(excess))
        assert floor < 0.8 * math.log(12)  # there was something to learn


# --- evaluation ---


def _one_at_a_time(model, tokens, stride):
    """Each token's nats from a forward pass of its own over the context it is entitled to."""
    length, nats, hits = model.config.max_seq_len, [], []
    for place in range(1, len(tokens)):
        window = 0
        while window * stride + length < place:
            window += 1
        context = tokens[window * stride : place].long()
        logits = model(context[None])[0][0, -1]
        nats.append(F.cross_entropy(logits, tokens[place].long()).item())
        hits.append(logits.argmax().item() == tokens[place].item())
    return nats, hits


@pytest.mark.parametrize("n", [2, 12, 13, 14, 57])
@pytest.mark.parametrize("stride", [None, 5, 1])
def test_evaluation_equals_one_token_at_a_time(n, stride):
    torch.manual_seed(0)
    model = musota.build_model(musota.MuConfig(vocab_size=60, max_seq_len=12, n_layer=1)).eval()
    tokens = torch.randint(60, (n,), dtype=torch.int32)
    nats, hits = _one_at_a_time(model, tokens, stride or 12)
    for batch_size in (1, 2, 16):
        got_nats, got_hits = score(model, tokens, stride, batch_size)
        np.testing.assert_allclose(got_nats, nats, rtol=1e-4)
        assert got_hits.tolist() == hits
    measured = musota.evaluate(model, tokens, stride=stride)
    assert measured["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert measured["ppl"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert measured["accuracy"] == pytest.approx(np.mean(hits))


def test_word_ppl_and_bits_per_byte_by_hand():
    """A model that gives each of 64 tokens 1/64: 6 bits a token, whatever the text."""
    model = musota.build_model(musota.MuConfig(vocab_size=64, max_seq_len=8, n_layer=1)).eval()
    with torch.no_grad():
        model.output.weight.zero_()
    tokens = torch.arange(21, dtype=torch.int32)  # 20 predictions, 120 bits
    measured = musota.evaluate(model, tokens, words=10, bytes=60)
    assert measured["ppl"] == pytest.approx(64)
    assert measured["bits_per_byte"] == pytest.approx(120 / 60)
    assert measured["word_ppl"] == pytest.approx(2 ** (120 / 10))
    assert set(musota.evaluate(model, tokens)) == {"loss", "ppl", "accuracy"}


def test_evaluation_leaves_the_model_in_its_mode_and_refuses_bad_input():
    model = musota.build_model(musota.MuConfig(vocab_size=60, max_seq_len=12, n_layer=1)).train()
    musota.evaluate(model, torch.arange(30))
    assert model.training
    for tokens, message in [
        (torch.tensor([1]), "at least two tokens"),
        (torch.tensor([1, 60]), "Token id 60 is out of range"),
        (torch.tensor([-1, 5]), "Token id -1 is out of range"),
    ]:
        with pytest.raises(MusotaError, match=message):
            musota.evaluate(model, tokens)
    with pytest.raises(MusotaError, match="stride must lie between 1 and max_seq_len=12"):
        musota.evaluate(model, torch.arange(30), stride=13)


def test_the_summary_is_what_the_best_checkpoint_measures(finished, short):
    model = finished.load_model()
    measured = musota.evaluate(model, short.valid, short.words["valid"], short.bytes["valid"])
    best = finished.history.loc[finished.history.ppl.idxmin()]
    for key in ("ppl", "accuracy", "word_ppl", "bits_per_byte"):
        assert finished.summary[key] == pytest.approx(measured[key], rel=1e-5)
        assert finished.summary[key] == best[key]
    test = musota.evaluate(model, short.test)
    assert finished.summary["test_ppl"] == pytest.approx(test["ppl"], rel=1e-5)
    nats = sum(finished.summary["valid_block_nats"]) / sum(finished.summary["valid_block_tokens"])
    assert nats == pytest.approx(finished.summary["valid_loss"], abs=1e-6)


def test_the_best_epoch_is_chosen_on_valid_and_kept(short, tmp_path):
    """A rate that learns the training text by heart: valid turns, the last epoch is not best."""
    hot = EXPERIMENT.with_(learning_rate=2e-2, epochs=8, dropout=0.0, n_layer=2)
    run = musota.train(hot, short, tmp_path / "run")
    best = run.history.loc[run.history.ppl.idxmin()]
    assert best.epoch < 8 and run.history.ppl.iloc[-1] > 1.05 * best.ppl
    assert run.summary["best_epoch"] == best.epoch and run.summary["ppl"] == best.ppl
    kept = musota.evaluate(run.load_model(), short.valid)
    assert kept["ppl"] == pytest.approx(best.ppl, rel=1e-5)


# --- the run folder ---


def test_what_a_run_leaves_behind(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "checkpoints"}
    kinds = {record["kind"] for record in finished.records}
    assert kinds == {"step", "epoch"}
    assert {"weights_sha256", "device", "versions", "seconds", "peak_memory_bytes"} <= set(
        finished.summary
    )
    assert finished.samples.epoch.tolist() == [1, 1, 1, 2, 2, 2]
    assert finished.samples.text.str.len().gt(0).all()
    assert isinstance(finished.history, pd.DataFrame) and len(finished.history) == 2
    assert [run.path for run in musota.load_runs(finished.path.parent)].count(finished.path) == 1


def _interrupt_after(monkeypatch, steps):
    """Ctrl-C in the middle of step `steps`."""
    original = trainer.Trainer.one_step

    def one_step(trainer):
        if trainer.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        original(trainer)

    monkeypatch.setattr(trainer.Trainer, "one_step", one_step)


@pytest.mark.parametrize("where", [3, 10, 14, 18])  # in an epoch, at its end, early and late
def test_an_interrupted_run_goes_on_bit_for_bit(where, finished, short, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, where)
        if where < finished.history.step[0]:
            with pytest.raises(KeyboardInterrupt):
                musota.train(EXPERIMENT, short, folder, name="finished")
        else:
            partial = musota.train(EXPERIMENT, short, folder, name="finished")
            assert not partial.finished and partial.summary["epochs_done"] == 1
    resumed = musota.train(EXPERIMENT, short, folder, name="finished")
    assert _history(resumed) == _history(finished)
    assert resumed.summary["weights_sha256"] == finished.summary["weights_sha256"]
    same = set(finished.summary) - CLOCKS
    assert {k: resumed.summary[k] for k in same} == {k: finished.summary[k] for k in same}


def test_lines_written_after_the_checkpoint_are_not_doubled(finished, short, tmp_path, monkeypatch):
    """A crash, not Ctrl-C: steps were logged that the checkpoint knows nothing of."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 14)
        patch.setattr(
            keeping,
            "checkpoint",
            lambda t, save=keeping.checkpoint: save(t) if t.step < 14 else None,
        )
        musota.train(EXPERIMENT, short, folder, name="finished")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 15, "lo')  # killed while writing
    resumed = musota.train(EXPERIMENT, short, folder, name="finished")
    assert _history(resumed) == _history(finished)


def test_a_finished_run_is_loaded_and_only_fresh_trains_again(finished, short, monkeypatch):
    before = (finished.path / "summary.json").read_bytes()

    def forbidden(trainer):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "one_step", forbidden)
        loaded = musota.train(EXPERIMENT, short, finished.path, name="finished")
        assert loaded.summary == finished.summary
        with pytest.raises(AssertionError, match="trained again"):
            copy = finished.path.parent / "copy"
            shutil.copytree(finished.path, copy)
            musota.train(EXPERIMENT, short, copy, name="finished", resume=False)
    assert (finished.path / "summary.json").read_bytes() == before


def test_finished_evidence_without_checkpoints_is_loaded(finished, short, tmp_path):
    shutil.copytree(finished.path, tmp_path / "kept", ignore=shutil.ignore_patterns("checkpoints"))
    kept = musota.train(EXPERIMENT, short, tmp_path / "kept", name="finished")
    assert kept.summary == finished.summary
    assert not (tmp_path / "kept" / "checkpoints").exists()  # read, not touched
    with pytest.raises(MusotaError, match="No saved model"):
        kept.load_model()


def test_a_folder_of_another_run_is_refused_and_left_alone(finished, short, corpus):
    before = (finished.path / "metrics.jsonl").read_bytes()
    for experiment, seed, text, message in [
        (EXPERIMENT.with_(learning_rate=1e-3), 0, short, "learning_rate is 0.003, not 0.001"),
        (EXPERIMENT, 1, short, "its seed is 0, not 1"),
        (EXPERIMENT, 0, corpus, "its corpus"),
    ]:
        with pytest.raises(MusotaError, match=message):
            musota.train(experiment, text, finished.path, seed=seed)
    assert (finished.path / "metrics.jsonl").read_bytes() == before


def test_metrics_with_a_half_written_end_are_read_and_damage_is_named(tmp_path):
    path, event = tmp_path / "metrics.jsonl", {"kind": "event", "step": 1, "event": "x"}
    line = json.dumps(event).encode() + b"\n"
    assert read_metrics(line + b'{"kind": "ep', path) == [event]
    for damaged in (b'{"kind": "ep', b"[]", b"null", b"{}", b'{"kind": "step", "step": 1}'):
        with pytest.raises(MusotaError, match="Line 2 of .*metrics.jsonl is damaged"):
            read_metrics(line + damaged + b"\n" + line, path)


def test_an_unwritable_folder_gets_one_sentence(short, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MusotaError, match="cannot be used"):
        musota.train(EXPERIMENT, short, tmp_path / "file" / "run")


def test_a_vocabulary_too_small_for_the_corpus_is_refused(short, tmp_path):
    with pytest.raises(MusotaError, match="The corpus uses 512 tokens but the model's vocab_size"):
        musota.train(EXPERIMENT.with_(vocab_size=300), short, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(short, tmp_path):
    with pytest.raises(MusotaError, match="training loss is (nan|inf) at step"):
        musota.train(
            EXPERIMENT.with_(learning_rate=1e30, warmup_steps=0, grad_clip=1e30), short, tmp_path
        )
