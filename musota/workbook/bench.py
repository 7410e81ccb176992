"""Measures our training step against the reference implementation, on the machine at hand.

The reference (`musota/models/reference.py`) is docs/model.md word by word: a loop over the blocks
with torch's own attention, every logit at once, float32. Tests hold the fast models to it.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from musota.config import DenseConfig, ModelConfig, MuConfig
from musota.errors import MusotaError
from musota.models.hub import build_model
from musota.models.reference import ReferenceModel
from musota.training.device import autocast_on, find_device, peak_memory, prepare_memory

MODELS = {"MU-SOTA": MuConfig(), "transformer": DenseConfig()}


def training_step(
    config: ModelConfig, fast: bool, batch: int, device: torch.device
) -> Callable[[], Tensor]:
    """A function that takes one optimizer step of the fast or the reference model on a fixed batch
    and returns the loss. Both start with the same weights."""
    torch.manual_seed(0)
    model = build_model(config).to(device)
    if not fast:
        model = ReferenceModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=fast or None)
    shape = batch, config.max_seq_len + 1
    window = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    window = window.to(device)

    def step() -> Tensor:
        with autocast_on(device, None if fast else "no"):
            loss = model(window[:, :-1], window[:, 1:])[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _measure(config, fast: bool, batch: int, device: torch.device, threads: int) -> tuple:
    """In a process of its own: (seconds of a step, peak memory in bytes)."""
    global _step
    if "_step" not in globals():
        torch.set_num_threads(threads)
        prepare_memory(device)
        _step = training_step(config, fast, batch, device)
        float(_step())  # warm-up
    started = perf_counter()
    float(_step())  # waits for the device
    return perf_counter() - started, peak_memory(device)


def run_bench(
    device: str | None = None,
    models: Mapping[str, ModelConfig] = MODELS,
    batch: int = 8,
    repeats: int = 7,
) -> pd.DataFrame:
    """One row a model: speed and memory of a training step, fast and reference, as medians over
    rounds in which the two take turns, each in its own process. Raises MusotaError for a device
    that is not there and for a process that ends by itself."""
    device, spawn, rows = find_device(device), get_context("spawn"), []
    for name, config in models.items():
        with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as theirs:
            how = batch, device, torch.get_num_threads()
            fast = partial(ours.submit, _measure, config, True, *how)
            reference = partial(theirs.submit, _measure, config, False, *how)
            try:
                rounds = [[fast().result(), reference().result()] for _ in range(repeats)]
            except RuntimeError as error:  # torch's for too little memory, or the process is gone
                raise MusotaError(
                    f"A process of the bench ended, out of memory? ({error})"
                ) from None
        seconds, peaks = np.moveaxis(np.array(rounds), -1, 0)  # each (round, fast and reference)
        speed, reference_speed = batch * config.max_seq_len / np.median(seconds, 0)
        row = {"model": name, "tokens/s": speed, "reference tokens/s": reference_speed}
        row |= {"ratio": np.median(seconds[:, 1] / seconds[:, 0]), "MiB": peaks[-1, 0] / 2**20}
        row["reference MiB"] = peaks[-1, 1] / 2**20
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")
