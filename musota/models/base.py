"""CausalLM, the base class of all models: logits, loss, scoring, generation, parameters."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musota.config import ModelConfig, check_value
from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError
from musota.models.diagnostics import Diagnostics, evaluating
from musota.models.hub import HubModel
from musota.models.loss import linear_cross_entropy, score_tokens

NOT_DECAYED = {"embedding", "positions", "affinity", "gate"}  # modules


class CausalLM(nn.Module, Diagnostics, HubModel):
    """A causal language model. A subclass creates `layers`, and `output` unless it is tied to the
    embedding, and defines `hidden_states`, (B, T) token ids to normalised states (B, T, C) for the
    output layer."""

    # Module name to its group in the parameter ledger, where the two differ.
    ledger_groups: ClassVar = {
        "affinity": "affinity tables",
        "attention_in": "attention",
        "attention_out": "attention",
        "feed_forward_up": "feed-forward",
        "feed_forward_down": "feed-forward",
        "norm": "norms",
        "norm_attention": "norms",
        "norm_feed_forward": "norms",
    }

    def __init__(self, config: ModelConfig, learned_positions: bool = True):
        super().__init__()
        self.config = config
        self.tokenizer: TextTokenizer | None = None
        self.measured: dict = {}  # what its model card states; see Run.load_model
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        shape = config.max_seq_len, config.d_model
        self.positions = nn.Embedding(*shape) if learned_positions else None
        self.dropout = Dropout(config.dropout)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, C): embeddings, plus learned positions if there are any."""
        x = self.embedding(input_ids)
        if self.positions:
            x = x + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.dropout(x)

    @property
    def output_weight(self) -> Tensor:  # (V, C)
        return self.output.weight if hasattr(self, "output") else self.embedding.weight

    @property
    def output_bias(self) -> Tensor | None:  # (V,)
        return self.output.bias if hasattr(self, "output") else None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(B, T) token ids to (logits (B, T, V), None), or with `targets` (B, T), the tokens that
        follow, to (None, mean loss in nats). Raises MusotaError for a sequence longer than
        max_seq_len and, on a CPU, for a token id out of range."""
        length, longest = input_ids.shape[-1], self.config.max_seq_len
        if not 1 <= length <= longest:
            raise MusotaError(f"Give 1 to {longest} tokens (max_seq_len), not {length}.")
        if input_ids.device.type == "cpu":  # on a GPU it would wait for the values
            self.check_tokens(input_ids)
        hidden = self.hidden_states(input_ids)
        if targets is None:
            return self.logits_of(hidden), None
        return None, self.loss_of(hidden, targets)

    def logits_of(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.output_weight, self.output_bias)

    def loss_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.output_weight, self.output_bias, targets)

    def score_of(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return score_tokens(hidden, self.output_weight, self.output_bias, targets)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises MusotaError for a token id outside the vocabulary."""
        low, high, last = int(tokens.min()), int(tokens.max()), self.config.vocab_size - 1
        if low < 0 or high > last:
            raise MusotaError(f"Token ids must lie between 0 and {last}, not {low} and {high}.")

    def as_ids(self, text: str | Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Token ids (int64) of a text or of whole numbers in any form. Raises MusotaError."""
        if isinstance(text, str):
            if not self.tokenizer:
                raise MusotaError("This model came without its tokenizer: give token ids.")
            text = self.tokenizer.encode(text)
        try:
            ids = text if isinstance(text, Tensor) else torch.tensor(np.asarray(text).tolist())
            if ids.numel():
                torch.iinfo(ids.dtype)  # raises TypeError for other types than whole numbers
        except (RuntimeError, TypeError, ValueError):
            raise MusotaError(f"Give text or whole-numbered token ids, not {text!r:.80}.") from None
        return ids.long()

    def compile_layers(self) -> None:
        """Run the layers through torch.compile, but for `evaluating`: one graph serves them all."""
        torch.compiler.reset()  # the limit on recompilations counts those of earlier models too
        for layer in self.layers:
            layer.compile(dynamic=False, fullgraph=True)

    def ledger_group(self, name: str) -> str:
        """The group in the ledger of the parameter `name`."""
        part = name.split(".")[2 if name.startswith("layers.") else 0]
        if part == "embedding" and not hasattr(self, "output"):
            return "embedding (also output)"
        return self.ledger_groups.get(part, part.replace("_", " "))

    def parameter_ledger(self) -> dict[str, int]:
        """The number of parameters by group; the groups sum to the total."""
        ledger: Counter[str] = Counter()
        for name, parameter in self.named_parameters():
            ledger[self.ledger_group(name)] += parameter.numel()
        return dict(ledger)

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter gets weight decay, as linear maps do; tables and gates do not."""
        is_matrix = name.endswith("weight") and parameter.dim() >= 2
        return is_matrix and NOT_DECAYED.isdisjoint(name.split("."))

    def optimizer_groups(self, weight_decay: float) -> list[dict]:
        """Two parameter groups: linear maps with weight decay, the rest without."""
        groups = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[not self.is_decayed(name, parameter)]["params"].append(parameter)
        return groups

    def score_text(self, text: str) -> pd.DataFrame:
        """A table of the text's tokens with bits and probability (the first one follows a line
        end); its `.attrs` hold the text's `ppl` and `bits_per_byte`. Raises MusotaError for a model
        without its tokenizer, and for anything but a text."""
        if not isinstance(text, str) or not text:
            raise MusotaError(f"score_text needs a text of a character or more, not {text!r:.40}.")
        tokens = self.as_ids(text).tolist()
        nats = score(self, torch.tensor([self.tokenizer.line_end, *tokens]))[0].double()
        pieces = [self.tokenizer.decode([token]) for token in tokens]
        bits, chance = nats / math.log(2), (-nats).exp()
        scored = pd.DataFrame({"token": pieces, "bits": bits, "probability": chance})
        per_byte = float(bits.sum()) / len(text.encode())
        scored.attrs = {"ppl": float(nats.mean().exp()), "bits_per_byte": per_byte}
        return scored

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Tokens (B, T + max_new_tokens) that continue (B, T) prompts, or one prompt, a text or
        (T,) ids; the model reads the last max_seq_len tokens. Temperature 0 takes the likeliest
        token. `top_k` keeps the k likeliest, `top_p` the fewest whose probability reaches p. The
        draw depends on `seed` alone. Raises MusotaError for an empty prompt, a token out of range
        or a setting outside its bounds."""
        check_value("max_new_tokens", max_new_tokens, int, 0)
        check_value("temperature", temperature, float, 0)
        check_value("top_k", 1 if top_k is None else top_k, int, 1)
        check_value("top_p", 1 if top_p is None else top_p, float, 1e-9, 1)
        ids = torch.atleast_2d(self.as_ids(input_ids))
        if ids.dim() != 2 or not ids.numel():
            raise MusotaError("generate needs token ids of shape (B, T) with at least one token.")
        self.check_tokens(ids)
        # On the CPU: the same draw on any device.
        generator = torch.Generator().manual_seed(check_value("seed", seed, int))
        ids = ids.to(self.device)
        with evaluating(self):
            for _ in range(max_new_tokens):
                hidden = self.hidden_states(ids[:, -self.config.max_seq_len :])[:, -1]
                logits = self.logits_of(hidden).float().cpu()
                drawn = _draw(logits, temperature, top_k, top_p, generator)
                ids = torch.cat([ids, drawn.to(ids)], 1)
        return ids


def _draw(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    """One drawn token id per row of logits (B, V); (B, 1)."""
    if temperature < 1e-6:  # too small a divisor for float32: the likeliest
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    ordered, order = logits.sort(descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = float("-inf")
    probabilities = ordered.softmax(-1)
    if top_p is not None:  # drop a token when those before it reach top_p, never the likeliest
        drop = probabilities.cumsum(-1) - probabilities >= top_p
        probabilities[:, 1:].masked_fill_(drop[:, 1:], 0)
    probabilities = probabilities.gather(1, order.argsort(-1))
    return torch.multinomial(probabilities, 1, generator=generator)


@torch.no_grad()
def score(
    model: CausalLM, tokens: Tensor, stride: int | None = None, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Losses in nats (float32) and top-1 hits (bool) of tokens 1 … n−1, (n−1,) each.

    Windows of max_seq_len advance by `stride` (default: their length). With a smaller stride, all
    windows but the first score only tokens that have at least max_seq_len − stride before them.
    Raises MusotaError for too few tokens, an id out of range or a stride out of bounds."""
    length = model.config.max_seq_len
    stride = check_value("stride", length if stride is None else stride, int, 1, length)
    batch_size = batch_size or (16 if model.device.type == "cpu" else 64)
    if tokens.dim() != 1 or len(tokens) < 2:
        raise MusotaError("Scoring needs a 1-D tensor of at least two tokens.")
    model.check_tokens(tokens)
    tokens = tokens.to(model.device).long()
    windows, scored, last = [], 0, len(tokens) - 1  # number of predictions
    for start in range(0, max(1, last - length + stride), stride):
        end = min(start + length, last)
        windows.append((end - start, end - scored, start))  # inputs, of which the last are scored
        scored = end
    nats, hits = [], []
    with evaluating(model):
        for (width, new), alike in groupby(windows, key=itemgetter(0, 1)):  # may share a batch
            starts = torch.tensor([start for *_, start in alike], device=tokens.device)
            for batch in starts.split(batch_size):
                window = tokens[batch[:, None] + torch.arange(width + 1, device=tokens.device)]
                hidden = model.hidden_states(window[:, :-1])[:, -new:]
                losses, correct = model.score_of(hidden, window[:, -new:])
                nats.append(losses.flatten())
                hits.append(correct.flatten())
    return torch.cat(nats).cpu(), torch.cat(hits).cpu()


class Dropout(nn.Dropout):
    """nn.Dropout, faster on a CPU: four elements share one 64-bit random number, so that the
    probability is rounded to 1/65,536. (torch's own takes a tenth of a training step.)"""

    def forward(self, x: Tensor) -> Tensor:
        fast = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (fast and self.training and self.p):
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        dropped = round(self.p * 2**16)
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * (keep * (2**16 / (2**16 - dropped))).to(x.dtype)
