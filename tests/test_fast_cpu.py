"""Training with scripts/fast_cpu.py; test_attention.py and test_loss.py check its kernels."""

import pytest
import torch
from conftest import fast_cpu

import musota
from musota.lab import scaled
from musota.models import base, dense, mu_sota, redesigned

pytestmark = pytest.mark.skipif(not fast_cpu, reason="needs g++")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["optimized", "baseline", "simplified", "redesigned"])
def test_a_step_equals_that_of_the_package(name, dtype, monkeypatch):
    model = musota.build_model(scaled(name, "tiny", vocab_size=1003).model).train()
    ids = torch.randint(1003, (3, 20))

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids, ids.roll(-1, 1))[1]
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss}

    wanted = step()
    parts = dict.fromkeys((dense, redesigned), "library_attention")
    parts |= {base: "linear_cross_entropy", mu_sota: "causal_attention"}
    for module, part in parts.items():
        monkeypatch.setattr(module, part, None)  # until the next line; restored after the test
    fast_cpu.use_kernels()
    monkeypatch.setattr(fast_cpu, "package_attention", None)  # it is not called
    if name == "baseline":  # whose heads have a kernel at this size; its scores are scaled
        monkeypatch.setattr(fast_cpu, "package_library_attention", None)
    if dtype == torch.bfloat16 or fast_cpu.KERNELS.has_products():
        monkeypatch.setattr(fast_cpu, "package_cross_entropy", None)
    error = 0.1 if dtype == torch.bfloat16 else 1e-4
    for part, value in step().items():
        assert (value - wanted[part]).norm() < error * wanted[part].norm() + 1e-6, part


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("place", "bad"), [(0, torch.nan), (1002, torch.inf)])  # the ends
def test_a_loss_that_is_not_finite_is_seen(place, bad, bf16):
    hidden, weight = torch.ones(3, 16), torch.ones(1003, 16).index_fill(0, torch.tensor(place), bad)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = fast_cpu.linear_cross_entropy(hidden, weight, None, torch.arange(3))
    assert not loss.isfinite()


def test_a_large_bias_does_not_overflow():
    bias, zeros = torch.arange(97.0) + 104, torch.zeros(97, 16)  # up to 200
    loss = fast_cpu.ExactCrossEntropy.apply(zeros, zeros, bias, torch.arange(97))
    torch.testing.assert_close(loss, bias.logsumexp(0) - bias.mean())


def test_gradients_of_logits_are_rounded_to_the_nearest_bf16():
    logits, bias = torch.randn(40, 1003).bfloat16(), torch.randn(1003)  # 1,003: a partial vector
    targets, d_bias = torch.randint(1003, (40,)), torch.zeros(1003)
    exact = (logits.float() + bias).softmax(-1) - torch.eye(1003)[targets]
    fast_cpu.call(fast_cpu.KERNELS.cross_entropy, logits, bias, targets, d_bias, 40, 1003)
    torch.testing.assert_close(logits.float(), exact, rtol=1.01 * 2**-8, atol=0)
    torch.testing.assert_close(d_bias, exact.sum(0))
