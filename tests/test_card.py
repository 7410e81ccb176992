"""The GPU path, on a machine without a GPU (see `fakecard`)."""

import dataclasses
import functools

import pytest
import torch
from fakecard import CARDS, backward, fake_card

import musota
from musota.lab.profiles import find_profile
from musota.models import attention, base
from musota.models.base import score
from musota.models.module import WrappedModule, module_config
from musota.training import device as machine
from musota.training import step

MODELS = {name: experiment.model for name, experiment in musota.experiments.items()}


class Own(torch.nn.Module):
    def __init__(self, vocab_size=500):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 16)
        self.norm = torch.nn.LayerNorm(16)

    def forward(self, ids):
        return self.norm(self.embedding(ids).cumsum(1)) @ self.embedding.weight.T


MODELS["own"] = module_config(Own(), 500, 192)


@pytest.fixture(params=CARDS)
def card(request, monkeypatch):
    with fake_card(monkeypatch, request.param) as device:
        yield device, CARDS[request.param][1]


def _model(name, device, monkeypatch):
    with device:
        if name == "own":  # whose first call would fork a random state that is not there
            monkeypatch.setattr("musota.models.module.call_once", lambda *_: None)
            return WrappedModule(Own(), MODELS[name])
        return musota.build_model(dataclasses.replace(MODELS[name], n_layer=2))


def _train(model, card):
    device, half = card
    stream = torch.zeros(50_000, dtype=torch.int32, device=device)
    span = torch.arange(model.config.max_seq_len + 1, device=device)
    window = stream[torch.arange(32, device=device)[:, None] + span].long()
    with torch.autocast(device.type, half):
        loss = model(window[:, :-1], window[:, 1:])[1]
    backward(loss)
    for name, p in model.named_parameters():
        found = p.grad.dtype, p.grad.device, p.grad.shape
        assert found == (torch.float32, p.device, p.shape), name
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def _evaluate(model, card):
    device, half = card
    tokens = torch.zeros(3000, dtype=torch.int32)  # on the CPU, as a corpus is
    with torch.autocast(device.type, half):
        nats, hits = score(model, tokens)
        assert (nats.device.type, hits.device.type) == ("cpu", "cpu")
        assert model.generate(tokens[None, :8].long(), 3, top_k=5, top_p=0.9).shape == (1, 11)
        model.health(tokens[:384].view(2, 192).long().to(device))


@pytest.mark.parametrize("use", [_train, _evaluate])
@pytest.mark.parametrize("name", MODELS)
def test_training_scoring_generation_and_health(name, use, card, monkeypatch):
    use(_model(name, card[0], monkeypatch), card)


def _embed_on_the_cpu(model, ids):
    return model.embedding(ids) + model.positions(torch.arange(ids.shape[1]))


def test_an_index_left_on_the_cpu_is_seen(card, monkeypatch):
    scored = base.score_tokens
    model = _model("optimized", card[0], monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(base, "score_tokens", lambda h, w, b, y: scored(h, w, b, y.cpu()))
        with pytest.raises(RuntimeError, match="found two different devices|same device"):
            _evaluate(model, card)
    monkeypatch.setattr(musota.CausalLM, "embed", _embed_on_the_cpu)
    with pytest.raises(RuntimeError, match="found two different devices|same device"):
        _train(model, card)


@pytest.mark.parametrize("name", CARDS)
def test_defaults_on_a_card(name, monkeypatch):
    with fake_card(monkeypatch, name) as device:
        assert machine.dtype_of(device) == CARDS[name][1]
        assert machine.autocast_on(device)._enabled
        assert machine.default_micro_batch(device, 32, 192) == 32
        assert machine.default_compile(device, 9999) and not machine.default_compile(device, 99)
        assert machine.find_device() == torch.device("cuda")
        assert find_profile("auto").name == "full"
        assert find_profile("auto", grid=True).name == "study"  # not twenty hours


def test_more_heads_than_a_launch_may_have_are_several_launches(monkeypatch):
    q, k, v = torch.randn(3, 50, 9, 2)
    whole = attention.attend_with_library(q, k, v, False)[0]
    monkeypatch.setattr(attention, "MOST_HEADS", 8)
    torch.testing.assert_close(attention.attend_with_library(q, k, v, False)[0], whole)


@pytest.mark.parametrize("name", ["optimized", "baseline", "redesigned", "own"])
def test_one_graph_serves_all_layers(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    if name == "own":
        model = WrappedModule(Own(64), module_config(Own(64), 64, 8)).train()
    else:
        sizes = {"vocab_size": 64, "max_seq_len": 8, "n_layer": 3, "dropout": 0.1}
        model = musota.build_model(dataclasses.replace(MODELS[name], **sizes)).train()
    ids = torch.zeros(12, 8, dtype=torch.long)
    torch._dynamo.utils.counters.clear()
    model.compile_layers()
    for size in (2, 2, 1):  # the last batch of an epoch is smaller
        model(ids[:size], ids[:size])[1].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    model.eval()(ids[:3])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(step.COMPILE_ERRORS):
        model.train()(ids[:4], ids[:4])
    model.compile_layers()  # the model of the next run starts with a clean count
    model(ids, ids)
