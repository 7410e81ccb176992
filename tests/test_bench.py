import json
import multiprocessing

import pytest
import torch
from click.testing import CliRunner

import musota
from musota.errors import MusotaError
from musota.files import write_json
from musota.models.musota import CrossAttention
from musota.workbook import bench
from musota.workbook.cli import cli
from musota.workbook.pages import write_bench_report
from musota.workbook.tables import bench_table, scaling_table

CPU = torch.device("cpu")
SMALL = {"vocab_size": 300, "max_seq_len": 24, "n_layer": 2}


@pytest.mark.parametrize(
    "config",
    [
        musota.MuConfig(**SMALL),
        musota.MuConfig(matrix_size=6, n_block=8, n_head=6, **SMALL),
        musota.MuConfig(n_block=8, **SMALL),
        musota.DenseConfig(d_model=48, n_head=3, **SMALL),
    ],
)
def test_twenty_training_steps_agree_with_the_literal_version(config):
    assert bench.agreement(config, batch=4, device=CPU) < 1e-5


def test_a_gate_that_ignores_the_entropy_does_not_agree(monkeypatch):
    forward = CrossAttention.forward

    def without_entropy(self, x):
        across, entropy = forward(self, x)
        return across, 0 * entropy

    monkeypatch.setattr(CrossAttention, "forward", without_entropy)
    assert bench.agreement(musota.MuConfig(**SMALL), batch=4, device=CPU) > 1e-5


SHAPE = {"vocab_size": 12_000, "max_seq_len": 96, "n_layer": 1}
MODELS = {"mu": musota.MuConfig(**SHAPE), "dense": musota.DenseConfig(**SHAPE)}


@pytest.fixture(scope="module")
def result():
    axes = {"batch": (4, 16), "n_block": (8,)}
    return bench.run_bench("cpu", MODELS, batch=16, repeats=3, scaling=axes, say=lambda _: None)


def test_bench_measures_what_it_promises(result):
    assert [(row["model"], row["against"]) for row in result["rows"]] == [
        (model, against)
        for model in ("mu", "dense")
        for against in ("literal", "literal, attention-weight dropout")
    ]
    for row in result["rows"]:
        low, high = row["tokens_per_s_ratio_range"]
        assert low <= row["tokens_per_s_ratio"] <= high
        assert row["tokens_per_s"] == pytest.approx(16 * 96 / row["ms_per_step"] * 1e3)
        # Two clocks on a shared machine: the share is defined, not bounded.
        done = row["tokens_per_s"] * MODELS[row["model"]].flops_per_token
        assert row["share_of_matmul_rate"] == pytest.approx(done / result["matmul_flops"])
        # 1,536 × 12,000 logits, several times over, against a chunk of 512.
        assert row["memory_ratio"] < 0.6
    assert result["rows"][0]["tokens_per_s_ratio"] > 1
    points = [(p["model"], p["axis"], p["value"], p["arithmetic"]) for p in result["scaling"]]
    assert [point[:3] for point in points] == [
        ("mu", "batch", 4), ("mu", "batch", 16), ("mu", "n_block", 8),
        ("dense", "batch", 4), ("dense", "batch", 16),
    ]  # fmt: skip
    assert points[0][3] == 1 and points[2][3] == pytest.approx(1, abs=0.02)


def test_its_report_can_be_written_from_the_file(result, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "bench"
    asked = {}
    monkeypatch.setattr(bench, "run_bench", lambda device, **rest: asked.update(rest) or result)
    command = ["bench", "--repeats", "2", "--json", str(folder / "some-machine.json")]
    answer = CliRunner().invoke(cli, command)
    assert answer.exit_code == 0, answer.output
    assert "attention-weight dropout" in answer.output and "time per token" in answer.output
    assert asked["repeats"] == 2 and asked["scaling"] == bench.SCALING
    answer = CliRunner().invoke(cli, ["report", str(folder)])
    assert answer.exit_code == 0, answer.output
    text = (folder / "README.md").read_text()
    kept = json.loads((folder / "some-machine.json").read_text())
    assert f"{kept['rows'][0]['tokens_per_s_ratio']:.2f}×" in text
    for name in ("some-machine.png", "some-machine-scaling.png"):
        assert name in text and (folder / name).stat().st_size > 10_000
    assert len(bench_table(kept)) == 4 and len(scaling_table(kept)) == 5
    write_json(folder / "some-machine.json", {**kept, "scaling": []})
    assert "-scaling.png" not in write_bench_report(folder).read_text()


def test_scaling_says_where_the_arithmetic_does_not_hold():
    point = {"model": "mu", "axis": "batch", "value": 4, "batch": 4, "tokens_per_s": 9.0}
    times = [{**point, "time_per_token": time, "arithmetic": 2.0} for time in (2.2, 3.0, 1.0)]
    assert list(scaling_table({"scaling": times}).measured) == [
        "as it says",
        "1.50 × it",
        "0.50 × it",
    ]


def test_an_absent_device_and_a_lost_process_are_answered_plainly():
    absent = ["nonsense"] if torch.cuda.is_available() else ["nonsense", "cuda"]
    for name in absent:
        with pytest.raises(MusotaError, match=f"There is no device '{name}' here"):
            bench.run_bench(name)
    lost = pytest.raises(MusotaError, match="ended by itself")
    with lost, bench.contender(musota.MuConfig(**SMALL), "ours", 2, CPU) as step:
        multiprocessing.active_children()[-1].kill()
        step()
