"""MU-SOTA: a token is a matrix of semantic blocks, with attention inside blocks and across them.
Channels are stored block by block; blocks of one size are computed together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musota.config import HEADS_PER_BLOCK, MuConfig
from musota.models.attention import causal_attention, merge_heads, split_heads
from musota.models.base import CausalLM, Dropout


class BlockAttention(nn.Module):
    """Causal self-attention inside each of `n_block` blocks of `size` channels."""

    def __init__(self, n_block: int, size: int):
        super().__init__()
        self.n_block, self.size = n_block, size
        # As in nn.MultiheadAttention, for each block: rows are outputs, in the order q, k, v.
        self.in_weight = nn.Parameter(torch.empty(n_block, 3 * size, size))
        self.in_bias = nn.Parameter(torch.zeros(n_block, 1, 3 * size))
        self.out_weight = nn.Parameter(torch.empty(n_block, size, size))
        self.out_bias = nn.Parameter(torch.zeros(n_block, 1, size))
        for block in range(n_block):  # Xavier for each map by itself
            for one_map in (*self.in_weight[block].chunk(3), self.out_weight[block]):
                nn.init.xavier_uniform_(one_map)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, n·c) to scaled queries, keys and values, (n·B·h, T, c/h) each."""
        B, T, _ = x.shape
        n, c = self.n_block, self.size
        x = x.view(B * T, n, c).transpose(0, 1)  # (n, B·T, c): blocks are a batch
        qkv = torch.baddbmm(self.in_bias, x, self.in_weight.mT)  # (n, B·T, 3c)
        return split_heads(qkv.view(n * B, T, 3 * c), HEADS_PER_BLOCK)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, n·c) to the same."""
        B, T, _ = x.shape
        n, c = self.n_block, self.size
        y, _ = causal_attention(*self.heads(x))  # (n·B·h, T, c/h)
        y = merge_heads(y, HEADS_PER_BLOCK).view(n, B * T, c)
        y = torch.baddbmm(self.out_bias, y, self.out_weight.mT)  # (n, B·T, c)
        return y.transpose(0, 1).reshape(B, T, n * c)


class CrossAttention(nn.Module):
    """Causal attention over all channels, with the entropy of each token's attention."""

    def __init__(self, d_model: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        for one_map in (*self.qkv.weight.data.chunk(3), self.out.weight.data):
            nn.init.xavier_uniform_(one_map)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) to scaled queries, keys and values, (B·h, T, C/h) each."""
        return split_heads(self.qkv(x), self.n_head)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) to the same, and the entropy in nats averaged over heads (B, T)."""
        y, spread = causal_attention(*self.heads(x), with_entropy=True)  # (B·h, T, C/h), (B·h, T)
        return self.out(merge_heads(y, self.n_head)), spread.unflatten(0, (len(x), -1)).mean(1)


class Gate(nn.Module):
    """The sensitivity of each token and block: the share of its new value that a block takes."""

    def __init__(self, n_block: int):
        super().__init__()
        self.up = _linear(n_block + 1, 2 * n_block)
        self.down = _linear(2 * n_block, n_block)
        self.beta = nn.Parameter(torch.full((n_block,), 0.5))

    def forward(self, affinity: Tensor, attention_entropy: Tensor) -> Tensor:
        """Affinity (B, T, N) and entropy (B, T) to sensitivities (B, T, N) in (0, β)."""
        features = torch.cat([affinity, attention_entropy.unsqueeze(-1).to(affinity)], -1)
        return self.beta * self.down(F.gelu(self.up(features))).sigmoid()


class MuLayer(nn.Module):
    """Block attention, cross attention and feed-forward layer; the gate weighs old and new."""

    def __init__(self, config: MuConfig):
        super().__init__()
        d, layout = config.d_model, config.layout
        self.block_attention = nn.ModuleList(BlockAttention(n, c) for n, c in layout.groups)
        self.cross_attention = CrossAttention(d, config.n_head)
        self.norm_attention = nn.LayerNorm(d)
        self.feed_forward_up = _linear(d, 4 * d)
        self.feed_forward_down = _linear(4 * d, d)
        self.norm_feed_forward = nn.LayerNorm(d)
        self.gate = Gate(config.n_block)
        self.dropout = Dropout(config.dropout)
        # Row n marks the channels of block n: it repeats a block's sensitivity for its channels.
        spread = torch.block_diag(*(torch.ones(1, size) for size in layout.sizes))
        self.register_buffer("spread", spread, persistent=False)  # (N, C)

    def forward(self, x: Tensor, affinity: Tensor) -> Tensor:
        """Channels (B, T, C) and the tokens' affinities (B, T, N) to new channels (B, T, C)."""
        groups = x.split([attend.n_block * attend.size for attend in self.block_attention], -1)
        attended = [attend(x) for attend, x in zip(self.block_attention, groups, strict=True)]
        y = self.dropout(torch.cat(attended, -1))
        across, attention_entropy = self.cross_attention(y)
        z = self.norm_attention(y + self.dropout(across))
        hidden = self.dropout(F.gelu(self.feed_forward_up(z)))
        z = self.norm_feed_forward(z + self.feed_forward_down(hidden))
        sensitivity = self.gate(affinity, attention_entropy)  # (B, T, N)
        return x + (sensitivity @ self.spread.to(sensitivity)) * (z - x)


class MuSota(CausalLM):
    """The model of docs/model.md, section "MU-SOTA"."""

    def __init__(self, config: MuConfig):
        super().__init__(config)
        L = config.n_layer
        self.affinity = nn.Embedding(config.vocab_size, L * config.n_block)  # tables of all layers
        self.layers = nn.ModuleList(MuLayer(config) for _ in range(L))
        self.norm = nn.LayerNorm(config.d_model)
        self.output = _linear(config.d_model, config.vocab_size)
        for table, std in (self.embedding, 0.02), (self.positions, 0.02), (self.affinity, 0.1):
            nn.init.normal_(table.weight, std=std)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)  # (B, T, C)
        affinities = self.affinity(input_ids).chunk(self.config.n_layer, -1)  # L of (B, T, N)
        for layer, affinity in zip(self.layers, affinities, strict=True):
            x = layer(x, affinity)
        return self.norm(x)

    def hook_points(self) -> dict:
        crosses = [layer.cross_attention for layer in self.layers]
        gates = [layer.gate for layer in self.layers]
        return super().hook_points() | {
            "attention_entropy": (lambda _, __, out: out[1].mean(), crosses),
            "gate": (lambda _, __, out: out, gates),
            "gate_open": (lambda _, __, out: out.sigmoid(), [gate.down for gate in gates]),
        }


def _linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
