"""Ours against the literal version, measured on the machine at hand: `python -m musota bench`.

The literal models say DESIGN section 2 word by word: a loop over the blocks with torch's own
attention, a table a layer, every logit at once, fp32. Tests hold the fast ones to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from statistics import median

import torch
from torch import Tensor, nn

from musota.errors import MusotaError
from musota.models.base import CausalLM, build_model
from musota.models.literal import Literal
from musota.plan.config import DenseConfig, ModelConfig, MuConfig
from musota.training.machine import about_machine, peak_memory, precision_for_device, prepare_memory

SCALING = {
    "batch": (1, 4, 8, 32),
    "max_seq_len": (128, 256, 512, 1024),
    "vocab_size": (8_192, 16_384, 32_768, 50_000),
    "n_layer": (3, 6, 12, 24),
    "n_block": (4, 8, 16, 32),
}


AGREEMENT_STEPS = 20


def training_step(
    model: nn.Module, batch: int, device: torch.device, precision: torch.dtype = torch.float32
) -> Callable[[], Tensor]:
    """A function that makes one optimizer step on a fixed batch and returns its loss.

    Ours with the trainer's fused AdamW, the literal one with torch's default; neither decays
    weights, so that the two do the same mathematics.
    """
    ours, half = isinstance(model, CausalLM), precision == torch.float16
    vocab_size, length = model.config.vocab_size, model.config.max_seq_len
    if ours and device.type == "cuda":
        model.compile_body()
    fused = {"fused": True} if ours and not half else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, **fused)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(vocab_size, (batch, length + 1), generator=generator).to(device)

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


class Contender:
    """One version of a model in a process of its own, which makes training steps when asked."""

    def __init__(self, config: ModelConfig, who: str, batch: int, device: torch.device):
        self.who = who
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = theirs, config, who, batch, device, torch.get_num_threads()
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # else the end of the process would not end the pipe
        self.ask("step")  # the first is warm-up

    def ask(self, what: str):
        """`step`: its seconds · `memory`: the bytes steps need beyond the model, at their peak ·
        `profile`: the share of a step's time by kernel."""
        try:
            self.pipe.send(what)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise MusotaError(
                f"The process that runs the {self.who} version ended by itself: its message stands "
                "above; if there is none, it wanted more memory than this machine has."
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.join()


def _serve(pipe, config, who, batch, device, n_thread) -> None:
    torch.set_num_threads(n_thread)
    if who == "ours" and device.type == "cpu":
        prepare_memory(device)
    precision = _precision(device) if who == "ours" else torch.float32
    step = training_step(_build(config, who, device), batch, device, precision)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
    else:
        import psutil  # comes with accelerate

        before = psutil.Process().memory_info().rss
    answers = {
        "step": lambda: seconds_per_step(step, device),
        "memory": lambda: peak_memory(device) - before,
        "profile": lambda: where_time_goes(step, device),
    }
    while True:
        pipe.send(answers[pipe.recv()]())


def _precision(device: torch.device) -> torch.dtype:
    """What the trainer computes in on this device."""
    names = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return names[precision_for_device()] if device.type == "cuda" else torch.float32


def seconds_per_step(step: Callable, device: torch.device) -> float:
    repeats = 10 if device.type == "cuda" else 1  # a GPU's steps are too short for one
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product, the best of 10."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds_per_step(lambda: a @ a, device) for _ in range(10))


def _contenders(config: ModelConfig) -> dict[str, Callable[[CausalLM], nn.Module]]:
    return {
        "ours": lambda model: model,
        "literal": Literal,
        "literal, attention-weight dropout": lambda model: Literal(model, config.dropout),
    }


def _build(config: ModelConfig, who: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return _contenders(config)[who](build_model(config).to(device))


def agreement(config: ModelConfig, batch: int, device: torch.device) -> float:
    """The largest relative difference of ours and the literal loss: 20 steps, fp32, no dropout."""
    config = dataclasses.replace(config, dropout=0.0)
    ours = _build(config, "ours", device)
    steps = [training_step(model, batch, device) for model in (ours, Literal(ours))]
    losses = torch.stack(
        [torch.stack([step() for step in steps]) for _ in range(AGREEMENT_STEPS)]
    ).double()
    return float((losses[:, 0] / losses[:, 1] - 1).abs().max())


def where_time_goes(step: Callable, device: torch.device, largest: int = 8) -> dict[str, float]:
    """Share of a step's own time by kernel, the largest first and the rest together."""
    step()
    with torch.profiler.profile() as profile:
        step()
        _wait(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, key) for event in profile.key_averages()}
    total = sum(times.values())
    shares = sorted(((value / total, name) for name, value in times.items()), reverse=True)
    shown = {name: share for share, name in shares[:largest]}
    return shown | {"everything else": 1 - sum(shown.values())}


def scaling_points(config: ModelConfig, batch: int, axes: Mapping[str, Sequence[int]]):
    """(axis, value, config, batch) of every point; longer sequences come in smaller batches."""
    for axis, values in axes.items():
        for value in values:
            if axis == "batch":
                yield axis, value, config, value
            elif hasattr(config, axis):
                changed = dataclasses.replace(config, **{axis: value})
                tokens = batch * config.max_seq_len
                yield axis, value, changed, max(1, round(tokens / changed.max_seq_len))


def run_bench(
    device: str | None = None,
    models: Mapping[str, ModelConfig] | None = None,
    batch: int | None = None,
    repeats: int = 7,
    scaling: Mapping[str, Sequence[int]] = SCALING,
    say: Callable[[str], None] = print,
) -> dict:
    """Everything the bench measures, ready for JSON.

    `rows` compare ours with each literal version: the ratios of speed are medians over rounds in
    which both are timed, `memory_ratio` is ours ÷ literal. `scaling` compares the time a token
    takes with the arithmetic's prediction, each relative to the reference shape. Raises MusotaError
    for a device that is not there.
    """
    device = _device(device)
    models = models or {"mu": MuConfig(), "dense": DenseConfig()}
    batch = batch or (32 if device.type == "cuda" else 8)
    rate = matmul_rate(device, _precision(device))
    result = {
        "batch": batch,
        "precision": str(_precision(device)).removeprefix("torch."),
        "matmul_flops": rate,
        **about_machine(device),
        "models": {kind: dataclasses.asdict(config) for kind, config in models.items()},
        "rows": [],
        "agreement": {},
        "profile": {},
        "scaling": [],
    }
    for kind, config in models.items():
        tokens = batch * config.max_seq_len
        for against in list(_contenders(config))[1:]:
            say(f"{kind}: {repeats} rounds of ours and {against}")
            # Two at a time: a third process presses on memory, which tells against the literal one.
            with (
                Contender(config, "ours", batch, device) as ours,
                Contender(config, against, batch, device) as theirs,
            ):
                # Each takes two steps running, the second counts: an idle process loses its caches.
                rounds = [
                    [[one.ask("step"), one.ask("step")][1] for one in (ours, theirs)]
                    for _ in range(repeats)
                ]
                memory = ours.ask("memory"), theirs.ask("memory")
                result["profile"][kind] = ours.ask("profile")
            seconds = [median(column) for column in zip(*rounds, strict=True)]
            ratios = sorted(slow / fast for fast, slow in rounds)
            result["rows"].append(
                {
                    "model": kind,
                    "against": against,
                    "tokens_per_s": tokens / seconds[0],
                    "ms_per_step": 1e3 * seconds[0],
                    "against_tokens_per_s": tokens / seconds[1],
                    "against_ms_per_step": 1e3 * seconds[1],
                    "tokens_per_s_ratio": median(ratios),
                    "tokens_per_s_ratio_range": [ratios[0], ratios[-1]],
                    "memory_bytes": memory[0],
                    "against_memory_bytes": memory[1],
                    "memory_ratio": memory[0] / memory[1],
                    "share_of_matmul_rate": tokens / seconds[0] * config.flops_per_token / rate,
                }
            )
        say(f"{kind}: the losses of {AGREEMENT_STEPS} steps, ours and literal")
        result["agreement"][kind] = agreement(config, 1, device)
        result["scaling"] += _scaling(kind, config, batch, device, scaling, say)
    return result


def _scaling(kind, config, batch, device, axes, say) -> list[dict]:
    points = []
    with Contender(config, "ours", batch, device) as reference:
        for axis, value, changed, changed_batch in scaling_points(config, batch, axes):
            say(f"{kind}: {axis} {value}")
            same = (changed, changed_batch) == (config, batch)  # against itself: shows the noise
            with (
                contextlib.nullcontext(reference)
                if same
                else Contender(changed, "ours", changed_batch, device)
            ) as here:
                rounds = [(reference.ask("step"), here.ask("step")) for _ in range(3)]
            tokens = changed_batch * changed.max_seq_len
            ratio = median(here / at_reference for at_reference, here in rounds)
            points.append(
                {
                    "model": kind,
                    "axis": axis,
                    "value": value,
                    "batch": changed_batch,
                    "tokens_per_s": tokens / median(here for _, here in rounds),
                    "time_per_token": ratio * batch * config.max_seq_len / tokens,
                    "arithmetic": changed.flops_per_token / config.flops_per_token,
                }
            )
    return points


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.suppress(RuntimeError):  # torch's sentence for a bad name is a page long
        device = torch.device(name)
        if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
            return device
    raise MusotaError(f"There is no device {name!r} here: use cpu, or cuda where there is a GPU.")
