"""Cross-entropy over a large vocabulary without ever holding all logits.

The output layer is applied to a few hundred tokens at a time. In training the gradient of each
chunk is computed in the forward pass, while its logits are at hand, so that nothing of size
tokens × vocabulary outlives its chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 512


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype a linear layer would compute in here: autocast's, else the input's own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype):
        n_token = targets.numel()
        cast_weight = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, n_token, CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            x, y = hidden[chunk].to(dtype), targets[chunk, None]
            logits = F.linear(x, cast_weight).float()  # (chunk, V)
            if bias is not None:
                logits += bias
            log_total = logits.logsumexp(-1, keepdim=True)
            total += (log_total - logits.gather(1, y)).sum()
            # The gradient of the summed loss is softmax − onehot; in fp16 dividing by the number of
            # tokens here would lose small values, so that happens in backward, in fp32.
            grad_logits = logits.sub_(log_total).exp_()
            grad_logits.scatter_add_(1, y, torch.full_like(y, -1, dtype=torch.float32))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(dtype)
            grad_hidden[chunk] = grad_logits @ cast_weight
            grad_weight += grad_logits.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.n_token = n_token
        return total / n_token

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grad_output / ctx.n_token
        weight_dtype, bias_dtype = ctx.dtypes
        grad_bias = None if grad_bias is None else (grad_bias * scale).to(bias_dtype)
        return (
            (grad_hidden * scale).to(grad_hidden.dtype),
            grad_weight.mul_(scale).to(weight_dtype),
            grad_bias,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """Mean cross-entropy, in nats per token, of `hidden @ weight.T + bias` against `targets`.

    hidden (..., d), weight (V, d), bias (V,) or None, targets (...) of token ids. Equal in value
    and gradient to `F.cross_entropy(F.linear(hidden, weight, bias), targets)`.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    dtype = _matmul_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype)


@torch.no_grad()
def score_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats (float32) and whether the top-1 guess is right (bool), for every token.

    Shapes as in `linear_cross_entropy`; both results have the shape of `targets`.
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    dtype = _matmul_dtype(hidden)
    nats = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    correct = torch.empty(labels.shape, dtype=torch.bool, device=labels.device)
    with torch.autocast(hidden.device.type, enabled=False):
        cast_weight = weight.to(dtype)
        for start in range(0, labels.numel(), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            logits = F.linear(flat[chunk].to(dtype), cast_weight).float()
            if bias is not None:
                logits += bias
            nats[chunk] = F.cross_entropy(logits, labels[chunk], reduction="none")
            correct[chunk] = logits.argmax(-1) == labels[chunk]
    return nats.view(targets.shape), correct.view(targets.shape)
