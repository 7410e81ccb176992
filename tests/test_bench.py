from itertools import chain

import pytest
from click.testing import CliRunner

import musota
from musota.errors import MusotaError
from musota.workbook import bench
from musota.workbook.cli import cli

SHAPE = {"vocab_size": 12_000, "max_seq_len": 96, "n_layer": 1}


def test_the_fast_models_are_faster_and_need_less_memory(monkeypatch):
    models = {"MU-SOTA": musota.MuConfig(**SHAPE), "transformer": musota.DenseConfig(**SHAPE)}
    table = bench.run_bench("cpu", models, batch=16, repeats=3)
    ours = {"MU-SOTA": models["MU-SOTA"]}
    again = (bench.run_bench("cpu", ours, batch=16, repeats=3) for _ in range(3))  # others may load
    assert any(measured.ratio["MU-SOTA"] > 1 for measured in chain([table], again))  # the machine
    # 1,536 × 12,000 logits, several times over, against a chunk of 512.
    assert (table["MiB"] < 0.8 * table["reference MiB"]).all()
    monkeypatch.setattr(bench, "run_bench", lambda device, repeats: table * 0 + repeats * 1185)
    answer = CliRunner().invoke(cli, ["bench", "--repeats", "2"])
    assert answer.exit_code == 0 and "2,370" in answer.output, answer.output


def test_an_absent_device_and_a_lost_process_are_sentences():
    with pytest.raises(MusotaError, match="There is no device 'nonsense' here"):
        bench.run_bench("nonsense")
    model = {"transformer": musota.DenseConfig(vocab_size=300, n_layer=1)}
    with pytest.raises(MusotaError, match="A process of the bench ended"):
        bench.run_bench("cpu", model, batch=2**40, repeats=1)  # more memory than there is
