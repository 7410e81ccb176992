"""Causal attention of very narrow heads (2, 3 or 8 channels), and its entropy.

On a CPU the weights are computed in tiles that fit the cache, and again in the backward pass (as in
FlashAttention, Dao et al. 2022); tiles that lie in the future are skipped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE_ROWS = 96  # queries of a tile
TILE_SIZE = 2**19  # weights of a tile, over several heads: 2 MB
MOST_HEADS = 65_535  # in one launch of a GPU kernel
COLUMNS = 16  # matrix products are padded to a multiple of this many columns, for speed


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of G heads, (G, T, c) each, and the entropy of its weights in nats, (G, T) or None.
    Scores are q · k: scale q beforehand."""
    attend = _TiledAttention.apply if q.device.type == "cpu" else attend_with_library
    return attend(q, k, v, with_entropy)


def attend_with_library(q: Tensor, k: Tensor, v: Tensor, with_entropy: bool):
    """`causal_attention` with torch's fused kernel, or with all weights for the entropy."""
    if with_entropy:  # recomputed in the backward pass: stored, the weights are half of all memory
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(_attend_with_weights, q, k, v, **options)
    if len(q) > MOST_HEADS:
        some = zip(*(x.split(MOST_HEADS) for x in (q, k, v)), strict=True)
        return torch.cat([attend_with_library(*part, False)[0] for part in some]), None
    return library_attention(q[None], k[None], v[None])[0], None


def _attend_with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    weights = (q @ k.mT).float().masked_fill(future, float("-inf")).softmax(-1)  # (G, T, T)
    smallest = torch.finfo(weights.dtype).tiny  # for a finite gradient where a weight is 0
    entropy = -(weights * weights.clamp_min(smallest).log()).sum(-1)
    return weights.to(v.dtype) @ v, entropy


def library_attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Causal attention of (B, h, T, c) each, with torch's fused kernel. On a GPU it needs widths in
    multiples of 8; on a CPU its backward pass in bf16 takes twice as long as in float32."""
    options = {"is_causal": True, "scale": scale}
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(v)
    width = v.shape[-1]
    q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options)[..., :width]


def split_heads(qkv: Tensor, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projections (B, T, 3C) to scaled queries, keys and values of h heads, (B·h, T, C/h) each."""
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, h, -1).permute(2, 0, 3, 1, 4).reshape(3, B * h, T, -1)
    return q * q.shape[-1] ** -0.5, k, v


def merge_heads(y: Tensor, h: int) -> Tensor:
    """(B·h, T, C/h) to (B, T, C)."""
    return y.unflatten(0, (-1, h)).transpose(1, 2).flatten(2)


def largest_score(q: Tensor, k: Tensor) -> Tensor:
    """The largest |q · k| of a query and a key not after it; (…, T, c) each. 16 heads at a time."""
    some = zip(q.flatten(0, -3).split(16), k.flatten(0, -3).split(16), strict=True)
    return torch.stack([(a @ b.mT).tril().abs().amax() for a, b in some]).amax()


def mean_entropy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean entropy of the attention weights in nats; (…, T, c) each."""
    q, k, v = (x.flatten(0, -3) for x in (q, k, v))
    return causal_attention(q, k, v, with_entropy=True)[1].mean()


class _TiledAttention(torch.autograd.Function):
    """The entropy is log Σ exp(score) − Σ p·score, and Σ p·score = q · Σ p·k. So the keys are
    appended to the values, and one product with the weights gives both terms."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, q, k, v, with_entropy):
        width = v.shape[-1]
        values = torch.cat([v, k], -1) if with_entropy else v
        padded = _widen(values)
        out = torch.empty_like(padded)
        log_total = q.new_empty(*q.shape[:2], 1)
        for rows, keys, scores in _tiles(q, k):
            highest = scores.amax(-1, keepdim=True) if with_entropy else None
            weights = torch.softmax(scores, -1, out=scores)
            if with_entropy:  # the largest weight is at least 1/T, so its logarithm is accurate
                log_total[rows] = highest - weights.amax(-1, keepdim=True).log()
            out[rows] = torch.bmm(weights, padded[keys])
        out = out[..., : values.shape[-1]].contiguous()
        ctx.save_for_backward(q, k, values, out)
        ctx.with_entropy = with_entropy
        if not with_entropy:
            return out, None
        return out[..., :width], log_total[..., 0] - (q * out[..., width:]).sum(-1)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_out, grad_entropy):
        q, k, values, out = ctx.saved_tensors
        width = q.shape[-1]
        upstream = grad_out
        if ctx.with_entropy:  # d entropy / d score = −p (score − Σ p·score)
            upstream = torch.cat([grad_out, -grad_entropy[..., None] * q], -1)
        # d loss / d score = p (upstream · values − upstream · out); one product for the bracket.
        shift = -(upstream * out).sum(-1, keepdim=True)
        upstream = torch.cat([upstream, shift], -1)
        values = torch.cat([values, torch.ones_like(shift)], -1)
        q_wide, k_wide, grad_wide = _widen(q), _widen(k), _widen(grad_out)
        grad_q, grad_k, grad_v = (torch.zeros_like(q_wide) for _ in range(3))
        for rows, keys, scores in _tiles(q, k):
            weights = torch.softmax(scores, -1, out=scores)
            grad_v[keys] += torch.bmm(weights.mT, grad_wide[rows])
            grad_scores = torch.bmm(upstream[rows], values[keys].mT).mul_(weights)
            grad_q[rows] = torch.bmm(grad_scores, k_wide[keys])
            grad_k[keys] += torch.bmm(grad_scores.mT, q_wide[rows])
        return *(grad[..., :width] for grad in (grad_q, grad_k, grad_v)), None


def _tiles(q: Tensor, k: Tensor):
    """Yields (rows of q, rows of k, their scores with the future at −∞) tile by tile."""
    G, T, _ = q.shape
    for start in range(0, T, TILE_ROWS):
        end = min(start + TILE_ROWS, T)
        future = q.new_full((end - start, end), float("-inf")).triu(1 + start)
        heads = max(1, TILE_SIZE // future.numel())
        buffer = q.new_empty(min(heads, G), *future.shape)  # each tile overwrites the last
        for first in range(0, G, heads):
            some = slice(first, first + heads)
            rows, keys = (some, slice(start, end)), (some, slice(end))
            scores = torch.baddbmm(future, q[rows], k[keys].mT, out=buffer[: G - first])
            yield rows, keys, scores


def _widen(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % COLUMNS))
