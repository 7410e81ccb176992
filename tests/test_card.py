"""The GPU path, on a machine without one (see `fakecard`)."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from fakecard import CARDS, backward, fake_card

import musota
from musota import OwnConfig
from musota.models import attention, base, loss
from musota.models.base import score
from musota.plan.profiles import find_profile
from musota.studies import probes
from musota.training import keeping, machine, remedies

TOKENS = 3000


class Own(torch.nn.Module):
    """Somebody's model."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 16)
        self.norm = torch.nn.LayerNorm(16)

    def forward(self, ids):
        return self.norm(self.embedding(ids).cumsum(1)) @ self.embedding.weight.T


MODELS = {name: experiment.model for name, experiment in musota.experiments.items()}
MODELS["own"] = OwnConfig(f"{__file__}:Own", max_seq_len=192)


@pytest.fixture(params=CARDS)
def card(request, monkeypatch):
    assert MODELS["own"].size  # measured once, where there is a random state to fork
    with fake_card(monkeypatch, request.param) as device:
        yield device, CARDS[request.param][2]


def _model(name, device):
    config = MODELS[name]
    with device:
        own = isinstance(config, OwnConfig)
        return musota.build_model(config if own else dataclasses.replace(config, n_layer=2))


def _train(name, card):
    device, half = card
    model = _model(name, device)
    stream = torch.zeros(50_000, dtype=torch.int32, device=device)
    span = torch.arange(model.config.max_seq_len + 1, device=device)
    window = stream[torch.arange(32, device=device)[:, None] + span].long()
    with torch.autocast(device.type, half, enabled=half is not None):
        loss = model(window[:, :-1], window[:, 1:])[1]
    backward(loss)
    for parameter, p in model.named_parameters():
        assert (p.grad.dtype, p.grad.device, p.grad.shape) == (torch.float32, p.device, p.shape), (
            parameter
        )
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def _look(name, card):
    device, half = card
    model, tokens = _model(name, device), torch.zeros(TOKENS, dtype=torch.int32)  # as a corpus is
    with torch.autocast(device.type, half, enabled=half is not None):
        nats, hits = score(model, tokens)
        assert (nats.device.type, hits.device.type) == ("cpu", "cpu")
        assert model.generate(tokens[None, :8].long(), 3, top_k=5, top_p=0.9).shape == (1, 11)
        model.health(tokens[:384].view(2, 192).long().to(device))


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step(name, card):
    _train(name, card)


@pytest.mark.parametrize("name", MODELS)
def test_scoring_generation_and_health(name, card):
    _look(name, card)


@pytest.mark.parametrize(("name", "parts"), [("optimized", 6 + 16), ("simplified", 6 + 8),
                                             ("redesigned", 4 + 8)])  # fmt: skip
def test_every_part_can_be_disabled(name, parts, card):
    model = _model(name, card[0])
    tokens = torch.zeros(64 * 192 + 1, dtype=torch.int32)
    if name != "redesigned":
        probes.look_inside(model, tokens[:7])
    assert len(probes.ablations(model, tokens)) == parts


# --- what is planted is seen ---


def _plant_in_embedding(monkeypatch):
    def embed(model, ids):
        return model.embedding(ids) + model.positions(torch.arange(ids.shape[1]))

    monkeypatch.setattr(musota.CausalLM, "embed", embed)


def _plant_in_backward(monkeypatch):
    def on_the_cpu(ctx, grad):
        hidden, weight, bias = ctx.saved_tensors
        scale = grad / ctx.n_token
        bias = None if bias is None else bias * scale
        return hidden * scale, weight * torch.ones(weight.shape), bias, None, None

    monkeypatch.setattr(loss._LinearCrossEntropy, "backward", staticmethod(on_the_cpu))


def _plant_in_scoring(monkeypatch):
    tell = loss.score_tokens
    monkeypatch.setattr(base, "score_tokens", lambda h, w, b, targets: tell(h, w, b, targets.cpu()))


