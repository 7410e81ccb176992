"""`musota` with C++ kernels for CPUs: python scripts/fast_cpu.py train optimized --precision bf16

Replaces causal attention, and in bf16 the cross-entropy of the output layer, by the kernels of
cpu_kernels.cpp, which compute the same in less time. Takes the arguments of `python -m musota`.
Needs g++ and one thread a run (OMP_NUM_THREADS=1).
"""

import ctypes
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from musota.models import attention, base, dense, loss, mu_sota, redesigned

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
COMPILE = ["g++", "-std=c++17", "-O3", "-march=native", "-ffast-math", "-fno-finite-math-only"]
COMPILE += ["-mprefer-vector-width=512", "-shared", "-fPIC"]
CHUNK = 512  # tokens whose logits are computed at once
WIDTHS = 2, 3, 6, 8, 16, 26  # of heads; the package computes all others

package_attention = attention.causal_attention
package_library_attention = attention.library_attention
package_cross_entropy = loss.linear_cross_entropy


def load_kernels() -> ctypes.CDLL:
    """The kernels, compiled for this CPU unless a compiled copy of the same source exists."""
    flags = subprocess.run([*COMPILE, "-Q", "--help=target"], capture_output=True).stdout
    name = "cpu_kernels_" + hashlib.sha256(SOURCE.read_bytes() + flags).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"{name}.so")
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, library.name)
            subprocess.run([*COMPILE, str(SOURCE), "-o", str(built)], check=True)
            built.replace(library)
    kernels = ctypes.CDLL(str(library))
    kernels.cross_entropy.restype = ctypes.c_double
    return kernels


KERNELS = load_kernels()


def call(function, *arguments: Tensor | int | None) -> float:
    """Calls a kernel with the addresses of contiguous tensors, null for None, and numbers."""
    address = ctypes.c_void_p
    return function(
        *(ctypes.c_int64(x) if isinstance(x, int) else address(x if x is None else x.data_ptr())
          for x in arguments)
    )  # fmt: skip


class Attention(torch.autograd.Function):
    """`musota.models.attention._TiledAttention` of heads as wide as one of WIDTHS."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, q, k, v, with_entropy):
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse, mean = torch.empty_like(q), q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
        call(KERNELS.attention_forward, q, k, v, out, lse, mean, *q.shape)
        ctx.save_for_backward(q, k, v, out, lse, mean)
        return out, (lse - mean if with_entropy else None)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, d_out, d_entropy):
        saved, shape = ctx.saved_tensors, ctx.saved_tensors[0].shape
        gradients = [torch.empty_like(saved[0]) for _ in range(3)]
        d_entropy = None if d_entropy is None else d_entropy.contiguous()
        d_out = d_out.contiguous()
        call(KERNELS.attention_backward, *saved, d_out, d_entropy, *gradients, *shape)
        return *gradients, None


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`musota.models.attention.causal_attention`."""
    attend = Attention.apply if q.shape[-1] in WIDTHS else package_attention
    return attend(q, k, v, with_entropy)


def library_attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """`musota.models.attention.library_attention`."""
    if q.shape[-1] not in WIDTHS:
        return package_library_attention(q, k, v, scale)
    with torch.autocast("cpu", enabled=False):
        heads = (x.float().reshape(-1, *x.shape[-2:]) for x in (q * scale, k, v))
        return Attention.apply(*heads, False)[0].view(q.shape).to(v)


class CrossEntropy(torch.autograd.Function):
    """`musota.models.loss._LinearCrossEntropy` in bf16."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        x, cast_weight = hidden.bfloat16(), weight.bfloat16()
        columns = cast_weight.T.contiguous()  # the product with it takes a fifth to a half the time
        logits = x.new_empty(len(x), len(weight))
        d_hidden, d_bias = torch.empty_like(hidden), None if bias is None else bias * 0
        total = 0.0
        for start in range(0, len(x), CHUNK):
            chunk = slice(start, start + CHUNK)
            part = torch.mm(x[chunk], columns, out=logits[chunk])
            total += call(KERNELS.cross_entropy, part, bias, targets[chunk], d_bias, *part.shape)
            d_hidden[chunk] = part @ cast_weight
        ctx.save_for_backward(d_hidden, (logits.T @ x).float(), d_bias)
        ctx.n_token = len(x)
        return hidden.new_tensor(total / len(x))

    @staticmethod
    def backward(ctx, d_loss):
        scale = float(d_loss) / ctx.n_token
        return *(None if x is None else x.mul_(scale) for x in ctx.saved_tensors), None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """`musota.models.loss.linear_cross_entropy`."""
    if loss._matmul_dtype(hidden) != torch.bfloat16:
        return package_cross_entropy(hidden, weight, bias, targets)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    with torch.autocast("cpu", enabled=False):
        return CrossEntropy.apply(hidden.float(), weight, bias, targets.contiguous())


def use_kernels() -> None:
    mu_sota.causal_attention = causal_attention
    base.linear_cross_entropy = linear_cross_entropy
    dense.library_attention = redesigned.library_attention = library_attention


if __name__ == "__main__":
    from musota.training import device
    from musota.workbook.cli import main

    about_machine = device.about_machine

    def about_machine_and_kernels(used: torch.device | None = None) -> dict:
        about = about_machine(used)
        return about | {"device": f"{about['device']} (scripts/fast_cpu.py)"}

    device.about_machine = about_machine_and_kernels
    use_kernels()
    sys.exit(main())
