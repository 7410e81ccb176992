"""Modules of the user's own: loaded from a file, measured, wrapped as a CausalLM."""

import sys

import pytest
import torch
from torch import nn

import musota
from musota.errors import MusotaError
from musota.models.base import score, weights_sha256
from musota.models.module import WrappedModule, logits_of, module_config
from musota.own import load_module, load_object

SOURCE = """
from __future__ import annotations

import dataclasses

import torch
from torch import nn


@dataclasses.dataclass
class Settings:
    width: int = 16


class Recurrent(nn.Module):
    def __init__(self, vocab_size, width=Settings().width):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.recurrence = nn.LSTM(width, width, 2, batch_first=True, dropout=0.1)
        self.output = nn.Linear(width, vocab_size)
        self.output.weight = self.embedding.weight

    def forward(self, ids):
        return (self.output(self.recurrence(self.embedding(ids))[0]),)


def build(**sizes):
    return Recurrent(sizes["vocab_size"], sizes["max_seq_len"])


def broken(vocab_size):
    raise ValueError(f"no, not {vocab_size}")


def nothing():
    return 3


READY = Recurrent(9)
"""
LAYERS = """
from torch import nn


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x{flip})
"""
WITH_LAYERS = """
from layers import Mix
from torch import nn


def build(vocab_size):
    from layers import Mix as Again

    assert Again is Mix
    return Model(vocab_size)


class Model(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.mix = Mix()
        self.output = nn.Linear(8, vocab_size)

    def forward(self, ids):
        import names  # only now

        self.name = names.NAME
        return self.output(self.mix(self.embedding(ids)))
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def wrapped(module, vocab_size=30, max_seq_len=8):
    return WrappedModule(module, module_config(module, vocab_size, max_seq_len))


# --- loading ---


def test_a_module_is_built_with_the_sizes_that_its_maker_takes(source):
    assert load_module(f"{source}:Recurrent", 30, 8).embedding.weight.shape == (30, 16)
    assert load_module(f"{source}:build", 30, 8).embedding.weight.shape == (30, 8)
    assert load_object(f"{source}:Settings")().width == 16
    source.write_text(SOURCE.replace("width: int = 16", "width: int = 10"))
    assert load_object(f"{source}:Settings")().width == 10  # read again


def test_two_files_do_not_share_the_modules_beside_them(tmp_path):
    for folder, flip in (("a", ""), ("b", ".flip(1)")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "layers.py").write_text(LAYERS.replace("{flip}", flip))
        (tmp_path / folder / "names.py").write_text(f"NAME = {folder!r}")
        (tmp_path / folder / "model.py").write_text(WITH_LAYERS)
    a, b = (load_module(f"{tmp_path}/{folder}/model.py:build", 30, 8) for folder in "ab")
    ids = torch.randint(30, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 30
    assert torch.equal(a(ids)[:, :-1], a(changed)[:, :-1])
    assert not torch.equal(b(ids)[:, :-1], b(changed)[:, :-1])  # looks ahead
    assert (a.name, b.name) == ("a", "b")
    assert not {"layers", "names"} & set(sys.modules) and str(tmp_path / "a") not in sys.path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "mine.py defines no 'missing'"),
        ("broken", r"mine.py:broken raised ValueError: no, not 30 \(line 32 of "),
        ("nothing", "mine.py:nothing made int, not a torch.nn.Module"),
        ("READY", "mine.py:READY is Recurrent: name the function or class"),
    ],
)
def test_a_file_that_makes_no_module_gets_one_sentence(source, name, message):
    with pytest.raises(MusotaError, match=message):
        load_module(f"{source}:{name}", 30, 8)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "slip.py").write_text("def build(:\n")
    for given, message in {
        "mine.py": "Name it as FILE.py:NAME",
        f"{tmp_path}/none.py:build": "There is no file .*none.py",
        f"{tmp_path}/slip.py:build": r"slip.py raised SyntaxError: .*\(line 1 of ",
    }.items():
        with pytest.raises(MusotaError, match=message):
            load_object(given)


# --- measuring ---


def test_a_config_describes_a_module_without_changing_it(source):
    module = load_module(f"{source}:Recurrent", 30, 8)
    before = torch.get_rng_state()
    config = module_config(module, 30, 8)
    assert torch.equal(torch.get_rng_state(), before) and module.training
    assert config.source == "mine.py:Recurrent" and (config.n_layer, config.dropout) == (2, 0.1)
    assert config.n_parameters == sum(p.numel() for p in module.parameters())
    per_token = 2 * 2 * 4 * 16 * 16 + 16 * 30  # two layers of two maps of four gates; the output
    assert config.flops_per_token == pytest.approx(3 * 2 * per_token, rel=0.05)
    assert config == module_config(load_module(f"{source}:Recurrent", 30, 8), 30, 8)
    source.write_text(SOURCE + "\n")
    other = module_config(load_module(f"{source}:Recurrent", 30, 8), 30, 8)
    assert other.file_sha256 != config.file_sha256
    assert other.shapes_sha256 == config.shapes_sha256


def test_its_parameter_matched_transformer(source):
    module = load_module(f"{source}:Recurrent", 512, 24)
    twin = musota.twin(module, vocab_size=512, max_seq_len=24)
    assert isinstance(twin, musota.Experiment)
    assert (twin.model.n_layer, twin.model.dropout, twin.model.max_seq_len) == (2, 0.1, 24)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert abs(twin.model.n_parameters / count - 1) < 0.15


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.output = nn.LazyLinear(30)

    def forward(self, ids):
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.ones(3, 4).T)  # not contiguous
        return {"logits": self.output(self.embedding(ids))}


class Writes(Lazy):
    def forward(self, ids):
        ids[ids >= 5] = 0
        return super().forward(ids)["logits"]


def test_lazy_parameters_and_buffers_exist_after_wrapping():
    module = Lazy()
    assert module_config(module, 30, 8).n_parameters == 30 * 8 + 8 * 30 + 30
    assert nn.parameter.is_lazy(module.output.weight)  # measured on a copy
    model = wrapped(module)
    assert {"embedding.weight", "output.weight", "output.bias", "seen"} == set(model.state_dict())
    assert model.parameter_ledger() == {"embedding": 240, "output": 270}


def test_a_module_that_writes_into_its_input_is_scored_on_the_true_targets():
    model, tokens = wrapped(Writes()), torch.arange(30)
    kept = tokens.clone()
    nats, _ = score(model, tokens)
    loss = model(tokens[None, :8], tokens[None, 1:9])[1]
    assert torch.equal(tokens, kept)
    logits = logits_of(model.module, tokens[None, :8].clone())
    wanted = nn.functional.cross_entropy(logits[0], tokens[1:9], reduction="none")
    torch.testing.assert_close(loss, wanted.mean())
    torch.testing.assert_close(nats[:8], wanted.detach())


def test_state_has_the_modules_own_names_and_no_shared_memory(source):
    module = load_module(f"{source}:Recurrent", 30, 8)
    model = wrapped(module)
    state = model.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert state["output.weight"].data_ptr() != state["embedding.weight"].data_ptr()
    other = wrapped(load_module(f"{source}:Recurrent", 30, 8))
    assert weights_sha256(other) != weights_sha256(model)
    other.load_state_dict(state)
    assert weights_sha256(other) == weights_sha256(model)
    decayed, plain = model.optimizer_groups(0.1)
    assert {p.dim() for p in decayed["params"]} == {2} and len(plain["params"]) == 6


class Stateful(Lazy):
    def get_extra_state(self):
        return {"steps": 3}


class Complex(Lazy):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, ids):
        return self.output((self.embedding(ids) * self.phase).real)


def test_modules_of_every_kind_are_taken_or_refused_in_one_sentence():
    assert module_config(Complex(), 30, 8).n_parameters == 518
    assert len(weights_sha256(wrapped(Complex()))) == 64
    scripted = torch.jit.script(nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30)))
    assert wrapped(scripted)(torch.arange(8)[None])[0].shape == (1, 8, 30)
    for module, message in [
        (nn.Identity(), "Identity has no parameters, so nothing can be trained"),
        (nn.Embedding(9, 30), "index out of range"),
        (nn.Embedding(30, 8), r"returned \(1, 8, 8\) and not \(1, 8, 30\): use vocab_size=8"),
        (nn.Sequential(nn.Embedding(30, 8), nn.Flatten()), "logits of every position are needed"),
        (Stateful(), "state is dict, which cannot be saved"),
    ]:
        with pytest.raises(MusotaError, match=message):
            wrapped(module)
