"""The loop, evaluation and the run folder, where nothing fails."""

import functools
import math
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EXPERIMENT, STILL, Recurrent, each_step, interrupted_at

import musota
from musota.config import TrainConfig
from musota.data.corpus import window_starts
from musota.errors import MusotaError
from musota.models.base import score
from musota.models.module import WrappedModule, module_config
from musota.training.device import make_accelerator
from musota.training.optim import learning_rate_at, update_ratios
from musota.training.state import Batches, TrainState, train_step
from musota.training.trainer import RunOptions

CLOCKS = {"seconds", "tokens_per_second", "peak_memory_bytes", "date", "metrics_sha256"}
CLOCKS |= {"metrics_bytes"}  # depends on the digits of seconds


def _history(run):
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in run.records]


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    config = TrainConfig(learning_rate=1e-3, warmup_steps=100)
    rates = [learning_rate_at(step, config, 1100) for step in range(1101)]
    places = {0: 0, 1: 1e-5, 50: 5e-4, 100: 1e-3, 600: 5e-4, 1100: 0}  # 600: half way down
    assert {step: rates[step] for step in places} == pytest.approx(places, abs=1e-12)
    assert all(low > high for low, high in pairwise(rates[100:]))
    assert learning_rate_at(1, TrainConfig(warmup_steps=0), 10) <= 1e-4


