import pytest
import torch
from conftest import LargestTensor, fast_cpu

from musota.models import attention
from musota.models.attention import attend_with_library, causal_attention

WAYS = {"tiled": causal_attention, "library": attend_with_library}
WAYS |= {"kernels": fast_cpu.causal_attention} if fast_cpu else {}


def reference(q, k, v):
    """Attention and its entropy, query by query."""
    outputs, spreads = [], []
    for t in range(q.shape[1]):
        weights = torch.einsum("gc,gsc->gs", q[:, t], k[:, : t + 1]).softmax(-1)
        outputs.append(torch.einsum("gs,gsc->gc", weights, v[:, : t + 1]))
        spreads.append(torch.special.entr(weights).sum(-1))
    return torch.stack(outputs, 1), torch.stack(spreads, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("T", "width"), [(1, 2), (37, 3), (33, 6), (48, 8), (33, 16), (33, 26)])
def test_equals_the_reference_in_value_and_gradient(way, with_entropy, T, width, monkeypatch):
    # Tiles of ten rows and launches of three heads do not divide the sizes above.
    for name, size in {"TILE_ROWS": 10, "TILE_SIZE": 500, "MOST_HEADS": 3}.items():
        monkeypatch.setattr(attention, name, size)
    torch.manual_seed(T)
    leaves = [torch.randn(19, T, width, dtype=torch.double, requires_grad=True) for _ in range(3)]
    got, wanted = WAYS[way](*leaves, with_entropy), reference(*leaves)
    error = {"library": 1e-5, "kernels": 1e-4}.get(way)  # in float32
    loose = {"rtol": error, "atol": error} if error else {}
    if not with_entropy:
        assert got[1] is None
        got, wanted = got[:1], wanted[:1]
    directions = [torch.randn_like(one) for one in wanted]
    gradients = []
    for found in (got, wanted):
        total = sum((one * d).sum() for one, d in zip(found, directions, strict=True))
        gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))
    for mine, theirs in zip((*got, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, theirs, check_dtype=False, **loose)


def test_large_scores_stay_finite():
    q, k, v = (torch.full((1, 5, 2), 200.0, requires_grad=True) for _ in range(3))
    y, spread = causal_attention(q, k, v, with_entropy=True)
    (y.sum() + spread.sum()).backward()
    assert y.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v))
    torch.testing.assert_close(spread[0], torch.arange(1, 6).log(), rtol=0, atol=0.05)


def test_autocast_computes_it_in_full_precision():
    q, k, v = (torch.randn(2, 9, 4, dtype=torch.bfloat16) for _ in range(3))
    wanted = causal_attention(q.float(), k.float(), v.float(), with_entropy=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = causal_attention(q, k, v, with_entropy=True)
    torch.testing.assert_close(got, wanted)


def test_no_more_weights_are_held_than_a_tile(monkeypatch):
    monkeypatch.setattr(attention, "TILE_SIZE", 4000)
    monkeypatch.setattr(attention, "TILE_ROWS", 16)
    leaves = [torch.randn(6, 100, 2, requires_grad=True) for _ in range(3)]
    with LargestTensor() as watch:
        y, spread = causal_attention(*leaves, with_entropy=True)
        (y.sum() + spread.sum()).backward()
    assert watch.elements < 6 * 100 * 100 / 2
