import pytest
import torch
import torch.nn.functional as F
from conftest import LargestTensor, fast_cpu

from musota.models import loss as loss_module
from musota.models.loss import linear_cross_entropy, score_tokens


def _problem(tokens, bias=True, d=16):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, d, requires_grad=True)
    weight = torch.randn(97, d, requires_grad=True)
    bias = torch.randn(97, requires_grad=True) if bias else None
    return hidden, weight, bias, torch.randint(97, (tokens,))


FUNCTIONS = {"package": linear_cross_entropy}
FUNCTIONS |= {"kernels": fast_cpu.linear_cross_entropy} if fast_cpu else {}
HALVES = [("package", torch.float16), *((name, torch.bfloat16) for name in FUNCTIONS)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("d, tokens, bias", [(16, 1, True), (76, 512, False), (112, 1025, True)])
@pytest.mark.parametrize("scale", [0.3, 30])
def test_equals_the_plain_loss_in_value_and_gradient(d, tokens, bias, scale, function):
    hidden, weight, bias, targets = _problem(tokens, bias, d)
    hidden = hidden * scale
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    got = FUNCTIONS[function](hidden, weight, bias, targets)
    torch.testing.assert_close(got, wanted)
    gradients = (torch.autograd.grad(3 * loss, leaves) for loss in (got, wanted))
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("function", "dtype"), HALVES)
def test_under_autocast_it_is_as_near_as_the_dtype_allows(function, dtype, bias):
    hidden, weight, bias, targets = _problem(600, bias)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    with torch.autocast("cpu", dtype=dtype):
        got = FUNCTIONS[function](hidden, weight, bias, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)
    gradients = (torch.autograd.grad(loss, leaves) for loss in (got, wanted))
    for mine, plain in zip(*gradients, strict=True):
        assert mine.dtype == torch.float32 and (mine - plain).norm() < 0.01 * plain.norm()


def test_no_tensor_as_large_as_all_logits_is_ever_made(monkeypatch):
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", 0)  # chunks of 32 tokens
    hidden, weight, bias, targets = _problem(640)
    with LargestTensor() as watch:
        linear_cross_entropy(hidden, weight, bias, targets).backward()
        score_tokens(hidden, weight, bias, targets)
    assert watch.elements < 640 * 97 / 4


def test_scores_are_the_losses_and_hits_of_each_token():
    hidden, weight, bias, targets = _problem(700)
    logits = F.linear(hidden, weight, bias)
    nats, hits = score_tokens(hidden.view(7, 100, 16), weight, bias, targets.view(7, 100))
    assert nats.shape == hits.shape == (7, 100)
    torch.testing.assert_close(nats.flatten(), F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(hits.flatten(), logits.argmax(-1) == targets)
    # All logits equal: the guess is the first token, not whatever the target is.
    _, hits = score_tokens(torch.zeros(97, 16), torch.zeros(97, 16), None, torch.arange(97))
    assert hits.sum() == 1 and hits[0]
