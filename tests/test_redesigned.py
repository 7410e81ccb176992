"""The redesign: its specification written out literally, its twins, the path, its blocks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import musota
from musota.errors import MusotaError
from musota.models.base import score
from musota.plan.architectures import CHANGES
from musota.plan.path import steps
from musota.plan.profiles import find_profile, scaled, twin
from musota.plan.registry import find_experiment
from musota.studies import names, path, probes
from musota.workbook import figures, tables

SMALL = musota.RedesignedConfig(
    vocab_size=60, max_seq_len=12, n_layer=2, block_size=6, d_ff=90, dropout=0.0
)


def shaken(config):
    """A model none of whose weights is zero, as trained ones are."""
    torch.manual_seed(0)
    model = musota.build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


# --- the specification, token by token and block by block ---


def normed(x):
    return x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()


def turned(x, place):
    """Pairs (x_i, x_{i + c/2}) as complex numbers, each turned by its own angle."""
    half = len(x) // 2
    turns = [place / 10_000 ** (2 * i / len(x)) for i in range(half)]
    pairs = [complex(math.cos(a), math.sin(a)) for a in turns]
    real = [x[i] * z.real - x[half + i] * z.imag for i, z in enumerate(pairs)]
    imaginary = [x[half + i] * z.real + x[i] * z.imag for i, z in enumerate(pairs)]
    return torch.stack(real + imaginary)


def literal_attention(attention, xs, config):
    """The attended cells of each token, from what it reads of itself and those before."""
    n, c, has = config.n_block, config.block_size, config.has
    queries, keys, out = [], [], []
    for place, x in enumerate(xs):
        for block in range(n):
            if has("blocks"):
                both = x[block * c : (block + 1) * c] @ attention.qk_weight[block]
            else:
                both = (x @ attention.qk_weight[0])[block * 2 * c : (block + 1) * 2 * c]
            for part, kept in ((both[:c], queries), (both[c:], keys)):
                part = normed(part) if has("query norm") else part
                kept.append(turned(part, place) if has("rotary") else part)
    for t in range(len(xs)):
        heads = []
        for block in range(n):
            sharp = attention.sharpness[block, 0, 0] if has("query norm") else 1
            past = range(t + 1)
            scores = [queries[t * n + block] @ keys[s * n + block] for s in past]
            weights = (torch.stack(scores) * sharp / c**0.5).softmax(0)
            values = [attention.value(xs[s])[block * c : (block + 1) * c] for s in past]
            heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        out.append(attention.out(torch.cat(heads)))
    return out


def literal_hidden(model, ids):
    config, layers = model.config, model.layers
    n, c, has = config.n_block, config.block_size, config.has
    xs = [model.embedding.weight[i] for i in ids]
    if not has("rotary"):
        xs = [x + model.positions.weight[t] for t, x in enumerate(xs)]
    if has("names"):  # I is block 0, C1 block 2
        before = [torch.zeros(c).to(xs[0]), *(x[2 * c : 3 * c] for x in xs[:-1])]
        xs = [torch.cat([x[: 2 * c], b, x[3 * c :]]) for x, b in zip(xs, before, strict=True)]

    def move(number, layer, t, update):
        if not has("gate"):
            return update
        table = model.affinity.weight[ids[t]]
        own = layer.gate.map(table) if has("one table") else table[number * n : (number + 1) * n]
        factors = 2 * own.sigmoid()
        if has("names"):
            factors = torch.cat([torch.zeros(1).to(factors), factors[1:]])
        return torch.cat([factors[b] * update[b * c : (b + 1) * c] for b in range(n)])

    def forward(layer, x):
        return layer.feed_forward_down(F.gelu(layer.feed_forward_up(x)))

    for number, layer in enumerate(layers):
        first, second = layer.norm_attention, layer.norm_feed_forward
        if has("norm before"):
            attended = literal_attention(layer.attention, [first(x) for x in xs], config)
            xs = [x + move(number, layer, t, attended[t]) for t, x in enumerate(xs)]
            xs = [x + move(number, layer, t, forward(layer, second(x))) for t, x in enumerate(xs)]
        else:
            attended = literal_attention(layer.attention, xs, config)
            news = []
            for t, x in enumerate(xs):
                z = first(x + attended[t])
                z = second(z + forward(layer, z))
                news.append(x + move(number, layer, t, z if has("stream") else z - x))
            xs = news
    return torch.stack([model.norm(x) for x in xs])


@pytest.mark.parametrize("without", ["names", "", "blocks,gate,names", *CHANGES, ",".join(CHANGES)])
def test_hidden_states_and_gradients_are_those_of_the_literal_version(without):
    model = shaken(replace(SMALL, without=without)).double()
    ids = torch.randint(60, (7,), generator=torch.Generator().manual_seed(1))
    aim = torch.randn(7, model.config.d_model).double()
    gradients = []
    for hidden in (model.hidden_states(ids[None])[0], literal_hidden(model, ids.tolist())):
        model.zero_grad()
        (hidden * aim).sum().backward()
        used = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((hidden.detach(), used))
    (ours, our_gradients), (theirs, their_gradients) = gradients
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # angles are float32
    for name, wanted in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], wanted, rtol=1e-4, atol=1e-5)


def test_it_starts_as_a_table_of_tokens_whose_gates_are_open():
    torch.manual_seed(0)
    model = musota.build_model(SMALL).eval()
    ids = torch.randint(60, (2, 12))
    assert torch.equal(model.hidden_states(ids), model.norm(model.embedding(ids)))
    assert torch.equal(model.layers[0].gate(model.affinity(ids)), torch.ones(2, 12, 8))


# --- sizes ---


def test_it_has_the_plans_size_at_full_size_and_the_budget_of_optimized_at_every_profile():
    for profile in ("full", "study", "quick", "tiny"):
        sizes = {
            name: scaled(find_experiment(name), profile).model.n_parameters
            for name in ("optimized", "redesigned", "modern_twin")
        }
        for size in sizes.values():
            assert abs(size / sizes["optimized"] - 1) < 0.001, (profile, sizes)
    ledger = musota.build_model(find_experiment("redesigned").model).parameter_ledger()
    assert sum(ledger.values()) == 16_692_256
    assert ledger["affinity tables"] == 400_000 and ledger["embedding (also output)"] == 11_200_000


def test_its_matrix_is_nearly_square_and_bears_the_plans_names():
    layout = find_experiment("redesigned").model.layout
    assert (layout.height, layout.width) == (16, 14) and set(layout.sizes) == {28}
    assert layout.names == ("I", "S", "C1", "R1", "R2", "T", "K", "G")
    assert find_experiment("modern_twin").model.layout is None


def test_its_twin_has_every_change_but_blocks_and_gates_and_its_rate_is_not_raised():
    redesigned = scaled(find_experiment("redesigned"), "study")
    modern = twin(redesigned)
    assert modern == scaled(find_experiment("modern_twin"), "study")
    assert modern.training == redesigned.training and modern.training.learning_rate == 3e-3
    assert modern.model.without == "blocks,gate,names"
    model = musota.build_model(modern.model)
    assert "affinity tables" not in model.parameter_ledger()


def test_flops_by_hand_are_those_torch_counts():
    for name in ("redesigned", "modern_twin"):
        config = scaled(find_experiment(name), "tiny").model
        model = musota.build_model(config)
        window = torch.zeros(1, config.max_seq_len, dtype=torch.long)
        math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, math_only:
            F.cross_entropy(model(window)[0][0], window[0]).backward()
        counted = counter.get_total_flops() / config.max_seq_len
        assert config.flops_per_token == pytest.approx(counted, rel=0.01)


def test_bad_configurations_are_refused_in_one_sentence():
    with pytest.raises(MusotaError, match="Unknown change 'rotery': did you mean 'rotary'"):
        musota.RedesignedConfig(without="rotery")
    with pytest.raises(MusotaError, match="5 blocks have no names: use 8 or 16"):
        musota.RedesignedConfig(n_block=5, without="")


# --- what can be looked at ---


def test_health_ablations_and_the_block_view_work_as_for_mu_sota():
    model, tokens = shaken(SMALL), torch.randint(60, (60,))
    health = model.health(tokens[:24].view(2, 12))
    assert len(health["gate_mean"]) == 8 and len(health["attention_entropy"]) == 2
    nats = probes.ablations(model, tokens)
    blocks = model.config.layout.names
    assert list(nats) == ["none", "attention", "gate", "affinity tables", *blocks]
    seen = probes.look_inside(model, tokens[:9])
    assert seen["cells"].shape == (3, 9, 48) and seen["gate"].shape == (2, 9, 8)
    # A token that attends to itself alone is a sequence of its own, but for where it stands.
    alone = torch.cat([score(model, pair)[0] for pair in tokens.unfold(0, 2, 1)])
    torch.testing.assert_close(nats["attention"], alone)
    model.layers[0].attention.out.weight.data.zero_()
    model.layers[1].attention.out.weight.data.zero_()
    silent = probes.ablations(model, tokens)
    torch.testing.assert_close(silent["attention"], silent["none"])


def test_the_twin_without_blocks_has_no_block_view():
    model = shaken(replace(SMALL, without="blocks,gate,names"))
    with pytest.raises(MusotaError, match="Only MU-SOTA and its redesign have semantic blocks"):
        probes.look_inside(model, torch.arange(9))


# --- do the names mean anything? ---


def test_similarity_is_1_for_a_turned_copy_and_near_0_for_strangers():
    torch.manual_seed(0)
    a = torch.randn(4000, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert names.similarity(a, 3 * a @ turn + 5) == pytest.approx(1)
    assert names.similarity(a, torch.randn(4000, 6)) < 0.01


def test_a_probe_reads_what_is_there_and_nothing_else():
    import numpy as np

    torch.manual_seed(0)
    labels = (torch.rand(80, 90) < 0.1).long()  # rare: a guess of the commoner class scores 0
    told = torch.randn(80, 90, 4)
    told[..., 2] += 6 * labels
    mean, low, high = names.reads(told, labels, np.random.default_rng(0))
    assert mean == pytest.approx(0.5, abs=0.03) and low <= mean <= high
    mean, low, high = names.reads(told[..., :2], labels, np.random.default_rng(0))
    assert low < 0 < high


@pytest.fixture(scope="module")
def named_run(corpus, tmp_path_factory):
    experiment = scaled(musota.experiments["redesigned"], "tiny").with_(without="")
    folder = tmp_path_factory.mktemp("runs") / "named"
    return musota.train(experiment.with_(epochs=1), corpus, folder)


def test_names_that_are_built_in_are_found(named_run, corpus):
    """Block I never moves, whatever stands before; untrained, C1 alone does."""
    found = names.measure_names(named_run, corpus)
    assert found["blocks"] == list(named_run.experiment.model.layout.names)
    assert found["words"] > 3 and found["moves"]["I"] == [0, 0, 0]
    assert min(found["moves"][block][0] for block in ("C1", "S", "G")) > 0.02
    assert all(found["similarity"][n][n] == pytest.approx(1) for n in range(8))
    found = names.names_of(musota.build_model(named_run.experiment.model), corpus)
    moved = {block: mean for block, (mean, *_) in found["moves"].items()}
    assert moved.pop("C1") > 0.5 and set(moved.values()) == {0}


# --- the path ---


def test_every_row_of_the_path_is_of_one_size_and_differs_from_the_others():
    rows = steps()
    at_study = [scaled(step.experiment, "study") for step in rows.values()]
    assert len(set(at_study)) == len(at_study)
    for experiment in at_study:
        assert abs(experiment.model.n_parameters / at_study[0].model.n_parameters - 1) < 0.01
        assert experiment.training.epochs == 4
    made = [name for name, step in rows.items() if step.made]
    assert [rows[name].before for name in made] == ["", *made[:-1]]
    last = scaled(rows[made[-1]].experiment, "study").model
    assert last == scaled(musota.experiments["redesigned"], "study").model
    assert {step.before for step in rows.values() if not step.made} == {made[-1]}


def test_the_path_judges_each_row_at_its_best_rate_with_the_seeds_all_have(named_run):
    import copy

    rows = steps()

    def run(name, rate, seed, loss):
        fake = copy.copy(named_run)
        experiment = scaled(rows[name].experiment, "study").with_(learning_rate=rate)
        fake.experiment, fake.seed = experiment, seed
        fake.summary = {**named_run.summary, "valid_loss": loss, "ppl": math.exp(loss)}
        return fake

    runs = [run("optimized", 3e-3, 0, 5.5), run("optimized", 1e-2, 0, 5.4)]
    runs += [run("optimized", 1e-2, seed, 5.4 + seed / 100) for seed in (1, 2)]
    runs += [run("one attention", 3e-3, seed, 5.3 + seed / 100) for seed in (0, 1, 2)]
    runs += [run("stream", 3e-3, seed, 5.295 + seed / 100) for seed in (0, 1, 2, 3)]
    judged = path.judge(path.sort_out(runs, find_profile("study")))
    assert list(judged) == ["optimized", "one attention", "stream"]
    assert judged["optimized"].rate == 1e-2 and judged["optimized"].tried == 2
    assert [r.seed for r in judged["stream"].runs] == [0, 1, 2]
    assert judged["one attention"].effect.mean == pytest.approx(-0.1)
    assert judged["one attention"].verdict == "earns its place"
    assert judged["stream"].verdict == "does not"  # 0.005 nats
    assert judged["optimized"].effect is None
    # A row that has one seed yet is shown, without an interval, and takes none from the others.
    more = path.sort_out([*runs, run("norm before", 3e-3, 0, 5.2)], find_profile("study"))
    judged = path.judge(more)
    assert judged["norm before"].effect.mean == pytest.approx(-0.095)
    assert math.isinf(judged["norm before"].effect.low) and judged["norm before"].verdict == ""
    assert judged["one attention"].verdict == "earns its place"
    judged.pop("norm before")
    table = tables.path_table(judged)
    assert list(table["best rate"]) == ["0.01 of 2", "0.003 of 1", "0.003 of 1"]
    assert figures.path(judged, {"bigram": 215.0}).axes
