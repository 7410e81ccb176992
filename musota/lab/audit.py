"""Audit of any torch language model: leaks between tokens or sequences, and errors in the loss."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn.parameter import is_lazy

from musota.config import check_value
from musota.errors import MusotaError, blaming
from musota.lab.verdicts import Verdict
from musota.matching import match_transformer
from musota.models.base import CausalLM
from musota.models.module import NoDropout, checked_logits, copy_module, logits_of, module_config
from musota.training.device import prepare_memory

SYMBOLS = 16  # tokens drawn at random: so few that a leak is learned at once
STEPS, STEP_ROWS, STEP_TOKENS, RATE = 250, 8, 16, 2e-3  # of training on them
SURE = 5  # standard errors: a false alarm in millions
SHOWN = 24  # tokens of the figure
ROUNDING = 1e-5  # of a token's largest logit: a convolution by FFT spreads as much everywhere
AGAIN = 8  # repeated calls that must agree before a model is accused
MODES = {"in evaluation": False, "in training": True}
SHIFTS = ("not shifted", "yes", "shifted twice")  # targets against logits
FAULTS = {  # decisions that make a model dishonest, and what to do
    "looks ahead": "mask everything after a position in whatever mixes positions",
    "mixes rows": "normalise and mix within a sequence only",
    "keeps a state": "start every call afresh",
    "writes into its input": "let the model work on a copy: ids = ids.clone()",
    "better than chance": "check the mask, the shift of the targets, and the inputs of the loss",
    "not shifted": "compare logits[:, :-1] with ids[:, 1:]",
    "shifted twice": "shift the targets in one place only",
}
OTHERS = {"mixes rows": "one row moved another", "keeps a state": "an earlier call moved logits"}
WRITES = {"writes into its input": "targets that share memory with the ids change with them"}
Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Audit:
    """The result of `audit`."""

    findings: tuple[Verdict, ...]
    change: Tensor  # (T, T): of logits in column u after replacing token t (row); rounding is 0
    losses: tuple[float, ...]  # of each step on random tokens, in nats, without a constant factor
    symbols: int  # the number of tokens that those were drawn from

    @property
    def honest(self) -> bool:
        """Whether the perplexity can be trusted: no finding is a fault, and none is undecided."""
        return self.status == 0

    @property
    def status(self) -> int:
        """0 honest, 1 not honest, 2 a question could not be decided."""
        decisions = {finding.decision for finding in self.findings}
        return 1 if decisions & FAULTS.keys() else 2 * ("undecided" in decisions)

    def figure(self) -> Figure:
        """Which logits move with which token, and the loss on random tokens."""
        figure = Figure(figsize=(11.5, 5.2), layout="constrained", dpi=110)
        left, right = figure.subplots(1, 2)
        draw_changes(left, self.change.numpy())
        floor, losses = math.log(self.symbols), pd.Series(self.losses, dtype=float)
        right.plot(losses, color="0.75", linewidth=0.8, label="each step, on new random tokens")
        right.plot(losses.rolling(15, min_periods=1).mean(), color="#0072B2", label="mean of 15")
        right.axhline(floor, color="k", linestyle="--", label=f"ln {self.symbols} = {floor:.2f}")
        right.set(ylim=(0, None), xlabel="training step", ylabel="loss (nats/token)")
        right.set_title("Loss on random tokens: no honest cross-entropy falls below the line")
        right.legend(fontsize=8, loc="upper right")
        faults = ", ".join(one.decision for one in self.findings if one.decision in FAULTS)
        figure.suptitle(("No fault found", f"NOT honest: {faults}", "Not judged")[self.status])
        return figure

    def __str__(self) -> str:
        first = f"This model is {('honest', 'NOT honest', 'not judged')[self.status]}."
        return "\n- ".join([first, *map(str, self.findings)])


def draw_changes(axis: Axes, change: np.ndarray) -> None:
    """Draws which predictions (columns) change when a token (row) does; of later tokens in red."""
    kind = (change > 0).astype(int)
    kind += np.tril(kind, -1)  # 0 unchanged, 1 allowed, 2 of a later token
    axis.imshow(kind, cmap=ListedColormap(["white", "#0072B2", "#C62828"]), vmin=0, vmax=2)
    axis.set(xlabel="position of the prediction", ylabel="position of the replaced token")
    answer = "Yes" if (kind == 2).any() else "No"
    axis.set_title(f"Does a prediction depend on a later token (red)? {answer}")


@dataclass(frozen=True)
class Probe:
    """What a model showed in one mode, with its weights as they are or with noise."""

    settings: tuple[str, str]  # mode and weights
    tolerance: float  # smaller changes of logits are rounding
    ahead: list[int]  # how far ahead of logits that moved the replaced token was
    showed: set[str]  # of FAULTS, or "undecided" where even fresh copies differ


def audit(module: nn.Module, vocab_size: int, max_seq_len: int, loss: Loss | None = None) -> Audit:
    """The audit of a language model that maps (B, T) token ids to logits (B, T, V): a tensor, a
    tuple that begins with it, or an object with `.logits`.

    `loss(module, ids)` is the author's own training loss of (B, T) ids, a scalar in nats. Only
    copies of the module are called; random states stay. Raises MusotaError if a call fails.
    """
    if not isinstance(module, nn.Module):
        raise MusotaError(f"audit needs a torch.nn.Module, not {type(module).__name__}.")
    places = sorted({str(tensor.device) for tensor in (*module.parameters(), *module.buffers())})
    if len(places) > 1 or "meta" in places:
        raise MusotaError(f"The model is on {' and '.join(places)}: move it to one device first.")
    vocab_size = check_value("vocab_size", vocab_size, int, 2)
    max_seq_len = check_value("max_seq_len", max_seq_len, int)
    prepare_memory(device := next(module.parameters(), torch.empty(0)).device)
    with torch.random.fork_rng(), ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        draw = Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (2, max_seq_len), generator=draw).to(device)
        module = _complete(module, ids, vocab_size)
        noisy = _shaken(module, ids, draw)
        nets = {"as initialised": module, "with noise on its weights": noisy}
        probes = [_probe((m, w), nets[w], ids, vocab_size) for m in MODES for w in nets]
        shown = next((probe for probe in probes if probe.ahead), probes[1])
        (mode, weights), positions = shown.settings, range(min(SHOWN, max_seq_len))
        first = _first(module, ids, SHOWN, vocab_size)
        called = _relative(nets[weights], MODES[mode], first)
        change = _changes(called, first, vocab_size, positions)[:, :SHOWN]
        change *= change > shown.tolerance
        shown.ahead.extend(_ahead(change, positions))
        shown.showed.update(["looks ahead"] if shown.ahead else ())
        few = _first(module, ids, STEP_TOKENS, vocab_size)[:1].expand(STEP_ROWS, -1)
        about_loss, scale = _judge_loss(noisy, few, vocab_size, loss, draw)
        trains = all("keeps a state" not in probe.showed for probe in probes)
        symbols = min(SYMBOLS, vocab_size)
        losses = _on_random_tokens(module, few, vocab_size, loss, draw, scale) if trains else []
        findings = (
            _looks_ahead(probes),
            _judge("Do the logits of a sequence depend on others?", probes, OTHERS, ("no", "")),
            _random_floor(losses, symbols, about_loss.decision),
            about_loss,
            _judge("Does it change the token ids that it is given?", probes, WRITES, ("no", "")),
            _size(module, vocab_size, max_seq_len),
        )
    return Audit(findings, change, tuple(losses), symbols)


def causality_matrix(model: CausalLM, tokens: Tensor, positions: int = 32) -> Tensor:
    """(positions, positions): largest change of a logit in column u after replacing token t (row).
    A causal model has exact zeros wherever u < t."""
    ids = tokens[: min(positions, model.config.max_seq_len)].long().to(model.device)[None]
    called = partial(_fresh_logits, model, False)
    return _changes(called, ids, model.config.vocab_size, range(ids.shape[1]))


@torch.no_grad()
def _complete(module: nn.Module, ids: Tensor, vocab_size: int) -> nn.Module:
    """The module, or a copy with the parameters that it creates in its first call."""
    checked_logits(called := _copy(module, False), ids.clone(), vocab_size)
    before, after = (dict(each.named_parameters()).keys() for each in (module, called))
    creates = before != after or any(map(is_lazy, (*module.parameters(), *module.buffers())))
    return called.train(module.training) if creates else module


def _copy(module: nn.Module, training: bool) -> nn.Module:
    """A copy, without the dropout of recurrent layers, which cuDNN draws where no seed applies."""
    copied = copy_module(module).train(training)
    for part in (part for part in copied.modules() if isinstance(part, nn.RNNBase)):
        part.dropout = 0.0
    return copied


def _shaken(module: nn.Module, ids: Tensor, draw: Generator) -> nn.Module:
    """A copy with noise on every weight: an output layer initialised at zero would hide a leak."""
    for strength in (0.5, 0.05, 0.005):
        shaken = _copy(module, False)
        for weight in (w for w in shaken.parameters() if w.is_floating_point() or w.is_complex()):
            size = float(weight.detach().abs().float().square().mean().sqrt())
            size = size or (weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.1)
            weight.data += strength * size * torch.randn(weight.shape, generator=draw).to(weight)
        if _logits(shaken, ids.clone()).isfinite().all():
            return shaken
    return _copy(module, False)


@torch.no_grad()
def _logits(net: nn.Module, ids: Tensor) -> Tensor:
    """Logits, always from the same random state. The ids are a copy that the net may write into."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    with blaming("The model"), NoDropout():
        return logits_of(net, ids).float()


