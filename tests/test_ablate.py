import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import shaken

import musota
from musota.errors import MusotaError
from musota.lab import ablate
from musota.lab.stats import Interval
from musota.models.base import score

MODEL = musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=2)


@pytest.fixture(scope="module")
def model():
    return shaken(MODEL)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(512, (600,), generator=torch.Generator().manual_seed(1)).int()


def test_look_inside_follows_the_tokens_and_needs_blocks(model, tokens):
    ids = tokens[:9]
    inside = ablate.look_inside(model, ids)
    x = model.embedding(ids.long()) + model.positions(torch.arange(9))
    affinities = model.affinity(ids.long()).view(9, 2, 16)
    for layer in range(2):
        torch.testing.assert_close(inside["channels"][layer], x)
        x = model.layers[layer](x[None], affinities[None, :, layer])[0]
    torch.testing.assert_close(inside["channels"][2], x)
    assert inside["gate"].shape == (2, 9, 16)
    ungated = musota.build_model(musota.RedesignedConfig(512, 24, 2, 4, 8, 64, gate=False))
    assert ablate.look_inside(ungated, tokens[:5])["gate"].equal(torch.ones(2, 5, 4))
    plain = musota.RedesignedConfig(512, 24, 1, 4, 8, 64, blocks=False, gate=False)
    for function in (ablate.look_inside, ablate.ablations):
        with pytest.raises(MusotaError, match="Only MU-SOTA and its redesign have"):
            function(musota.build_model(plain), tokens)


def test_ablations_equal_models_changed_by_hand(model, tokens):
    nats = ablate.ablations(model, tokens)
    attentions = ["block attention", "cross attention", "both attentions"]
    assert [*nats] == ["none", *attentions, "gate", "affinity tables", *MODEL.layout.names]
    torch.testing.assert_close(nats["none"], score(model, tokens)[0])

    def zeroed(name):
        state = {key: value * (name not in key) for key, value in model.state_dict().items()}
        changed = musota.build_model(MODEL).eval()
        changed.load_state_dict(state)
        return score(changed, tokens)[0]

    for part, name in (("cross attention", "cross_attention.out"), ("affinity tables", "affinity")):
        torch.testing.assert_close(nats[part], zeroed(name))
    assert len({float(part.sum()) for part in nats.values()}) == len(nats)  # each has an effect
    torch.testing.assert_close(nats["none"], score(model, tokens)[0])  # and no hook is left


def test_a_redesign_without_attention_reads_one_token(tokens):
    redesigned = shaken(musota.RedesignedConfig(512, 24, 2, n_block=4, block_size=8, d_ff=64))
    ids = tokens[:10].long().repeat(2, 1)
    ids[1, :9] = 7
    assert not torch.allclose(*redesigned.hidden_states(ids)[:, -1])
    with ablate.replaced(*ablate.disabled_parts(redesigned, tokens)["attention"]):
        torch.testing.assert_close(*redesigned.hidden_states(ids)[:, -1])


def test_a_fixed_gate_is_the_mean_over_all_tokens(model, tokens):
    def gates():
        seen = []
        keep = [model.layers[1].gate], lambda _, __, out: seen.append(out.flatten(0, 1))
        with ablate.replaced(keep):
            score(model, tokens)
        return torch.cat(seen)

    with ablate.replaced(*ablate.disabled_parts(model, tokens)["gate"]):
        fixed = gates()
    assert (fixed == fixed[0]).all()
    torch.testing.assert_close(fixed[0], gates().mean(0))


@torch.no_grad()
def test_a_zeroed_block_is_zero_before_and_after_every_layer_and_at_the_output(model, tokens):
    block, ids = 3, tokens[:24].long()[None]
    kept = torch.ones(64)
    kept[4 * block : 4 * block + 4] = 0
    x = (model.embedding(ids) + model.positions(torch.arange(24))) * kept
    affinities = model.affinity(ids).view(1, 24, 2, 16).unbind(2)
    for layer, affinity in zip(model.layers, affinities, strict=True):
        x = layer(x, affinity) * kept
    logits = F.linear(model.norm(x) * kept, model.output_weight, model.output_bias)
    literal = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    nats = ablate.ablations(model, tokens)[MODEL.layout.names[block]]
    torch.testing.assert_close(nats[:23], literal)


def test_ablations_of_a_run_are_summed_by_blocks_of_text(finished, short):
    measured = ablate.measure_ablations(finished, short)
    assert sum(measured["tokens"]) == len(short.valid) - 1
    loss = sum(measured["nats"]["none"]) / sum(measured["tokens"])
    assert loss == pytest.approx(finished.valid_loss, rel=1e-4)
    gate = ablate.ablation_effects(measured)["gate"]
    without = sum(measured["nats"]["gate"]) / sum(measured["tokens"])
    assert gate.mean == pytest.approx(without - loss)
    assert math.isinf(gate.low)  # two blocks of text are too few for an interval


def test_weak_spots_name_the_parts_that_are_used_and_those_that_are_not():
    spans = {
        "block attention": (0.001, -0.002, 0.004), "cross attention": (0.4, 0.35, 0.45),
        "both attentions": (0.41, 0.36, 0.46), "gate": (0.05, 0.01, 0.09),
        "affinity tables": (0.02, 0.01, 0.03), "A": (0.01, 0.0, 0.02), "B": (0.3, 0.2, 0.4),
        "C": (0.02, 0.01, 0.03),
    }  # fmt: skip
    effects = {part: Interval(*span) for part, span in spans.items()}
    ledger = {"block attention": 5, "cross attention": 20, "affinity tables": 75}
    model = SimpleNamespace(layout=SimpleNamespace(names=("A", "B", "C")))
    experiment = SimpleNamespace(model=model)
    run = SimpleNamespace(summary={"parameter_ledger": ledger}, experiment=experiment)
    found = ablate.weak_spots(run, effects)
    context, block, cross, gate, tables, blocks = found
    decisions = ["used", "hardly used", "used", "undecided", "hardly used", "few"]
    assert [verdict.decision for verdict in found] == decisions
    assert "75.0% of the parameters" in tables.reason and "25.0%" in context.reason
    assert block.next_step and tables.next_step and not cross.next_step
    assert " 0.0% of the parameters" in gate.reason  # a gate without a map has no parameters
    assert blocks.value == 0.3 and "2 of 3" in blocks.reason and "block B" in blocks.reason
    effects["both attentions"] = Interval(0.01, 0.0, 0.02)
    assert "little better than a bigram" in ablate.weak_spots(run, effects)[0].reason
    unsure = dict.fromkeys("ABC", Interval(0.001, -math.inf, math.inf))  # too little text
    (blocks,) = ablate.weak_spots(run, unsure)
    assert blocks.decision == "undecided"
