"""The equations of docs/model.md in plain torch, with which tests and the benchmark compare."""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musota.config import HEADS_PER_BLOCK, MuConfig
from musota.models.base import CausalLM


class ReferenceModel(nn.Module):
    """`model`, with the same weights, computed block by block and with all logits at once. It
    returns (None, loss)."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        model = self.model
        x = self.drop(model.embedding(input_ids) + model.positions.weight[: input_ids.shape[1]])
        if isinstance(model.config, MuConfig):
            affinities = model.affinity(input_ids).chunk(model.config.n_layer, -1)
            for layer, affinity in zip(model.layers, affinities, strict=True):
                x = self.mu_layer(layer, x, affinity)
        else:
            for layer in model.layers:
                x = self.dense_layer(layer, x)
        logits = F.linear(model.norm(x), model.output_weight, model.output_bias)
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.model.config.dropout, self.training)

    def mu_layer(self, layer: nn.Module, x: Tensor, affinity: Tensor) -> Tensor:
        sizes = self.model.config.layout.sizes
        groups = [zip(*group.parameters(), strict=True) for group in layer.block_attention]
        blocks = zip(x.split(sizes, -1), chain(*groups), strict=True)  # with each block's own maps
        alone = [attend(block, HEADS_PER_BLOCK, *own)[0] for block, own in blocks]
        y = self.drop(torch.cat(alone, -1))
        cross = layer.cross_attention
        across, weights = attend(y, cross.n_head, *cross.parameters(), need_weights=True)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean(1)  # (B, T)
        z = layer.norm_attention(y + self.drop(across))
        hidden = self.drop(F.gelu(layer.feed_forward_up(z)))
        z = layer.norm_feed_forward(z + layer.feed_forward_down(hidden))
        hidden = F.gelu(layer.gate.up(torch.cat([affinity, entropy.unsqueeze(-1)], -1)))
        sensitivity = layer.gate.beta * torch.sigmoid(layer.gate.down(hidden))  # (B, T, N)
        parts = zip(sensitivity.unbind(-1), x.split(sizes, -1), z.split(sizes, -1), strict=True)
        return torch.cat([old + s.unsqueeze(-1) * (new - old) for s, old, new in parts], -1)

    def dense_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        maps = *layer.attention_in.parameters(), *layer.attention_out.parameters()
        x = x + self.drop(attend(layer.norm_attention(x), layer.n_head, *maps)[0])
        hidden = self.drop(F.gelu(layer.feed_forward_up(layer.norm_feed_forward(x))))
        return x + layer.feed_forward_down(hidden)


def attend(x: Tensor, n_head: int, in_weight, in_bias, out_weight, out_bias, need_weights=False):
    """Torch's causal multi-head attention: (B, T, C) to the same, and its weights (B, h, T, T)."""
    T, C = x.shape[1:]
    future = x.new_full((T, T), float("-inf")).triu(1)
    x = x.transpose(0, 1)
    y, weights = F.multi_head_attention_forward(
        *(x, x, x, C, n_head, in_weight, in_bias.flatten(), None, None, False, 0.0),
        *(out_weight, out_bias.flatten()),
        attn_mask=future,
        need_weights=need_weights,
        average_attn_weights=False,
        is_causal=not need_weights,
    )
    return y.transpose(0, 1), weights
