"""The specification in plain torch, which tests and the benchmark compare the fast models with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musota.config import DenseConfig, MuConfig
from musota.models.base import CausalLM


class ReferenceMuLayer(nn.Module):
    """A layer of MU-SOTA, block by block."""

    def __init__(self, config: MuConfig, attention_dropout: float):
        super().__init__()
        d, N = config.d_model, config.n_block
        self.sizes = list(config.layout.sizes)
        options = {"dropout": attention_dropout, "batch_first": True}
        self.blocks = nn.ModuleList(nn.MultiheadAttention(c, 2, **options) for c in self.sizes)
        self.cross_attention = nn.MultiheadAttention(d, config.n_head, **options)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.linear1, self.linear2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.affinity = nn.Embedding(config.vocab_size, N)
        self.gate = nn.ModuleDict({"up": nn.Linear(N + 1, 2 * N), "down": nn.Linear(2 * N, N)})
        self.gate.beta = nn.Parameter(torch.empty(N))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, input_ids: Tensor, future: Tensor) -> Tensor:
        options = {"attn_mask": future, "is_causal": True, "need_weights": False}
        blocks = zip(self.blocks, x.split(self.sizes, -1), strict=True)
        alone = [attend(block, block, block, **options)[0] for attend, block in blocks]
        y = self.dropout(torch.cat(alone, -1))
        options = {"attn_mask": future, "average_attn_weights": False}
        across, weights = self.cross_attention(y, y, y, **options)  # weights (B, h, T, T)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean(1, keepdim=True).mT
        z = self.norm1(y + self.dropout(across))
        hidden = self.dropout(F.gelu(self.linear1(z)))
        z = self.norm2(z + self.linear2(hidden))
        hidden = F.gelu(self.gate.up(torch.cat([self.affinity(input_ids), entropy], -1)))
        sensitivity = self.gate.beta * torch.sigmoid(self.gate.down(hidden))  # (B, T, N)
        olds, news = x.split(self.sizes, -1), z.split(self.sizes, -1)
        moved = [
            old + sensitivity[..., block, None] * (new - old)
            for block, (old, new) in enumerate(zip(olds, news, strict=True))
        ]
        return torch.cat(moved, -1)


class ReferenceDenseLayer(nn.TransformerEncoderLayer):
    """Torch's pre-norm layer, without dropout on the output of the feed-forward layer."""

    def __init__(self, config: DenseConfig, attention_dropout: float):
        options = {"activation": "gelu", "batch_first": True, "norm_first": True}
        d = config.d_model
        super().__init__(d, config.n_head, 4 * d, config.dropout, **options)
        self.self_attn.dropout = attention_dropout
        self.dropout2 = nn.Identity()

    def forward(self, x: Tensor, input_ids: Tensor, future: Tensor) -> Tensor:
        return super().forward(x, src_mask=future, is_causal=True)


class ReferenceModel(nn.Module):
    """A plain implementation of `model` with the same weights. It returns (None, loss)."""

    def __init__(self, model: CausalLM, attention_dropout: float = 0.0):
        super().__init__()
        self.config = config = model.config
        d, is_mu = config.d_model, isinstance(config, MuConfig)
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.positions = nn.Embedding(config.max_seq_len, d)
        layer = ReferenceMuLayer if is_mu else ReferenceDenseLayer
        self.layers = nn.ModuleList(layer(config, attention_dropout) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(d)
        self.output = nn.Linear(d, config.vocab_size, bias=is_mu)
        if not is_mu:
            self.output.weight = self.embedding.weight
        self.dropout = nn.Dropout(config.dropout)
        self.load_state_dict(_reference_weights(model))
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


RENAMED = {  # parts of parameter names, here and in `ReferenceModel`
    "cross_attention.qkv.": "cross_attention.in_proj_",
    "cross_attention.out.": "cross_attention.out_proj.",
    "attention_in.": "self_attn.in_proj_",
    "attention_out.": "self_attn.out_proj.",
    "norm_attention": "norm1",
    "norm_feed_forward": "norm2",
    "feed_forward_up": "linear1",
    "feed_forward_down": "linear2",
}


def _reference_weights(model: CausalLM) -> dict[str, Tensor]:
    """The weights of a model under the names of its `ReferenceModel`."""
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
            for ours, theirs in RENAMED.items():
                name = name.replace(ours, theirs)
            weights[name] = value
    if isinstance(config, DenseConfig):
        weights["output.weight"] = weights["embedding.weight"]
    return weights
