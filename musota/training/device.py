"""The machine: device, precision, memory, progress, signals."""

import ctypes
import gc
import io
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import psutil  # comes with accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    parse_flag_from_env,
)
from tqdm import tqdm

from musota.errors import MusotaError
from musota.files import sha256

PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}  # accelerate's
COMPILE_STEPS = 2000  # a run of so many steps regains the time that compiling takes
CPU_TOKENS = 1536  # computed at a time on a CPU
HEADLESS = "MUSOTA_HEADLESS"  # set where progress goes to a log and not to a screen


def find_device(name: str | torch.device | None = None) -> torch.device:
    """cpu or cuda, by default the best one here. Raises MusotaError for another one."""
    known = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if name is not None and str(name).removesuffix(":0") not in known:
        raise MusotaError(f"There is no device {str(name)!r} here: use {' or '.join(known)}.")
    return torch.device(str(name).removesuffix(":0") if name is not None else known[0])


def make_accelerator(
    device: str | torch.device | None = None,
    precision: str | None = None,
    unused_parameters: bool = False,
) -> Accelerator:
    """accelerate's interface to a device (default: the best one), in a precision (default: what
    pays on that device). Environment variables of accelerate do not change the computation.

    `unused_parameters`: some may get no gradient, which several processes have to know.
    """
    if device is None and parse_flag_from_env("ACCELERATE_USE_CPU"):
        device = "cpu"
    chosen = find_device(device)
    precision = precision or PRECISIONS[dtype_of(chosen)]
    if precision not in PRECISIONS.values() or (precision == "fp16" and chosen.type == "cpu"):
        raise MusotaError(f"No precision {precision!r} on {chosen.type}: use no, bf16 or fp16.")
    other_device = PartialState._shared_state and PartialState().device.type != chosen.type
    before = AcceleratorState._shared_state and AcceleratorState().mixed_precision
    if other_device or (before and before != precision):
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first choice
    return Accelerator(
        cpu=chosen.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)],
    )


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs that compute in it, float16 on older ones, float32 on a CPU."""
    if device.type != "cuda":
        return torch.float32
    # is_bf16_supported() is True on a T4, which only emulates it.
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def autocast_on(device: torch.device, precision: str | None = None) -> torch.autocast:
    """The context in which a model is evaluated: on a GPU in `precision` or what pays there, on a
    CPU in float32."""
    kinds = {name: dtype for dtype, name in PRECISIONS.items()}
    dtype = kinds.get(precision, dtype_of(device))
    exact = device.type == "cpu" or dtype == torch.float32
    return torch.autocast(device.type, None if exact else dtype, enabled=not exact)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means too little memory, whatever a library calls it."""
    words = "out of memory", "ALLOC_FAILED", "can't allocate memory"
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def default_micro_batch(device: torch.device, sequences_per_step: int, max_seq_len: int) -> int:
    """A whole step on a GPU, about CPU_TOKENS tokens on a CPU."""
    few = max(1, min(sequences_per_step, CPU_TOKENS // max_seq_len))
    return few if device.type == "cpu" else sequences_per_step


def default_compile(device: torch.device, total_steps: int) -> bool:
    """Only for a long run on a GPU: compiling takes half a minute, and gains nothing on a CPU."""
    return device.type == "cuda" and total_steps >= COMPILE_STEPS


def about_machine(used: torch.device | None = None) -> dict:
    """What a measurement was made on (`used`, by default the best device here), when, and with
    which versions; of this package a hash of the files that decide a result."""
    threads = torch.get_num_threads()
    device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if (used or find_device()).type == "cuda":
        device = torch.cuda.get_device_name()
    package = Path(__file__).resolve().parents[1]
    names = ("config.py", "data/*.py", "models/*.py", "training/*.py")
    files = (path for name in names for path in sorted(package.glob(name)))
    text = b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in files)  # git's choice
    versions = {"python": platform.python_version(), "musota": sha256(text)[:12]}
    versions |= {name: metadata.version(name) for name in ("torch", "tokenizers")}
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"device": device, "date": date, "versions": versions}


def prepare_memory(device: torch.device) -> None:
    """Prepare the process's memory for a run. A GPU counts its peak anew. A CPU's allocator (Linux
    with glibc) keeps what one step frees for the next, which saves a tenth of a step and more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans half a second for every new shape
    elif platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU allocated since the run began, else of the whole process (on a Mac: now)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


@contextmanager
def stop_on_signal(processes: int = 1) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C or SIGTERM has come, so that no step is cut in two.
    A second signal of the same kind interrupts at once."""
    received: list[int] = []

    def receive(number, _):
        if number in received:
            raise KeyboardInterrupt
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    # Several processes could not agree on the step to stop at.
    if processes > 1 or threading.current_thread() is not threading.main_thread():
        signals = ()
    before = {number: signal.signal(number, receive) for number in signals}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Lines(io.TextIOBase):
    """A file for tqdm that prints each update of the bar as a line."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)


def has_front_end() -> bool:
    """Whether this notebook is shown to somebody while it runs, as far as a kernel can know."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if os.environ.get(HEADLESS) or not hasattr(shell, "kernel"):
        return False
    with suppress(psutil.Error):
        parent = psutil.Process().parent()  # None in the first process of a container
        started_by = " ".join(parent.cmdline() if parent else ())
        return not any(name in started_by for name in ("papermill", "nbconvert", "nbclient"))
    return True


def progress_bar(total_tokens: int, done: int = 0, shown: bool = True) -> tqdm:
    """Tokens done, tokens/s and time left: a bar on a screen, a line every 10 s in a log."""
    settings = {"mininterval": 1, "dynamic_ncols": True}
    if not (sys.stderr.isatty() or has_front_end()):
        settings = {"mininterval": 10, "file": _Lines(), "ncols": 120}
    settings |= {"maxinterval": float("inf"), "unit": " tokens", "unit_scale": True}
    return tqdm(total=total_tokens, initial=done, disable=not shown, **settings)
