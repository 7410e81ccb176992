"""The machine: device, precision, memory, progress, signals."""

import ctypes
import gc
import io
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil  # comes with accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    parse_flag_from_env,
)
from tqdm import tqdm

from musota.errors import MusotaError
from musota.files import sha256

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str | torch.device | None = None) -> torch.device:
    """cpu or cuda, by default the best one here. Raises MusotaError for another one."""
    known = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    wanted = known[0] if name is None else str(name).removesuffix(":0")
    if wanted not in known:
        raise MusotaError(f"There is no device {wanted!r} here: use {' or '.join(known)}.")
    return torch.device(wanted)


def make_accelerator(device=None, precision=None, unused_parameters=False) -> Accelerator:
    """accelerate's interface to a device (default: the best one), in a precision (default: the
    fastest that is safe there). Environment variables of accelerate do not change the computation.
    `unused_parameters`: some may get no gradient, which several processes have to know."""
    if device is None and parse_flag_from_env("ACCELERATE_USE_CPU"):
        device = "cpu"
    chosen = find_device(device)
    precision = precision or default_precision(chosen)
    if precision not in PRECISIONS or (precision == "fp16" and chosen.type == "cpu"):
        usable = "no or bf16" if chosen.type == "cpu" else "no, bf16 or fp16"
        raise MusotaError(f"No precision {precision!r} on {chosen.type}: use {usable}.")
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first choice
    return Accelerator(
        cpu=chosen.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)],
    )


def default_precision(device: torch.device) -> str:
    """bf16 on GPUs that compute in it, fp16 on older ones, no (float32) on a CPU."""
    if device.type == "cpu":
        return "no"
    # is_bf16_supported() is True on a T4, which only emulates it.
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def autocast_on(device: torch.device, precision: str | None = None) -> torch.autocast:
    """The context in which a model is evaluated: on a GPU in `precision`, on a CPU in float32."""
    dtype = PRECISIONS[precision or default_precision(device)]
    exact = device.type == "cpu" or dtype == torch.float32
    return torch.autocast(device.type, None if exact else dtype, enabled=not exact)


def about_machine(used: torch.device | None = None) -> dict:
    """The device (`used`, by default the best one here), the date, and versions; of this package a
    hash of the files that decide a result."""
    threads = torch.get_num_threads()
    device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if (used or find_device()).type == "cuda":
        device = torch.cuda.get_device_name()
    package = Path(__file__).resolve().parents[1]
    patterns = ("config.py", "data/*.py", "models/*.py", "training/*.py")
    files = (path for pattern in patterns for path in sorted(package.glob(pattern)))
    text = b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in files)  # git's choice
    versions = {"python": platform.python_version(), "musota": sha256(text)[:12]}
    versions |= {name: metadata.version(name) for name in ("torch", "tokenizers")}
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"device": device, "date": date, "versions": versions}


def prepare_memory(device: torch.device) -> None:
    """A GPU's peak memory is counted anew. glibc's allocator keeps what one step frees for the
    next, which saves a tenth of a CPU's step and more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans half a second for every new shape
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU allocated since the run began, else of the whole process (on a Mac: now)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


@contextmanager
def stop_on_signal(processes: int) -> Iterator[list]:
    """Gives a list that is filled when Ctrl-C or SIGTERM comes, so that no step is cut in two."""
    received: list[int] = []

    def receive(number, _):
        received.append(number)
        signal.signal(number, before[number])  # a second one acts at once

    # Several processes could not agree on the step to stop at.
    alone = processes == 1 and threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if alone else ()
    before = {number: signal.signal(number, receive) for number in signals}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Lines(io.TextIOBase):
    """A file for tqdm that prints each update of the bar as a line."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)


def progress_bar(total_tokens: int, done: int, shown: bool) -> tqdm:
    """Tokens done, tokens/s and time left: a bar on a screen, a line every 10 s elsewhere."""
    settings = {"mininterval": 1, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        settings = {"mininterval": 10, "file": _Lines(), "ncols": 120}
    settings |= {"maxinterval": float("inf"), "unit": " tokens", "unit_scale": True}
    return tqdm(total=total_tokens, initial=done, disable=not shown, **settings)
