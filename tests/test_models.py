import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import shaken
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import musota
from musota.errors import MusotaError
from musota.lab.profiles import scaled
from musota.models import reference as reference_module
from musota.models.base import Dropout
from musota.models.diagnostics import effective_rank
from musota.models.reference import ReferenceModel
from musota.registry import REGISTRY

SMALL = {"vocab_size": 60, "max_seq_len": 12, "n_layer": 2}
CONFIGS = {  # with a ReferenceModel; the redesign's equations are in test_redesigned.py
    "8x8/16": musota.MuConfig(**SMALL),
    "8x8/8": musota.MuConfig(n_block=8, **SMALL),
    "6x6/8": musota.MuConfig(matrix_size=6, n_block=8, n_head=6, **SMALL),
    "dense": musota.DenseConfig(d_model=48, n_head=3, **SMALL),
}
REDESIGNED = musota.RedesignedConfig(block_size=6, d_ff=90, **SMALL)
ALL = CONFIGS | {
    "redesigned": REDESIGNED,
    "blocks alone": replace(REDESIGNED, gate=False),
    "gate alone": replace(REDESIGNED, blocks=False),
    "modern transformer": replace(REDESIGNED, blocks=False, gate=False),
}
MODULE = {"source": "my.py:Net", "file_sha256": "", "shapes_sha256": "", "n_parameters": 1}
MODULE |= {"vocab_size": 9, "max_seq_len": 4, "flops_per_token": 6, "n_layer": 1, "dropout": 0.0}


@pytest.fixture(params=ALL)
def model(request):
    torch.manual_seed(0)
    return musota.build_model(ALL[request.param])


def test_ledger_sums_to_the_built_models_parameters_and_to_the_formula(model):
    built = sum(parameter.numel() for parameter in model.parameters())
    assert sum(model.parameter_ledger().values()) == built == model.config.n_parameters


@pytest.mark.parametrize("name", REGISTRY)
def test_the_formula_for_flops_gives_what_torch_counts(name):
    config = scaled(name, "tiny").model
    model = musota.build_model(config)
    window = torch.zeros(1, config.max_seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if isinstance(config, musota.RedesignedConfig):
            F.cross_entropy(model(window)[0][0], window[0]).backward()
        else:
            ReferenceModel(model)(window, window)[1].backward()
    counted = counter.get_total_flops() / config.max_seq_len
    assert config.flops_per_token == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_no_token_changes_a_logit_before_it(name, training):
    model = shaken(ALL[name]).train(training)
    ids = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(1))

    def logits(ids):
        torch.manual_seed(5)  # the same dropout in each pass
        return model(ids)[0].detach()

    base = logits(ids)
    for position in range(12):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 60
        difference = (logits(changed) - base).abs().amax(-1)
        assert (difference[:, :position] == 0).all()
        assert (difference[:, position:] > 0).all()  # its own and all later ones


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_reference(name):
    """Block by block, head by head, all logits at once: `musota/models/reference.py`."""
    model = shaken(CONFIGS[name]).double()
    window = torch.randint(60, (3, 13))
    losses, gradients = [], []
    for one in (model, ReferenceModel(model).eval()):
        losses.append(one(window[:, :-1], window[:, 1:])[1])
        gradients.append(torch.autograd.grad(losses[-1], [*model.parameters()]))
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    for ours, wanted in zip(*gradients, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5 * scale)


def test_weight_decay_touches_matrices_of_linear_maps_only(model):
    decayed, plain = model.optimizer_groups(0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names.pop(id(parameter)) for parameter in decayed["params"]}
    assert {id(parameter) for parameter in plain["params"]} == names.keys()
    for name in decayed:
        assert name.endswith("weight")
        assert not any(w in name for w in ("embedding", "positions", "affinity", "norm", "gate"))
    maps = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "gate" not in n]
    assert {f"{name}.weight" for name in maps} <= decayed


