"""The baseline: a GPT-2 style transformer (Radford et al. 2019), with dropout as in MU-SOTA."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from musota.config import DenseConfig
from musota.models.attention import library_attention, split_heads
from musota.models.base import CausalLM, Dropout


class DenseLayer(nn.Module):
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

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) to scaled queries, keys and values, (B·h, T, C/h) each; for statistics."""
        return split_heads(self.attention_in(self.norm_attention(x)), self.n_head)

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
