"""Building, saving and loading models. Loading runs no code from a folder."""

import hashlib
import json
import os
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors.torch import load_file, save
from torch import Tensor, nn

from musota.config import Experiment, ModelConfig, ModuleConfig, describe
from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError, blaming
from musota.files import as_path, nan_for_null, write_bytes, write_json, write_whole

if TYPE_CHECKING:
    from musota.models.base import CausalLM

CARD = (Path(__file__).parent / "card.md.j2").read_text("utf-8")  # of a shared model
MEASURED = "measured.json"  # the file that holds `CausalLM.measured`


def build_model(config: ModelConfig) -> "CausalLM":
    """The model a config describes, freshly initialised from torch's random state. Raises
    MusotaError for a ModuleConfig, whose code is not part of this package."""
    if isinstance(config, ModuleConfig):
        advice = "build the module and fill it with Run.load_weights(module)"
        raise MusotaError(f"{config.source} is your own code: {advice}.")
    if not hasattr(config, "built_by"):
        wanted = "the configuration of a model, such as experiment.model"
        raise MusotaError(f"build_model needs {wanted}, not {config!r:.60}.")
    return pkgutil.resolve_name(config.built_by)(config)


def save_model(
    folder: str | os.PathLike,
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer: TextTokenizer | None = None,
) -> None:
    """Write model.safetensors, config.json and tokenizer.json, each whole or not at all."""
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "model.safetensors", save(weights))
    write_json(folder / "config.json", describe(config))
    if tokenizer:
        write_whole(folder / "tokenizer.json", tokenizer.save)
    else:
        (folder / "tokenizer.json").unlink(missing_ok=True)  # of an earlier model


def weights_sha256(model: nn.Module) -> str:
    """A hash of all weights and their names: equal for bit-identical models only."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)  # bf16 has no numpy
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def load_model(folder: str | os.PathLike, device: str | torch.device = "cpu") -> "CausalLM":
    """The model that `save_pretrained` wrote, with its tokenizer. Raises MusotaError if a file is
    missing or damaged, or, before a model is built, if the config has other sizes."""
    folder = as_path(folder)
    with blaming(f"The saved model in {folder}, when read,"):
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "experiment" in described:
            raise MusotaError(f"{folder} is a run: load its model with Run(folder).load_model().")
        config = Experiment.from_dict({"model": described, "training": {}}).model
        weights = load_file(folder / "model.safetensors")
        held = sum(weight.numel() for weight in weights.values())
        if held != config.n_parameters and not isinstance(config, ModuleConfig):
            wanted = f"{config.n_parameters:,} of its config.json"
            raise MusotaError(f"{folder} holds {held:,} weights, not the {wanted}.")
        model = build_model(config)
        model.load_state_dict(weights)
        if (folder / "tokenizer.json").exists():
            model.tokenizer = TextTokenizer.load(folder / "tokenizer.json")
        if (folder / MEASURED).exists():
            model.measured = dict(nan_for_null(json.loads((folder / MEASURED).read_text("utf-8"))))
        return model.to(device).eval()


ABOUT = {"library_name": "musota", "license": "mit", "pipeline_tag": "text-generation"}


class HubModel(ModelHubMixin, **ABOUT, model_card_template=CARD):
    """`save_pretrained`, `push_to_hub` and `from_pretrained`, on huggingface_hub's mixin."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, audit=None, model_card_kwargs=None, **options
    ) -> str | None:
        """Write the model and its card into a folder. The card states what the run measured, on
        which text and split, and the answer of `audit`: `musota.audit`, or what that returned."""
        card = as_path(save_directory) / "README.md"
        if card.exists() and b"library_name: musota" in card.read_bytes():
            card.unlink()  # it may be of other weights
        options["model_card_kwargs"] = model_card_kwargs or {"audit": audit}
        return super().save_pretrained(card.parent, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(save_directory, self.config, self.state_dict(), self.tokenizer)
        write_json(save_directory / MEASURED, self.measured)

    def push_to_hub(self, repo_id: str, audit=None, model_card_kwargs=None, **options) -> str:
        """Put the model and its card, as in `save_pretrained`, on the Hugging Face hub; `options`
        are those of huggingface_hub (private, token, branch, …). Returns the commit's address.
        Raises MusotaError if the hub refuses or does not answer."""
        options["model_card_kwargs"] = model_card_kwargs or {"audit": audit}
        with blaming(f"Pushing to {repo_id} (log in first with `hf auth login`)"):
            return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, audit=None, **options) -> ModelCard:
        same = self.measured.get("best_weights_sha256") == weights_sha256(self)  # as measured
        with blaming(f"The model card, made from {MEASURED} and the audit,"):
            if audit and not hasattr(audit, "honest"):
                audit = audit(self, self.config.vocab_size, self.config.max_seq_len)
            filled = {"run": self.measured if same else None, "audit": audit}
            return super().generate_model_card(model=self, **filled, **options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **download) -> "CausalLM":
        """The model in a folder, or in a repository of the Hugging Face hub (`download` is passed
        to its snapshot_download: revision, token, …). Raises MusotaError where there is none."""
        if os.path.isdir(as_path(name)):
            return load_model(name)
        wanted = ["*.json", "model.safetensors"]
        try:
            folder = snapshot_download(str(name), allow_patterns=wanted, etag_timeout=5, **download)
        except Exception as error:  # the hub's client raises many types
            why = f"it is not a folder, and not on the Hugging Face hub ({type(error).__name__})"
            raise MusotaError(f"There is no model {name}: {why}.") from None
        return load_model(folder)