def test_forward_returns_logits_or_loss(model):
    model.eval()
    window = torch.randint(60, (3, 13))
    (logits, none), (also_none, loss) = model(window[:, :-1]), model(window[:, :-1], window[:, 1:])
    assert none is also_none is None
    torch.testing.assert_close(loss, F.cross_entropy(logits.mT, window[:, 1:]))
    health, gates = model.health(window[:, :-1]), getattr(model.layers[0], "gate", None)
    assert len(health["attention_entropy"]) == 2  # a layer each
    assert len(health.get("gate_mean", ())) == (model.config.n_block if gates else 0)
    with pytest.raises(MusotaError, match="Token ids must lie between 0 and 59, not 60 and 60"):
        model(torch.full((1, 3), 60))
    with pytest.raises(MusotaError, match="Give 1 to 12 tokens .*, not 13"):
        model(torch.zeros(1, 13, dtype=torch.long))


def test_generate_is_seeded_bounded_and_honours_its_filters(model):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    first = model.generate(prompt, 15, temperature=0.9, top_k=20, top_p=0.9, seed=3)
    assert first.shape == (2, 18)  # beyond max_seq_len: the window slides
    assert torch.equal(first, model.generate(prompt, 15, 0.9, 20, 0.9, seed=3))
    assert not torch.equal(first, model.generate(prompt, 15, 0.9, 20, 0.9, seed=4))
    greedy = model.generate(prompt, 5, temperature=0)
    assert torch.equal(greedy, model.generate(prompt, 5, top_k=1))
    assert torch.equal(greedy, model.generate(prompt, 5, top_p=1e-6))
    allowed = model.eval()(prompt)[0][:, -1].topk(5).indices
    drawn = torch.cat([model.generate(prompt, 1, top_k=5, seed=s)[:, -1:] for s in range(20)], 1)
    assert torch.isin(drawn[0], allowed[0]).all() and torch.isin(drawn[1], allowed[1]).all()
    for wrong in ({"max_new_tokens": 2.5}, {"temperature": None}, {"top_p": "x"}):
        with pytest.raises(MusotaError, match="must be a"):
            model.generate(prompt, **{"max_new_tokens": 3, **wrong})


def test_a_saved_model_is_loaded_with_its_tokenizer(model, corpus, tmp_path, monkeypatch):
    model.tokenizer = corpus.tokenizer
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("~/model")
    loaded = musota.CausalLM.from_pretrained("~/model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # and no folder "~"
    assert type(loaded) is type(model) and loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert loaded.tokenizer.backend.to_str() == corpus.tokenizer.backend.to_str()
    model.tokenizer = None
    model.save_pretrained("~/model")  # over one with a tokenizer
    assert musota.CausalLM.from_pretrained("~/model").tokenizer is None


def test_what_cannot_be_loaded_is_refused_in_one_sentence(tmp_path):
    musota.build_model(CONFIGS["8x8/16"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in [
        ({"vocab_size": 10**15}, "parameters is over the limit"),
        ({"n_layer": 40_000}, "not the 2,.* of its config.json"),
        ({"kind": "other"}, "Not the description of an experiment"),
        ({"surprise": 1}, "Not the description of an experiment"),
        ({"kind": "module", **MODULE}, "my.py:Net is your own code: build the module"),
    ]:
        described = changes if len(changes) > 1 else config | changes
        (tmp_path / "config.json").write_text(json.dumps(described))
        with pytest.raises(MusotaError, match=message):
            musota.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(MusotaError, match="The saved model in .* raised SafetensorError"):
        musota.load_model(tmp_path)
    with pytest.raises(MusotaError, match="raised FileNotFoundError: .*config.json"):
        musota.load_model(tmp_path / "elsewhere")


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.full((1000, 333), 2.0, requires_grad=True)
    y = dropout(x)
    dropped = y == 0
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.002)
    torch.testing.assert_close(y, 2 / 0.9 * ~dropped, rtol=1e-4, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 2)
    # Neighbours share one random number; they must still be dropped independently.
    fate = dropped.flatten()[: 4 * 83_250].view(-1, 4).float()
    assert torch.corrcoef(fate.T).fill_diagonal_(0).abs().max() < 0.02
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)


def test_effective_rank_counts_the_directions_in_use():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16)).Q
    for used in (1, 3, 16):
        vectors = 5 + torch.randn(20_000, used) @ directions[:used]  # an offset counts for nothing
        assert effective_rank(vectors) == pytest.approx(used, rel=0.02)


