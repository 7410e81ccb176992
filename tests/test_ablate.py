import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import shaken

import musota
from musota.errors import MusotaError
from musota.lab import ablate
from musota.lab.stats import Interval
from musota.models.base import score

STUDY = Path(__file__).resolve().parent.parent / "results" / "study"
MODEL = musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=2)
REDESIGNED = musota.RedesignedConfig(512, 24, 2, n_block=4, block_size=8, d_ff=64)


@pytest.fixture(scope="module")
def model():
    return shaken(MODEL)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(512, (600,), generator=torch.Generator().manual_seed(1)).int()


def test_look_inside_follows_the_tokens_through_the_layers(model, tokens):
    ids = tokens[:9]
    inside = ablate.look_inside(model, ids)
    x = model.embedding(ids.long()) + model.positions(torch.arange(9))
    affinities = model.affinity(ids.long()).view(9, 2, 16)
    for layer in range(2):
        torch.testing.assert_close(inside["channels"][layer], x)
        x = model.layers[layer](x[None], affinities[None, :, layer])[0]
    torch.testing.assert_close(inside["channels"][2], x)
    assert inside["gate"].shape == (2, 9, 16)
    moved = (inside["channels"][1] - inside["channels"][0]).view(9, 16, 4)
    assert (moved.abs().amax(-1) > 0).equal(inside["gate"][0] != 0)


def test_only_models_with_blocks_are_looked_into(tokens):
    ungated = musota.build_model(musota.RedesignedConfig(512, 24, 2, 4, 8, 64, gate=False))
    assert ablate.look_inside(ungated, tokens[:5])["gate"].equal(torch.ones(2, 5, 4))
    plain = musota.RedesignedConfig(512, 24, 1, 4, 8, 64, blocks=False, gate=False)
    for config in (musota.DenseConfig(512, 24, 1, 2, d_model=32), plain):
        for function in (ablate.look_inside, ablate.ablations):
            with pytest.raises(MusotaError, match="Only MU-SOTA and its redesign have"):
                function(musota.build_model(config), tokens)


def test_ablations_equal_models_changed_by_hand(model, tokens):
    nats = ablate.ablations(model, tokens)
    attentions = ["block attention", "cross attention", "both attentions"]
    assert [*nats] == ["none", *attentions, "gate", "affinity tables", *MODEL.layout.names]
    torch.testing.assert_close(nats["none"], score(model, tokens)[0])

    def changed(change):
        copy = musota.build_model(MODEL).eval()
        copy.load_state_dict(model.state_dict())
        change(copy)
        return score(copy, tokens)[0]

    def no_cross(copy):
        for layer in copy.layers:
            for parameter in layer.cross_attention.out.parameters():
                parameter.data.zero_()

    torch.testing.assert_close(nats["cross attention"], changed(no_cross))
    no_tables = changed(lambda copy: copy.affinity.weight.data.zero_())
    torch.testing.assert_close(nats["affinity tables"], no_tables)

    def neither(copy):
        no_cross(copy)
        modules, alone = ablate.disabled_parts(copy, tokens)["block attention"][0]
        for module in modules:
            module.register_forward_hook(alone)

    torch.testing.assert_close(nats["both attentions"], changed(neither))
    assert len({float(part.sum()) for part in nats.values()}) == len(nats)  # each has an effect
    torch.testing.assert_close(nats["none"], score(model, tokens)[0])  # and no hook is left


def _without(part, model, tokens):
    return ablate.replaced(*ablate.disabled_parts(model, tokens)[part])


def test_a_redesign_without_attention_reads_one_token(tokens):
    redesigned, ids = shaken(REDESIGNED), tokens[:10].long().repeat(2, 1)
    ids[1, :9] = 7
    assert not torch.allclose(*redesigned.hidden_states(ids)[:, -1])
    with _without("attention", redesigned, tokens):
        torch.testing.assert_close(*redesigned.hidden_states(ids)[:, -1])


@pytest.mark.parametrize("config", [MODEL, REDESIGNED])
def test_a_fixed_gate_is_the_mean_over_all_tokens(config, tokens):
    model = shaken(config)

    def gates():
        seen = []
        hook = model.layers[1].gate.register_forward_hook(lambda _, __, out: seen.append(out))
        score(model, tokens)
        hook.remove()
        return torch.cat([out.flatten(0, 1) for out in seen])

    with _without("gate", model, tokens):
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
    assert json.loads(json.dumps(measured)) == measured
    loss = sum(measured["nats"]["none"]) / sum(measured["tokens"])
    assert loss == pytest.approx(finished.valid_loss, rel=1e-4)
    effects = ablate.ablation_effects(measured)
    costs = sum(measured["nats"]["gate"]) / sum(measured["tokens"]) - loss
    assert effects["gate"].mean == pytest.approx(costs)
    assert math.isinf(effects["gate"].low)  # two blocks of text are too few for an interval


def test_weak_spots_name_the_parts_that_are_used_and_those_that_are_not():
    spans = {
        "block attention": (0.001, -0.002, 0.004), "cross attention": (0.4, 0.35, 0.45),
        "both attentions": (0.41, 0.36, 0.46), "gate": (0.05, 0.01, 0.09),
        "affinity tables": (0.02, 0.01, 0.03), "A": (0.01, 0.0, 0.02), "B": (0.3, 0.2, 0.4),
        "C": (0.02, 0.01, 0.03),
    }  # fmt: skip
    effects = {part: Interval(*span) for part, span in spans.items()}
    ledger = {"block attention": 5, "cross attention": 20, "gate": 5, "affinity tables": 70}

    def judged():
        context, *parts, blocks = ablate.weak_spots(effects, ledger, ("A", "B", "C"))
        return context, dict(zip([*spans][:2] + [*spans][3:5], parts, strict=True)), blocks

    context, parts, blocks = judged()
    decisions = ["hardly used", "used", "undecided", "hardly used"]
    assert [verdict.decision for verdict in parts.values()] == decisions
    assert "70.0% of the parameters" in parts["affinity tables"].reason
    assert parts["affinity tables"].next_step and not parts["cross attention"].next_step
    assert (parts["gate"].value, parts["gate"].low, parts["gate"].high) == spans["gate"]
    assert context.decision == "used" and "25.0% of the parameters" in context.reason
    assert blocks.decision == "hardly used" and "2 of 3" in blocks.reason
    assert blocks.value == 0.3 and "block B" in blocks.reason and blocks.next_step
    del ledger["gate"]  # a gate without a map has no parameters
    assert " 0.0% of the parameters" in judged()[1]["gate"].reason
    effects["both attentions"] = Interval(0.01, 0.0, 0.02)
    assert judged()[0].decision == "hardly used" and "bigram" in judged()[0].reason
