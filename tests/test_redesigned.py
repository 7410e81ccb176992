"""The redesign: its specification written out literally, its twins, the path, its blocks."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken

import musota
from musota.errors import MusotaError
from musota.models.base import score
from musota.plan.architectures import CHANGES
from musota.plan.path import steps
from musota.plan.profiles import find_profile, redesign, scaled, twin
from musota.plan.registry import FIRST_REDESIGN, find_experiment
from musota.rules import verdicts
from musota.studies import names, path, probes
from musota.workbook import figures, tables
from musota.workbook.evidence import Evidence

SMALL = musota.RedesignedConfig(
    vocab_size=60, max_seq_len=12, n_layer=2, block_size=6, d_ff=90, dropout=0.0
)
TWIN = "blocks,gate,names"


# --- the specification, block by block ---


def turned(x):
    """(T, c): pairs (x_i, x_{i + c/2}) as complex numbers, each turned by its own angle."""
    T, half = x.shape[0], x.shape[1] // 2
    angle = torch.arange(T)[:, None] / 10_000 ** (torch.arange(half).double() / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], 1)


def literal_attention(attention, x, config):
    """(T, d) to the attended cells."""
    c, has, heads = config.block_size, config.has, []
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    for block in range(config.n_block):
        own = slice(block * c, (block + 1) * c)
        if has("blocks"):
            k = x[:, own] @ attention.key_weight[block]
        else:
            k = (x @ attention.key_weight[0])[:, own]
        if has("blocks") and not has("whole queries"):
            q = x[:, own] @ attention.query_weight[block]
        else:
            q = (x @ attention.query_weight[0])[:, own]
        if has("query norm"):
            q, k = (y / (y.square().mean(1, keepdim=True) + 1e-16).sqrt() for y in (q, k))
            q = q * attention.sharpness[block, 0, 0]
        q, k = (turned(q), turned(k)) if has("rotary") else (q, k)
        weights = (q @ k.T / c**0.5).masked_fill(future, -math.inf).softmax(-1)
        heads.append(weights @ attention.value(x)[:, own])
    return attention.out(torch.cat(heads, 1))


def literal_hidden(model, ids):
    config, n, c, has = (
        model.config,
        model.config.n_block,
        model.config.block_size,
        model.config.has,
    )
    x = model.embedding.weight[ids]
    if not has("rotary"):
        x = x + model.positions.weight[: len(ids)]
    if has("embedding norm"):
        x = x / (x.square().mean(1, keepdim=True) + 1e-16).sqrt()
    if has("names"):  # I is block 0, C1 block 2
        before = torch.cat([torch.zeros(1, c), x[:-1, 2 * c : 3 * c]])
        x = torch.cat([x[:, : 2 * c], before, x[:, 3 * c :]], 1)
    for number, layer in enumerate(model.layers):
        factors = torch.ones(len(ids), n)
        if has("gate"):
            table = model.affinity.weight[ids]
            one = has("one table")
            own = layer.gate.map(table) if one else table[:, number * n : (number + 1) * n]
            factors = 2 * own.sigmoid()
        if has("names"):
            factors = torch.cat([torch.zeros(len(ids), 1), factors[:, 1:]], 1)
        factors = factors.repeat_interleave(c, 1)
        first, second = layer.norm_attention, layer.norm_feed_forward

        def forward(x, layer=layer):
            return layer.feed_forward_down(F.gelu(layer.feed_forward_up(x)))

        if has("norm before"):
            x = x + factors * literal_attention(layer.attention, first(x), config)
            x = x + factors * forward(second(x))
        else:
            z = first(x + literal_attention(layer.attention, x, config))
            z = second(z + forward(z))
            x = x + factors * (z if has("stream") else z - x)
    return model.norm(x)


ROWS = [getattr(step.experiment.model, "without", "") for step in steps().values()]


@pytest.mark.parametrize("without", dict.fromkeys([*ROWS, *CHANGES]))
def test_hidden_states_and_gradients_are_those_of_the_literal_version(without):
    model = shaken(replace(SMALL, without=without)).double()
    ids = torch.randint(60, (7,), generator=torch.Generator().manual_seed(1))
    aim = torch.randn(7, model.config.d_model).double()
    found = []
    for hidden in (model.hidden_states(ids[None])[0], literal_hidden(model, ids)):
        model.zero_grad()
        (hidden * aim).sum().backward()
        used = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((hidden.detach(), used))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # angles are float32
    for name, wanted in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], wanted, rtol=1e-4, atol=1e-5)


def test_it_starts_as_a_table_of_tokens_whose_gates_are_open():
    torch.manual_seed(0)
    model = musota.build_model(SMALL).eval()
    ids = torch.randint(60, (2, 12))
    cells = F.rms_norm(model.embedding(ids), (48,))
    assert torch.equal(model.hidden_states(ids), model.norm(cells))
    assert torch.equal(model.layers[0].gate(model.affinity(ids)), torch.ones(2, 12, 8))


# --- sizes ---


@pytest.mark.parametrize("profile", ["full", "study", "quick", "tiny"])
def test_it_and_its_twin_have_the_size_of_optimized_at_every_profile(profile):
    optimized, redesigned, modern = (
        scaled(find_experiment(name), profile)
        for name in ("optimized", "redesigned", "modern_twin")
    )
    for experiment in (redesigned, modern):
        share = experiment.model.n_parameters / optimized.model.n_parameters
        assert abs(share - 1) < 0.001
    # The twin has every change but blocks and gates, and the rate, which is not raised, is its own.
    assert modern == twin(redesigned) and modern.model.without == TWIN
    assert modern.training == redesigned.training and modern.training.learning_rate == 3e-3


def test_models_without_the_same_changes_are_equal():
    assert replace(SMALL, without="names, rotary,") == replace(SMALL, without="rotary,names")


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
    for layer in model.layers:
        layer.attention.out.weight.data.zero_()
    silent = probes.ablations(model, tokens)
    torch.testing.assert_close(silent["attention"], silent["none"])
    ungated = probes.look_inside(shaken(replace(SMALL, without="gate,names")), tokens[:9])
    assert torch.equal(ungated["gate"], torch.ones(2, 9, 8))
    with pytest.raises(MusotaError, match="Only MU-SOTA and its redesign have semantic blocks"):
        probes.look_inside(shaken(replace(SMALL, without=TWIN)), torch.arange(9))


# --- do the names mean anything? ---


def test_similarity_is_1_for_a_turned_copy_and_near_0_for_strangers():
    torch.manual_seed(0)
    a = torch.randn(4000, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert names.similarity(a, 3 * a @ turn + 5) == pytest.approx(1)
    assert names.similarity(a, torch.randn(4000, 6)) < 0.01


def test_a_probe_reads_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    labels = (torch.rand(80, 90) < 0.1).long()  # rare: a guess of the commoner class scores 0
    told = torch.randn(80, 90, 4)
    told[..., 2] += 6 * labels
    mean, low, high = names.reads(told, labels, np.random.default_rng(0))
    assert mean == pytest.approx(0.5, abs=0.03) and low <= mean <= high
    mean, low, high = names.reads(told[..., :2], labels, np.random.default_rng(0))
    assert low < 0 < high
    few = names.reads(told[:18], labels[:18], np.random.default_rng(0))  # nine windows to test on
    assert len(few) == 1  # no interval


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


def test_names_mean_something_where_the_named_block_certainly_tells_most():
    def verdict(position, digit, blocks="PMX", certain=True):
        reads = {"position": position, "digit": digit}
        ends = (-0.1, 0.1) if certain else ()
        reads = {
            p: {b: [m, *(m + end for end in ends)] for b, m in zip(blocks, of, strict=True)}
            for p, of in reads.items()
        }
        found = {"reads": reads, "blocks": [*blocks], "similarity": np.eye(3).tolist(), "moves": {}}
        return verdicts.names_mean(found, names.EXPECTED).verdict

    assert verdict((0.9, 0.1, 0.7), (0.1, 0.9, 0.7)) == "names"
    assert verdict((0.9, 0.1, 0.7), (0.1, 0.9, 0.7), certain=False) == "undecided"  # no interval
    assert verdict((0.9, 0.1, 0.85), (0.1, 0.9, 0.7)) == "labels"  # one of two is not certain
    assert verdict((0.1, 0.9, 0.7), (0.9, 0.1, 0.7)) == "labels"
    assert verdict((0.9, 0.1, 0.7), (0.1, 0.9, 0.7), "ABC") == "undecided"  # none is named for it


def test_a_dense_twin_has_no_twin_not_even_one_with_names(named_run):
    runs = []
    for without in ("", TWIN, "blocks,gate"):
        run = copy.copy(named_run)
        run.name = f"redesigned,without={without}"
        run.experiment = redesign(run.experiment, without=without)
        runs.append(run)
    evidence = Evidence(named_run.path, tuple(runs))
    assert [evidence.twin_of(run.name) for run in runs] == [runs[1].name, "", ""]


# --- the path ---


def test_every_row_of_the_path_is_of_one_size_and_differs_from_the_others():
    rows = steps()
    at_study = [scaled(step.experiment, "study") for step in rows.values()]
    assert len(set(at_study)) == len(at_study)
    for experiment in at_study:
        assert abs(experiment.model.n_parameters / at_study[0].model.n_parameters - 1) < 0.01
    longer = {name: rows.pop(name) for name in [*rows] if ", longer" in name}
    assert {scaled(step.experiment, "study").training.epochs for step in rows.values()} == {4}
    assert {scaled(step.experiment, "study").training.epochs for step in longer.values()} == {6}
    for name, step in longer.items():
        if name.endswith(", longer"):
            assert step.experiment.model == rows[name.removesuffix(", longer")].experiment.model
        else:  # one field away, of the redesign or of its twin
            one, other = step.experiment.fields(), longer[step.before].experiment.fields()
            assert len({f for f in one if one[f] != other[f]}) == 1, name
    made = [name for name, step in rows.items() if step.kind == "made"]
    assert [rows[name].before for name in made] == ["", *made[:-1]]
    # Each is one change away from the row before: of `CHANGES`, or of the blocks' width.
    for name, step in rows.items():
        if step.kind in ("made", "taken back", "added") and step.before not in ("", "optimized"):
            one, other = step.experiment, rows[step.before].experiment
            moves = set(one.model.without.split(",")) ^ set(other.model.without.split(","))
            moves |= {"n_block"} if one.model.n_block != other.model.n_block else set()
            assert len(moves - {""}) == 1 and one.training == other.training, name
    last = scaled(rows[made[-1]].experiment, "study").model
    assert last == scaled(musota.experiments["redesigned"], "study").model
    assert rows["quiet start"].experiment.model.without == FIRST_REDESIGN
    assert {s.before for s in rows.values() if s.kind in ("taken back", "twin")} == {made[-1]}
    # Every change is taken back, but the last, which the row before lacks, and one that changes
    # nothing where norms come before.
    back = [s.experiment.model.without for s in rows.values() if s.kind == "taken back"]
    taken_back = {change for without in back for change in without.split(",")}
    assert {*CHANGES} - taken_back == {"stream", made[-1]}


def test_the_path_judges_each_row_at_its_best_rate_with_the_seeds_all_have(named_run):
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
    assert judged["stream"].verdict == "does not earn it"  # 0.005 nats
    assert judged["optimized"].effect is None
    # What is added to the redesign is judged like a change made, what is taken back otherwise.
    added = "the redesign, block I kept and C1 from the token before"
    taken = "the redesign, but no gate"
    of_three = [("whole queries", 5.2), (added, 5.1), (taken, 5.3), ("modern dense twin", 5.3)]
    more = [run(n, 3e-3, seed, loss + seed / 100) for n, loss in of_three for seed in (0, 1, 2)]
    found = path.judge(path.sort_out(more, find_profile("study")))
    assert (found[added].verdict, found[taken].verdict) == ("earns its place", "needed")
    assert found["modern dense twin"].verdict == "worse than the redesign"
    twins = [run("dense GPT-2 twin", 3e-3, seed, 5.19 + seed / 100) for seed in (0, 1, 2)]
    found = path.judge(path.sort_out([*more, *twins], find_profile("study")))
    assert found["dense GPT-2 twin"].verdict == "better than the redesign"  # if not by much
    # A row that diverges with a seed is told so, and takes no seed from the others.
    bad = [*more, run(added, 3e-3, 1, 0)]
    bad.remove(more[4])
    bad[-1].summary = {"finished": False}
    bad[-1].records = [{"kind": "event", "step": 3, "event": "diverged"}]
    found = path.judge(path.sort_out(bad, find_profile("study")))
    assert (found[added].verdict, found[added].effect) == ("diverges", None)
    assert found[taken].verdict == "needed"
    assert tables.path_table(found)["valid PPL"].tolist().count("–") == 1
    assert len(figures.path(found, {}).axes[0].get_yticks()) == 3
    # A row that has one seed yet is shown, without an interval, and takes none from the others.
    more = path.sort_out([*runs, run("norm before", 3e-3, 0, 5.2)], find_profile("study"))
    judged = path.judge(more)
    assert judged["norm before"].effect.mean == pytest.approx(-0.095)
    assert math.isinf(judged["norm before"].effect.low) and judged["norm before"].verdict == ""
    assert judged["one attention"].verdict == "earns its place"
    # Nor does one with fewer seeds than the others.
    half = [run("norm before", 3e-3, seed, 5.2 + seed / 100) for seed in (0, 1)]
    found = path.judge(path.sort_out([*runs, *half], find_profile("study")))
    assert found["norm before"].verdict == "" and len(found["stream"].runs) == 3
    judged.pop("norm before")
    table = tables.path_table(judged)
    assert list(table["best rate"]) == ["0.01 of 2", "0.003 of 1", "0.003 of 1"]
    assert figures.path(judged, {"bigram": 215.0}).axes