def test_health_equals_statistics_of_the_reference(monkeypatch):
    torch.manual_seed(0)
    model = musota.build_model(CONFIGS["8x8/16"]).train()
    ids = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(1))
    for layer in model.layers:
        nn.init.constant_(layer.gate.down.bias[3:4], 20.0)  # a saturated block
    health = model.health(ids)
    assert model.training  # as it was, and no hook is left behind
    assert not any(module._forward_hooks for module in model.modules())
    reference = ReferenceModel(model).eval()
    scores, entropies, shares = [], [], []

    def attend(x, n_head, in_weight, in_bias, *others, **options):
        qkv = F.linear(x, in_weight, in_bias.flatten()).view(3, 12, 3, n_head, -1)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        scores.append((q @ k.mT / q.shape[-1] ** 0.5).tril().abs().max().item())
        return plain_attend(x, n_head, in_weight, in_bias, *others, **options)

    plain_attend = reference_module.attend
    monkeypatch.setattr(reference_module, "attend", attend)
    for layer in model.layers:
        layer.gate.up.register_forward_pre_hook(lambda _, x: entropies.append(x[0][..., -1].mean()))
        layer.gate.down.register_forward_hook(lambda _, __, out: shares.append(out.sigmoid()))
    reference(ids, ids)
    assert health["largest_score"] == pytest.approx(max(scores), rel=1e-4)
    assert health["attention_entropy"] == pytest.approx(torch.stack(entropies).tolist(), 1e-4)
    shares = torch.stack(shares).flatten(1, 2)  # (L, B·T, N)
    gates = shares * torch.stack([layer.gate.beta for layer in model.layers])[:, None]
    assert health["gate_mean"] == pytest.approx(gates.mean((0, 1)).tolist(), rel=1e-4)
    spread = gates.std(1).mean(0).tolist()
    assert health["gate_spread"] == pytest.approx(spread, rel=1e-3, abs=1e-6)
    out = ((shares - 0.5).abs() > 0.45).float().mean((0, 1)).tolist()
    assert health["gate_saturated"] == pytest.approx(out) and out[3] == 1


def test_scores_of_a_text(corpus):
    model = shaken(replace(CONFIGS["dense"], vocab_size=512))
    model.tokenizer = corpus.tokenizer
    scored = model.score_text("A text, and another.")
    assert "".join(scored["token"]) == "A text, and another."
    assert scored.attrs["bits_per_byte"] == pytest.approx(scored["bits"].sum() / 20)
    with torch.no_grad():
        model.embedding.weight.mul_(1e4)  # a very unlikely text
    assert model.score_text("A text, and another.").attrs["ppl"] == math.inf
    with pytest.raises(MusotaError, match="lone surrogate"):
        model.score_text("fine \ud800 not")


# The sum of all magnitudes, and the last value of the first parameter and of the last but one.
FROZEN = {
    "original": (892402.59, -0.017388789, -0.0088261897),
    "optimized": (892517.97, 0.001521173, 0.010685204),
    "baseline": (238155.31, -0.011016826, 1.0),
    "simplified": (310896.65, 0.0031136819, 0.0057680514),
    "redesigned": (388688.88, -0.027844774, 0.0),
}


def test_the_weights_of_a_seed_stay_the_same():
    """Order and initialisation of parameters: committed runs can be trained again."""
    torch.manual_seed(0)
    for name, numbers in FROZEN.items():
        parameters = list(musota.build_model(musota.experiments[name].model).parameters())
        found = [sum(float(one.detach().abs().double().sum()) for one in parameters)]
        found += [float(parameters[index].detach().flatten()[-1]) for index in (0, -2)]
        assert found == pytest.approx(numbers, rel=1e-5), name  # other CPUs round otherwise
