"""Any torch module as a model of this package: called on token ids, measured, and wrapped."""

import copy
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import CellType, FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from musota.config import ModuleConfig, check_value
from musota.errors import MusotaError, blaming
from musota.files import sha256
from musota.models.base import CausalLM
from musota.models.diagnostics import evaluating

DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout}


def logits_of(module: nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of (B, T) token ids: the module's output, the first item of a tuple, or
    `.logits`. Ids are passed by position, or as `input_ids` where the module takes no other."""
    by_name = False
    if not isinstance(module, torch.jit.ScriptModule):  # which has no Python signature
        parameters = inspect.signature(module.forward).parameters.values()
        by_name = all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    out = module(input_ids=ids) if by_name else module(ids)
    out = out["logits"] if isinstance(out, Mapping) else getattr(out, "logits", out)
    return out[0] if isinstance(out, (tuple, list)) else out


def checked_logits(module: nn.Module, ids: Tensor, vocab_size: int) -> Tensor:
    """`logits_of`. Raises MusotaError if the module fails, or its logits have another shape or are
    not finite."""
    with blaming(f"The model, given token ids up to {vocab_size - 1} in shape {(*ids.shape,)},"):
        logits = logits_of(module, ids)
    wanted = (*ids.shape, vocab_size)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != wanted:
        advice = "logits of every position are needed, (batch, position, vocabulary)"
        if found[:-1] == ids.shape:
            advice = f"use vocab_size={found[-1]}, or build it for {vocab_size}"
        raise MusotaError(f"The model returned {found} and not {wanted}: {advice}.")
    if not logits.isfinite().all():
        raise MusotaError("Some logits of the model are not finite: correct the model first.")
    return logits


def call_once(module: nn.Module, max_seq_len: int) -> Tensor:
    """The logits of one sequence of zeros; the call creates lazy parameters and buffers. The random
    state stays as it is. Raises MusotaError for another length, and if the module fails."""
    max_seq_len = check_value("max_seq_len", max_seq_len, int)
    device = next(module.parameters(), torch.empty(0)).device
    ids = torch.zeros(1, max_seq_len, dtype=torch.long, device=device)
    whose = f"The model, given token ids of 0 in shape (1, {max_seq_len}),"
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with forked, torch.no_grad(), evaluating(module), blaming(whose):
        return logits_of(module, ids)


class NoDropout(TorchFunctionMode):
    """A context without dropout: what experts draw depends on how many tokens each of them gets."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in DROPOUTS:
            return args[0] if args else kwargs["input"]
        return function(*args, **kwargs)


def copy_module(module: nn.Module) -> nn.Module:
    """A copy of a module, without torch.compile's wrapper. Raises MusotaError where that fails."""
    plain = getattr(module, "_orig_mod", module)
    tensors = [v for part in plain.modules() for v in vars(part).values() if isinstance(v, Tensor)]
    # Tensors with a history, such as those of weight_norm, are copied by hand.
    history = {id(v): v.detach().clone() for v in tensors if not v.is_leaf}
    # With gradients, parameters of scripted modules would get a history.
    with torch.no_grad(), blaming("The model, when copied,"):
        copied = copy.deepcopy(plain, history)
    cells = {}  # deepcopy leaves functions, and the modules in their closures

    def own(cell: CellType) -> CellType:  # functions that share a cell still do
        with suppress(ValueError):  # it is empty
            held = cell.cell_contents
            return cells.setdefault(id(cell), CellType(history.get(id(held), held)))
        return cell

    homes = [h for p in copied.modules() for h in (vars(p), *vars(p).values())]
    for home in (home for home in homes if type(home) in (dict, OrderedDict, defaultdict, list)):
        for name, f in [*(enumerate(home) if type(home) is list else home.items())]:
            if isinstance(f, FunctionType) and f.__closure__:
                how = f.__globals__, f.__name__, f.__defaults__, (*map(own, f.__closure__),)
                home[name] = FunctionType(f.__code__, *how)
                home[name].__kwdefaults__ = f.__kwdefaults__
    for weight, original in zip(copied.parameters(), plain.parameters(), strict=True):
        weight.requires_grad = original.requires_grad
    return copied


def module_config(module: nn.Module, vocab_size: int, max_seq_len: int) -> ModuleConfig:
    """The description of a module, measured on a copy with one sequence of `max_seq_len` tokens.
    Raises MusotaError for a module without parameters, or whose output does not fit."""
    vocab_size = check_value("vocab_size", vocab_size, int)
    max_seq_len = check_value("max_seq_len", max_seq_len, int)
    call_once(measured := copy_module(module).eval(), max_seq_len)
    name = type(measured).__name__
    parameters = dict(measured.named_parameters())
    if not parameters:
        raise MusotaError(f"{name} has no parameters, so nothing can be trained.")
    device = next(measured.parameters()).device
    ids = torch.linspace(0, vocab_size - 1, max_seq_len, device=device).long()
    try:
        flops = _count_flops(measured, ids[None], vocab_size)
    except MusotaError:  # torch's counter fails on views of parameters that are trained
        flops = _count_flops(measured.requires_grad_(False), ids[None], vocab_size)
    shapes = sorted((_plain(name), tuple(p.shape)) for name, p in parameters.items())
    n_layer, dropout = _depth_and_dropout(measured)
    path = _defining_file(type(measured))
    made_by = vars(measured).get("musota_file")  # see musota.own
    files = dict.fromkeys(Path(file) for file in (path, made_by) if file)
    code = b"".join(file.read_bytes() for file in files) or _code_of(measured)
    return ModuleConfig(
        source=f"{path.name}:{name}" if path else name,
        file_sha256=sha256(code),
        shapes_sha256=sha256(repr(shapes).encode()),
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        n_parameters=sum(parameter.numel() for parameter in parameters.values()),
        flops_per_token=3 * flops // max_seq_len,
        n_layer=n_layer,
        dropout=dropout,
    )


def _count_flops(module: nn.Module, ids: Tensor, vocab_size: int) -> int:
    """The operations of a forward pass. Raises MusotaError as `checked_logits` does."""
    with (
        warnings.catch_warnings(action="ignore"),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # fused kernels are not counted
        torch.backends.mkldnn.flags(enabled=False),
        FlopCounterMode(display=False) as counter,
        ExitStack() as after,
    ):
        after.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)  # nor is this one
        after.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False
        checked_logits(module, ids, vocab_size)
    return counter.get_total_flops()


