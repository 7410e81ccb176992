"""The GPU path, on a machine without a GPU (see `fakecard`)."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import Recurrent
from fakecard import CARDS, backward, fake_card

import musota
from musota.lab.profiles import find_profile
from musota.models import base
from musota.models.base import score
from musota.models.diagnostics import evaluating
from musota.models.module import WrappedModule, module_config
from musota.training import device as machine
from musota.training import trainer
from musota.training.trainer import RunOptions, choose

MODELS = {name: experiment.model for name, experiment in musota.experiments.items()}


@pytest.fixture(params=CARDS)
def card(request, monkeypatch):
    with fake_card(monkeypatch, request.param) as device:
        yield device, CARDS[request.param][1]


def _model(name, device):
    with device:
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
def test_training_scoring_generation_and_health(name, use, card):
    use(_model(name, card[0]), card)


def test_an_index_left_on_the_cpu_is_seen(card, monkeypatch):
    scored = base.score_tokens
    model = _model("optimized", card[0])
    monkeypatch.setattr(base, "score_tokens", lambda h, w, b, y: scored(h, w, b, y.cpu()))
    with pytest.raises(RuntimeError, match="found two different devices|same device"):
        _evaluate(model, card)


def test_defaults_on_a_card(card, monkeypatch):
    device, half = card
    assert machine.PRECISIONS[machine.default_precision(device)] == half
    assert machine.autocast_on(device)._enabled
    for steps in (99, 9999):
        batches = SimpleNamespace(sequences=32, length=192, total_steps=steps)
        for triton in (None, "found"):  # what torch.compile needs on a GPU
            monkeypatch.setattr(trainer, "find_spec", lambda name, spec=triton: spec)
            chosen = choose(RunOptions(), batches, device, None)
            assert chosen == {"micro_batch": 32, "compile": steps == 9999 and triton is not None}
    assert machine.find_device() == torch.device("cuda")
    assert find_profile("auto").name == "full"
    assert find_profile("auto", grid=True).name == "study"  # not twenty hours


@pytest.mark.parametrize("name", ["optimized", "baseline", "redesigned"])
def test_one_graph_serves_all_layers(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    sizes = {"vocab_size": 64, "max_seq_len": 8, "n_layer": 3, "dropout": 0.1}
    model = musota.build_model(dataclasses.replace(MODELS[name], **sizes)).train()
    ids = torch.zeros(12, 8, dtype=torch.long)
    torch._dynamo.utils.counters.clear()
    model.compile_layers()
    for size in (2, 2, 1):  # the last batch of an epoch is smaller
        model(ids[:size], ids[:size])[1].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    with evaluating(model):
        model(ids[:3])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    too_many = pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit)
    with torch._dynamo.config.patch(recompile_limit=2), too_many:
        model.train()(ids[:4], ids[:4])
    model.compile_layers()  # the model of the next run starts with a clean count
    model(ids, ids)


def test_a_recurrent_module_is_compiled_in_parts(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = WrappedModule(module := Recurrent().eval(), module_config(module, 512, 8))
    ids = torch.zeros(2, 8, dtype=torch.long)
    plain = model(ids)[0]
    model.compile_layers()
    assert torch.equal(model(ids)[0], plain)
