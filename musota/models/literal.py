"""The specification in plain torch: what tests and the bench compare against."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musota.models.base import CausalLM
from musota.plan.architectures import DenseConfig, MuConfig


class LiteralMuLayer(nn.Module):
    def __init__(self, config: MuConfig, attention_dropout: float):
        super().__init__()
        d, N = config.d_model, config.n_block
        self.sizes = list(config.layout.sizes)
        options = {"dropout": attention_dropout, "batch_first": True}
        self.blocks = nn.ModuleList(nn.MultiheadAttention(c, 2, **options) for c in self.sizes)
        self.cross_attention = nn.MultiheadAttention(d, config.n_head, **options)
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(d), nn.LayerNorm(d)
        self.feed_forward_up, self.feed_forward_down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.affinity = nn.Embedding(config.vocab_size, N)
        self.gate = nn.ModuleDict({"up": nn.Linear(N + 1, 2 * N), "down": nn.Linear(2 * N, N)})
        self.gate.beta = nn.Parameter(torch.empty(N))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, input_ids: Tensor, future: Tensor) -> Tensor:
        options = {"attn_mask": future, "is_causal": True, "need_weights": False}
        blocks = zip(self.blocks, x.split(self.sizes, -1), strict=True)
        alone = [attend(cells, cells, cells, **options)[0] for attend, cells in blocks]
        y = self.dropout(torch.cat(alone, -1))
        options = {"attn_mask": future, "average_attn_weights": False}
        across, weights = self.cross_attention(y, y, y, **options)  # weights (B, h, T, T)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean(1, keepdim=True).mT
        z = self.norm_attention(y + self.dropout(across))
        hidden = self.dropout(F.gelu(self.feed_forward_up(z)))
        z = self.norm_feed_forward(z + self.feed_forward_down(hidden))
        hidden = F.gelu(self.gate.up(torch.cat([self.affinity(input_ids), entropy], -1)))
        sensitivity = self.gate.beta * torch.sigmoid(self.gate.down(hidden))  # (B, T, N)
        olds, news = x.split(self.sizes, -1), z.split(self.sizes, -1)
        moved = [
            old + sensitivity[..., block, None] * (new - old)
            for block, (old, new) in enumerate(zip(olds, news, strict=True))
        ]
        return torch.cat(moved, -1)


class LiteralDenseLayer(nn.Module):
    def __init__(self, config: DenseConfig, attention_dropout: float):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.attention_in, self.attention_out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(d), nn.LayerNorm(d)
        self.feed_forward_up, self.feed_forward_down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, input_ids: Tensor, future: Tensor) -> Tensor:
        q, k, v = self.attention_in(self.norm_attention(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + future).softmax(-1)  # (B, h, T, T)
        y = (self.attention_dropout(weights) @ v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.attention_out(y))
        hidden = F.gelu(self.feed_forward_up(self.norm_feed_forward(x)))
        return x + self.feed_forward_down(self.dropout(hidden))


class Literal(nn.Module):
    """The obvious version of `model`, with its weights. Called like it, it returns (None, loss)."""

    def __init__(self, model: CausalLM, attention_dropout: float = 0.0):
        super().__init__()
        self.config = config = model.config
        d, is_mu = config.d_model, isinstance(config, MuConfig)
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.positions = nn.Embedding(config.max_seq_len, d)
        layer = LiteralMuLayer if is_mu else LiteralDenseLayer
        self.layers = nn.ModuleList(layer(config, attention_dropout) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(d)
        self.output = nn.Linear(d, config.vocab_size, bias=is_mu)
        if not is_mu:
            self.output.weight = self.embedding.weight
        self.dropout = nn.Dropout(config.dropout)
        self.load_state_dict(_literal_weights(model))
        self.to(model.device)

    def forward(self, input_ids: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        T = input_ids.shape[1]
        place = torch.arange(T, device=input_ids.device)
        x = self.dropout(self.embedding(input_ids) + self.positions(place))
        future = x.new_full((T, T), float("-inf")).triu(1)
        for layer in self.layers:
            x = layer(x, input_ids, future)
        logits = self.output(self.norm(x))
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _literal_weights(model: CausalLM) -> dict[str, Tensor]:
    """The weights of one of our models under the names of `Literal`."""
    weights, config = {}, model.config
    for name, value in model.state_dict().items():
        if name == "affinity.weight":
            tables = value.chunk(config.n_layer, 1)
            weights |= {f"layers.{layer}.{name}": table for layer, table in enumerate(tables)}
        elif ".block_attention." in name:
            layer, group, part = name.replace(".block_attention", "").rsplit(".", 2)
            part = part.replace("in_", "in_proj_").replace("out_", "out_proj.")
            first = sum(n for n, _ in config.layout.groups[: int(group)])
            blocks = enumerate(value, start=first)
            weights |= {f"{layer}.blocks.{n}.{part}": one.squeeze(0) for n, one in blocks}
        else:
            name = name.replace("cross_attention.qkv.", "cross_attention.in_proj_")
            weights[name.replace("cross_attention.out.", "cross_attention.out_proj.")] = value
    if isinstance(config, DenseConfig):
        weights["output.weight"] = weights["embedding.weight"]
    return weights
