"""GPUs that are not there: fake tensors with a CUDA device. Every operation, forward and backward,
is checked for device, dtype and shape; nothing is computed."""

import ctypes
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CARDS = {"T4": ((7, 5), torch.float16), "A100": ((8, 0), torch.bfloat16)}  # capability, autocast
MOST_HEADS = 65_535  # a grid axis of a kernel launch
CUDA, META = 1, 14  # torch's device types


@contextmanager
def fake_card(patch, name):
    """Within it there is a GPU of CARDS; gives its device. `patch` is pytest's monkeypatch."""
    with FakeTensorMode():  # first: fake tensors must see that there is no driver
        _register_device_guard()
        answers = {"is_available": True, "device_count": 1, "current_device": 0,
                   "is_initialized": True, "_lazy_init": None, "is_bf16_supported": True,
                   "get_device_capability": CARDS[name][0]}  # fmt: skip
        for function, value in answers.items():
            patch.setattr(torch.cuda, function, lambda *_, value=value, **__: value)
        patch.setattr(fake_tensor, "init_gpu_context", lambda device: None, raising=False)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attend)
        # A value that is read is zero; a list becomes a tensor of zeros.
        zero = {"__int__": 0, "__float__": 0.0, "__bool__": False, "item": 0.0}
        for function, value in zero.items():
            patch.setattr(torch.Tensor, function, lambda self, value=value: value)
        patch.setattr(torch.Tensor, "tolist", lambda self: _zeros(tuple(self.shape)))
        patch.setattr(torch, "tensor", lambda data, device=None, **_: torch.zeros(
            len(data), dtype=torch.long, device=device))  # fmt: skip
        yield torch.device("cuda", 0)


def _register_device_guard():
    """Autograd asks the device's guard for streams. Torch built without CUDA has none, so that of
    meta tensors, which does nothing, takes its place."""
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("*c10.*"))))
    guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[CUDA] or guards[META]


def _attend(q, k, v, is_causal=False, scale=None):
    """Attention that checks what the kernels of a GPU need."""
    assert max(q.shape[:2]) <= MOST_HEADS, f"more heads than a launch may have: {tuple(q.shape)}"
    assert q.device.type != "cuda" or q.shape[-1] % 8 == 0, f"heads of {q.shape[-1]}"
    return (q @ k.mT).softmax(-1).to(v.dtype) @ v


def _zeros(shape):
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0


def backward(loss):
    """loss.backward(), node by node, the last made first: autograd's own engine asks a driver for
    streams."""
    held = defaultdict(dict, {loss.grad_fn: {0: torch.ones_like(loss)}})
    while nodes := [node for node in held if not hasattr(node, "variable")]:
        node = max(nodes, key=lambda node: node._sequence_nr())
        given = held.pop(node)
        call = node if callable(node) else node.apply
        grads = call(*(given.get(place) for place in range(len(node._input_metadata))))
        grads = grads if isinstance(grads, tuple) else (grads,)
        for grad, (other, place) in zip(grads, node.next_functions, strict=False):
            if other is not None and grad is not None:
                meant = other._input_metadata[place]
                assert grad.device == meant.device, (node, grad.device)
                grad = grad.sum_to_size(*meant.shape).to(meant.dtype)  # as the engine does
                held[other][place] = held[other].get(place, 0) + grad
    for leaf, given in held.items():
        leaf.variable.grad = given[0]