@pytest.mark.parametrize(
    ("plant", "see"),
    [(_plant_in_embedding, _train), (_plant_in_backward, _train), (_plant_in_scoring, _look)],
)
def test_an_index_left_on_the_cpu_is_seen(plant, see, card, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(RuntimeError, match="found two different devices|same device"):
        see("optimized", card)


# --- what a GPU needs besides ---


def test_ablations_are_measured_on_the_card_as_it_computes(card, monkeypatch):
    device, half = card
    seen = []
    monkeypatch.setattr(probes, "find_device", lambda: device)
    monkeypatch.setattr(probes, "ablations", lambda model, _: seen.append(
        (model.device, torch.is_autocast_enabled(device.type))) or {"none": torch.zeros(9)}
    )  # fmt: skip
    run = SimpleNamespace(load_model=lambda device: SimpleNamespace(device=device))
    probes.measure_ablations(run, SimpleNamespace(valid=None))
    assert seen == [(device, half is not None)]


def test_a_run_on_a_card_leaves_cudnns_attention_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        machine.prepare_memory(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_a_process_that_does_not_write_checkpoints_waits_as_long_for_the_next():
    reader = SimpleNamespace(folder=SimpleNamespace(writes=False), saved_at=-1e9, best_unsaved=None,
                             accelerator=SimpleNamespace(scaler=None))  # fmt: skip
    keeping.checkpoint(reader)
    assert reader.saved_at > 0


def test_entropy_keeps_no_weights_for_the_way_back():
    q, k, v = torch.randn(3, 4, 32, 8).unbind()
    q.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        y, spread = attention.attend_with_library(q, k, v, True)
    assert kept and max(kept) < 4 * 32 * 32
    (y.sum() + spread.sum()).backward()
    expected = torch.autograd.grad(
        sum(part.sum() for part in attention.causal_attention(q, k, v, True)), q
    )[0]
    torch.testing.assert_close(q.grad, expected)


@pytest.mark.parametrize("name", CARDS)
def test_what_is_chosen_for_a_card(name, monkeypatch):
    with fake_card(monkeypatch, name) as device:
        assert machine.dtype_of(device) == (CARDS[name][2] or torch.float32)
        assert machine.autocast_on(device)._enabled == (CARDS[name][2] is not None)
        choices = machine.default_choices(musota.experiments["optimized"], device, 9999)
        assert choices == {"micro_batch": 32, "compile": device.type == "cuda"}
        if device.type == "cuda":
            assert machine.find_device() == torch.device("cuda")
            assert find_profile("auto").name == "full"
            assert find_profile("auto", grid=True).name == "study"  # not twenty hours


def test_more_heads_than_a_launch_may_have_are_several_launches(monkeypatch):
    q, k, v = torch.randn(3, 50, 9, 2)
    whole = attention.attend_with_library(q, k, v, False)[0]
    monkeypatch.setattr(attention, "MOST_HEADS", 8)
    torch.testing.assert_close(attention.attend_with_library(q, k, v, False)[0], whole)


@pytest.mark.parametrize("name", ["optimized", "baseline", "redesigned", "own"])
def test_one_graph_serves_all_layers_and_too_many_shapes_are_told(name, monkeypatch):
    config = MODELS[name]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    sizes = {"vocab_size": 64, "max_seq_len": 8, "n_layer": 3, "dropout": 0.1}
    named = {k: v for k, v in sizes.items() if k in {f.name for f in dataclasses.fields(config)}}
    model = musota.build_model(dataclasses.replace(config, **named)).train()
    ids = torch.zeros(12, 8, dtype=torch.long)
    torch._dynamo.utils.counters.clear()
    model.compile_layers()
    for size in (2, 2, 1):  # the last batch of an epoch is smaller
        model(ids[:size], ids[:size])[1].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    model.eval()(ids[:3])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(remedies.COMPILING):
        model.train()(ids[:4], ids[:4])
    model.compile_layers()  # a model of the next run starts anew
    model(ids, ids)