def _first(module: nn.Module, ids: Tensor, tokens: int, vocab_size: int) -> Tensor:
    """The first `tokens` of the ids; all of them for a model that takes one length only."""
    with suppress(MusotaError):
        checked_logits(_copy(module, True), ids[:, :tokens].clone(), vocab_size)
        return ids[:, :tokens]
    return ids


def _fresh_logits(module: nn.Module, training: bool, *batches: Tensor, sizes=1.0) -> Tensor:
    """Logits (÷ `sizes`) of the last of the batches that a fresh copy of a module is called on."""
    called = _copy(module, training)
    return [_logits(called, batch.clone()) for batch in batches][-1] / sizes


def _relative(module: nn.Module, training: bool, ids: Tensor) -> Callable[..., Tensor]:
    """`_fresh_logits` of batches, divided by each vocabulary token's largest logit on `ids`."""
    sizes = _fresh_logits(module, training, ids).abs().amax((0, 1)).clamp_min(1e-30)
    return partial(_fresh_logits, module, training, sizes=sizes)


def _changes(called: Callable, ids: Tensor, vocab_size: int, positions, n: int = 1) -> Tensor:
    """(positions, T): largest change of a logit by place; a row each `n` replaced tokens."""
    base, changes = called(ids), [torch.zeros(0, ids.shape[1])]
    others = (ids + (vocab_size // 2 | 1)) % vocab_size  # nearly all of the other half
    for t in positions:
        other = ids.clone()
        other[:, t : t + n] = others[:, t : t + n]
        moved = called(other).sub_(base).abs_()
        changes.append(moved.amax((0, 2))[None].cpu())
    return torch.cat(changes)


def _ahead(moved: Tensor, positions: Sequence[int]) -> list[int]:
    """How far ahead of the logits that moved the replaced token was, where it was."""
    return [positions[i] - u for i, u in moved.nonzero().tolist() if u < positions[i]]


def _probe(settings: tuple[str, str], module: nn.Module, ids: Tensor, vocab_size: int) -> Probe:
    training = MODES[settings[0]]
    given = ids.clone()  # its _version counts what is written, even values that it already has
    _logits(_copy(module, training), given)
    base = (called := _relative(module, training, ids))(ids)
    noise = float((called(ids) - base).abs().max())
    tolerance, last = ROUNDING + 4 * noise, ids.shape[1] - 1
    positions = [t for t in sorted({1, last // 3, last // 2, last}) if 0 < t <= last]
    change, rest = (_changes(called, ids, vocab_size, positions, n) for n in (1, last))
    ahead = _ahead(change > tolerance, positions)
    other = ids[1:].expand_as(ids)  # the first row is replaced by the second
    seen = {
        "looks ahead": ahead or _ahead(rest > tolerance, positions),
        "mixes rows": (called(other) - base)[1].abs().max() > tolerance,
        "keeps a state": (called(other, ids) - called(ids, ids)).abs().max() > tolerance,
    }
    if any((called(ids) - base).abs().max() > tolerance for _ in range(AGAIN * any(seen.values()))):
        noise, tolerance, ahead, seen = math.inf, math.inf, [], {}  # equal calls differ
    seen["undecided"] = noise > 1e-3
    seen["writes into its input"] = given._version or not given.equal(ids)
    return Probe(settings, tolerance, ahead, {name for name, holds in seen.items() if holds})


def _on_random_tokens(
    module: nn.Module, like: Tensor, vocab_size: int, loss: Loss | None, draw: Generator, scale
) -> list[float]:
    """The training loss (÷ `scale`) of each step, on new tokens drawn from SYMBOLS of them."""
    net, (rows, tokens) = _copy(module, True), like.shape
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    # Adam needs dense gradients and single precision, of which a master is the weight itself.
    masters = [w.detach().to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
    fused = not any(weight.is_complex() for weight in weights)
    optimizer = torch.optim.AdamW(masters, RATE, fused=fused) if weights else None
    shape = rows, tokens + (loss is None)  # whose targets end later
    some, losses = torch.randperm(vocab_size, generator=draw)[:SYMBOLS], []
    for _ in range(STEPS):
        ids = some[torch.randint(len(some), shape, generator=draw)].to(like.device)
        with blaming("The loss" if loss else "The model in training"):
            logits = None if loss else logits_of(net, ids[:, :-1].clone())
            value = loss(net, ids) if loss else F.cross_entropy(logits.float().mT, ids[:, 1:])
            losses.append(float(value.detach()) / scale)
            if optimizer and value.requires_grad and value.isfinite():
                value.backward()
                for weight, master in zip(weights, masters, strict=True):
                    grad, weight.grad = weight.grad, None
                    master.grad = None if grad is None else grad.to_dense().to(master.dtype)
                nn.utils.clip_grad_norm_(masters, 1.0)
                optimizer.step()
                for weight, master in zip(weights, masters, strict=True):
                    weight.data.copy_(master)
    return losses


@torch.no_grad()
def _judge_loss(
    net: nn.Module, ids: Tensor, vocab_size: int, loss: Loss | None, draw: Generator
) -> tuple[Verdict, float]:
    """The verdict on the author's loss, and by what it multiplies the cross-entropy."""
    question = "Is its loss the cross-entropy of the next token?"
    if loss is None:
        return _found(question, "not given", "the plain cross-entropy was used"), 1.0
    own, plain = [], [[], [], []]  # of four batches: its loss; the cross-entropy of each shift
    for _ in range(4):
        drawn = torch.randint(vocab_size, ids.shape, generator=draw).to(ids)
        with blaming("The loss"):
            own.append(float(loss(net, drawn.clone())))
        logits = _logits(net, drawn.clone()).mT  # (B, V, T)
        for shift, losses in enumerate(plain):
            length = max(1, drawn.shape[1] - shift)
            losses.append(float(F.cross_entropy(logits[..., :length], drawn[:, -length:])))
    ratios = np.array(own) / np.array(plain)  # of a shift: alike in every batch?
    spread, varies = (np.ptp(x, axis=1) / np.abs(np.mean(x, axis=1)) for x in (ratios, plain))
    best = int(spread.argmin())
    # Beyond rounding, and far less than the batches differ: else any loss would do.
    if own[0] < 0 or not spread[best] < min(1e-3, max(2e-6, varies[best] / 50)):
        seen = f"{own[0]:.4f} nats where cross-entropy is {plain[1][0]:.4f}"
        return _found(question, "another", f"{seen}: report the PPL of cross-entropy alone"), 1.0
    scale = float(ratios[best].mean())
    learned = ("to repeat each token", "the next token", "the token after the next")[best]
    return _found(question, SHIFTS[best], f"it learns {learned}, times {scale:.3g}"), scale


def _found(question: str, decision: str, reason: str, **value) -> Verdict:
    return Verdict(question, decision, reason=reason, next_step=FAULTS.get(decision, ""), **value)


def _judge(question: str, probes: Sequence[Probe], may_show: dict, otherwise: tuple) -> Verdict:
    """The first decision of `may_show` that a probe shows, in which settings; or `otherwise`."""
    for decision, reason in may_show.items():
        if showing := [probe.settings for probe in probes if decision in probe.showed]:
            shared = [names[0] for names in zip(*showing, strict=True) if len(set(names)) == 1]
            only = f" (only {', '.join(shared)})" if shared else ""
            return _found(question, decision, reason + only)
    return _found(question, *otherwise)


def _looks_ahead(probes: Sequence[Probe]) -> Verdict:
    question = "Does a prediction depend on later tokens?"
    seen = "the logits at t move when all the tokens after it are replaced"
    if ahead := [distance for probe in probes for distance in probe.ahead]:
        seen = f"the logits at t read token t+{min(ahead)}"
        seen += f", and up to t+{max(ahead)}" * (max(ahead) > min(ahead))
    may_show = {"looks ahead": seen, "undecided": "equal calls give different logits"}
    return _judge(question, probes, may_show, ("no", f"none moved in {len(probes)} settings"))


def _random_floor(losses: Sequence[float], symbols: int, about_loss: str) -> Verdict:
    """Only a model that reads in advance has a mean cross-entropy below ln(symbols) here."""
    question, floor = f"Does it predict random tokens better than ln {symbols}?", math.log(symbols)
    last = np.asarray(losses[-max(2, len(losses) // 4) :], float)
    if len(last) < 2 or not np.isfinite(last).all():
        return _found(question, "undecided", "the loss is no number, or could not be trained")
    mean, error = float(last.mean()), float(last.std(ddof=1)) / math.sqrt(len(last))
    decision = "better than chance" if mean < floor - SURE * error else "no"
    reason = f"± {error:.3f}, ln {symbols} is {floor:.3f}; after {len(losses)} training steps"
    if decision != "no" and about_loss == "another":
        decision, reason = "undecided", f"{reason}; chance is unknown for a loss with other terms"
    return _found(question, decision, reason, value=mean, unit="nats")


def _size(module: nn.Module, vocab_size: int, max_seq_len: int) -> Verdict:
    """Parameters by part, FLOPs, memory, and the parameter-matched transformer."""
    question, parts = "How large is it?", Counter()
    for name, weight in module.named_parameters():
        parts[name.partition(".")[0]] += weight.numel()
    if not parts:
        return _found(question, "measured", "it has no parameters")
    size = module_config(_copy(module, False), vocab_size, max_seq_len)
    shares = ", ".join(f"{n} {c / size.n_parameters:.0%}" for n, c in parts.most_common(5))
    other = match_transformer(size)
    reason = (
        f"{shares}; {size.flops_per_token / 1e6:.1f} MFLOP per token; "
        f"{16 * size.n_parameters / 1e6:,.0f} MB for weights, gradients and Adam; its "
        f"parameter-matched transformer has d_model {other.d_model}, {other.n_head} heads "
        f"and {other.n_layer} layer{'s' * (other.n_layer > 1)}: {other.n_parameters:,} parameters"
    )
    return _found(question, "measured", reason, value=size.n_parameters, unit="parameters")
