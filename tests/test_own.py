"""Modules of the user's own: loaded from a file, measured, wrapped as a CausalLM."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, OneLength
from torch import nn

import musota
from musota.errors import MusotaError
from musota.models.base import score
from musota.models.module import WrappedModule, copy_module, logits_of, module_config
from musota.own import load_module, load_objects

SOURCE = """
from __future__ import annotations
import dataclasses
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
WITH_LAYERS = """
from layers import flip
from torch import nn

def build(vocab_size):
    from layers import flip as again
    assert again is flip
    return Model(vocab_size)

class Model(nn.Sequential):
    def __init__(self, vocab_size):
        super().__init__(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))
    def forward(self, ids):
        import importlib, names  # only now
        self.name = names.NAME, importlib.import_module("names").NAME
        return super().forward(flip(ids))
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def wrapped(module, vocab_size=30, max_seq_len=8):
    return WrappedModule(module, module_config(module, vocab_size, max_seq_len))


def test_a_module_is_built_with_the_sizes_that_its_maker_takes(source):
    assert load_module(f"{source}:Recurrent", 30, 8).embedding.weight.shape == (30, 16)
    assert load_module(f"{source}:build", 30, 8).embedding.weight.shape == (30, 8)
    source.write_text(SOURCE.replace("width: int = 16", "width: int = 10"))
    assert load_objects(f"{source}:Settings")[0]().width == 10  # read again


def test_two_files_do_not_share_the_modules_beside_them(tmp_path):
    for folder, flipped in (("a", "ids"), ("b", "ids.flip(1)")):
        (tmp_path / folder).mkdir()
        later = "def flip(ids):\n    from musota_deeper import flip as other\n    return other(ids)"
        (tmp_path / folder / "layers.py").write_text(later)  # imports when it is called
        (tmp_path / folder / "musota_deeper.py").write_text(f"def flip(ids):\n    return {flipped}")
        (tmp_path / folder / "names.py").write_text(f"NAME = {folder!r}")
        (tmp_path / folder / "model.py").write_text(WITH_LAYERS)
    a, b = (load_module(f"{tmp_path}/{folder}/model.py:build", 30, 8) for folder in "ab")
    b.load_state_dict(a.state_dict())
    ids = torch.arange(8)[None]
    assert torch.equal(a(ids), b(ids).flip(1)) and (*a.name, *b.name) == (*"aabb",)
    assert not {"layers", "names", "musota_deeper"} & set(sys.modules)
    assert str(tmp_path / "a") not in sys.path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:missing", "mine.py defines no 'missing'"),
        ("mine.py:broken", r"mine.py:broken raised ValueError: no, not 30 \(line 23 of "),
        ("mine.py:nothing", "mine.py:nothing made int, not a torch.nn.Module"),
        ("mine.py:READY", "mine.py:READY is Recurrent: name the function or class"),
        ("mine.py", "Name it as FILE.py:NAME"),
        ("none.py:build", "There is no file .*none.py"),
        ("slip.py:build", r"slip.py raised SyntaxError: .*\(line 1 of "),
    ],
)
def test_a_file_that_makes_no_module_gets_one_sentence(source, name, message):
    (source.parent / "slip.py").write_text("def build(:\n")
    with pytest.raises(MusotaError, match=message):
        load_module(f"{source.parent}/{name}", 30, 8)


class Shared(nn.Embedding):  # returns a view of a parameter, as learned positions often do
    def forward(self, ids):
        return self.weight[None, : ids.shape[1]]


class Stepping(nn.Embedding):  # takes gradients in its forward pass
    def forward(self, ids):
        with torch.enable_grad():
            (step,) = torch.autograd.grad(self.weight.square().sum(), self.weight)
        return super().forward(ids) - F.embedding(ids, step)


def test_a_config_and_a_matched_transformer_describe_a_module_without_changing_it(source):
    module = load_module(f"{source}:Recurrent", 512, 24)
    before = torch.get_rng_state()
    config = module_config(module, 512, 24)
    assert torch.equal(torch.get_rng_state(), before) and module.training
    assert config.source == "mine.py:Recurrent" and (config.n_layer, config.dropout) == (2, 0.1)
    assert config.n_parameters == sum(p.numel() for p in module.parameters())
    per_token = 2 * 2 * 4 * 16 * 16 + 16 * 512  # two layers of two maps of four gates; the output
    assert config.flops_per_token == pytest.approx(3 * 2 * per_token, rel=0.05)
    encoder = load_module(f"{ROOT}/notebooks/examples/my_transformer.py:Transformer", 512, 64)
    encoder = module_config(encoder, 512, 64)  # torch's fast path is counted
    assert encoder.flops_per_token > 5 * encoder.n_parameters
    twin = musota.twin(module, vocab_size=512, max_seq_len=24).model
    assert (twin.n_layer, twin.dropout, twin.max_seq_len) == (2, 0.1, 24)
    assert abs(twin.n_parameters / config.n_parameters - 1) < 0.15
    assert config == module_config(load_module(f"{source}:Recurrent", 512, 24), 512, 24)
    source.write_text(SOURCE + "\n")
    other = module_config(load_module(f"{source}:Recurrent", 512, 24), 512, 24)
    assert other.file_sha256 != config.file_sha256
    assert other.shapes_sha256 == config.shapes_sha256
    for kind in (Stepping, Shared):  # which torch's counter of operations has trouble with
        module.embedding = kind(512, 16)
        assert module_config(module, 512, 24).n_parameters == config.n_parameters + 512 * 16


def test_the_code_of_a_module_of_torchs_parts_is_part_of_what_it_is(tmp_path):
    parts = "import torch\ndef build(vocab_size):\n    return torch.nn.Sequential("
    parts += "torch.nn.Embedding(vocab_size, 8), torch.nn.{}(), torch.nn.Linear(8, vocab_size))"
    (tmp_path / "one.py").write_text(parts.format("ReLU"))
    (tmp_path / "other.py").write_text(parts.format("Tanh"))
    made = [load_module(f"{tmp_path}/{name}.py:build", 30, 8) for name in ("one", "other")]
    one, other = (module_config(module, 30, 8) for module in made)
    acts = nn.ReLU(), nn.Tanh()
    typed = [nn.Sequential(nn.Embedding(30, 8), act, nn.Linear(8, 30)) for act in acts]
    hashes = {module_config(module, 30, 8).file_sha256 for module in typed}
    assert len(hashes | {one.file_sha256, other.file_sha256}) == 4


def test_a_copy_shares_nothing_with_the_module_not_even_through_a_function():
    module = Lazy()
    module.head = lambda x, *, scale=2: scale * module.output(x)
    module.heads, module.by_name = [module.head], {"head": module.head}
    copied = copy_module(module)
    for head in (copied.head, *copied.heads, *copied.by_name.values()):
        assert head.__closure__ == copied.head.__closure__  # what functions share they still share
        (held,) = (cell.cell_contents for cell in head.__closure__)
        assert held is copied and held is not module and head.__kwdefaults__ == {"scale": 2}


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.output = nn.LazyLinear(30)

    def forward(self, ids):
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.ones(3, 4).T)  # not contiguous
        ids[ids >= 5] = 0
        return {"logits": self.output(self.embedding(ids))}


def test_lazy_parameters_and_buffers_exist_after_wrapping():
    module = Lazy()
    assert module_config(module, 30, 8).n_parameters == 30 * 8 + 8 * 30 + 30
    assert nn.parameter.is_lazy(module.output.weight)  # measured on a copy
    model = wrapped(module)
    assert {"embedding.weight", "output.weight", "output.bias", "seen"} == set(model.state_dict())
    assert model.parameter_ledger() == {"embedding": 240, "output": 270}


def test_a_module_that_writes_into_its_input_is_scored_on_the_true_targets():
    model, tokens = wrapped(Lazy()), torch.arange(30)
    nats, _ = score(model, tokens)
    loss = model(tokens[None, :8], tokens[None, 1:9])[1]
    assert torch.equal(tokens, torch.arange(30))
    logits = logits_of(model.module, tokens[None, :8].clone())
    wanted = nn.functional.cross_entropy(logits[0], tokens[1:9], reduction="none")
    torch.testing.assert_close(loss, wanted.mean())
    torch.testing.assert_close(nats[:8], wanted.detach())


def test_state_has_the_modules_own_names_and_only_its_matrices_decay(source):
    module = load_module(f"{source}:Recurrent", 30, 8)
    model = wrapped(module)
    assert model.state_dict().keys() == module.state_dict().keys()
    decayed, plain = model.optimizer_groups(0.1)
    assert {p.dim() for p in decayed["params"]} == {2} and len(plain["params"]) == 6


class Stateful(Lazy):
    def get_extra_state(self):
        return {"steps": 3}


def test_modules_of_every_kind_are_taken_or_refused_in_one_sentence():
    scripted = torch.jit.script(nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30)))
    assert wrapped(scripted)(torch.arange(8)[None])[0].shape == (1, 8, 30)
    for module, message in [
        (nn.Identity(), "Identity has no parameters, so nothing can be trained"),
        (nn.Embedding(9, 30), "index out of range"),
        (nn.Embedding(30, 8), r"returned \(1, 8, 8\) and not \(1, 8, 30\): use vocab_size=8"),
        (nn.Sequential(nn.Embedding(30, 8), nn.Flatten()), "logits of every position are needed"),
        (Stateful(), "state must be a tensor, not dict"),
        (OneLength(30, 8), r"given token ids of 0 in shape \(1, 7\), raised RuntimeError"),
    ]:
        with pytest.raises(MusotaError, match=message):
            wrapped(module)
