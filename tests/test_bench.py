import multiprocessing

import pytest
import torch
from click.testing import CliRunner

import musota
from musota.errors import MusotaError
from musota.models.musota import CrossAttention
from musota.workbook import bench
from musota.workbook.cli import cli

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
    return bench.run_bench("cpu", MODELS, batch=16, repeats=3)


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
        # 1,536 × 12,000 logits, several times over, against a chunk of 512.
        assert row["memory_ratio"] < 0.6
    assert result["rows"][0]["tokens_per_s_ratio"] > 1


def test_its_report_can_be_written_from_the_file(result, tmp_path, monkeypatch):
    folder, asked = tmp_path / "new" / "bench", {}
    monkeypatch.setattr(bench, "run_bench", lambda device, **rest: asked.update(rest) or result)
    command = ["bench", "--repeats", "2", "--json", str(folder / "some-machine.json")]
    answer = CliRunner().invoke(cli, command)
    assert answer.exit_code == 0, answer.output
    assert "attention-weight dropout" in answer.output and asked["repeats"] == 2
    answer = CliRunner().invoke(cli, ["report", str(folder)])
    assert answer.exit_code == 0, answer.output
    text = (folder / "README.md").read_text()
    assert f"{result['rows'][0]['tokens_per_s_ratio']:.2f}×" in text
    assert (folder / "some-machine.png").stat().st_size > 10_000


def test_an_absent_device_and_a_lost_process_are_answered_plainly():
    with pytest.raises(MusotaError, match="There is no device 'nonsense' here"):
        bench.run_bench("nonsense")
    lost = pytest.raises(MusotaError, match="ended by itself")
    with lost, bench.contender(musota.MuConfig(**SMALL), "ours", 2, CPU) as step:
        multiprocessing.active_children()[-1].kill()
        step()
