"""Cross-entropy over a large vocabulary without holding all logits at once.

The output layer is applied to a few hundred tokens at a time, and their gradient computed in the
forward pass. Logits become probabilities and then gradients in place: on a CPU each pass over them
costs as much as a matrix product.
"""

import torch
from torch import Tensor

GPU_CHUNK = 2048  # tokens: 400 MB of logits for a vocabulary of 50,000
CACHED_LOGITS = 10_000_000  # fit a CPU's cache: 200 tokens for a vocabulary of 50,000


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a linear layer: autocast's where it is on, else the input's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
    """Yields slices of tokens, each with its hidden states in `dtype` and its float32 logits. The
    caller may change the logits; the next chunk overwrites them."""
    size = min(512, max(CACHED_LOGITS // len(weight), 32))
    size = GPU_CHUNK if hidden.is_cuda else size
    # A GPU sums in float32 anyway; rounded to bf16 the likeliest tokens would often be equal.
    exact = hidden.is_cuda and dtype != torch.float32
    shape = min(size, len(hidden)), len(weight)
    buffer = None if exact else hidden.new_empty(shape, dtype=dtype)
    for start in range(0, len(hidden), size):
        x = hidden[start : start + size].to(dtype)
        if exact:
            logits = torch.mm(x, weight.T, out_dtype=torch.float32)
        else:
            logits = torch.mm(x, weight.T, out=buffer[: len(x)]).float()
        if bias is not None:
            logits += bias
        yield slice(start, start + size), x, logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype):
        cast_weight = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk, x, logits in _chunks(hidden, cast_weight, bias, dtype):
            y = targets[chunk, None]
            highest, of_target = logits.amax(-1, keepdim=True), logits.gather(1, y)
            grad_logits = torch.softmax(logits, -1, out=logits)
            # The largest probability is at least 1/V, so its logarithm is accurate.
            log_total = highest - grad_logits.amax(-1, keepdim=True).log()
            total += (log_total - of_target).sum()
            # The gradient of the summed loss is softmax − onehot. Division by the number of tokens
            # follows in backward, in float32: in fp16 it would lose small values.
            grad_logits.scatter_add_(1, y, torch.full_like(y, -1, dtype=torch.float32))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(dtype)
            grad_hidden[chunk] = grad_logits @ cast_weight
            if dtype == grad_weight.dtype:  # without a temporary tensor
                grad_weight.addmm_(grad_logits.T, x)
            else:
                grad_weight += grad_logits.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.n_token = len(targets)
        return total / len(targets)

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grad_output / ctx.n_token
        grad_bias = None if grad_bias is None else grad_bias * scale
        return grad_hidden * scale, grad_weight.mul_(scale), grad_bias, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias), targets)`, in nats per token: hidden
    (..., d), weight (V, d), bias (V,) or None, targets (...) of token ids."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    dtype = _matmul_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype)


@torch.no_grad()
def score_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats (float32) and whether the top-1 guess is right (bool), for every token,
    in the shape of `targets`; the rest as in `linear_cross_entropy`."""
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    dtype = _matmul_dtype(hidden)
    nats, correct = [], []
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk, _, logits in _chunks(flat, weight.to(dtype), bias, dtype):
            y = labels[chunk, None]
            highest, guess = logits.max(-1, keepdim=True)
            of_target = logits.gather(1, y)
            log_total = highest - torch.softmax(logits, -1, out=logits).gather(1, guess).log()
            nats.append(log_total - of_target)
            correct.append(guess == y)
    return torch.cat(nats).view(targets.shape), torch.cat(correct).view(targets.shape)
