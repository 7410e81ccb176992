"""Saving and loading models; loading runs no code."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError
from musota.files import write_json, write_whole
from musota.models.base import CausalLM, build_model
from musota.plan.config import Experiment, ModelConfig, TrainConfig


def save_model(
    folder: str | os.PathLike,
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer: TextTokenizer | None = None,
) -> None:
    """Write model.safetensors, config.json and tokenizer.json, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save(weights)
    write_whole(folder / "model.safetensors", lambda path: path.write_bytes(data))
    write_json(folder / "config.json", Experiment(config, TrainConfig()).to_dict()["model"])
    if tokenizer:
        write_whole(folder / "tokenizer.json", tokenizer.save)


def load_model(folder: str | os.PathLike, device: str = "cpu") -> CausalLM:
    """A model written by `save_model`, its tokenizer included. Runs no code from the folder.

    Raises MusotaError if a file is missing or damaged, or if the weights are not as many as the
    config says; that is seen before any memory is taken.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = Experiment.from_dict({"model": described, "training": {}}).model
        with safe_open(folder / "model.safetensors", "pt") as file:
            held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        if held != config.n_parameters:
            raise MusotaError(
                f"The model in {folder} is refused: its config.json describes "
                f"{config.n_parameters:,} parameters, its weights are {held:,}."
            )
        model = build_model(config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        if (folder / "tokenizer.json").exists():
            model.tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    except MusotaError:
        raise
    except FileNotFoundError as error:
        missing = error.filename or "model.safetensors"
        raise MusotaError(f"No saved model in {folder}: {missing} is missing.") from None
    except Exception as error:  # safetensors and torch raise types of their own
        raise MusotaError(f"The saved model in {folder} cannot be read: {error}") from None
    return model.to(device).eval()
