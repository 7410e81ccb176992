import multiprocessing

import pandas as pd
import pytest
from click.testing import CliRunner

import musota
from musota.errors import MusotaError
from musota.workbook import bench
from musota.workbook.cli import cli

SHAPE = {"vocab_size": 12_000, "max_seq_len": 96, "n_layer": 1}
MODELS = {"MU-SOTA": musota.MuConfig(**SHAPE), "transformer": musota.DenseConfig(**SHAPE)}


def test_the_fast_models_are_faster_and_need_less_memory():
    table = bench.run_bench("cpu", MODELS, batch=16, repeats=3)
    assert list(table.index) == list(MODELS)
    assert table.ratio["MU-SOTA"] > 1
    # 1,536 × 12,000 logits, several times over, against a chunk of 512.
    assert (table["MiB"] < 0.8 * table["reference MiB"]).all()


def test_the_table_is_printed_and_written(tmp_path, monkeypatch):
    table = pd.DataFrame({"model": ["MU-SOTA"], "tokens/s": [1185.0]}).set_index("model")
    monkeypatch.setattr(bench, "run_bench", lambda device, repeats: table * repeats)
    file = tmp_path / "new" / "bench.csv"
    answer = CliRunner().invoke(cli, ["bench", "--repeats", "2", "--csv", str(file)])
    assert answer.exit_code == 0 and "2,370" in answer.output, answer.output
    assert file.read_text() == "model,tokens/s\nMU-SOTA,2370.0\n"


def test_an_absent_device_and_a_lost_process_are_sentences(monkeypatch):
    with pytest.raises(MusotaError, match="There is no device 'nonsense' here"):
        bench.run_bench("nonsense")
    measure = bench.ProcessPoolExecutor.submit

    def killed(pool, *work):
        future = measure(pool, *work)
        multiprocessing.active_children()[-1].kill()
        return future

    monkeypatch.setattr(bench.ProcessPoolExecutor, "submit", killed)
    with pytest.raises(MusotaError, match="A process of the bench ended"):
        bench.run_bench("cpu", MODELS, batch=2, repeats=1)
