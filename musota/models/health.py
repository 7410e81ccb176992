"""How a model behaves, in numbers."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it a model does not drop out."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def hooked(hooks: list) -> Iterator[None]:
    """Within it, and no longer, these hooks of modules are there."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Watched:
    """What a model lets one see of its inside. Mixed into CausalLM."""

    def looks(self) -> dict[str, tuple[Callable, list[nn.Module]]]:
        """By name, what `of(module, inputs, out)` is to be kept of which modules, a layer after the
        other: `largest_score` and `attention_entropy`, scalars, and of gated models `gate` and
        `gate_open`, (B, T, N): the sensitivities, and how far open that is, 0 to 1."""
        raise NotImplementedError

    def watch(self, seen: dict[str, list[Tensor]]) -> list:
        """Hooks that collect in `seen` what `looks` names."""

        def keep(name: str, of: Callable, *given) -> None:
            seen[name].append(of(*given))

        return [
            module.register_forward_hook(partial(keep, name, of))
            for name, (of, modules) in self.looks().items()
            for module in modules
        ]

    @torch.no_grad()
    def health(self, input_ids: Tensor) -> dict[str, float | list[float]]:
        """How the model behaves on (B, T) tokens, without dropout.

        `effective_rank` of the output layer's inputs · `largest_score` of any attention ·
        `attention_entropy` in nats, by layer (MU-SOTA: across blocks) · of gated models, by block
        and averaged over layers, the sensitivities' `gate_mean`, `gate_spread` (over tokens) and
        `gate_saturated`, the share of tokens whose gate is under 5 % or over 95 % open.
        """
        seen = defaultdict(list)
        with hooked(self.watch(seen)), evaluating(self):
            hidden = self.hidden_states(input_ids)
        measured = {
            "effective_rank": effective_rank(hidden.flatten(0, 1)),
            "largest_score": float(torch.stack(seen["largest_score"]).max()),
            "attention_entropy": torch.stack(seen["attention_entropy"]).tolist(),
        }
        if seen["gate"]:
            gate, share = (torch.stack(seen[key]).float() for key in ("gate", "gate_open"))
            saturated = ((share < 0.05) | (share > 0.95)).float()  # (L, B, T, N)
            measured |= {
                "gate_mean": gate.mean((0, 1, 2)).tolist(),
                "gate_spread": gate.flatten(1, 2).std(1).mean(0).tolist(),
                "gate_saturated": saturated.mean((0, 1, 2)).tolist(),
            }
        return measured


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred (n, d) vectors: how many
    directions they use evenly (Roy and Vetterli 2007); between 1 and d."""
    vectors = vectors.cpu()  # not every card has what follows, or float64
    centred = (vectors - vectors.mean(0)).double()
    singular = torch.linalg.eigvalsh(centred.mT @ centred).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-30)
    return float(torch.special.entr(share).sum().exp())
