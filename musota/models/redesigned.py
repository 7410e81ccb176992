"""The redesign: MU-SOTA's blocks, affinities and gates on the body of a modern transformer.

Each semantic block has one attention head. Queries use all channels of a token; keys use those of
their own block (`config.blocks`). A gate scales the updates of each block (`config.gate`). With
both switches off this is the parameter-matched modern transformer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musota.config import RedesignedConfig
from musota.models.attention import library_attention
from musota.models.base import CausalLM, Dropout


class Attention(nn.Module):
    """Causal attention with rotary positions and normalised queries and keys, one head a block."""

    def __init__(self, config: RedesignedConfig):
        super().__init__()
        d, N, c = config.d_model, config.n_block, config.block_size
        self.n_block, self.block_size = N, c
        key_shape = (N, c, c) if config.blocks else (1, d, d)
        self.query_weight = nn.Parameter(torch.empty(1, d, d))  # (parts, in, out)
        self.key_weight = nn.Parameter(torch.empty(key_shape))
        self.value = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.sharpness = nn.Parameter(torch.ones(N, 1, 1))  # length of the queries, by head

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) to scaled queries, keys and values, (B, N, T, C/N) each."""
        qk = torch.stack([self.project(x, self.query_weight), self.project(x, self.key_weight)])
        q, k = rotate(F.rms_norm(qk, (self.block_size,)))
        return q * (self.sharpness * self.block_size**-0.5), k, self.split(self.value(x))

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, T, C) to (B, N, T, C/N): equal parts of the channels, each by its `weight[part]`."""
        parts = x.reshape(-1, len(weight), weight.shape[1]).transpose(0, 1)
        return self.split(torch.bmm(parts, weight).transpose(0, 1).reshape(x.shape))

    def split(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, N, T, C/N)."""
        return x.unflatten(-1, (self.n_block, self.block_size)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        y = library_attention(*self.heads(x))  # (B, N, T, C/N)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): (…, T, c) with each pair of channels rotated by an angle
    proportional to the position."""
    T, c = x.shape[-2:]
    frequency = 10_000.0 ** -(torch.arange(0, c, 2, device=x.device) / c)
    angle = torch.arange(T, device=x.device)[:, None] * frequency  # (T, c/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Gate(nn.Module):
    """The factor of each block's updates, 1 at first, from the token's affinities."""

    def __init__(self, n_block: int):
        super().__init__()
        self.map = nn.Linear(n_block, n_block)

    def forward(self, affinity: Tensor) -> Tensor:
        """Affinities (B, T, N) to factors (B, T, N) in (0, 2)."""
        return 2 * self.map(affinity).sigmoid()


class RedesignedLayer(nn.Module):
    """Attention and feed-forward layer, each with a norm before it and gated updates."""

    def __init__(self, config: RedesignedConfig):
        super().__init__()
        d = config.d_model
        self.n_block = config.n_block
        self.norm_attention = nn.RMSNorm(d)
        self.attention = Attention(config)
        self.norm_feed_forward = nn.RMSNorm(d)
        self.feed_forward_up = nn.Linear(d, config.d_ff, bias=False)
        self.feed_forward_down = nn.Linear(config.d_ff, d, bias=False)
        self.gate = Gate(config.n_block) if config.gate else None
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, affinity: Tensor | None) -> Tensor:
        """Channels (B, T, C) and the tokens' affinities (B, T, N) to new channels (B, T, C)."""
        factors = self.gate(affinity) if self.gate else None
        x = x + self.gated(self.dropout(self.attention(self.norm_attention(x))), factors)
        hidden = self.dropout(F.gelu(self.feed_forward_up(self.norm_feed_forward(x))))
        return x + self.gated(self.feed_forward_down(hidden), factors)

    def gated(self, update: Tensor, factors: Tensor | None) -> Tensor:
        """An update (B, T, C) times the factors (B, T, N) of its blocks."""
        if factors is None:
            return update
        return (update.unflatten(-1, (self.n_block, -1)) * factors.unsqueeze(-1)).flatten(-2)


class Redesigned(CausalLM):
    """The model of docs/model.md, section "Redesign"."""

    def __init__(self, config: RedesignedConfig):
        super().__init__(config, learned_positions=False)
        if config.gate:
            self.affinity = nn.Embedding(config.vocab_size, config.n_block)  # of all layers
        self.layers = nn.ModuleList(RedesignedLayer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Linear maps keep the variance of their input; those that end attention and feed-forward
        layers start at 0, so that every layer starts as the identity."""
        for name, parameter in self.named_parameters():
            ends_layer = name.endswith(("out.weight", "feed_forward_down.weight"))
            if ends_layer or ".gate." in name:
                nn.init.zeros_(parameter)
            elif name.startswith("embedding"):
                nn.init.normal_(parameter, std=0.02)
            elif name.startswith("affinity"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() > 1 and "sharpness" not in name:
                fan_in = parameter.shape[1]  # nn.Linear (out, in); `project` (parts, in, out)
                nn.init.normal_(parameter, std=fan_in**-0.5)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)  # (B, T, C)
        x = F.rms_norm(x, (x.shape[-1],))
        affinity = self.affinity(input_ids) if self.config.gate else None  # (B, T, N)
        for layer in self.layers:
            x = layer(x, affinity)
        return self.norm(x)

    def hook_points(self) -> dict:
        gates = [layer.gate for layer in self.layers if layer.gate]
        return super().hook_points() | {
            "gate": (lambda _, __, factors: factors, gates),
            "gate_open": (lambda _, __, factors: factors / 2, gates),
        }
