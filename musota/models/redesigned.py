"""The redesign: MU-SOTA's blocks, affinities and gates on a body that reads context.

A token is still a matrix of named blocks. A head a block: the whole token asks, each block answers
with its own cells alone; what is found, and the feed-forward, move all blocks, each as far as the
token's affinity allows.
`config.without` takes single changes back: all rows of the path from `optimized` are this model,
and so is the modern dense twin, which has neither blocks nor gates.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musota.models.attention import largest_score, library_attention, mean_entropy
from musota.models.base import CausalLM, Dropout, Layer
from musota.plan.architectures import RedesignedConfig
from musota.plan.layout import NAMES


class Attention(nn.Module):
    """Causal attention, a head a block: the whole token asks, a block's keys see that block."""

    def __init__(self, config: RedesignedConfig):
        super().__init__()
        d, n, c = config.d_model, config.n_block, config.block_size
        self.n, self.c, self.rotary = n, c, config.has("rotary")
        shapes = [(parts, d // parts, d // parts) for parts in config.parts_read]
        self.query_weight, self.key_weight = (nn.Parameter(torch.empty(s)) for s in shapes)
        self.value = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        # How sharply a head chooses: length of its queries, where those are normalised.
        self.sharpness = nn.Parameter(torch.ones(n, 1, 1)) if config.has("query norm") else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) to scaled queries, keys and values, (B, N, T, C/N) each."""
        qk = torch.stack([self.read(x, self.query_weight), self.read(x, self.key_weight)])
        if self.sharpness is not None:
            qk = F.rms_norm(qk, (self.c,))
        q, k = rotate(qk) if self.rotary else qk
        q = q * (self.c**-0.5 if self.sharpness is None else self.sharpness * self.c**-0.5)
        return q, k, self.by_head(self.value(x))

    def read(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, T, C) to (B, N, T, C/N), each part of the cells by its own map (parts, in, out)."""
        by_part = x.reshape(-1, len(weight), weight.shape[1]).transpose(0, 1)
        return self.by_head(torch.bmm(by_part, weight).transpose(0, 1).reshape(x.shape))

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n, self.c)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = library_attention(*self.heads(x))
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """(…, T, c) turned pair by pair by an angle that grows with the place, so that q · k knows how
    far apart two tokens are (rotary positions, Su et al. 2021)."""
    T, c = x.shape[-2:]
    frequency = 10_000.0 ** -(torch.arange(0, c, 2, device=x.device) / c)
    angle = torch.arange(T, device=x.device)[:, None] * frequency  # (T, c/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Gate(nn.Module):
    """How far each block of a token moves: 2 × sigmoid, from its affinities; 1 at the start."""

    def __init__(self, config: RedesignedConfig):
        super().__init__()
        n = config.n_block
        self.map = nn.Linear(n, n) if config.has("one table") else None

    def forward(self, affinity: Tensor) -> Tensor:
        """Affinities (B, T, N) to factors (B, T, N) in (0, 2)."""
        return 2 * (self.map(affinity) if self.map else affinity).sigmoid()


class RedesignedLayer(Layer):
    def __init__(self, config: RedesignedConfig):
        super().__init__()
        d = config.d_model
        self.n_block = config.n_block
        self.norm_first, self.keeps = config.has("norm before"), config.has("stream")
        self.norm_attention = nn.RMSNorm(d)
        self.attention = Attention(config)
        self.norm_feed_forward = nn.RMSNorm(d)
        self.feed_forward_up = nn.Linear(d, config.d_ff, bias=False)
        self.feed_forward_down = nn.Linear(config.d_ff, d, bias=False)
        self.gate = Gate(config) if config.has("gate") else None
        self.kept = NAMES[self.n_block].index("I") if config.has("names") else None
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, affinity: Tensor | None) -> Tensor:
        """Cells (B, T, C) and the tokens' affinities (B, T, N) to new cells (B, T, C)."""
        gate = self.gate(affinity) if self.gate else None
        if self.norm_first:
            x = x + self.gated(self.dropout(self.attention(self.norm_attention(x))), gate)
            return x + self.gated(self.feed_forward(self.norm_feed_forward(x)), gate)
        z = self.norm_attention(x + self.dropout(self.attention(x)))
        z = self.norm_feed_forward(z + self.feed_forward(z))
        return x + self.gated(z if self.keeps else z - x, gate)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.feed_forward_down(self.dropout(F.gelu(self.feed_forward_up(x))))

    def gated(self, update: Tensor, gate: Tensor | None) -> Tensor:
        """(B, T, C) times one factor a block: its gate, and 0 for the block that is kept."""
        blocks = update.unflatten(-1, (self.n_block, -1))
        if gate is not None:
            blocks = blocks * gate.unsqueeze(-1)
        if self.kept is not None:
            moved = torch.arange(self.n_block, device=update.device) != self.kept
            blocks = blocks * moved.unsqueeze(-1)
        return blocks.flatten(-2)


