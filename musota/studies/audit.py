"""Does a model look ahead, and is its loss what it seems? Asked of any torch module."""

import copy
import pkgutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from musota.errors import MusotaError, blaming
from musota.models.base import CausalLM
from musota.plan.architectures import DenseConfig
from musota.plan.own import checked_logits, logits_of, size_of
from musota.plan.profiles import match_width
from musota.rules import audit as rules
from musota.rules.findings import Finding
from musota.training.machine import prepare_memory

SYMBOLS = 16  # of the vocabulary are drawn at random: so few that a leak is learned at once
STEPS, STEP_ROWS, STEP_TOKENS, RATE = 250, 8, 16, 2e-3  # of training on them
SHOWN = 24  # tokens of the picture
ROUNDING = 1e-5  # of the largest logit: what a convolution by FFT spreads everywhere
MODES = {"in evaluation": False, "in training": True}
Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Audit:
    """What `audit` found."""

    findings: tuple[Finding, ...]
    change: Tensor  # (T, T): of logits in column u after replacing token t (row); rounding is 0
    losses: tuple[float, ...]  # of each step on random tokens, in nats
    symbols: int  # from which those were drawn

    @property
    def honest(self) -> bool:
        """Whether nothing was found that reaches it but must not, nor a wrong target."""
        return not any(finding.verdict in rules.GUILTY for finding in self.findings)

    def figure(self):
        """Which token moves what, and the loss on random tokens, as a matplotlib figure."""
        return pkgutil.resolve_name("musota.workbook.pictures:audited")(self)  # a room above

    def __str__(self) -> str:
        said = "honest" if self.honest else "NOT honest"
        return "\n".join([f"This model is {said}.", *(f"- {f.short}" for f in self.findings)])


def audit(
    module: nn.Module, vocab_size: int, max_seq_len: int, loss: Loss | None = None, *, seed: int = 0
) -> Audit:
    """Five questions to any language model that maps (B, T) token ids to logits (B, T, V): a
    tensor, a tuple that begins with it, or an object with `.logits`.

    `loss(module, ids)` is the author's own training loss of (B, T) ids, a scalar in nats. Only
    copies of the module are asked, and torch's random state is left as it was.
    Raises MusotaError for what is no such module, and for what its code raises.
    """
    _check(module, vocab_size, max_seq_len)
    device = _device(module)
    prepare_memory(device)
    with torch.random.fork_rng():
        draw = Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (2, max_seq_len), generator=draw).to(device)
        checked_logits(_copy(module, False), ids, vocab_size)
        nets = {"as it is": module, "with its weights shaken": _shaken(module, ids, draw)}
        probes = [
            _probe(mode, weights, net, ids, vocab_size)
            for mode in MODES
            for weights, net in nets.items()
        ]
        shown = next((probe for probe in probes if probe.ahead), probes[1])
        net, first = nets[shown.weights], ids[:, :SHOWN]
        change = _changes(net, MODES[shown.mode], first, vocab_size, range(first.shape[1]))
        change = change * (change > shown.tolerance)
        shown.ahead.extend(_ahead(change, range(first.shape[1])))
        compared = _compare_losses(nets["with its weights shaken"], ids, vocab_size, loss, draw)
        scale = rules.which_shift(*compared)[1] if loss else 1.0
        try:
            losses = _on_random_tokens(module, vocab_size, max_seq_len, loss, draw)
        except MusotaError:
            if not any(probe.kept for probe in probes):
                raise
            losses = []  # a state with a history cannot be trained
        symbols = min(SYMBOLS, vocab_size)
        findings = (
            rules.looks_ahead(probes),
            rules.other_sequences(probes),
            rules.random_floor([one / scale for one in losses], symbols),
            rules.loss_is_the_loss(*compared),
            _size(module, ids, vocab_size),
        )
    return Audit(findings, change, tuple(losses), symbols)


def causality_matrix(model: CausalLM, tokens: Tensor, positions: int = 32) -> Tensor:
    """(positions, positions): largest change of a logit in column u after replacing token t (row).

    A causal model has exact zeros wherever u < t.
    """
    ids = tokens[: min(positions, model.config.max_seq_len)].long().to(model.device)[None]
    return _changes(model, False, ids, model.config.vocab_size, range(ids.shape[1]))


def _check(module, vocab_size, max_seq_len) -> None:
    if not isinstance(module, nn.Module):
        raise MusotaError(f"audit needs a torch.nn.Module, not {type(module).__name__}.")
    for name, value, least in (("vocab_size", vocab_size, 2), ("max_seq_len", max_seq_len, 1)):
        if type(value) is not int or value < least:
            raise MusotaError(f"{name} must be a whole number of at least {least}, not {value!r}.")
    places = {str(tensor.device) for tensor in (*module.parameters(), *module.buffers())}
    if len(places) > 1 or "meta" in places:
        where = " and ".join(sorted(places))
        raise MusotaError(f"The model lies on {where}: move all of it to one device first.")


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device


def _copy(module: nn.Module, training: bool) -> nn.Module:
    """Of recurrent layers without their dropout, which cuDNN draws where no seed reaches."""
    kept = [v for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor)]
    try:  # tensors with a history, such as those of weight_norm, are copied by hand
        history = {id(v): v.detach().clone() for v in kept if not v.is_leaf}
        module = copy.deepcopy(module, history).train(training)
    except RuntimeError as error:
        raise MusotaError(f"The model cannot be copied, so audit a fresh one: {error}") from None
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.dropout = 0.0
    return module


