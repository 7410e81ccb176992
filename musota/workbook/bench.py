"""Measures our training step against the reference model, on the machine at hand."""

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from time import perf_counter

import pandas as pd
import torch
from torch import nn

from musota.config import DenseConfig, ModelConfig, MuConfig
from musota.errors import MusotaError
from musota.models.hub import build_model
from musota.models.reference import ReferenceModel
from musota.training.device import autocast_on, find_device, peak_memory, prepare_memory

MODELS = {"MU-SOTA": MuConfig(), "transformer": DenseConfig()}


def measure_step(
    config: ModelConfig, fast: bool, batch: int, device: torch.device, repeats: int
) -> tuple[float, int]:
    """Seconds of a training step of the fast or the reference model (the median) and the peak
    memory in bytes, on a fixed batch, from the same weights. The peak is that of the process."""
    prepare_memory(device)
    torch.manual_seed(0)
    model = build_model(config).to(device)
    if not fast:
        model = ReferenceModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=fast or None)
    window = torch.randint(config.vocab_size, (batch, config.max_seq_len + 1)).to(device)
    seconds = []
    for _ in range(1 + repeats):
        started = perf_counter()
        with autocast_on(device, None if fast else "no"):
            loss = model(window[:, :-1], window[:, 1:])[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
        seconds.append(perf_counter() - started)
    return median(seconds[1:]), peak_memory(device)  # the first is a warm-up


def run_bench(
    device: str | None = None,
    models: Mapping[str, ModelConfig] = MODELS,
    batch: int = 8,
    repeats: int = 7,
) -> pd.DataFrame:
    """One row a model: speed and memory of a training step, fast and reference. Raises MusotaError
    for a device that is not there and for a process that ends by itself."""
    device, rows = find_device(device), {}
    for name, config in models.items():
        measured = []
        for fast in (True, False):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                try:
                    job = pool.submit(measure_step, config, fast, batch, device, repeats)
                    measured.append(job.result())
                except RuntimeError as error:  # torch's for too little memory, or it is gone
                    ended = f"A process of the bench ended, possibly out of memory ({error})"
                    raise MusotaError(ended) from None
        (seconds, peak), (reference_seconds, reference_peak) = measured
        tokens = batch * config.max_seq_len
        rows[name] = {
            "tokens/s": tokens / seconds,
            "reference tokens/s": tokens / reference_seconds,
            "ratio": reference_seconds / seconds,
            "MiB": peak / 2**20,
            "reference MiB": reference_peak / 2**20,
        }
    return pd.DataFrame(rows).T.rename_axis("model")
