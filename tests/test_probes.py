import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import EXPERIMENT, each_step

import musota
from musota.errors import MusotaError
from musota.models.base import CausalLM, score
from musota.plan.profiles import Profile, twin
from musota.plan.registry import experiments
from musota.plan.suspects import grid as make_grid
from musota.studies import grid as grid_room
from musota.studies import probes
from musota.studies.cells import run_cells
from musota.training import evaluate as evaluate_room
from musota.training import schedule

MODEL = musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = musota.build_model(MODEL)
    for parameter in model.parameters():  # away from its tame start, so that every part matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(512, (600,), generator=torch.Generator().manual_seed(1)).int()


# --- looking inside ---


def test_look_inside_follows_the_tokens_through_the_layers(model, tokens):
    ids = tokens[:9]
    inside = probes.look_inside(model, ids)
    x = model.embedding(ids.long()) + model.positions(torch.arange(9))
    affinities = model.affinity(ids.long()).view(9, 2, 16)
    for layer in range(2):
        torch.testing.assert_close(inside["cells"][layer], x)
        x = model.layers[layer](x[None], affinities[None, :, layer])[0]
    torch.testing.assert_close(inside["cells"][2], x)
    assert inside["gate"].shape == (2, 9, 16)
    moved = (inside["cells"][1] - inside["cells"][0]).view(9, 16, 4)
    assert (moved.abs().amax(-1) > 0).equal(inside["gate"][0] != 0)
    dense = musota.build_model(musota.DenseConfig(512, 24, 1, 2, d_model=32))
    for probe in (probes.look_inside, probes.ablations):
        with pytest.raises(MusotaError, match="Only MU-SOTA and its redesign have semantic blocks"):
            probe(dense, tokens)


# --- ablations against literal versions ---


def test_ablations_equal_models_changed_by_hand(model, tokens):
    nats = probes.ablations(model, tokens)
    assert list(nats) == [
        "none", "block attention", "cross attention", "both attentions", "gate", "affinity tables",
        *MODEL.layout.names,
    ]  # fmt: skip
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
        modules, alone = probes.disabled_parts(copy, tokens)["block attention"][0]
        for module in modules:
            module.register_forward_hook(alone)

    torch.testing.assert_close(nats["both attentions"], changed(neither))
    assert len({float(part.sum()) for part in nats.values()}) == len(nats)  # each does something
    torch.testing.assert_close(nats["none"], score(model, tokens)[0])  # and leaves nothing behind


def _without(part, model, tokens):
    return probes.replaced(*probes.disabled_parts(model, tokens)[part])


def test_without_block_attention_a_token_sees_itself_alone_inside_its_blocks(model, tokens):
    attention = model.layers[0].block_attention[0]
    x = torch.randn(2, 5, 64)
    with _without("block attention", model, tokens):
        alone = attention(x)
    one_by_one = torch.stack([attention(x[:, t : t + 1])[:, 0] for t in range(5)], 1)
    torch.testing.assert_close(alone, one_by_one)
    assert not torch.allclose(alone[:, 1:], attention(x)[:, 1:])


def test_a_fixed_gate_is_the_mean_over_all_tokens(model, tokens):
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
    for layer, affinity in zip(
        model.layers, model.affinity(ids).view(1, 24, 2, 16).unbind(2), strict=True
    ):
        x = layer(x, affinity) * kept
    logits = F.linear(model.norm(x) * kept, model.output_weight, model.output_bias)
    literal = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    nats = probes.ablations(model, tokens)[MODEL.layout.names[block]]
    torch.testing.assert_close(nats[:23], literal)


# --- anneal ---


def test_annealing_goes_on_from_a_checkpoint_and_leaves_it_alone(short, finished, tmp_path):
    run = musota.train(EXPERIMENT, short, tmp_path / "run", stop_at=0.5)
    assert not run.finished and len(run.history) == 1
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    seen = []
    with each_step(after=lambda t: seen.append((t.step, t.optimizer.param_groups[0]["lr"]))):
        nats = probes.anneal(run, short, share=0.5)
    assert {path: path.read_bytes() for path in before} == before
    step, half = run.history.step[0], len(seen) // 2
    assert half == math.ceil(0.5 * step)
    assert [at for at, _ in seen] == [*range(step + 1, step + half + 1)] * 2
    rate = schedule.learning_rate_at(step, EXPERIMENT.training, 2 * step)
    falling = [rate * (1 - n / half) for n in range(1, half + 1)]
    assert [lr for _, lr in seen] == pytest.approx([*falling, *[rate] * half])
    assert len(nats["before"]) == len(short.valid) - 1
    assert not nats["decayed"].equal(nats["held"])
    before = nats["before"].double().mean()
    assert float(before) == pytest.approx(run.history.valid_loss[0])
    with pytest.raises(MusotaError, match="is finished, its rate is 0"):
        probes.anneal(finished, short)


# --- the grid ---


def test_each_cell_changes_what_it_says_and_nothing_else():
    cells, suspects, seeds = make_grid("quick")
    original = experiments["original"].fields()

    def changed(cell):
        fields = cells[cell].experiment.fields()
        return {name: fields[name] for name in fields if fields[name] != original.get(name)}

    expected = {
        "original": {},
        "epochs": {"epochs": 30},
        "learning_rate": {"learning_rate": 1e-4},
        "warmup": {"warmup_steps": 2000},
        "sequence": {"max_seq_len": 192, "batch_size": 4, "accumulation_steps": 8},
        "original_half": {"epochs": 20},
        "blocks_8": {"n_block": 8},
        "layers_8": {"n_layer": 8},
        "matrix_6": {"matrix_size": 6, "n_block": 8, "n_head": 6},
    }
    assert {cell: changed(cell) for cell in expected} == expected
    assert list(seeds) == [0, 1] and cells["original_half"].share == 0.5
    assert cells["dense"].experiment == twin(experiments["original"])
    for factor in (0.1, 3, 10, 30, 100):
        assert changed(f"original_rate_x{factor}")["learning_rate"] == pytest.approx(3e-4 * factor)
    assert {s.confidence for s in suspects} == {
        "70 %", "60 %", "50 %", "40 %", "30 %", "unknown", "not in the plan",
    }  # fmt: skip
    assert {cell for s in suspects for cell in (s.before, s.after)} <= set(cells)