def _code_of(module: nn.Module) -> bytes:
    """The code of a module that no file defines: its parts as printed, its classes' methods."""
    kinds = dict.fromkeys(type(part) for part in module.modules())
    own = [kind for kind in kinds if not kind.__module__.startswith("torch.")]
    methods = [f for kind in own for f in vars(kind).values() if inspect.isfunction(f)]
    with suppress(OSError):  # typed into Python itself: there is no source
        return "".join([repr(module), *map(inspect.getsource, methods)]).encode()
    return repr(module).encode()


def _defining_file(kind: type) -> Path | None:
    """The file that defines a class; None for classes of torch and of a notebook."""
    functions = map(inspect.unwrap, filter(inspect.isfunction, vars(kind).values()))
    files = [Path(function.__code__.co_filename) for function in functions]
    of_torch = kind.__module__.startswith("torch.")
    return None if of_torch else next(filter(Path.is_file, files), None)


def _depth_and_dropout(module: nn.Module) -> tuple[int, float]:
    """The length of the longest list of equal layers that is in no other such list, as that of
    experts is, and the largest dropout."""
    depths, dropouts, lists = [1], [0.0], []
    for name, part in module.named_modules():
        if isinstance(part, nn.RNNBase):
            depths.append(part.num_layers)
            dropouts.append(float(part.dropout))
        elif isinstance(part, nn.Dropout):
            dropouts.append(float(part.p))
        elif isinstance(part, (nn.ModuleList, nn.Sequential)) and len({*map(type, part)}) == 1:
            depths += [len(part)] * (not name.startswith((*lists,)))
            lists += [f"{name}." if name else ""] * (len(part) > 1)  # one only wraps
    return max(depths), max(dropouts)


def _plain(name: str) -> str:
    """The name of a parameter without the prefix that torch.compile gives it."""
    return name.replace("_orig_mod.", "")


def load_state(module: nn.Module, state: Mapping[str, Tensor], strict=True, assign=False):
    """Load into a module what `WrappedModule.state_dict` gave."""
    for part in module.modules():
        for name, buffer in [*part.named_buffers(recurse=False)]:
            if type(buffer) is Tensor and not buffer.is_contiguous():  # one made by `expand`
                setattr(part, name, buffer.contiguous())
    own = {_plain(name): name for name in module.state_dict()}
    named = {own.get(name, name): value for name, value in state.items()}
    return module.load_state_dict(named, strict, assign)


class WrappedModule(CausalLM):
    """A CausalLM around any module, whose logits are its hidden states. Raises MusotaError for a
    module whose state is not all tensors."""

    def __init__(self, module: nn.Module, config: ModuleConfig):
        nn.Module.__init__(self)  # without the embeddings of a CausalLM
        self.config, self.tokenizer = config, None
        self.module, self.call = module, logits_of
        for length in (config.max_seq_len, max(1, config.max_seq_len - 1)):  # the last is shorter
            call_once(module, length)
        for name, value in module.state_dict().items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise MusotaError(f"{name} in the model's state must be a tensor, not {kind}.")

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        # A copy: a module may write into its input, which shares memory with the targets.
        return self.call(self.module, input_ids.clone())  # (B, T, V)

    def compile_layers(self) -> None:
        torch.compiler.reset()
        self.call = torch.compile(logits_of, dynamic=False)  # not fullgraph, which refuses RNNs

    def logits_of(self, hidden: Tensor) -> Tensor:
        return hidden

    def loss_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden.float().flatten(0, -2), targets.flatten())

    def score_of(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = zip(hidden, targets, strict=True)  # row by row: less memory
        nats = [F.cross_entropy(row.float(), y, reduction="none") for row, y in rows]
        return torch.stack(nats), hidden.argmax(-1) == targets

    def health(self, input_ids: Tensor) -> dict:
        return {}  # a module has no hook points

    def ledger_group(self, name: str) -> str:
        return name.split(".")[1].replace("_", " ")  # the first part after "module."

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        tables = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        return parameter.dim() >= 2 and not any(parameter is table for table in tables)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """The module's state, under the module's own names. Copies: tied weights share memory,
        which safetensors refuses."""
        state = self.module.state_dict(*args, **kwargs)
        whole = {"memory_format": torch.contiguous_format}
        return {_plain(name): value.detach().clone(**whole) for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], strict=True, assign=False):
        return load_state(self.module, state, strict, assign)
