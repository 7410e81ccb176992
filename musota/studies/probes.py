"""Experiments that look into one model."""

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.models.base import CausalLM, score
from musota.models.health import evaluating, hooked
from musota.models.musota import MuSota
from musota.plan.config import Experiment
from musota.training import keeping
from musota.training.evaluate import blocks_of
from musota.training.folder import RunFolder
from musota.training.machine import autocast_on, find_device, make_accelerator
from musota.training.runs import Run
from musota.training.trainer import Trainer, train

# Modules, and what becomes of their output: a forward hook of torch.
Change = tuple[list[nn.Module], Callable]


@torch.no_grad()
def look_inside(model: CausalLM, ids: Tensor) -> dict[str, Tensor]:
    """What a model with blocks makes of (T,) tokens: `cells` (L + 1, T, d), embeddings first, in
    cell order, and `gate` (L, T, N), each block's, 1 where there is none. Raises MusotaError for
    another model."""
    require_blocks(model)
    ids, cells, seen = model.as_ids(ids), [], defaultdict(list)
    hooks = model.watch(seen)
    for part in (*model.layers, model.norm):
        hooks.append(part.register_forward_pre_hook(lambda _, inputs: cells.append(inputs[0][0])))
    with hooked(hooks), evaluating(model):
        model.hidden_states(ids[None].long().to(model.device))
    gates = seen["gate"] or [torch.ones(1, len(ids), model.config.n_block)] * len(model.layers)
    return {"cells": torch.stack(cells).cpu(), "gate": torch.stack(gates)[:, 0].cpu()}


def ablations(model: CausalLM, tokens: Tensor) -> dict[str, Tensor]:
    """Nats of every token (see `score`) with nothing changed (`none`), and with a part disabled.

    `attention`: a token attends to itself alone; of MU-SOTA by itself `block attention`, and `cross
    attention`, whose contribution is left out, and `both attentions` · `gate`: held at its mean
    over tokens, for each layer and block · `affinity tables`: zeros · and the name of each semantic
    block: its cells are zero throughout.
    Raises MusotaError for a model without blocks.
    """
    require_blocks(model)
    nats = {"none": score(model, tokens)[0]}
    for name, changes in disabled_parts(model, tokens).items():
        with replaced(*changes):
            nats[name] = score(model, tokens)[0]
    return nats


def measure_ablations(run: Run, corpus: Corpus) -> dict:
    """`ablations` of a run's best model on valid, by blocks of text: `tokens` and, by part, `nats`.
    Raises MusotaError for a run without blocks or without its checkpoint."""
    model = run.load_model(find_device())
    with autocast_on(model.device):
        return _by_blocks(ablations(model, corpus.valid))


def measure_annealing(experiment: Experiment, corpus: Corpus, seed: int = 0) -> dict:
    """Train `experiment` half-way, then `anneal` it; `tokens` and, by arm, `nats` by block."""
    with TemporaryDirectory() as folder:
        run = train(experiment, corpus, folder, seed=seed, stop_at=0.5)
        return _by_blocks(anneal(run, corpus))


def anneal(run: Run, corpus: Corpus, share: float = 0.15) -> dict[str, Tensor]:
    """Does a lower learning rate bring out what an unfinished run has learned?

    From the run's last checkpoint `share` as many steps more are trained twice: with the rate
    falling to 0 in a straight line, and held. Returns nats of every valid token (see `score`) at
    the checkpoint (`before`) and after both (`decayed`, `held`). The run itself stays as it is.
    Raises MusotaError for a finished run, whose rate has fallen to 0 already.
    """
    if run.finished:
        raise MusotaError(f"{run.path} is finished, its rate is 0: anneal a run stopped half-way.")
    nats = {}
    for arm, falls in {"decayed": 1, "held": 0}.items():
        with TemporaryDirectory() as scratch:
            shutil.copytree(run.path, scratch, dirs_exist_ok=True)
            folder = RunFolder(scratch, run.config)
            trainer = Trainer(run.experiment, corpus, run.seed, folder, make_accelerator())
            keeping.restore(trainer, trainer.saved)
            with autocast_on(trainer.device):
                nats.setdefault("before", score(keeping.kept_model(trainer), corpus.valid)[0])
            rate, steps = trainer.schedule(trainer.applied), math.ceil(share * trainer.step)
            for done in range(1, steps + 1):
                trainer.schedule = lambda _, rate=rate * (1 - falls * done / steps): rate
                trainer.one_step()
            with autocast_on(trainer.device):
                nats[arm] = score(keeping.kept_model(trainer), corpus.valid)[0]
    return nats


def _by_blocks(nats: Mapping[str, Tensor]) -> dict:
    blocks = {name: blocks_of(values) for name, values in nats.items()}
    tokens = next(iter(blocks.values()))[1]
    return {"tokens": tokens, "nats": {name: sums for name, (sums, _) in blocks.items()}}


def disabled_parts(model: CausalLM, tokens: Tensor) -> dict[str, list[Change]]:
    """By the name of a part, what disables it."""

    def alone(attention, inputs, _):
        B, T, C = inputs[0].shape
        one_by_one = inputs[0].reshape(B * T, 1, C)  # every token a sequence of its own
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
        places = [model.dropout, *model.layers, model.norm]  # whatever hands cells on
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
    """Within it what some modules return is replaced."""
    return hooked([m.register_forward_hook(new) for modules, new in changes for m in modules])


def require_blocks(model: CausalLM) -> None:
    """Raises MusotaError for a model without named blocks."""
    if not getattr(model.config, "layout", None):
        those = "Only MU-SOTA and its redesign have semantic blocks and gates"
        raise MusotaError(f"{those}: choose a run of them.")
