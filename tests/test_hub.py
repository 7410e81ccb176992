"""Sharing a model: what its card states, offline loading, uploading (with a mocked API)."""

import json
import math
import shutil

import huggingface_hub
import pytest
import torch
from conftest import EXPERIMENT

import musota
from musota.errors import MusotaError
from musota.models.hub import weights_sha256


def test_the_card_states_what_was_measured_and_the_answer_of_the_audit(finished, tmp_path):
    model, summary, corpus = finished.load_model(), finished.summary, finished.config["corpus"]
    model.save_pretrained(tmp_path / "model", audit=musota.audit)
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert huggingface_hub.ModelCard(card).data.license == "mit"
    assert "# finished\n" in card and f"{EXPERIMENT.model.n_parameters:,} parameters" in card
    assert f"Text: {corpus['name']} ({corpus['source']}), {corpus['tokens']['train']:,}\n" in card
    for split, p in (("valid", ""), ("test", "test_")):
        ppl, accuracy, bits = (summary[p + key] for key in ("ppl", "accuracy", "bits_per_byte"))
        row = f"| {split} | {corpus['tokens'][split]:,} | {ppl:.1f} | {accuracy:.1%} | "
        assert f"\n{row}{round(bits, 3)} |\n" in card
    assert f"sha256 `{weights_sha256(model)}`" in card and "seed 0" in card
    assert "This model is honest.\n- Does a prediction depend" in card
    # A model that is saved and loaded again knows its run; a card is never of other weights.
    again = musota.CausalLM.from_pretrained(tmp_path / "model")
    assert again.measured["weights_sha256"] == summary["weights_sha256"]
    assert again.measured["experiment"] == EXPERIMENT.to_dict() and "command" not in again.measured
    again.save_pretrained(tmp_path / "model")
    unaudited = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert card.partition("## Audit")[0] in unaudited and "Not audited" in unaudited
    with torch.no_grad():
        again.embedding.weight[0, 0] += 1
    again.save_pretrained(tmp_path / "model")
    changed = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "Nothing was measured with these weights." in changed and "PPL" not in changed


def test_a_dishonest_model_gets_a_card_that_says_so_and_no_other_readme_is_replaced(tmp_path):
    class Peeking(type(musota.build_model(EXPERIMENT.model))):
        def hidden_states(self, input_ids):
            return super().hidden_states(input_ids.flip(1)).flip(1)

    torch.manual_seed(0)
    found = musota.audit(Peeking(EXPERIMENT.model), 512, 24)
    musota.build_model(EXPERIMENT.model).save_pretrained(tmp_path / "a", audit=found)
    assert "This model is NOT honest." in (tmp_path / "a" / "README.md").read_text("utf-8")
    (tmp_path / "README.md").write_text("# My project")
    musota.build_model(EXPERIMENT.model).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project"


def test_pushing_uploads_the_model_with_its_card(finished, tmp_path, monkeypatch):
    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **how):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = finished.load_model()
    audit = musota.audit(model, 512, 24)
    address = model.push_to_hub("me/small", audit=audit, token="secret", private=True)
    assert address == "https://huggingface.co/me/small/commit/1"
    uploaded = {path.name for path in (tmp_path / "me" / "small").iterdir()}
    weights = {"config.json", "model.safetensors", "tokenizer.json", "measured.json"}
    assert uploaded == {*weights, "README.md"}
    card = (tmp_path / "me" / "small" / "README.md").read_text("utf-8")
    assert f"| {finished.summary['ppl']:.1f} |" in card and "This model is honest." in card
    how = {"push_to_hub": True, "repo_id": "me/other", "token": "secret", "private": True}
    model.save_pretrained(tmp_path / "here", **how)
    assert (tmp_path / "me" / "other" / "model.safetensors").exists()


def test_a_push_that_fails_gets_one_sentence():
    model = musota.build_model(EXPERIMENT.model)
    for repo_id, kind in (("me/small", "OfflineModeIsEnabled"), ("a b/c", "HFValidationError")):
        with pytest.raises(MusotaError, match=f"Pushing to {repo_id} .log in .*raised {kind}: "):
            model.push_to_hub(repo_id)


def test_a_model_of_the_hub_loads_offline_from_its_cache(finished, tmp_path):
    place, commit = tmp_path / "models--me--small", "0" * 40
    model = finished.load_model()
    model.save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    loaded = musota.CausalLM.from_pretrained("me/small", cache_dir=tmp_path)
    assert weights_sha256(loaded) == weights_sha256(model)
    assert loaded.measured["ppl"] == finished.summary["ppl"]
    loaded.measured["test_ppl"] = math.inf  # null in the file
    loaded.save_pretrained(tmp_path / "again")
    musota.load_model(tmp_path / "again").save_pretrained(tmp_path / "third")
    assert "| test |" in (tmp_path / "third" / "README.md").read_text("utf-8")
    with pytest.raises(MusotaError, match="is a run: load its model with Run"):
        musota.load_model(finished.path)
    assert loaded.score_text("def a(b):")["token"].tolist()


def test_a_damaged_record_and_a_wrong_audit_are_named(finished, tmp_path):
    model = finished.load_model()
    model.save_pretrained(tmp_path)
    for damaged, message in (("[1]", "The saved model in"), ("{", "raised JSONDecodeError")):
        (tmp_path / "measured.json").write_text(damaged)
        with pytest.raises(MusotaError, match=message):
            musota.load_model(tmp_path)
    known = {"best_weights_sha256": weights_sha256(model), "corpus": None}
    (tmp_path / "measured.json").write_text(json.dumps(known))
    with pytest.raises(MusotaError, match="The model card, made from measured.json .* raised"):
        musota.load_model(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(MusotaError, match="raised TypeError: 'bool' object is not callable"):
        model.save_pretrained(tmp_path, audit=True)
