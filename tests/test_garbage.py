"""Nonsense as input of the public API: either it works, or one clear sentence says why not."""

import copy
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EXPERIMENT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import musota
from musota.errors import MusotaError
from musota.files import read_sealed, write_sealed
from musota.lab.profiles import GRID_PROFILES, find_profile, scaled
from musota.registry import find_experiment
from musota.workbook import Workbook

settings.register_profile("garbage", max_examples=60, deadline=None)
settings.load_profile("garbage")

NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=5)
)
FIELDS = sorted({name for e in musota.experiments.values() for name in e.fields()} - {"d_ff"})
JSON = st.recursive(
    NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def _answer(call, *given, **named):
    """The result of a call, or None where it raises a user-facing error of one sentence."""
    try:
        return call(*given, **named)
    except MusotaError as error:
        assert 10 < len(str(error)) < 1500 and "Traceback" not in str(error)
        return None


@given(name=st.sampled_from(FIELDS), value=NUMBERS, kind=st.sampled_from([*musota.experiments]))
@example("learning_rate", math.nan, "optimized")
@example("dropout", "0.1", "optimized")
@example("matrix_size", 10**12, "simplified")
def test_configurations(name, value, kind):
    if changed := _answer(musota.experiments[kind].with_, **{name: value}):
        assert changed.model.n_parameters > 0
        for profile in GRID_PROFILES.values():
            _answer(scaled, changed, profile)


@given(name=st.text(max_size=30))
@example("../../etc")
@example("\0")
@example("~\0")
@example("x" * 500)
@example("no-one/nothing")
def test_names(name):
    for find in (find_experiment, find_profile, musota.load_corpus):
        _answer(find, name)
    assert _answer(musota.CausalLM.from_pretrained, name) is None


@given(config=JSON, weights=st.binary(max_size=300))
@example(config={"kind": []}, weights=b"")
@example(config={"kind": "module", "source": 3}, weights=b"")
@example(config=None, weights=b"")
def test_folders_of_runs_and_of_models(config, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "metrics.jsonl"):
        (folder / name).write_bytes(weights)
    for data in (config, {"model": config, "training": {}}):
        assert _answer(musota.Experiment.from_dict, data) is None
    assert _answer(musota.load_model, folder) is _answer(musota.Run, folder) is None
    assert musota.load_runs(folder) == []  # left out, with a line


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return musota.build_model(musota.MuConfig(vocab_size=300, max_seq_len=8, n_layer=1))


@given(
    ids=st.lists(st.integers(-2, 302), max_size=12),
    temperature=st.floats(),
    top_k=st.none() | st.integers(-2, 400),
    top_p=st.none() | st.floats(),
)
@example([1], math.nan, None, None)
@example([1], 1e-320, 1, 1.0)
def test_generating(model, ids, temperature, top_k, top_p):
    prompt = torch.tensor([ids], dtype=torch.long)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    out = _answer(model.generate, prompt, 2, **settings)
    assert out is None or (out.shape == (1, len(ids) + 2) and 0 <= out.min() <= out.max() < 300)


@given(tokens=st.lists(st.integers(-2, 302), max_size=30), stride=st.none() | st.integers(-2, 12))
def test_evaluating(model, tokens, stride):
    tokens = torch.tensor(tokens, dtype=torch.int32)
    found = _answer(musota.evaluate, model, tokens, stride=stride)
    assert found is None or found["ppl"] >= 1


TRAINING = [("experiment", "optimized"), ("experiment", torch.nn.Linear), ("corpus", None)]
TRAINING += [("seed", value) for value in ("a", None, 1.5, -1, 2**63)]
TRAINING += [("micro_batch", 0), ("micro_batch", "4")]
TRAINING += [("stop_at", value) for value in (math.nan, 0, None)]
PARAMETERS = [("profile", []), ("profile", "quik"), ("corpus", 3), ("corpus", None)]
PARAMETERS += [("save_to", 3), ("save_to", "\0"), ("seed", 10**30), ("seed", True)]
PARAMETERS += [("fresh", "no"), ("fresh", None)]


@pytest.mark.parametrize(("name", "value"), TRAINING)
def test_training(name, value, corpus, short, tmp_path):
    given = {"experiment": EXPERIMENT, "corpus": corpus, name: value}
    with pytest.raises(MusotaError, match="train needs|must"):
        if name in ("micro_batch", "stop_at"):
            musota.RunOptions(**{name: value})
        musota.train(run_dir=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
    with pytest.raises(MusotaError, match="too long"):
        musota.train(EXPERIMENT, short, 300 * "x")


@pytest.mark.parametrize(("name", "value"), PARAMETERS)
def test_notebook_parameters(name, value, text_folder):
    given = {"profile": "tiny", "corpus": str(text_folder), name: value}
    assert _answer(Workbook, **given) is None


@pytest.mark.parametrize("content", [b"", b"[]", b'{"ppl": 3, "sha256": ""}', b"\xff"])
def test_damaged_records_are_named(content, tmp_path):
    path = tmp_path / "config.json"
    write_sealed(path, {"ppl": math.inf, "steps": 3})
    assert read_sealed(path) == {"ppl": None, "steps": 3}
    for written, problem in ((content, "is damaged"), (b'{"ppl": 50}', "has no hash: it is")):
        path.write_bytes(written)
        with pytest.raises(MusotaError, match=f"config.json {problem}"):
            read_sealed(path)


# --- the forms in which token ids come ---


def test_text_lists_arrays_and_tensors_are_all_taken(model, text_folder, tmp_path):
    tokenizer = musota.load_corpus(text_folder, 300).tokenizer
    text = (text_folder / "valid.txt").read_text("utf-8")[:2000]
    ids, owned = tokenizer.encode(text), copy.copy(model)
    owned.tokenizer = tokenizer
    with warnings.catch_warnings(action="error"):
        short = ids.astype(np.uint16)
        short.tofile(tmp_path / "ids.bin")  # as nanoGPT stores them
        mapped = np.memmap(tmp_path / "ids.bin", np.uint16, "r")
        forms = text, ids, ids.tolist(), torch.from_numpy(ids), mapped, torch.from_numpy(short)
        forms += ids.astype(">i8"), ids.astype(np.uint64), tuple(ids), pd.Series(ids)
        assert len({musota.evaluate(owned, form)["loss"] for form in forms}) == 1
    assert torch.equal(owned.generate(text[:20], 3), owned.generate(tokenizer.encode(text[:20]), 3))
    assert tokenizer.decode(torch.from_numpy(ids)) == text
    with pytest.raises(MusotaError, match="without its tokenizer"):
        musota.evaluate(model, text)
    with pytest.raises(MusotaError, match="evaluate needs a model of musota, .* not Linear"):
        musota.evaluate(torch.nn.Linear(1, 1), ids)
    for wrong in (None, [1.5, 2.0], [[1], [2, 3]], [True, False], {"a": 1}):
        with pytest.raises(MusotaError, match="whole-numbered token ids"):
            musota.evaluate(owned, wrong)
