"""Values recorded at hook points of a model, and health statistics made of them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from musota.models.attention import largest_score, mean_entropy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode (no dropout) and runs uncompiled, since the
    shapes of its inputs vary."""
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


@contextmanager
def hooked(hooks: list) -> Iterator[None]:
    """A context at whose end these hooks are removed."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Diagnostics:
    """Hook points and health statistics. Mixed into CausalLM."""

    def hook_points(self) -> dict[str, tuple[Callable, list[nn.Module]]]:
        """By name: a function of (module, inputs, output), and the modules it applies to in layer
        order. Attentions are the modules with a method `heads`, which gives scaled queries, keys
        and values. Gated models add `gate`, the factors (B, T, N), and `gate_open`, the same on a
        scale from 0 to 1."""
        attentions = [module for module in self.modules() if hasattr(module, "heads")]
        return {
            "largest_score": (lambda one, x, _: largest_score(*one.heads(*x)[:2]), attentions),
            "attention_entropy": (lambda one, x, _: mean_entropy(*one.heads(*x)), attentions),
        }

    def record(self, seen: dict[str, list[Tensor]]) -> list:
        """Hooks that append to `seen[name]` the values of each hook point; use with `hooked`."""

        def hook(name: str, of: Callable):
            return lambda *given: seen[name].append(of(*given))

        points = self.hook_points().items()
        return [m.register_forward_hook(hook(name, of)) for name, (of, ms) in points for m in ms]

    @torch.no_grad()
    def health(self, input_ids: Tensor) -> dict[str, float | list[float]]:
        """Statistics of the model on (B, T) tokens, without dropout: `effective_rank` of the output
        layer's inputs · `largest_score` of any attention · `attention_entropy` in nats, by layer
        (MU-SOTA: across blocks) · of gated models, by block and averaged over layers, the factors'
        `gate_mean`, `gate_spread` (over tokens) and `gate_saturated`, the share of tokens whose
        gate is under 5 % or over 95 % open."""
        seen = defaultdict(list)
        with hooked(self.record(seen)), evaluating(self):
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
    """exp of the entropy of the normalised singular values of centred (n, d) vectors: the number
    of directions they use evenly (Roy and Vetterli 2007), between 1 and d."""
    centred = (vectors - vectors.mean(0)).cpu().double()
    singular = torch.linalg.eigvalsh(centred.mT @ centred).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-30)
    return float(torch.special.entr(share).sum().exp())