def _shaken(module: nn.Module, ids: Tensor, draw: Generator) -> nn.Module:
    """A copy with noise on every weight: an output that begins at zero hides whatever leaks."""
    for strength in (0.5, 0.05, 0.005):
        shaken = _copy(module, False)
        for weight in filter(torch.is_floating_point, shaken.parameters()):
            size = float(weight.detach().float().square().mean().sqrt())
            size = size or (weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.1)
            noise = torch.randn(weight.shape, generator=draw).to(weight)
            weight.data += strength * size * noise
        if _ask(shaken, ids).isfinite().all():
            return shaken
    return _copy(module, False)


@torch.no_grad()
def _ask(net: nn.Module, ids: Tensor) -> Tensor:
    """Logits, always from the same random state."""
    torch.manual_seed(0)
    with blaming("The model"):
        return logits_of(net, ids).float()


def _changes(
    module: nn.Module, training: bool, ids: Tensor, vocab_size: int, positions: Sequence[int]
) -> Tensor:
    """(positions, T): largest change of a logit at each place after replacing, in every row, the
    token at each position in turn. Every call has the same shape and is the first of a copy."""
    base, changes = _ask(_copy(module, training), ids), [torch.zeros(0, ids.shape[1])]
    for t in positions:
        other = ids.clone()
        other[:, t] = (ids[:, t] + 1) % vocab_size
        moved = _ask(_copy(module, training), other).sub_(base).abs_()
        changes.append(moved.amax((0, 2))[None].cpu())
    return torch.cat(changes)


def _ahead(moved: Tensor, positions: Sequence[int]) -> list[int]:
    """How far ahead of the logits that moved the replaced token stood, where it did."""
    rows, columns = moved.nonzero(as_tuple=True)
    distances = torch.tensor(positions, dtype=torch.long)[rows] - columns
    return distances[distances > 0].tolist()


def _probe(mode: str, weights: str, module: nn.Module, ids: Tensor, vocab_size: int) -> rules.Probe:
    training = MODES[mode]
    base, same = (_ask(_copy(module, training), ids) for _ in range(2))
    noise, largest = float(same.sub_(base).abs_().max()), float(base.abs().max())
    tolerance, last = ROUNDING * largest + 4 * noise, ids.shape[1] - 1
    positions = [t for t in sorted({1, last // 3, last // 2, last}) if 0 < t <= last]
    change = _changes(module, training, ids, vocab_size, positions)
    other, kept = ids.clone(), _copy(module, training)
    other[0] = (ids[0] + 1) % vocab_size
    beside = _ask(_copy(module, training), other).sub_(base).abs_()
    after = [_ask(kept, asked) for asked in (other, ids)][1].sub_(base).abs_()
    return rules.Probe(
        mode,
        weights,
        ahead=_ahead(change > tolerance, positions),
        talk=bool(beside[1].max() > tolerance),
        kept=bool(after.max() > tolerance),
        unsure=noise > 1e-3 * largest,
        tolerance=tolerance,
    )


def _shifted(net: nn.Module, ids: Tensor) -> Tensor:
    """The loss of whoever gives none: cross-entropy in nats, targets shifted once."""
    logits = logits_of(net, ids[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def _on_random_tokens(
    module: nn.Module, vocab_size: int, max_seq_len: int, loss: Loss | None, draw: Generator
) -> list[float]:
    """The training loss of each step on tokens drawn evenly, and never twice, from a few."""
    net = _copy(module, True)
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE, fused=True) if weights else None
    shape = STEP_ROWS, min(max_seq_len, STEP_TOKENS) + (loss is None)  # whose targets end later
    some, losses = torch.randperm(vocab_size, generator=draw)[:SYMBOLS], []
    for _ in range(STEPS):
        ids = some[torch.randint(len(some), shape, generator=draw)].to(_device(module))
        with blaming("The loss" if loss else "The model in training"):
            value = (loss or _shifted)(net, ids)
            losses.append(float(value.detach()))
            if optimizer and value.isfinite():
                value.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return losses


@torch.no_grad()
def _compare_losses(
    net: nn.Module, ids: Tensor, vocab_size: int, loss: Loss | None, draw: Generator
) -> tuple[list[float], list[list[float]]]:
    """The author's loss of some batches; and of each shift, the cross-entropy of its logits."""
    own, plain = [], [[], [], []]
    for _ in range(4 if loss else 0):
        drawn = torch.randint(vocab_size, ids.shape, generator=draw).to(ids)
        with blaming("The loss"):
            own.append(float(loss(net, drawn)))
        logits = _ask(net, drawn).mT  # (B, V, T)
        for shift, losses in enumerate(plain):
            length = max(1, drawn.shape[1] - shift)
            losses.append(float(F.cross_entropy(logits[..., :length], drawn[:, -length:])))
    return own, plain


def _size(module: nn.Module, ids: Tensor, vocab_size: int) -> Finding:
    """Parameters by module, arithmetic, memory, and the dense model to compare with."""
    size, parts = size_of(_copy(module, False), vocab_size, ids.shape[1]), Counter()
    for name, weight in module.named_parameters():
        parts[name.partition(".")[0]] += weight.numel()
    shares = ", ".join(f"{n} {c / size.n_parameters:.0%}" for n, c in parts.most_common(5))
    other = match_width(size.n_parameters, DenseConfig(vocab_size, ids.shape[1], size.n_layer))
    saw = (
        f"{size.n_parameters:,} parameters ({shares}), {size.flops_per_token / 1e6:.1f} MFLOP a "
        f"token; {16 * size.n_parameters / 1e6:,.0f} MB for weights, gradients and Adam"
    )
    twin = (
        f"its dense twin has d_model {other.d_model}, {other.n_head} heads, {other.n_layer} "
        f"layers: {other.n_parameters:,} parameters"
    )
    return Finding("Size", "measured", saw, "counted", twin)
