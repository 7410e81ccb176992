"""A model in its author's own file, `my_model.py:build`: found, built, asked, measured.

Code runs only from files that the caller has named in this process. A record holds a name and a
hash, and executes nothing.
"""

import inspect
import sys
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from musota.errors import MusotaError, blaming
from musota.files import as_path
from musota.files import sha256 as hash_of

_named: dict[str, tuple[Path, bytes]] = {}  # by hash: where it stood and what it held


def name_file(source: str) -> tuple[str, str]:
    """`folder/my_model.py:build` to ("my_model.py:build", the file's sha256); from here on this
    process may run what the file holds now."""
    place, _, name = str(source).rpartition(":")
    if not place.endswith(".py") or not name.isidentifier():
        raise MusotaError(
            f"A model of one's own is named FILE.py:NAME, like my_model.py:build, not {source!r}."
        )
    path = as_path(place).absolute()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MusotaError(f"{path} cannot be read: {error.strerror}.") from None
    _named[hash_of(data)] = path, data
    return f"{path.name}:{name}", hash_of(data)


def find(source: str, sha256: str):
    """What a named file defines. Raises MusotaError where the caller has not named it, where it
    does not run, or has no such name."""
    if sha256 not in _named:
        raise MusotaError(
            f"{source} is its author's code, and a record never runs code: name the file yourself "
            f'first, musota.OwnConfig("folder/{source}"), as it was (sha256 {sha256[:12]}…).'
        )
    (path, data), title, name = _named[sha256], f"own_{sha256[:12]}", source.rpartition(":")[2]
    if title not in sys.modules:
        module = sys.modules[title] = types.ModuleType(title)
        module.__file__ = str(path)
        sys.path.insert(0, str(path.parent))  # what stands beside it can be imported
        try:
            with blaming(path.name):
                exec(compile(data, str(path), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[title]
            raise
        finally:
            sys.path.remove(str(path.parent))
    try:
        return getattr(sys.modules[title], name)
    except AttributeError:
        raise MusotaError(f"{path} defines no {name!r}.") from None


def build(source: str, sha256: str, arguments: dict, sizes: dict):
    """The module that `source` makes of `arguments`, and of those `sizes` it takes."""
    from torch import nn

    make = find(source, sha256)
    if isinstance(make, nn.Module) or not callable(make):
        raise MusotaError(
            f"{source} is {type(make).__name__}: name the function or class that makes the model."
        )
    with blaming(source):
        taken = inspect.signature(make).parameters
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()) and "vocab_size" not in taken:
            taken = sizes  # def build(**everything)
        module = make(**{k: v for k, v in sizes.items() if k in taken} | arguments)
    if not isinstance(module, nn.Module):
        raise MusotaError(f"{source} made {type(module).__name__}, not a torch.nn.Module.")
    return module


def logits_of(module, ids):
    """(B, T) token ids to logits (B, T, V): what a module returns, the first of a tuple of it, or
    its `.logits`. Ids are handed over by position, else as `input_ids`."""
    parameters = inspect.signature(module.forward).parameters.values()
    by_place = any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    out = module(ids) if by_place else module(input_ids=ids)
    out = out["logits"] if isinstance(out, Mapping) else getattr(out, "logits", out)
    return out[0] if isinstance(out, (tuple, list)) else out


def checked_logits(module, ids, vocab_size: int):
    """`logits_of`, or a MusotaError that says what is wrong with them."""
    with blaming(f"The model, given token ids up to {vocab_size - 1} in shape {(*ids.shape,)},"):
        logits = logits_of(module, ids)
    found, wanted = getattr(logits, "shape", type(logits).__name__), (*ids.shape, vocab_size)
    if found != wanted:
        advice = "logits of every position are needed, (batch, position, vocabulary)"
        if found[:-1] == ids.shape:
            advice = f"say vocab_size={found[-1]}, or build it for {vocab_size}"
        found = found if isinstance(found, str) else (*found,)
        raise MusotaError(f"The model returned {found} and not {wanted}: {advice}.")
    if not logits.isfinite().all():
        raise MusotaError("Not all logits of the fresh model are finite: mend that first.")
    return logits


class Size(NamedTuple):
    n_parameters: int
    flops_per_token: int  # of a training step: matrix products only, backward twice the forward
    n_layer: int
    dropout: float


def size_of(module, vocab_size: int, max_seq_len: int) -> Size:
    """Measured on one sequence of `max_seq_len` tokens."""
    import torch
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    parameters = list(module.parameters())
    device = parameters[0].device if parameters else "cpu"
    ids = torch.randint(vocab_size, (1, max_seq_len), device=device)
    with (
        warnings.catch_warnings(action="ignore"),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # fused kernels are not counted
        torch.backends.mkldnn.flags(enabled=False),
        FlopCounterMode(display=False) as counter,
    ):
        checked_logits(module, ids, vocab_size)
    parts = list(module.modules())
    lists = [part for part in parts if isinstance(part, (nn.ModuleList, nn.Sequential))]
    depths = [len(layers) for layers in lists if len({type(layer) for layer in layers}) == 1]
    drops = [float(part.p) for part in parts if isinstance(part, nn.Dropout)]
    for part in parts:
        if isinstance(part, nn.RNNBase):
            depths.append(part.num_layers)
            drops.append(float(part.dropout))
    count = sum(parameter.numel() for parameter in parameters)
    flops = 3 * counter.get_total_flops() // max_seq_len
    return Size(count, flops, max(depths, default=1), max(drops, default=0.0))
