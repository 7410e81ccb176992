"""Ablations of a trained model with semantic blocks: what disabling each of its parts costs."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.lab.stats import RELEVANT, Interval, block_bootstrap
from musota.lab.verdicts import Verdict, in_nats
from musota.models.base import CausalLM, score
from musota.models.diagnostics import evaluating, hooked
from musota.models.mu_sota import MuSota
from musota.training.device import autocast_on, find_device
from musota.training.evaluate import blocks_of
from musota.training.run import Run

Change = tuple[list[nn.Module], Callable]  # modules, and a forward hook on them


@torch.no_grad()
def look_inside(model: CausalLM, ids: Tensor) -> dict[str, Tensor]:
    """The inside of a model with blocks on (T,) tokens, at most max_seq_len: `channels` (L + 1, T,
    C), embeddings first, and `gate` (L, T, N), the factor of each block, 1 where there is no gate.
    Raises MusotaError for another model."""
    require_blocks(model)
    ids, channels, seen = model.as_ids(ids)[: model.config.max_seq_len], [], defaultdict(list)
    model.check_tokens(ids)
    hooks = model.record(seen)
    for part in (*model.layers, model.norm):
        keep = part.register_forward_pre_hook(lambda _, inputs: channels.append(inputs[0][0]))
        hooks.append(keep)
    with hooked(hooks), evaluating(model):
        model.hidden_states(ids[None].long().to(model.device))
    gates = seen["gate"] or [torch.ones(1, len(ids), model.config.n_block)] * len(model.layers)
    return {"channels": torch.stack(channels).cpu(), "gate": torch.stack(gates)[:, 0].cpu()}


def ablations(model: CausalLM, tokens: Tensor) -> dict[str, Tensor]:
    """Nats of every token (see `score`) with nothing changed (`none`), and with a part disabled.

    `attention` (of MU-SOTA `block attention`): a token attends to itself alone · `cross attention`:
    its contribution is left out · `gate`: held at its mean over tokens, for each layer and block ·
    `affinity tables`: zeros · the name of each semantic block: its channels are zero throughout.
    Raises MusotaError for a model without blocks.
    """
    require_blocks(model)
    nats = {"none": score(model, tokens)[0]}
    for name, changes in disabled_parts(model, tokens).items():
        with replaced(*changes):
            nats[name] = score(model, tokens)[0]
    return nats


def measure_ablations(run: Run, corpus: Corpus) -> dict:
    """`ablations` of a run's best model on the valid split, summed by blocks of text: `tokens` of
    each block and, by part, its `nats`. Raises MusotaError for a run without its checkpoint."""
    model = run.load_model(find_device())
    with autocast_on(model.device):
        nats = ablations(model, corpus.valid)
    tokens = blocks_of(nats["none"])[1]
    return {"tokens": tokens, "nats": {part: blocks_of(each)[0] for part, each in nats.items()}}


def disabled_parts(model: CausalLM, tokens: Tensor) -> dict[str, list[Change]]:
    """The changes that disable each part, by its name."""

    def alone(attention, inputs, _):
        B, T, C = inputs[0].shape
        one_by_one = inputs[0].reshape(B * T, 1, C)  # every token is a sequence of its own
        return type(attention).forward(attention, one_by_one).view(B, T, C)

    def mean_gate() -> Change:
        seen, gates = defaultdict(list), [layer.gate for layer in model.layers]
        with replaced((gates, lambda gate, _, out: seen[gate].append(out.flatten(0, 1)))):
            score(model, tokens)
        means = {gate: torch.cat(outs).mean(0) for gate, outs in seen.items()}
        return gates, lambda gate, _, out: means[gate].expand_as(out)

    def without(block: int) -> Change:
        kept = torch.ones(model.config.d_model, device=model.device)
        kept[sum(layout.sizes[:block]) :][: layout.sizes[block]] = 0
        places = [model.dropout, *model.layers, model.norm]  # whatever returns channels
        return places, lambda _, __, out: out * kept

    layout = model.config.layout
    if isinstance(model, MuSota):
        own = [one for layer in model.layers for one in layer.block_attention], alone
        crosses = [layer.cross_attention for layer in model.layers]
        cross = crosses, lambda _, __, out: (torch.zeros_like(out[0]), out[1])
        parts = {"block attention": [own], "cross attention": [cross]}
        parts["both attentions"] = [own, cross]
    else:
        parts = {"attention": [([layer.attention for layer in model.layers], alone)]}
    if hasattr(model, "affinity"):
        parts["gate"] = [mean_gate()]
        parts["affinity tables"] = [([model.affinity], lambda _, __, out: out * 0)]
    return parts | {name: [without(place)] for place, name in enumerate(layout.names)}


def replaced(*changes: Change) -> AbstractContextManager:
    """A context in which the output of some modules is replaced."""
    return hooked([m.register_forward_hook(new) for modules, new in changes for m in modules])


def require_blocks(model: CausalLM) -> None:
    """Raises MusotaError for a model without named blocks."""
    if not getattr(model.config, "layout", None):
        raise MusotaError("Only MU-SOTA and its redesign have blocks: choose a run of one of them.")


def ablation_effects(measured: Mapping) -> dict[str, Interval]:
    """The cost of disabling each part, from what `measure_ablations` returned."""
    whole, tokens = measured["nats"]["none"], measured["tokens"]
    parts = {part: nats for part, nats in measured["nats"].items() if part != "none"}
    costs = {part: np.subtract(nats, whole) for part, nats in parts.items()}
    return {part: block_bootstrap(cost, tokens) for part, cost in costs.items()}


CONTEXT = ("attention", "both attentions")  # without it no token reads another
ADVICE = dict.fromkeys(CONTEXT, "give attention a residual path without a gate, and more width")
ADVICE |= {  # what to do with a part that is hardly used
    "block attention": "give the blocks more channels, or remove their attention",
    "cross attention": "remove it, or widen it until it helps",
    "gate": "replace it by a fixed number for each block",
    "affinity tables": "remove them and spend their parameters on width",
}
DECISIONS = {-1: "hardly used", 0: "undecided", 1: "used"}


def weak_spots(run: Run, effects: Mapping[str, Interval]) -> list[Verdict]:
    """Whether the parts of a run's model are used (the interval of what disabling one costs lies
    above RELEVANT), hardly used (below) or undecided, given its `ablation_effects`. Blocks get one
    verdict."""
    ledger, blocks = run.summary["parameter_ledger"], run.experiment.model.layout.names
    verdicts = []
    for part in (part for part in ADVICE if part in effects):
        question, groups = f"Is the part “{part}” used?", [part]
        side = effects[part].beyond(RELEVANT)
        if part in CONTEXT:
            question = "Is the text before the current token used?"
            groups = [group for group in ledger if "attention" in group]
        share = sum(ledger.get(group, 0) for group in groups) / sum(ledger.values())
        reason = f"cost of disabling {part}, {share:.1%} of the parameters"
        if side < 0 and part in CONTEXT:
            reason += "; it is a table of which token follows which, little better than a bigram"
        about = {"reason": reason, "next_step": ADVICE[part] if side < 0 else ""}
        verdicts.append(Verdict(question, DECISIONS[side], **in_nats(effects[part]), **about))
    idle = [block for block in blocks if effects[block].beyond(RELEVANT) < 0]
    most = max(blocks, key=lambda block: effects[block].mean)
    reason = f"{len(idle)} of {len(blocks)} hardly used; shown: the largest cost, of block {most}"
    step = "use fewer blocks of more channels" if len(idle) > len(blocks) / 2 else ""
    decision = "few" if step else DECISIONS[max(0, effects[most].beyond(RELEVANT))]
    about = {"reason": reason, "next_step": step}
    return [*verdicts, Verdict("Are the blocks used?", decision, **in_nats(effects[most]), **about)]
