"""The baseline: a GPT-2 style transformer (Radford et al. 2019), with dropout as in MU-SOTA."""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from musota.config import DenseConfig
from musota.models.attention import largest_score, library_attention, mean_entropy, split_heads
from musota.models.base import CausalLM, Dropout, Layer


class DenseLayer(Layer):
    """Attention and feed-forward layer, each with a norm before it."""

    def __init__(self, config: DenseConfig):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.norm_attention = nn.LayerNorm(d)
        self.attention_in = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.norm_feed_forward = nn.LayerNorm(d)
        self.feed_forward_up = nn.Linear(d, 4 * d)
        self.feed_forward_down = nn.Linear(4 * d, d)
        self.dropout = Dropout(config.dropout)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        for residual in (self.attention_out, self.feed_forward_down):
            nn.init.normal_(residual.weight, std=0.02 * (2 * config.n_layer) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        B, T, C = x.shape
        qkv = self.attention_in(self.norm_attention(x)).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, T, C/h)
        y = library_attention(q, k, v, 1 / math.sqrt(q.shape[-1]))
        y = self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        x = x + self.dropout(y)
        hidden = F.gelu(self.feed_forward_up(self.norm_feed_forward(x)))
        return x + self.feed_forward_down(self.dropout(hidden))


class DenseTransformer(CausalLM):
    """Pre-norm, learned positions, GELU, biases, embeddings tied to the output layer."""

    ledger_groups: ClassVar = CausalLM.ledger_groups | {
        "embedding": "embedding (also output)",
        "attention_in": "attention",
        "attention_out": "attention",
    }
    decayed_groups = frozenset({"attention", "feed-forward"})

    def __init__(self, config: DenseConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(DenseLayer(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)  # (B, T, C)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def hook_points(self) -> dict:
        def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return split_heads(qkv, self.config.n_head)

        maps = [layer.attention_in for layer in self.layers]
        return {
            "largest_score": (lambda _, __, qkv: largest_score(*heads(qkv)[:2]), maps),
            "attention_entropy": (lambda _, __, qkv: mean_entropy(*heads(qkv)), maps),
        }
