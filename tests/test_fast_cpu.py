"""The kernels of scripts/fast_cpu.py against the package."""

import shutil

import pytest
import torch
from test_attention import reference

import musota
from musota.lab import scaled
from musota.models import base, dense, mu_sota, redesigned

if not shutil.which("g++"):
    pytest.skip("The kernels need g++.", allow_module_level=True)
from scripts import fast_cpu


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("width", [2, 3, 8, 16])
def test_attention_equals_the_reference_in_value_and_gradient(with_entropy, width):
    torch.manual_seed(width)
    leaves = [torch.randn(19, 37, width, requires_grad=True) for _ in range(3)]
    directions = torch.randn(19, 37, width), torch.randn(19, 37) * with_entropy
    found = []
    for y, entropy in (fast_cpu.Attention.apply(*leaves, with_entropy), reference(*leaves)):
        total = (y * directions[0]).sum()
        total += (entropy * directions[1]).sum() if with_entropy else 0
        found.append((y, *torch.autograd.grad(total, leaves)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["optimized", "baseline"])
def test_a_step_equals_that_of_the_package(name, monkeypatch):
    model = musota.build_model(scaled(name, "tiny", vocab_size=1003).model).train()
    ids = torch.randint(1003, (3, 20))

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, ids.roll(-1, 1))[1]
        loss.backward()
        return {"loss": loss, **{name: p.grad for name, p in model.named_parameters()}}

    wanted = step()
    attentions = (dense, "library_attention"), (redesigned, "library_attention")
    parts = (base, "linear_cross_entropy"), (mu_sota, "causal_attention"), *attentions
    for module, part in parts:
        monkeypatch.setattr(module, part, getattr(module, part))  # restored after the test
    fast_cpu.use_kernels()
    assert all(getattr(module, part) is getattr(fast_cpu, part) for module, part in parts)
    for part, value in step().items():
        assert (value - wanted[part]).norm() < 0.1 * wanted[part].norm() + 1e-6, part
