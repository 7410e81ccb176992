import multiprocessing

import pytest
import torch
from click.testing import CliRunner

import musota
from musota.errors import MusotaError
from musota.workbook import bench
from musota.workbook.cli import cli

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
    assert max(result["agreement"].values()) < 1e-5


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
    with lost, bench.contender(MODELS["mu"], "ours", 2, torch.device("cpu")) as step:
        multiprocessing.active_children()[-1].kill()
        step()