def test_a_run_equals_the_plain_loop(still, short):
    """The trainer against twenty obvious lines: same windows, AdamW, clipping and schedule."""
    torch.manual_seed(0)
    model = musota.build_model(STILL.model)
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.01), betas=(0.9, 0.999))
    losses, norms, step = [], [], 0
    total = 2 * math.ceil(((len(short.train) - 24) // 24) / 16)
    for epoch in range(2):
        for batch in window_starts(len(short.train), 24, 0, epoch).split(16):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, STILL.training, total)
            windows = torch.stack([short.train[s : s + 25] for s in batch.tolist()]).long()
            logits = model(windows[:, :-1])[0]
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            losses.append(loss.item())
            assert still.steps.learning_rate[step - 1] == pytest.approx(group["lr"])
    np.testing.assert_allclose(still.steps.loss, losses, rtol=1e-4)
    np.testing.assert_allclose(still.steps.grad_norm, norms, rtol=5e-3)


@pytest.mark.parametrize(
    ("choices", "tolerance"),
    [({"micro_batch": 5}, 2e-5), ({"compile": True}, 2e-5), ({"precision": "bf16"}, 5e-3)],
)  # fmt: skip
def test_choices_change_rounding_only(choices, tolerance, still, short, tmp_path, monkeypatch):
    # Traced and differentiated ahead of time as on a GPU; generating code would take a minute.
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    run = musota.train(STILL, short, tmp_path, options=RunOptions(**choices))
    assert choices.items() <= run.config.items()
    np.testing.assert_allclose(run.steps.loss, still.steps.loss, rtol=tolerance)
    np.testing.assert_allclose(run.history.ppl, still.history.ppl, rtol=10 * tolerance)
    assert not run.events
    if "precision" in choices:
        assert run.history.ppl.tolist() != still.history.ppl.tolist()


def test_where_compiling_fails_the_advice_is_not_to_compile(short, tmp_path, monkeypatch):
    def broken(*_):
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", lambda body, **_: broken)
    with pytest.raises(MusotaError, match=r"failed \(no compiler here\): .*--no-compile"):
        musota.train(EXPERIMENT, short, tmp_path, options=RunOptions(compile=True))


def test_a_step_never_waits_for_a_value(short, monkeypatch):
    """On a GPU, reading a value waits for the device. Reads are counted here, except those that
    only a CPU does: the check of token ids, and the optimizer's step count."""
    monkeypatch.setattr(musota.CausalLM, "check_tokens", lambda *_: None)
    reads = []

    class CountReads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
                reads.append(function)
            return function(*args, **(kwargs or {}))

    accelerator = make_accelerator()
    model, training = musota.build_model(EXPERIMENT.model), EXPERIMENT.training
    state = TrainState.new(model, training, accelerator, micro_batch=16, compile=False)
    batches = Batches(short.train, EXPERIMENT, 0, accelerator.device)
    train_step(state, batches)
    with CountReads():
        loss, _ = train_step(state, batches)
    assert not reads
    with CountReads():
        float(loss)
    assert reads


def test_health_is_recorded_each_epoch(finished, short):
    for epoch in finished.health:
        assert set(epoch["update_ratio"]) == set(finished.summary["parameter_ledger"])
        assert all(1e-6 < ratio < 1 for ratio in epoch["update_ratio"].values())
        assert 1 < epoch["effective_rank"] <= 64 and len(epoch["gate_mean"]) == 16
    clean = [epoch["clean_train_loss"] for epoch in finished.health]
    np.testing.assert_allclose(clean, finished.history.train_loss, atol=1.5)
    nats = np.array(finished.valid_block_nats).sum(1) / (len(short.valid) - 1)
    np.testing.assert_allclose(nats, finished.history.valid_loss, rtol=1e-5)


@torch.no_grad()
def test_update_ratios_are_those_of_the_weights():
    model = musota.build_model(EXPERIMENT.model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter *= 1.01
    model.embedding.weight *= 1.02 / 1.01
    expected = dict.fromkeys(model.parameter_ledger(), 0.01) | {"embedding": 0.02}
    assert update_ratios(model, before) == pytest.approx(expected, rel=1e-3)


def _one_at_a_time(model, tokens, stride):
    """Each token's nats from a forward pass of its own over its context."""
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
    model.train()
    for batch_size in (1, 2, 16):
        got_nats, got_hits = score(model, tokens, stride, batch_size)
        np.testing.assert_allclose(got_nats, nats, rtol=1e-4)
        assert got_hits.tolist() == hits
    measured = musota.evaluate(model, tokens, stride=stride)
    assert model.training  # as it was
    assert measured["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert measured["ppl"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert measured["accuracy"] == pytest.approx(np.mean(hits))
    with pytest.raises(MusotaError, match="stride must be a whole number from 1 to 12"):
        musota.evaluate(model, tokens, stride=13)


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


def test_the_best_epoch_is_chosen_on_valid_and_the_summary_measures_it(short, tmp_path):
    """With a high rate the valid loss rises again: the last epoch is not the best."""
    run = musota.train(STILL.with_(learning_rate=2e-2, epochs=8, n_layer=2), short, tmp_path)
    best = run.history.loc[run.history.ppl.idxmin()]
    assert best.epoch < 8 and run.history.ppl.iloc[-1] > 1.05 * best.ppl
    assert run.summary["best_epoch"] == best.epoch
    model = run.load_model()
    measured = musota.evaluate(model, short.valid, short.words["valid"], short.bytes["valid"])
    for key in ("ppl", "accuracy", "word_ppl", "bits_per_byte"):
        assert run.summary[key] == best[key] == pytest.approx(measured[key], rel=1e-5)
    test = musota.evaluate(model, short.test)
    assert run.summary["test_ppl"] == pytest.approx(test["ppl"], rel=1e-5)


def test_what_a_run_leaves_behind(finished, short):
    windows = (len(short.train) - 24) // 24
    steps = math.ceil(windows / 16)  # optimizer steps an epoch
    assert finished.history.step.tolist() == [steps, 2 * steps]
    assert finished.history.tokens.tolist() == [windows * 24, 2 * windows * 24]
    names = {path.name for path in finished.path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "checkpoints"}
    assert {"weights_sha256", "device", "versions", *CLOCKS} <= set(finished.summary)
    assert finished.samples.epoch.tolist() == [1, 1, 1, 2, 2, 2]
    assert finished.samples.text.str.len().gt(0).all()
    assert finished.valid_text == short.valid_sha256


@pytest.mark.parametrize("where", [3, 10, 14, 18])  # within an epoch, at its end, early and late
def test_an_interrupted_run_goes_on_bit_for_bit(where, finished, short, tmp_path):
    with interrupted_at(where):
        if where < finished.history.step[0]:
            with pytest.raises(KeyboardInterrupt):
                musota.train(EXPERIMENT, short, tmp_path, name="finished")
        else:
            partial = musota.train(EXPERIMENT, short, tmp_path, name="finished")
            assert not partial.finished and partial.summary["epochs_done"] == 1
    resumed = musota.train(EXPERIMENT, short, tmp_path, name="finished")
    assert _history(resumed) == _history(finished)
    same = set(finished.summary) - CLOCKS  # the hash of the weights among them
    assert {k: resumed.summary[k] for k in same} == {k: finished.summary[k] for k in same}


def test_a_finished_run_is_loaded_untouched_and_only_fresh_trains_again(finished, short, tmp_path):
    def forbidden(state):
        raise AssertionError("trained again")

    kept = tmp_path / "kept"  # as evidence, without its checkpoints
    shutil.copytree(finished.path, kept, ignore=shutil.ignore_patterns("checkpoints"))
    with each_step(forbidden):
        loaded = musota.train(EXPERIMENT, short, kept, name="finished")
        assert loaded.summary == finished.summary and not (kept / "checkpoints").exists()
        with pytest.raises(AssertionError, match="trained again"):
            musota.train(EXPERIMENT, short, kept, resume=False)


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


def test_what_cannot_be_trained_gets_one_sentence(short, tmp_path):
    (tmp_path / "file").write_text("in the way")
    small, size = EXPERIMENT.with_(vocab_size=300), {"max_seq_len": 24}
    for trained, name, how, message in [
        (EXPERIMENT, "file/run", {}, "cannot be used"),
        (small, "run", {}, "The corpus uses 512 tokens but the model's vocab_size"),
        (EXPERIMENT, "run", {"options": RunOptions("tpu")}, "no device 'tpu' here: use .*cpu"),
        (EXPERIMENT, "run", size, "are for modules"),
        (Recurrent(), "run", {**size, "training": {}}, "must be a TrainConfig, not {}"),
        (Recurrent().requires_grad_(False), "run", size, "Recurrent has no parameters to train"),
        (Recurrent(), "run", {}, "A module needs max_seq_len"),
        (Recurrent(), "run", {"max_seq_len": -1}, "max_seq_len must be a whole number"),
        (Recurrent(300), "run", size, "the model's vocab_size is 300"),
    ]:
        with pytest.raises(MusotaError, match=message):
            musota.train(trained, short, tmp_path / name, **how)


def test_accelerates_environment_variables_change_no_weight(finished, short, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run = musota.train(EXPERIMENT, short, tmp_path)
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]


class Complex(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(0.1 * torch.randn(512, 4, dtype=torch.complex64))

    def forward(self, ids):
        return (self.table[ids] @ self.table.mH).real


class Sparse(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Embedding(512, 8, sparse=True), torch.nn.Linear(8, 512))


class Shared(torch.nn.Module):
    """Tied weights, a buffer whose elements share memory, and no length."""

    def __init__(self, wrap=lambda layer: layer):
        super().__init__()
        self.embedding, self.mix = torch.nn.Embedding(512, 4), wrap(torch.nn.Linear(4, 4))
        self.register_buffer("mask", torch.zeros(1, 8).expand(3, 8))
        self.head = torch.nn.Linear(4, 512, bias=False)
        self.head.weight = self.embedding.weight

    def __len__(self):
        return 0

    def forward(self, ids):
        return self.head(self.mix(self.embedding(ids)))


TRAINING = TrainConfig(2, 3e-3, 10, 8, 1)
compiled = functools.partial(torch.compile, backend="eager")
ALIKE = {"tied": Shared, "compiled": lambda: compiled(Shared()), "part": lambda: Shared(compiled)}
KINDS = {"LSTM": Recurrent, "complex": Complex, "sparse": Sparse, **ALIKE}  # ALIKE share weights
KINDS["scripted"] = lambda: torch.jit.script(Sparse())


@pytest.mark.parametrize("name", KINDS)
def test_a_module_trains_resumes_and_gets_its_weights(name, corpus, tmp_path):
    kind = KINDS[name]
    train = functools.partial(musota.train, training=TRAINING, max_seq_len=np.int64(24))
    torch.manual_seed(0)
    module = kind()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    whole = train(module, corpus, tmp_path / "whole")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    torch.manual_seed(0)
    train(kind(), corpus, tmp_path / "cut", options=RunOptions(stop_at=0.7))
    resumed = train(kind(), corpus, tmp_path / "cut")  # with other weights
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert whole.history.ppl[1] < whole.history.ppl[0] and len(whole.samples)
    assert whole.key == resumed.key
    for make in ALIKE.values() if name in ALIKE else [kind]:
        fresh = make()
        whole.load_weights(fresh)
        assert len([*fresh.parameters()]) == len([*module.parameters()])  # tied as before
        config = module_config(fresh, 512, 24)
        assert config.shapes_sha256 == whole.experiment.model.shapes_sha256
        measured = musota.evaluate(WrappedModule(fresh, config), corpus.valid)
        assert measured["ppl"] == pytest.approx(whole.summary["ppl"], rel=1e-5)
    with pytest.raises(MusotaError, match="do not fit this Recurrent"):
        whole.load_weights(Recurrent(width=8))
    with pytest.raises(MusotaError, match="load_weights"):
        whole.load_model()


def test_a_module_may_start_far_above_a_uniform_guess(corpus, tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Embedding(512, 16), torch.nn.Linear(16, 512))
    module[1].weight.data *= 10
    run = musota.train(module, corpus, tmp_path, training=TRAINING, max_seq_len=24)
    assert run.finished and run.steps.loss[0] > math.log(512) + 2


def test_what_load_runs_leaves_out_and_refuses(finished, short, tmp_path, capsys):
    shutil.copytree(finished.path, tmp_path / "b")
    options = RunOptions(stop_at=0.6, device=torch.device("cpu"))
    musota.train(EXPERIMENT, short, tmp_path / "a", seed=np.int64(1), options=options)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), interrupted_at(2):
        musota.train(EXPERIMENT, short, tmp_path / "d", seed=2)
    capsys.readouterr()
    runs = musota.load_runs(tmp_path)
    assert [run.path.name for run in runs] == ["a", "b"]
    assert runs[0].key == runs[1].key and not runs[0].ended and runs[1].ended
    left_out = capsys.readouterr().out.splitlines()
    assert ["c is left out: " in left_out[0], "d is left out: " in left_out[1]] == [True, True]
    last = int(finished.steps.step.iloc[-1])
    with pytest.raises(KeyboardInterrupt), interrupted_at(last):  # what comes next must not begin
        musota.train(EXPERIMENT, short, tmp_path / "f", seed=3)
    assert musota.Run(tmp_path / "f").finished
    shutil.copytree(finished.path, tmp_path / "e")
    with pytest.raises(MusotaError, match="b and .*e are the same run"):
        musota.load_runs(tmp_path)


def test_null_is_nan_and_half_a_line_is_left_out(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "metrics.jsonl"
    text = re.sub(r'"(ppl|grad_norm)": [\d.e-]+', r'"\1": null', path.read_text())
    path.write_text(text + '{"kind": "ep')
    run = musota.Run(tmp_path / "run")
    assert run.history.ppl.isna().all() and run.steps.grad_norm.isna().all()
    assert run.history.ppl.dtype == run.steps.grad_norm.dtype == float
    path.write_text(text[:-9] + "\n" + text)
    with pytest.raises(MusotaError, match=r"metrics.jsonl is damaged"):
        _ = musota.Run(tmp_path / "run").history
