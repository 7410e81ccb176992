"""Nonsense on the public entries: either it works, or one clear sentence says why not."""

import copy
import json
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import musota
from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError
from musota.plan.profiles import find_profile, grid_profiles
from musota.plan.registry import find_experiment
from musota.workbook.evidence import read_rungs
from musota.workbook.records import read_probes

fixtures_too = [HealthCheck.function_scoped_fixture]
settings.register_profile(
    "garbage", max_examples=60, deadline=None, suppress_health_check=fixtures_too
)
settings.load_profile("garbage")

NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=5)
)
FIELDS = sorted(
    {name for e in musota.experiments.values() for name in e.fields()} - {"d_ff", "without"}
)
JSON = st.recursive(
    NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def _sentence(error):
    assert 10 < len(str(error)) < 1500 and "Traceback" not in str(error)


@given(name=st.sampled_from(FIELDS), value=NUMBERS, kind=st.sampled_from([*musota.experiments]))
@example("learning_rate", math.nan, "optimized")
@example("dropout", "0.1", "optimized")
@example("matrix_size", 10**12, "simplified")
def test_configurations(name, value, kind):
    try:
        changed = musota.experiments[kind].with_(**{name: value})
        assert changed.model.n_parameters > 0
        for profile in grid_profiles.values():
            musota.scaled(changed, profile)
    except MusotaError as error:
        _sentence(error)


@given(name=st.text(max_size=30))
@example("../../etc")
@example("\0")
@example("x" * 5000)
def test_names(name):
    for find in (find_experiment, find_profile, musota.load_corpus):
        try:
            find(name)
        except MusotaError as error:
            _sentence(error) if len(name) < 100 else None


@given(data=st.binary(max_size=200), name=st.sampled_from(["config.json", "metrics.jsonl"]))
def test_files_of_a_run(data, name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / name).write_bytes(data)
    with pytest.raises(MusotaError) as caught:
        musota.Run(folder)
    _sentence(caught.value)
    assert musota.load_runs(folder.parent) == []  # skipped and named; others would be shown
    (folder / name).unlink()


@given(config=JSON, weights=st.binary(max_size=300))
@example(config={"kind": []}, weights=b"")
@example(config=None, weights=b"")
def test_folders_of_models_and_descriptions_of_experiments(config, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    for data in (config, {"model": config, "training": {}}):
        with pytest.raises(MusotaError) as caught:
            musota.Experiment.from_dict(data)
        _sentence(caught.value)
    with pytest.raises(MusotaError) as caught:
        musota.load_model(folder)
    _sentence(caught.value)


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
@example([1], math.inf, None, None)
def test_generating(model, ids, temperature, top_k, top_p):
    prompt = torch.tensor([ids], dtype=torch.long)
    try:
        out = model.generate(prompt, 2, temperature=temperature, top_k=top_k, top_p=top_p)
        assert out.shape == (1, len(ids) + 2) and out.min() >= 0 and out.max() < 300
    except MusotaError as error:
        _sentence(error)


@given(
    tokens=st.lists(st.integers(-2, 302), max_size=30),
    stride=st.none() | st.integers(-2, 12),
    batch_size=st.integers(-2, 5),
)
def test_evaluating(model, tokens, stride, batch_size):
    try:
        tokens = torch.tensor(tokens, dtype=torch.int32)
        found = musota.evaluate(model, tokens, stride=stride, batch_size=batch_size)
        assert found["ppl"] >= 1
    except MusotaError as error:
        _sentence(error)


TRAINING = {
    "experiment": ["optimized"],
    "corpus": [None],
    "seed": ["a", None, 1.5, -1, 2**63],
    "micro_batch": [0, True, "4"],
    "stop_at": [math.nan, 0, None],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, bad in TRAINING.items() for v in bad])
def test_training(name, value, corpus, tmp_path):
    given = {"experiment": musota.experiments["optimized"], "corpus": corpus, name: value}
    with pytest.raises(MusotaError, match="train needs|must") as caught:
        musota.train(run_dir=tmp_path / "run", **given)
    _sentence(caught.value)
    assert not (tmp_path / "run").exists()


PARAMETERS = {
    "profile": [[], "quik"],
    "corpus": [3, None],
    "save_to": [3, "\0"],
    "seed": [10**30, True],
    "fresh": ["no", None],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, bad in PARAMETERS.items() for v in bad])
def test_notebook_parameters(name, value, text_folder):
    with pytest.raises(MusotaError) as caught:
        musota.Workbook(**{"profile": "tiny", "corpus": str(text_folder), name: value})
    _sentence(caught.value)


def test_a_model_that_is_nowhere(tmp_path):
    for name in (tmp_path / "nothing", "no-one/nothing", "a b/c\0"):
        with pytest.raises(MusotaError, match="There is no model"):
            musota.CausalLM.from_pretrained(name)


@pytest.mark.parametrize("name", ["tokens-*.bin", "tokenizer-*.json"])
def test_a_damaged_cache_is_made_anew(name, text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path))
    before = musota.load_corpus(str(text_folder), 400)
    for path in tmp_path.glob(name):
        data = bytearray(path.read_bytes())
        path.unlink()  # the tensors of `before` are mapped from it
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = musota.load_corpus(str(text_folder), 400)
    assert again.fingerprint == before.fingerprint
    assert again.tokenizer.backend.to_str() == before.tokenizer.backend.to_str()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"ppl": 3, "fingerprint": ""}', "\0"])
def test_damaged_rungs_are_named(content, tmp_path):
    (tmp_path / "ladder.json").write_text(content)
    with pytest.raises(MusotaError, match=r"ladder.json is damaged"):
        read_rungs(read_probes(tmp_path), "")


# --- what people have at hand ---


def test_text_lists_arrays_and_tensors_are_all_taken(model, text_folder):
    tokenizer = musota.load_corpus(str(text_folder), 300).tokenizer
    text = (text_folder / "valid.txt").read_text("utf-8")[:2000]
    ids, owned = tokenizer.encode(text), copy.copy(model)
    owned.tokenizer = tokenizer
    with warnings.catch_warnings(action="error"):
        forms = text, ids, ids.tolist(), torch.from_numpy(ids)
        assert len({musota.evaluate(owned, form)["loss"] for form in forms}) == 1
    assert torch.equal(owned.generate(text[:20], 3), owned.generate(tokenizer.encode(text[:20]), 3))
    assert tokenizer.decode(torch.from_numpy(ids)) == text
    with pytest.raises(MusotaError, match="without its tokenizer"):
        musota.evaluate(model, text)
    for wrong in (None, [1.5, 2.0], object(), [[1], [2, 3]], [True, False], {"a": 1}):
        with pytest.raises(MusotaError, match="whole-numbered token ids"):
            musota.evaluate(owned, wrong)
    other = TextTokenizer.train(["another text entirely, " * 99], 300)
    with pytest.warns(UserWarning, match="if another one made these, the PPL means nothing"):
        musota.evaluate(owned, other.encode(text))