class Redesigned(CausalLM):
    """The model of docs/model.md, section "The redesign"."""

    ledger_groups: ClassVar = CausalLM.ledger_groups | {
        "embedding": "embedding (also output)",
        "affinity": "affinity tables",
    }
    decayed_groups = frozenset({"attention", "feed-forward", "output"})

    def __init__(self, config: RedesignedConfig):
        super().__init__(config, learned_positions=not config.has("rotary"))
        d, N = config.d_model, config.n_block
        if config.has("gate"):
            tables = 1 if config.has("one table") else config.n_layer
            self.affinity = nn.Embedding(config.vocab_size, tables * N)
        self.layers = nn.ModuleList(RedesignedLayer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(d)
        if not config.has("tied"):
            self.output = nn.Linear(d, config.vocab_size)
        self.start(config)

    @torch.no_grad()
    def start(self, config: RedesignedConfig) -> None:
        """Maps keep the size of what they are given; those that end attention and feed-forward
        start at 0."""
        quiet = config.has("quiet start")
        for name, parameter in self.named_parameters():
            is_map = name.startswith("layers.") and parameter.dim() > 1 and "sharpness" not in name
            is_last = name.endswith(("out.weight", "feed_forward_down.weight"))
            if "gate" in name or name.endswith("bias") or (is_last and quiet):
                nn.init.zeros_(parameter)
            elif is_map and quiet:
                fan_in = parameter.shape[1]  # of nn.Linear (out, in); of `read` (parts, in, out)
                nn.init.normal_(parameter, std=fan_in**-0.5)
            elif is_map or name.startswith(("embedding", "positions", "output")):
                nn.init.normal_(parameter, std=0.02)
            elif name.startswith("affinity"):
                nn.init.normal_(parameter, std=0.1)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)  # (B, T, C)
        if self.config.has("embedding norm"):
            x = F.rms_norm(x, (x.shape[-1],))
        if self.config.has("names"):
            n, c = NAMES[self.config.n_block].index("C1"), self.config.block_size
            before = F.pad(x[:, :-1, n * c : (n + 1) * c], (0, 0, 1, 0))  # of the previous token
            x = torch.cat([x[..., : n * c], before, x[..., (n + 1) * c :]], -1)
        affinities = [None] * len(self.layers)
        if self.config.has("one table"):
            affinities = [self.affinity(input_ids)] * len(self.layers)  # (B, T, N)
        elif self.config.has("gate"):
            affinities = self.affinity(input_ids).chunk(len(self.layers), -1)
        for layer, affinity in zip(self.layers, affinities, strict=True):
            x = layer(x, affinity)
        return self.norm(x)

    def looks(self) -> dict:
        def heads(attention: Attention, x: Tensor) -> list[Tensor]:
            return [part.flatten(0, 1) for part in attention.heads(x)]

        attentions = [layer.attention for layer in self.layers]
        gates = [layer.gate for layer in self.layers if layer.gate]
        return {
            "largest_score": (lambda one, x, _: largest_score(*heads(one, *x)[:2]), attentions),
            "attention_entropy": (lambda one, x, _: mean_entropy(*heads(one, *x)), attentions),
            "gate": (lambda _, __, gate: gate, gates),
            "gate_open": (lambda _, __, gate: gate / 2, gates),
        }
