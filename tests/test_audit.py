"""The audit finds every fault and accuses no honest model. Each model here has one fault."""

import json
import random
from functools import partial
from itertools import chain, cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import OneLength, Recurrent
from torch import nn
from torch.nn.parameter import is_lazy

from musota.config import DenseConfig, MuConfig
from musota.errors import MusotaError
from musota.lab.audit import audit, causality_matrix
from musota.models.hub import build_model
from musota.models.module import module_config
from musota.workbook.cli import cli

V, T, D = 40, 24, 32
FEW = torch.arange(V) < V // 4  # of the vocabulary


class Attention(nn.Module):
    """A transformer of one layer; it reads `window` tokens ahead, or all (None)."""

    def __init__(self, window=0, zero_output=False, only_in_training=False):
        super().__init__()
        self.window, self.only_in_training = window, only_in_training
        self.embedding, self.places = nn.Embedding(V, D), nn.Embedding(T, D)
        self.layer = nn.TransformerEncoderLayer(D, 4, 4 * D, batch_first=True, norm_first=True)
        self.output = nn.Linear(D, V)
        if zero_output:
            nn.init.zeros_(self.output.weight)

    def forward(self, ids):
        length = ids.shape[1]
        window = 0 if self.only_in_training and not self.training else self.window
        window = length if window is None else window
        mask = torch.ones(length, length, dtype=torch.bool).triu(window + 1)
        x = self.embedding(ids) + self.places(torch.arange(length))
        return self.output(self.layer(x, mask))


class Around(nn.Module):
    """A module with functions of the ids before it and of the logits after it."""

    def __init__(self, before=lambda ids: ids, after=lambda logits: logits, module=None):
        super().__init__()
        self.module, self.before, self.after = module or Attention(), before, after

    def forward(self, ids):
        return self.after(self.module(self.before(ids)))


class Threshold(Attention):
    """Reads of the next token only whether it is in the upper half of the vocabulary."""

    def forward(self, ids):
        return super().forward(ids) + 0.5 * (ids.roll(-1, 1) >= V // 2)[..., None]


class KeywordOnly(nn.Embedding):
    def forward(self, *, input_ids):
        return SimpleNamespace(logits=super().forward(input_ids))


class Convolution(nn.Module):
    """Padded on the left. Weights of the old weight_norm have a history; the FFT spreads rounding
    everywhere; the output map is complex, as in state-space models."""

    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(V, D), nn.Linear(D, V, dtype=torch.complex64)
        self.convolution = torch.nn.utils.weight_norm(nn.Conv1d(D, D, 3))
        self.filter = nn.Parameter(torch.randn(T, D) / T**0.5)

    def forward(self, ids):
        x = self.embedding(ids).mT
        x = self.convolution(F.pad(x, (2, 0))).relu().mT
        length = x.shape[1]
        spectra = (torch.fft.rfft(one, 2 * length, dim=-2) for one in (x, self.filter[:length]))
        x = torch.fft.irfft(torch.mul(*spectra), 2 * length, dim=-2)[:, :length]
        return self.output(x.to(torch.complex64)).real


class FirstCall(nn.Embedding):
    """Its last layer is made in the first call."""

    def forward(self, ids):
        if not hasattr(self, "last"):
            self.last = nn.Linear(D, V)
        return self.last(super().forward(ids))


class SkippedLayers(Attention):
    """Skips its layer in half of the training calls, as `draw() < 0.5` says."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, ids):
        skips = self.training and self.draw() < 0.5
        return self.output(self.embedding(ids)) if skips else super().forward(ids)


def one_token(sparse=False, lazy=False):
    """A table of which token follows which."""
    output = nn.LazyLinear(V) if lazy else nn.Linear(D, V)
    return nn.Sequential(nn.Embedding(V, D, sparse=sparse), output)


def shifted(by, module, ids):
    """A training loss with the targets shifted `by`."""
    logits = module(ids)[:, : ids.shape[1] - by]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, by:].flatten())


def with_hint(module, ids):
    """Adds the targets to the logits; what the module itself returns is honest."""
    hint = 5 * F.one_hot(ids[:, 1:], V)
    return F.cross_entropy((module(ids)[:, :-1] + hint).flatten(0, 1), ids[:, 1:].flatten())


def focal(module, ids):
    """Below the cross-entropy for an honest model, too (Lin et al. 2017)."""
    nats = F.cross_entropy(module(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
    return (nats * (1 - (-nats).exp()) ** 2).mean()


def padded(module, ids):
    """The mean over all positions; the last has no target, so its factor depends on the length."""
    return shifted(1, module, ids) * (1 - 1 / ids.shape[1])


def masked():
    """Reads ahead; the logits of most tokens are masked."""
    return Around(after=lambda x: x.masked_fill(~FEW, -1e9), module=Attention(None))


class Experts(nn.Module):
    """A layer with experts: the draws of an expert's dropout depend on the tokens it gets."""

    def __init__(self):
        super().__init__()
        self.embedding, self.router = nn.Embedding(V, D), nn.Linear(D, 4)
        self.output = nn.Linear(D, V)
        experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.1)) for _ in range(4))
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": experts}) for _ in range(2))

    def forward(self, ids):
        x = self.embedding(ids)
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for place, expert in enumerate(self.layers[0]["experts"]):
            given = {"input": expert(x[chosen == place]), "p": 0.1}
            y[chosen == place] = F.dropout(training=self.training, **given)
        return self.output(x + y)


