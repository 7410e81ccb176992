"""The audit: every fault is found, nobody honest is accused. Each model has just one fault."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from musota import DenseConfig, MuConfig, MusotaError, audit, build_model

V, T, D = 40, 24, 32


class Attention(nn.Module):
    """A GPT-2 block and what stands around it; `window` tokens to come are seen, or all (None)."""

    def __init__(self, window=0, dropout=0.1, zero_output=False, only_in_training=False):
        super().__init__()
        self.window, self.only_in_training = window, only_in_training
        self.embedding, self.places = nn.Embedding(V, D), nn.Embedding(T, D)
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(),
                                 nn.Linear(4 * D, D), nn.Dropout(dropout))  # fmt: skip
        self.output = nn.Linear(D, V)
        if zero_output:
            nn.init.zeros_(self.output.weight)

    def forward(self, ids):
        length = ids.shape[1]
        window = 0 if self.only_in_training and not self.training else self.window
        window = length if window is None else window
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril(window)
        x = self.embedding(ids) + self.places(torch.arange(length, device=ids.device))
        q, k, v = self.qkv(self.norm(x)).view(*ids.shape, 3, 4, D // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(*ids.shape, D))
        return self.output(x + self.mlp(x))


class Recurrent(nn.Module):
    """Honest, unless it keeps its state for the next call, or centres it over the batch."""

    def __init__(self, keeps_state=False, over_batch=False):
        super().__init__()
        self.embedding, self.output = nn.Embedding(V, D), nn.Linear(D, V)
        self.lstm = nn.LSTM(D, D, 2, batch_first=True, dropout=0.2)
        self.keeps_state, self.over_batch, self.state = keeps_state, over_batch, None

    def forward(self, ids):
        same = self.state is not None and self.state[0].shape[1] == len(ids)
        hidden, state = self.lstm(self.embedding(ids), self.state if same else None)
        if self.keeps_state:
            self.state = tuple(one.detach() for one in state)
        if self.over_batch:
            hidden = hidden - hidden.mean(0, keepdim=True)
        return self.output(hidden)


class Convolution(nn.Module):
    """Padded on the left; `old_norm` weights have a history, `fft` spreads rounding everywhere."""

    def __init__(self, old_norm=False, fft=False):
        super().__init__()
        self.embedding, self.output, self.fft = nn.Embedding(V, D), nn.Linear(D, V), fft
        self.convolution = nn.Conv1d(D, D, 3)
        if old_norm:
            self.convolution = torch.nn.utils.weight_norm(self.convolution)
        self.filter = nn.Parameter(torch.randn(T, D) / T**0.5)

    def forward(self, ids):
        x = self.embedding(ids).mT
        x = self.convolution(F.pad(x, (2, 0))).relu().mT
        if self.fft:
            length = x.shape[1]
            spectra = (torch.fft.rfft(one, 2 * length, dim=-2) for one in (x, self.filter[:length]))
            x = torch.fft.irfft(torch.mul(*spectra), 2 * length, dim=-2)[:, :length]
        return self.output(x)


class KeywordOnly(Attention):
    def forward(self, *, input_ids):
        return super().forward(input_ids)


class Returns(Attention):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap  # of the logits

    def forward(self, ids):
        return self.wrap(super().forward(ids))


class OneToken(nn.Sequential):
    """A table of which token follows which."""

    def __init__(self):
        super().__init__(nn.Embedding(V, D), nn.Linear(D, V))


def shifted(by):
    """A training loss with the targets shifted `by`."""

    def loss(module, ids):
        logits = module(ids)[:, : ids.shape[1] - by]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, by:].flatten())

    return loss


def told(module, ids):
    """Hands the targets over; what the module itself returns is honest."""
    hint = 5 * F.one_hot(ids[:, 1:], V)
    return F.cross_entropy((module(ids)[:, :-1] + hint).flatten(0, 1), ids[:, 1:].flatten())


def smoothed(module, ids):
    logits, targets = module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


FAULTS = {  # model, loss, and the verdict that names it
    "no mask": (lambda: Attention(window=None), None, "looks ahead"),
    "a mask one too wide": (lambda: Attention(window=1), None, "looks ahead"),
    "leaks in training only": (
        lambda: Attention(window=None, only_in_training=True), None, "looks ahead",
    ),
    "leaks behind a zero output": (
        lambda: Attention(window=None, zero_output=True), None, "looks ahead",
    ),
    "leaks through the batch": (lambda: Recurrent(over_batch=True), None, "rows talk"),
    "keeps a hidden state": (lambda: Recurrent(keeps_state=True), None, "keeps a state"),
    "targets not shifted": (Attention, shifted(0), "not shifted"),
    "targets shifted twice": (Attention, shifted(2), "shifted twice"),
    "targets in the loss's input": (Attention, told, "under the floor"),
    "a leak of a thousandth": (
        lambda: Returns(lambda x: x + 1e-3 * x.roll(-1, 1)), None, "looks ahead",
    ),
}  # fmt: skip
HONEST = {
    "LSTM": (Recurrent, None),
    "left-padded convolution": (Convolution, None),
    "old weight_norm": (lambda: Convolution(old_norm=True), None),
    "FFT convolution": (lambda: Convolution(fft=True), None),
    "GPT-2 block": (Attention, shifted(1)),
    "zero output": (lambda: Attention(zero_output=True), None),
    "label smoothing": (Attention, smoothed),
    "scaled loss": (Attention, lambda module, ids: shifted(1)(module, ids) / 4),
    "MU-SOTA": (lambda: build_model(MuConfig(V, T, 2, 4, 0.1, 4, 4)), None),
    "the dense twin": (lambda: build_model(DenseConfig(V, T, 2, 2, 0.1, D)), None),
    "returns a tuple": (lambda: Returns(lambda logits: (logits, "hidden")), None),
    "returns .logits": (lambda: Returns(lambda logits: SimpleNamespace(logits=logits)), None),
    "takes only input_ids=": (KeywordOnly, None),
    "bf16": (lambda: Attention().bfloat16(), None),
    "one token": (OneToken, None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found(name):
    make, loss, verdict = FAULTS[name]
    torch.manual_seed(0)
    found = audit(make(), V, T, loss)
    assert not found.honest and verdict in [finding.verdict for finding in found.findings]


@pytest.mark.parametrize("name", HONEST)
def test_nobody_honest_is_accused(name):
    make, loss = HONEST[name]
    torch.manual_seed(0)
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    found = audit(module, V, T, loss)
    assert found.honest, str(found)
    assert [finding.verdict for finding in found.findings[:3]] == ["causal", "apart", "holds"]
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    assert torch.get_rng_state().equal(state)


def test_a_smoothed_loss_is_no_cross_entropy():
    def smoothed(module, ids, shift=1):
        logits = module(ids)[0][:, :-shift].flatten(0, 1)
        return F.cross_entropy(logits, ids[:, shift:].flatten(), label_smoothing=0.1)

    torch.manual_seed(0)
    model = build_model(DenseConfig(512, 64, 2, 4, 0.0, 64))  # near uniform: all losses are alike
    assert audit(model, 512, 64, smoothed).findings[3].verdict == "another"


def test_the_first_distance_is_named_and_drawn():
    found = audit(Attention(window=1), V, T)
    assert "the logits at t see token t+1 " not in found.findings[0].saw  # in every setting
    assert found.findings[0].saw == "the logits at t see token t+1"
    rows, columns = found.change.nonzero(as_tuple=True)
    assert int((rows - columns).max()) == 1
    only = audit(Attention(window=None, only_in_training=True), V, T).findings[0]
    assert only.saw == f"the logits at t see token t+1, and up to t+{T - 1} (only in training)"
    assert found.figure()._suptitle.get_text() == "NOT honest: looks ahead, under the floor"


def test_one_token_is_a_sequence_too():
    assert audit(OneToken(), V, 1).honest


def test_the_size_finds_the_twin():
    found = audit(build_model(MuConfig(V, T, 2, 4, 0.1, 4, 4)), V, T).findings[-1]
    assert "layers" in found.saw and "2 layers" in found.conclusion


@pytest.mark.parametrize(
    ("module", "sizes", "message"),
    [
        ("a model", (V, T), "audit needs a torch.nn.Module, not str."),
        (OneToken(), (1, T), "vocab_size must be a whole number of at least 2, not 1."),
        (OneToken(), (V, 0), "max_seq_len must be a whole number of at least 1, not 0."),
        (Returns(lambda x: x[:, -1:]), (V, T), "logits of every position are needed"),
        (Returns(lambda x: None), (V, T), "The model returned NoneType and not (2, 24, 40)"),
        (OneToken(), (V - 1, T), "say vocab_size=40"),
        (OneToken(), (V + 9, T), "up to 48 in shape (2, 24), raised IndexError"),
        (Returns(lambda x: x * torch.nan), (V, T), "Not all logits of the fresh model are finite"),
        (OneToken().to("meta"), (V, T), "The model lies on meta: move all of it to one device"),
    ],
)
def test_what_cannot_be_audited_is_told_in_a_sentence(module, sizes, message):
    with pytest.raises(MusotaError) as told:
        audit(module, *sizes)
    assert message in str(told.value) and "\n" not in str(told.value)
