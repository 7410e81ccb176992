"""`musota` with C++ kernels for CPUs: python scripts/fast_cpu.py train optimized --precision bf16

Takes the arguments of `python -m musota`. Causal attention and the cross-entropy of the output
layer are computed by cpu_kernels.cpp, which g++ compiles at the first start. The kernels use one
thread: set OMP_NUM_THREADS=1. The package computes them on GPUs, with torch.compile, for heads of a
width that has no kernel, and the float32 cross-entropy on CPUs without AVX-512.
"""

import ctypes
import hashlib
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed
from musota.files import cache_folder
from musota.models import attention, base, dense, loss, mu_sota, redesigned

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
# Not -ffast-math: GCC before 13 would switch on flush-to-zero in the whole process.
COMPILE = ["g++", "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi"]
COMPILE += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
COMPILE += ["-freciprocal-math"]
CHUNK = 512  # tokens whose logits are computed at once

package_attention = attention.causal_attention
package_library_attention = attention.library_attention
package_cross_entropy = loss.linear_cross_entropy


def load_kernels() -> ctypes.CDLL:
    """The kernels, compiled for this CPU unless that was done before. Exits if g++ fails."""
    run = partial(subprocess.run, check=True)
    try:
        target = run([*COMPILE, "-Q", "--help=target"], capture_output=True).stdout
        source = SOURCE.read_bytes() + " ".join(COMPILE).encode() + target
        library = cache_folder() / f"cpu_kernels_{hashlib.sha256(source).hexdigest()[:16]}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                built = Path(folder, library.name)
                run([*COMPILE, str(SOURCE), "-o", str(built)])
                built.replace(library)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"The kernels could not be compiled with g++ ({error}). Use python -m musota.")
    kernels = ctypes.CDLL(str(library))
    kernels.cross_entropy.restype = kernels.linear_cross_entropy.restype = ctypes.c_double
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
    """`musota.models.attention._TiledAttention` of heads that have a kernel."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, q, k, v, with_entropy):
        q, k, v = (x.float().contiguous() for x in (q, k, v))
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


def has_kernel(q: Tensor) -> bool:
    """Whether there is a kernel for these heads, (…, T, c); the package computes all others."""
    on_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and bool(call(KERNELS.has_kernels, q.shape[-1]))


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`musota.models.attention.causal_attention`."""
    attend = Attention.apply if has_kernel(q) else package_attention
    return attend(q, k, v, with_entropy)


def library_attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """`musota.models.attention.library_attention`."""
    if not has_kernel(q):
        return package_library_attention(q, k, v, scale)
    with torch.autocast("cpu", enabled=False):
        heads = (x.reshape(-1, *x.shape[-2:]) for x in (q.float() * scale, k, v))
        return Attention.apply(*heads, False)[0].view(q.shape).to(v)


class CrossEntropy(torch.autograd.Function):
    """`musota.models.loss._LinearCrossEntropy` in bf16. Holds the logits of all tokens, in bf16."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        x, cast_weight = hidden.bfloat16(), weight.bfloat16()
        columns = cast_weight.T.contiguous()  # the product with a view takes 2 to 5 times as long
        logits = x.new_empty(len(x), len(weight))
        d_hidden = torch.empty_like(hidden)
        d_bias = None if bias is None else torch.zeros_like(bias)
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


class ExactCrossEntropy(torch.autograd.Function):
    """The same in float32. The loss is NaN if the exponentials of a row are too small to add."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        (n, d), V = hidden.shape, len(weight)
        # An upper bound of each row's logits (Cauchy-Schwarz inequality).
        limit = hidden.norm(dim=1) * weight.norm(dim=1).max() + (0 if bias is None else bias.max())
        if d % 16:
            hidden, weight = (F.pad(x, (0, -d % 16)) for x in (hidden, weight))
        gradients = [x if x is None else torch.zeros_like(x) for x in (hidden, weight, bias)]
        given = hidden, weight, bias, targets, limit
        total = call(KERNELS.linear_cross_entropy, *given, *gradients, n, hidden.shape[1], V)
        ctx.save_for_backward(gradients[0][:, :d], gradients[1][:, :d], gradients[2])
        ctx.n_token = n
        return hidden.new_tensor(total / n)

    backward = CrossEntropy.backward


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """`musota.models.loss.linear_cross_entropy`."""
    dtype = loss._matmul_dtype(hidden)
    exact = dtype == torch.float32 and KERNELS.has_products()
    if hidden.device.type != "cpu" or not (exact or dtype == torch.bfloat16):
        return package_cross_entropy(hidden, weight, bias, targets)
    x, y = hidden.reshape(-1, hidden.shape[-1]).float(), targets.reshape(-1).long().contiguous()
    if y.min() < 0 or y.max() >= len(weight):  # the kernel would write elsewhere
        raise IndexError("A target lies outside the vocabulary.")
    b = None if bias is None else bias.float()
    function = ExactCrossEntropy if exact else CrossEntropy
    with torch.autocast("cpu", enabled=False):
        nats = function.apply(x.contiguous(), weight.contiguous(), b, y)
    if exact and nats.isnan():
        return package_cross_entropy(hidden, weight, bias, targets)
    return nats


def use_kernels() -> None:
    mu_sota.causal_attention = causal_attention
    base.linear_cross_entropy = linear_cross_entropy
    dense.library_attention = redesigned.library_attention = library_attention


if __name__ in ("__main__", "__mp_main__"):  # also in the processes that this one starts
    from musota.training import device

    # The moments of rare tokens become subnormal numbers, with which AdamW is ten times as slow.
    torch.set_flush_denormal(True)

    about_machine = device.about_machine

    def about_machine_and_kernels(used: torch.device | None = None) -> dict:
        about = about_machine(used)
        return about | {"device": f"{about['device']} (scripts/fast_cpu.py)"}

    device.about_machine = about_machine_and_kernels
    use_kernels()
if __name__ == "__main__":
    from musota.workbook.cli import main

    sys.exit(main())