def test_larger_profiles_also_put_one_change_back():
    cells, suspects, seeds = make_grid("study")
    assert cells["without_epochs"].experiment == experiments["optimized"].with_(epochs=10)
    assert len(seeds) == 3 and sum(s.name.startswith("from optimized") for s in suspects) == 6
    assert make_grid("full")[0] == cells


TINY = Profile("small", 512, 4000, 1200, 1 / 12, 1 / 8, 1 / 10, 1 / 4, 30.0, 1)


@pytest.fixture(scope="module", name="grid")
def _grid(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    cells, suspects, _ = make_grid("quick")
    some = ("original", "original_half", "original_rate_x3", "dense", "dense_rate_x3")
    cells = {name: cells[name] for name in some}
    runs = run_cells(cells, (0, 1), TINY, short, folder, keep=("original",), workers=2)
    return cells, suspects, folder, runs


def test_a_grid_trains_every_cell_and_never_twice(grid, short, capsys):
    cells, _, folder, runs = grid
    assert list(runs) == list(cells) and all(set(r) == {0, 1} for r in runs.values())
    assert all(run.finished for by_seed in runs.values() for run in by_seed.values())
    assert runs["original"][0].has_model and not runs["dense"][0].has_model
    (folder / "dense-seed1" / "summary.json").unlink()  # as if it had been interrupted
    capsys.readouterr()
    again = run_cells(cells, (0, 1), TINY, short, folder)
    assert "9 of 10 runs are here already." in capsys.readouterr().out
    before = runs["dense"][1].summary["ppl"]  # of a process with one thread: rounded otherwise
    assert again["dense"][1].summary["ppl"] == pytest.approx(before, rel=1e-4)


def test_half_the_text_is_half_the_text_in_as_many_steps(grid):
    runs = grid[3]
    whole, half = (runs[name][0] for name in ("original", "original_half"))
    tokens = [run.config["corpus"]["tokens"]["train"] for run in (whole, half)]
    assert tokens[1] == pytest.approx(tokens[0] / 2, rel=0.1)
    assert half.steps.step.max() == pytest.approx(whole.steps.step.max(), rel=0.15)
    assert grid_room.data_losses(runs, "original").keys() == set(tokens)


def test_a_grid_is_judged_as_far_as_it_has_been_trained(grid):
    _, suspects, _, runs = grid
    causes = {cause.suspect.after: cause for cause in grid_room.judge(runs, suspects)}
    names = [cause.suspect.name for cause in grid_room.judge(runs, suspects)]
    assert "architecture (→ dense twin), each at its best rate (at an edge)" in names
    assert len(names) == 4
    assert next(c for c in causes.values() if "edge" in c.suspect.name).verdict == "undecided"
    raised = causes["original_rate_x3"]
    losses = grid_room.valid_losses(runs)
    means = {cell: sum(by_seed.values()) / 2 for cell, by_seed in losses.items()}
    assert raised.effect.mean == pytest.approx(means["original_rate_x3"] - means["original"])
    assert raised.here == "learning_rate 0.009 → 0.027"
    assert [*grid_room.sweep_losses(runs, "original")] == pytest.approx([0.009, 0.027])
    assert sorted(grid_room.sweep_losses(runs, "dense")) == pytest.approx([0.009, 0.027])


def test_an_interrupted_study_stops_and_keeps_its_checkpoint(short, tmp_path):
    cells = {name: make_grid("quick")[0][name] for name in ("epochs", "original")}

    def interrupt(trainer):
        if trainer.step == trainer.steps_per_epoch + 1:
            signal.raise_signal(signal.SIGINT)

    with each_step(after=interrupt), pytest.raises(KeyboardInterrupt):
        run_cells(cells, (0,), TINY, short, tmp_path, workers=1)
    (only,) = tmp_path.iterdir()
    assert not musota.Run(only).ended and [*only.glob("checkpoints/step-*")]
    assert all(run[0].finished for run in run_cells(cells, (0,), TINY, short, tmp_path).values())


def test_a_diverged_cell_is_remembered_and_no_cause(grid, short, monkeypatch):
    cells, suspects, folder, _ = grid
    cells = {name: cells[name] for name in ("original",)}
    cells["original_rate_x10"] = make_grid("quick")[0]["original_rate_x10"]
    monkeypatch.setattr(evaluate_room, "score", lambda *_: 1 / 0)  # nothing that has ended
    losses = CausalLM.loss_of
    monkeypatch.setattr(CausalLM, "loss_of", lambda *given: losses(*given) * math.inf)
    runs = run_cells(cells, (0, 1), TINY, short, folder, workers=1)
    assert runs["original_rate_x10"][1].diverged and not runs["original"][0].diverged
    records = (folder / "original_rate_x10-seed0" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["event"] == "diverged"
    runs = run_cells(cells, (0, 1), TINY, short, folder, workers=1)
    (cause,) = grid_room.judge(runs, suspects)
    assert (cause.effect, cause.verdict, cause.ppl_after) == (None, "not a cause", math.inf)
