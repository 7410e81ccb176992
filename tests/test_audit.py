"""The audit finds every fault and accuses no honest model. Each model here has one fault."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

from musota.config import DenseConfig, MuConfig
from musota.errors import MusotaError
from musota.lab.audit import audit, causality_matrix
from musota.models.hub import build_model
from musota.models.module import logits_of

V, T, D = 40, 24, 32


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


class Around(Attention):
    """With functions of the ids before it and of the logits after it."""

    def __init__(self, before=lambda ids: ids, after=lambda logits: logits):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, ids):
        return self.after(super().forward(self.before(ids)))


class KeywordOnly(Attention):
    def forward(self, *, input_ids):
        return super().forward(input_ids)


class Recurrent(nn.Module):
    """Honest, unless it keeps its state for the next call."""

    def __init__(self, keeps_state=False):
        super().__init__()
        self.embedding, self.output = nn.Embedding(V, D), nn.Linear(D, V)
        self.lstm = nn.LSTM(D, D, 2, batch_first=True, dropout=0.2)
        self.keeps_state, self.state = keeps_state, None

    def forward(self, ids):
        same = self.state is not None and self.state[0].shape[1] == len(ids)
        hidden, state = self.lstm(self.embedding(ids), self.state if same else None)
        if self.keeps_state:
            self.state = tuple(one.detach() for one in state)
        return self.output(hidden)


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


class FirstCall(Attention):
    """Its last layer is made in the first call."""

    def forward(self, ids):
        logits = super().forward(ids)
        if not hasattr(self, "last"):
            self.last = nn.Linear(V, V)
        return self.last(logits)


class OneToken(nn.Sequential):
    """A table of which token follows which."""

    def __init__(self, sparse=False, lazy=False):
        output = nn.LazyLinear(V) if lazy else nn.Linear(D, V)
        super().__init__(nn.Embedding(V, D, sparse=sparse), output)


def shifted(by):
    """A training loss with the targets shifted `by`."""

    def loss(module, ids):
        logits = module(ids)[:, : ids.shape[1] - by]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, by:].flatten())

    return loss


def with_hint(module, ids):
    """Adds the targets to the logits; what the module itself returns is honest."""
    hint = 5 * F.one_hot(ids[:, 1:], V)
    return F.cross_entropy((module(ids)[:, :-1] + hint).flatten(0, 1), ids[:, 1:].flatten())


def smoothed(module, ids):
    logits = logits_of(module, ids)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)


def small_leak(logits):
    return logits + 1e-3 * logits.roll(-1, 1)


def replace_from(first):
    return lambda ids: ids.masked_fill_(ids >= first, 0)


FAULTS = {  # model, loss, and the decision that names it
    "no mask": (lambda: Attention(window=None), None, "looks ahead"),
    "behind a zero output": (lambda: Attention(None, zero_output=True), None, "looks ahead"),
    "centred over the batch": (lambda: Around(after=lambda x: x - x.mean(0)), None, "mixes rows"),
    "keeps a hidden state": (lambda: Recurrent(keeps_state=True), None, "keeps a state"),
    "targets not shifted": (Attention, shifted(0), "not shifted"),
    "targets shifted twice": (Attention, shifted(2), "shifted twice"),
    "targets in the loss's input": (Attention, with_hint, "under the floor"),
    "writes": (lambda: Around(replace_from(V // 2)), None, "writes into its input"),
    "writes nothing new": (lambda: Around(replace_from(V)), None, "writes into its input"),
    "a small leak": (lambda: Around(after=small_leak), None, "looks ahead"),
}
HONEST = {
    "LSTM": (Recurrent, None),
    "convolutions": (Convolution, None),
    "GPT-2 block": (Attention, shifted(1)),
    "zero output": (lambda: Attention(zero_output=True), None),
    "label smoothing": (Attention, smoothed),
    "scaled loss": (Attention, lambda module, ids: shifted(1)(module, ids) / 4),
    "MU-SOTA": (lambda: build_model(MuConfig(V, T, 2, 4, 0.1, 4, 4)), None),
    "GPT-2 style transformer": (lambda: build_model(DenseConfig(V, T, 2, 2, 0.1, D)), None),
    "returns a tuple": (lambda: Around(after=lambda logits: (logits, "hidden")), None),
    "returns .logits": (lambda: Around(after=lambda logits: SimpleNamespace(logits=logits)), None),
    "takes only input_ids=": (KeywordOnly, None),
    "bf16": (lambda: Attention().bfloat16(), None),
    "one token": (OneToken, None),
    "lazy parameters": (lambda: OneToken(lazy=True), None),
    "sparse gradients": (lambda: OneToken(sparse=True), None),
    "parameters of the first call": (FirstCall, None),
    "nothing to train": (lambda: OneToken().requires_grad_(False), None),
    "scripted": (lambda: torch.jit.script(OneToken()), None),
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
    state_dict = module.state_dict()
    before = {name: value.clone() for name, value in state_dict.items() if not is_lazy(value)}
    state = torch.get_rng_state()
    found = audit(module, V, T, loss)
    assert found.honest, str(found)
    decisions = [finding.decision for finding in found.findings]
    assert decisions[:3] == ["causal", "apart", "holds"] and decisions[4:] == ["no", "measured"]
    after = module.state_dict()
    assert after.keys() == state_dict.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert torch.get_rng_state().equal(state)
    if name == "MU-SOTA":
        size = found.findings[-1]
        assert size.value == sum(parameter.numel() for parameter in module.parameters())
        assert "layers 78%" in size.reason and "heads, 2 layers" in size.reason


def test_a_smoothed_loss_is_no_cross_entropy():
    torch.manual_seed(0)
    model = build_model(DenseConfig(512, 64, 2, 4, 0.0, 64))  # near uniform: all losses are alike
    assert audit(model, 512, 64, smoothed).findings[3].decision == "another"


def test_the_first_distance_is_named_and_drawn():
    found = audit(Attention(window=1), V, T)
    assert found.findings[0].reason == "the logits at t read token t+1"  # in every setting
    rows, columns = found.change.nonzero(as_tuple=True)
    assert int((rows - columns).max()) == 1
    only = audit(Attention(window=None, only_in_training=True), V, T).findings[0]
    assert only.reason == f"the logits at t read token t+1, and up to t+{T - 1} (only in training)"
    assert found.figure()._suptitle.get_text() == "NOT honest: looks ahead, under the floor"


def test_one_token_is_a_sequence_too():
    assert audit(OneToken(), V, 1).honest


def test_the_causality_matrix_of_a_causal_model_is_zero_before_the_token():
    model = build_model(DenseConfig(V, T, 2, 2, 0.1, D)).eval()
    change = causality_matrix(model, torch.arange(40) % V)
    assert change.shape == (T, T) and not change.tril(-1).any() and (change.diagonal() > 0).all()


@pytest.mark.parametrize(
    ("module", "sizes", "message"),
    [
        ("a model", (V, T), "audit needs a torch.nn.Module, not str."),
        (OneToken(), (1, T), "vocab_size must be a whole number of at least 2, not 1."),
        (OneToken(), (V, 0), "max_seq_len must be a whole number of at least 1, not 0."),
        (Around(after=lambda x: x[:, -1:]), (V, T), "logits of every position are needed"),
        (Around(after=lambda x: None), (V, T), "The model returned NoneType and not (2, 24, 40)"),
        (OneToken(), (V - 1, T), "use vocab_size=40"),
        (OneToken(), (V + 9, T), "up to 48 in shape (2, 24), raised IndexError"),
        (Around(after=lambda x: x * torch.nan), (V, T), "Some logits of the model are not finite"),
        (OneToken().to("meta"), (V, T), "The model is on meta: move it to one device"),
    ],
)
def test_what_cannot_be_audited_raises_one_sentence(module, sizes, message):
    with pytest.raises(MusotaError) as raised:
        audit(module, *sizes)
    assert message in str(raised.value) and "\n" not in str(raised.value)
