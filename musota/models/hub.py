"""Building, saving and loading models. Loading runs no code from a folder."""

import json
import os
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors.torch import load_file, save
from torch import Tensor

from musota.config import (
    DenseConfig,
    Experiment,
    ModelConfig,
    ModuleConfig,
    MuConfig,
    RedesignedConfig,
    describe,
)
from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError, blaming
from musota.files import as_path, write_bytes, write_json, write_whole

if TYPE_CHECKING:
    from musota.models.base import CausalLM

# The class of each configuration, by name: the modules that define them import this one.
ARCHITECTURES = {
    MuConfig: "musota.models.mu_sota:MuSota",
    DenseConfig: "musota.models.dense:DenseTransformer",
    RedesignedConfig: "musota.models.redesigned:Redesigned",
}
CARD = """---
{{ card_data }}
---
A small causal language model, trained for research: do not rely on the text it generates.
`model = musota.CausalLM.from_pretrained(folder)` loads it; `model.generate("A text", 50)[0]` gives
tokens, which `model.tokenizer.decode` turns into text.
"""


def build_model(config: ModelConfig) -> "CausalLM":
    """The model a config describes, freshly initialised from torch's random state. Raises
    MusotaError for a ModuleConfig, whose code is not part of this package."""
    if isinstance(config, ModuleConfig):
        advice = "build the module and fill it with Run.load_weights(module)"
        raise MusotaError(f"{config.source} is your own code: {advice}.")
    return pkgutil.resolve_name(ARCHITECTURES[type(config)])(config)


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


def load_model(folder: str | os.PathLike, device: str | torch.device = "cpu") -> "CausalLM":
    """The model that `save_model` wrote, with its tokenizer. Raises MusotaError if a file is
    missing or damaged, or, before a model is built, if the config has other sizes."""
    folder = as_path(folder)
    with blaming(f"The saved model in {folder}, when read,"):
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    return model.to(device).eval()


ABOUT = {"library_name": "musota", "license": "mit", "pipeline_tag": "text-generation"}


class HubModel(ModelHubMixin, **ABOUT, model_card_template=CARD):
    """`save_pretrained`, `push_to_hub` and `from_pretrained`, on huggingface_hub's mixin."""

    def save_pretrained(self, save_directory: str | os.PathLike, **options) -> str | None:
        return super().save_pretrained(as_path(save_directory), **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(save_directory, self.config, self.state_dict(), self.tokenizer)

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
