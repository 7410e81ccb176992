"""Ours against the literal version, measured on the machine at hand: `python -m musota bench`.

The literal models say `docs/model.md` word by word: a loop over the blocks with torch's own
attention, a table a layer, every logit at once, fp32. Tests hold the fast ones to them.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import psutil  # comes with accelerate
import torch
from torch import Tensor, nn

from musota.errors import MusotaError
from musota.models.literal import Literal
from musota.models.sharing import build_model
from musota.plan.architectures import DenseConfig, ModelConfig, MuConfig
from musota.training.machine import (
    about_machine,
    dtype_of,
    find_device,
    peak_memory,
    prepare_memory,
)

AGREEMENT_STEPS = 20
OURS, LITERAL, ALSO_DROPOUT = "ours", "literal", "literal, attention-weight dropout"


def training_step(
    config: ModelConfig, who: str, batch: int, device: torch.device, precision=torch.float32
) -> Callable[[], Tensor]:
    """A function that makes one optimizer step of ours or a literal version, whose weights are the
    same every time, on a fixed batch and returns its loss: ours with the trainer's fused AdamW, the
    literal one with torch's default, neither decaying weights."""
    torch.manual_seed(0)
    model, ours, half = build_model(config).to(device), who == OURS, precision == torch.float16
    if not ours:
        model = Literal(model, attention_dropout=config.dropout if who == ALSO_DROPOUT else 0.0)
    elif device.type == "cuda":
        model.compile_layers()
    fused = (ours and not half) or None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    generator = torch.Generator().manual_seed(0)
    shape = batch, config.max_seq_len + 1
    window = torch.randint(config.vocab_size, shape, generator=generator).to(device)

    def step() -> Tensor:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = model(window[:, :-1], window[:, 1:])[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


@contextmanager
def contender(config: ModelConfig, who: str, batch: int, device: torch.device):
    """One version of a model in a process of its own; gives what lets it make a training step, and
    returns its seconds and the bytes needed beyond the model so far, at their peak."""
    arguments = config, who, batch, device, torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), _prepare, arguments) as process:
        try:
            process.submit(_measure).result()  # the first is warm-up
            yield lambda: process.submit(_measure).result()
        except RuntimeError as error:  # torch's for too little memory, or the process is gone
            raise MusotaError(
                "A process that runs one version of the model ended by itself: its message stands "
                f"above; if there is none, it wanted more memory than this machine has ({error})."
            ) from None


def _prepare(config, who, batch, device, n_thread) -> None:
    """In a contender's process: the step and what memory held before the first."""
    global _prepared
    torch.set_num_threads(n_thread)
    if who == OURS:
        prepare_memory(device)
    precision = dtype_of(device) if who == OURS else torch.float32
    step = training_step(config, who, batch, device, precision)
    on_gpu = device.type == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    _prepared = step, device, held


def _measure() -> tuple[float, int]:
    step, device, held = _prepared
    return seconds_per_step(step, device), peak_memory(device) - held


def seconds_per_step(step: Callable, device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    repeats = 10 if on_gpu else 1  # a GPU's steps are too short for one
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - started) / repeats


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product, the best of 10."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds_per_step(lambda: a @ a, device) for _ in range(10))


def agreement(config: ModelConfig, batch: int, device: torch.device) -> float:
    """The largest relative difference of ours and the literal loss: 20 steps, fp32, no dropout."""
    config = dataclasses.replace(config, dropout=0.0)
    ours, literal = (training_step(config, who, batch, device) for who in (OURS, LITERAL))
    losses = torch.tensor([(ours(), literal()) for _ in range(AGREEMENT_STEPS)]).double()
    return float((losses[:, 0] / losses[:, 1] - 1).abs().max())


def run_bench(
    device: str | None = None,
    models: Mapping[str, ModelConfig] | None = None,
    batch: int | None = None,
    repeats: int = 7,
) -> dict:
    """Everything the bench measures, ready for JSON: ratios of speed are medians over rounds in
    which ours and a literal version take turns. Raises MusotaError for a device that is not there.
    """
    device = find_device(device)
    models = models or {"mu": MuConfig(), "dense": DenseConfig()}
    batch = batch or (32 if device.type == "cuda" else 8)
    rate = matmul_rate(device, dtype_of(device))
    rows, differences = [], {}
    for kind, config in models.items():
        for against in (LITERAL, ALSO_DROPOUT):
            print(f"{kind}: {repeats} rounds of ours and {against}")
            row = _compare(config, against, batch, device, repeats)
            done = row["tokens_per_s"] * config.flops_per_token
            rows.append({"model": kind, **row, "share_of_matmul_rate": done / rate})
        print(f"{kind}: the losses of {AGREEMENT_STEPS} steps, ours and literal")
        differences[kind] = agreement(config, 1, device)
    return {
        "batch": batch,
        "precision": str(dtype_of(device)).removeprefix("torch."),
        "matmul_flops": rate,
        **about_machine(device),
        "models": {kind: dataclasses.asdict(config) for kind, config in models.items()},
        "rows": rows,
        "agreement": differences,
    }


def _compare(config, against: str, batch: int, device, repeats: int) -> dict:
    # Two at a time: a third process presses on memory, which tells against the literal one.
    with (
        contender(config, OURS, batch, device) as ours,
        contender(config, against, batch, device) as theirs,
    ):
        # Each takes two steps running, the second counts: an idle process loses its caches.
        rounds = [[(step(), step())[1] for step in (ours, theirs)] for _ in range(repeats)]
    seconds, peaks = np.moveaxis(rounds, -1, 0)  # (round, ours and theirs)
    (own, their), ratios = np.median(seconds, 0), seconds[:, 1] / seconds[:, 0]
    memory, their_memory = peaks[-1].tolist()
    tokens = batch * config.max_seq_len
    return {
        "against": against,
        "tokens_per_s": tokens / own,
        "ms_per_step": 1e3 * own,
        "against_tokens_per_s": tokens / their,
        "tokens_per_s_ratio": np.median(ratios),
        "tokens_per_s_ratio_range": [ratios.min(), ratios.max()],
        "memory_bytes": memory,
        "against_memory_bytes": their_memory,
        "memory_ratio": memory / their_memory,
    }