FAULTS = {  # model, loss, and the decision that names it
    "behind a zero output": (lambda: Attention(None, zero_output=True), None, "looks ahead"),
    "centred over the batch": (lambda: Around(after=lambda x: x - x.mean(0)), None, "mixes rows"),
    "keeps a hidden state": (lambda: Recurrent(V, D, keeps_state=True), None, "keeps a state"),
    "targets not shifted": (Attention, partial(shifted, 0), "not shifted"),
    "targets shifted twice": (Attention, partial(shifted, 2), "shifted twice"),
    "targets in the loss's input": (Attention, with_hint, "undecided"),
    "writes": (lambda: Around(lambda ids: ids.clamp_(max=V)), None, "writes into its input"),
    "that in half precision": (lambda: Attention().half(), with_hint, "undecided"),
    "a loss without chance level": (Attention, focal, "undecided"),
    "behind masked tokens": (masked, None, "looks ahead"),
    "a leak of one bit": (lambda: Threshold(), None, "looks ahead"),
    "a small leak": (lambda: Around(after=lambda x: x + 1e-3 * x.roll(-1, 1)), None, "looks ahead"),
}
HONEST = {
    "LSTM": (lambda: Recurrent(V, D), None),
    "convolutions": (Convolution, None),
    "mean over all positions": (Attention, padded),
    "a padded vocabulary": (lambda: Around(after=lambda x: x * FEW, module=Convolution()), None),
    "experts": (Experts, None),
    "scaled loss": (Attention, lambda module, ids: shifted(1, module, ids) / 4),
    "MU-SOTA": (lambda: build_model(MuConfig(V, T, 2, 4, 0.1, 4, 4)), None),
    "takes only input_ids=": (lambda: KeywordOnly(V, V), None),
    "bf16": (lambda: Attention().bfloat16(), None),
    "half precision": (lambda: Attention().half(), None),
    "double precision": (lambda: Attention().double(), None),
    "draws from its own": (lambda: SkippedLayers(np.random.default_rng(0).random), None),
    "draws from Python": (lambda: SkippedLayers(lambda: random.random()), None),
    "draws from numpy": (lambda: SkippedLayers(lambda: np.random.rand()), None),
    "lazy parameters": (lambda: one_token(lazy=True), None),
    "sparse gradients": (lambda: one_token(sparse=True), None),
    "parameters of the first call": (lambda: FirstCall(V, D), None),
    "nothing to train": (lambda: one_token().requires_grad_(False), None),
    "scripted": (lambda: torch.jit.script(one_token()), None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found(name):
    make, loss, verdict = FAULTS[name]
    torch.manual_seed(0)
    found = audit(make(), V, T, loss)
    assert not found.honest and verdict in [finding.decision for finding in found.findings]


@pytest.mark.parametrize("name", HONEST)
def test_nobody_honest_is_accused(name):
    make, loss = HONEST[name]
    torch.manual_seed(0)
    module = make()
    before = {k: v if is_lazy(v) else v.clone() for k, v in module.state_dict().items()}
    state, others = torch.get_rng_state(), (random.getstate(), str(np.random.get_state()))
    found = audit(module, V, T, loss)
    assert found.honest, str(found)
    decisions = [finding.decision for finding in found.findings]
    assert decisions[:3] == ["no", "no", "no"] and decisions[4:] == ["no", "measured"]
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(is_lazy(value) or after[name].equal(value) for name, value in before.items())
    assert torch.get_rng_state().equal(state)
    assert (random.getstate(), str(np.random.get_state())) == others
    if name == "MU-SOTA":
        assert found.findings[-1].value == module.config.n_parameters
        assert all(words in found.findings[-1].reason for words in ("layers 78%", "2 layers: "))


def test_experts_are_not_counted_as_layers():
    assert module_config(Experts(), V, T).n_layer == 2
    assert module_config(nn.Sequential(Experts()), V, T).n_layer == 2  # which only wraps it


def test_a_smoothed_loss_is_no_cross_entropy_and_no_fault():
    def smoothed(module, ids):
        logits = module(ids)[0][:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)

    torch.manual_seed(0)
    model = build_model(DenseConfig(512, 64, 2, 4, 0.0, 64))  # near uniform: all losses are alike
    found = audit(model, 512, 64, smoothed)
    assert found.honest and found.findings[3].decision == "another"
    negative = audit(model, 512, 64, lambda module, ids: -module(ids[:, :-1], ids[:, 1:])[1])
    assert negative.findings[3].decision == "another"


def test_the_first_distance_is_named_and_drawn():
    found = audit(Attention(window=1), V, T)
    assert found.findings[0].reason == "the logits at t read token t+1"  # in every setting
    assert found.change.tril(-1).any() and not found.change.tril(-2).any()
    only = audit(Attention(window=None, only_in_training=True), V, T).findings[0]
    assert only.reason == f"the logits at t read token t+1, and up to t+{T - 1} (only in training)"
    assert found.figure()._suptitle.get_text() == "NOT honest: looks ahead, better than chance"
    assert audit(one_token(), V, 1).honest  # one token is a sequence too
    model = build_model(DenseConfig(V, T, 2, 2, 0.1, D)).eval()
    change = causality_matrix(model, torch.arange(40) % V)
    assert change.shape == (T, T) and not change.tril(-1).any() and (change.diagonal() > 0).all()


@pytest.mark.parametrize(
    ("module", "sizes", "message"),
    [
        ("a model", (V, T), "audit needs a torch.nn.Module, not str."),
        (one_token(), (V, 0), "max_seq_len must be a whole number of at least 1, not 0."),
        (Around(after=lambda x: x[:, -1:]), (V, T), "logits of every position are needed"),
        (Around(after=lambda x: x * torch.nan), (V, T), "Some logits of the model are not finite"),
        (one_token().to("meta"), (V, T), "The model is on meta: move it to one device"),
    ],
)
def test_what_cannot_be_audited_raises_one_sentence(module, sizes, message):
    with pytest.raises(MusotaError) as raised:
        audit(module, *sizes)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_model_of_one_length_is_audited_at_it():
    found = audit(OneLength(V, 40), V, 40)
    assert found.honest and found.change.shape == (24, 24)


def test_what_cannot_be_decided_is_not_honest():
    draws = chain([0, 0], cycle([0, 1]))  # the first two calls agree by chance
    found = audit(SkippedLayers(lambda: next(draws)), V, T)
    assert not found.honest and found.status == 2 and str(found).startswith("This model is not j")
    assert found.findings[0].decision == "undecided"
    assert found.findings[0].reason == "equal calls give different logits (only in training)"


FILE = """
import sys
from torch import nn, roll

class Honest(nn.Embedding):
    def __init__(self, vocab_size):
        super().__init__(vocab_size, vocab_size)

class Ahead(Honest):
    def forward(self, ids):
        return super().forward(ids.roll(-1, 1))

class EndsWhenCalled(Honest):
    def forward(self, ids):
        sys.exit(0)

def wrong_size():
    return nn.Embedding(9, 9)

def ending():
    sys.exit(0)

def stopped():
    raise KeyboardInterrupt
"""
STATUS = {
    "Honest": (0, True, "This model is honest."),
    "Ahead": (1, False, "This model is NOT honest."),
    "wrong_size": (2, None, "raised IndexError"),
    "ending": (2, None, "model.py:ending ended with SystemExit(0)."),
    "EndsWhenCalled": (2, None, "ended with SystemExit(0)."),
    "stopped": (2, None, "ended with KeyboardInterrupt()."),
    "nothing": (2, None, "defines no 'nothing'."),
}


@pytest.mark.parametrize("name", STATUS)
def test_the_exit_status_says_honest_or_not_or_not_audited(name, tmp_path):
    (tmp_path / "model.py").write_text(FILE)
    status, honest, sentence = STATUS[name]
    record = tmp_path / "out.json"
    record.write_text('{"honest": true}')  # of an earlier audit
    sizes = ["--vocab-size", "40", "--max-seq-len", "24"]
    source = f"{tmp_path / 'model.py'}:{name}"
    answer = CliRunner().invoke(cli, ["audit", source, *sizes, "--json", str(record)])
    assert answer.exit_code == status and sentence in answer.output, answer.output
    found = json.loads(record.read_text())
    assert (found["model"], found["vocab_size"], found["max_seq_len"]) == (source, 40, 24)
    assert found["honest"] is honest and len(found["findings"]) == (0 if honest is None else 6)
    for one in found["findings"]:
        assert [*one] == ["question", "decision", "value", "unit", "reason", "next_step"]
    if name == "Ahead":
        assert found["findings"][0]["decision"] == "looks ahead"


WRONG = [("raise SystemExit", ""), (FILE, "--loss nothing"), (FILE, "--loss FILE")]
WRONG += [(FILE, "--vocab-size many"), (FILE, "--vocab-size 0")]
WRONG += [(FILE, "--json no/such/folder/out.json"), (FILE, "--picture no/such/folder/out.png")]


@pytest.mark.parametrize(("text", "options"), WRONG)
def test_whatever_prevents_an_audit_is_status_2(text, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(text)
    answer = CliRunner().invoke(cli, ["audit", "model.py:Honest", *options.split()])
    assert answer.exit_code == 2 and "Traceback" not in answer.output, answer.output
    assert answer.output.strip().splitlines()[-1].startswith("Error: ")
