"""The machine: precision, memory, progress, interruption."""

import ctypes
import gc
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import psutil  # comes with accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from tqdm import tqdm

from musota.errors import MusotaError
from musota.files import sha256
from musota.plan.config import Experiment

PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}  # accelerate's
COMPILE_STEPS = 2000  # a run of so many steps wins back what compiling takes
HEADLESS = "MUSOTA_HEADLESS"  # set where progress goes to a log and not to a screen


def find_device(name: str | None = None) -> torch.device:
    """cpu, cuda or mps, by default the best one here. Raises MusotaError for one that is not."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    known = [*(device for device, there in here.items() if there), "cpu"]
    if name is not None and name not in known:
        raise MusotaError(f"There is no device {name!r} here: use {' or '.join(known)}.")
    return torch.device(name or known[0])


def make_accelerator(device: str | None = None, precision: str | None = None) -> Accelerator:
    """accelerate's, on a device by name or the best one, in a precision by name or in what pays
    there. What its environment variables could change in the mathematics is said explicitly."""
    if device is None and parse_flag_from_env("ACCELERATE_USE_CPU"):
        device = "cpu"
    chosen = find_device(device)
    precision = precision or PRECISIONS[dtype_of(chosen)]
    if precision not in PRECISIONS.values() or (precision == "fp16" and chosen.type == "cpu"):
        raise MusotaError(f"No precision {precision!r} on {chosen.type}: take no, bf16 or fp16.")
    other_device = PartialState._shared_state and PartialState().device.type != chosen.type
    before = AcceleratorState._shared_state and AcceleratorState().mixed_precision
    if other_device or (before and before != precision):
        AcceleratorState._reset_state(reset_partial_state=True)  # which keeps the first choice
    return Accelerator(
        cpu=chosen.type == "cpu", mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), dynamo_backend="no",
    )  # fmt: skip


def dtype_of(device: torch.device) -> torch.dtype:
    """What pays there: bf16 on GPUs that really have it, fp16 on older ones, else float32."""
    if device.type != "cuda":
        return torch.float32
    # is_bf16_supported() says yes on a T4, which only emulates it.
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def autocast_on(device: torch.device, precision: str | None = None) -> torch.autocast:
    """Where a model is only looked at: on a GPU in `precision` or what pays there, exactly on a
    CPU."""
    kinds = {name: dtype for dtype, name in PRECISIONS.items()}
    dtype = kinds.get(precision, dtype_of(device))
    exact = device.type == "cpu" or dtype == torch.float32
    return torch.autocast(device.type, None if exact else dtype, enabled=not exact)


def is_out_of_memory(error: Exception) -> bool:
    """Whatever a device's libraries call it."""
    words = "out of memory", "ALLOC_FAILED", "can't allocate memory"
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def default_choices(experiment: Experiment, device: torch.device, total_steps: int) -> dict:
    """A GPU takes a whole step at once, a CPU about 1,500 tokens. Compiling takes a CUDA device
    half a minute, which only a long run wins back, and brings a CPU nothing."""
    sequences = experiment.training.sequences_per_step
    few = max(1, min(sequences, 1536 // experiment.model.max_seq_len))
    return {
        "micro_batch": few if device.type == "cpu" else sequences,
        "compile": device.type == "cuda" and total_steps >= COMPILE_STEPS,
    }


def about_machine(used: torch.device | None = None) -> dict:
    """What a measurement was taken on (`used`, by default the best device here), and when."""
    threads = torch.get_num_threads()
    device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if (used := used or find_device()).type != "cpu":
        device = torch.cuda.get_device_name() if used.type == "cuda" else "Apple GPU"
    house = Path(__file__).resolve().parents[1]
    rooms = (house / room for room in ("plan", "data", "models", "training"))
    files = sorted(path for room in rooms for path in room.glob("*.py"))  # that decide its result
    text = b"".join(path.read_bytes() for path in files)
    versions = {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "tokenizers")},
        "musota": sha256(text.replace(b"\r\n", b"\n"))[:12],  # git may write either
    }
    return {
        "device": device,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions,
    }


def prepare_memory(device: torch.device) -> None:
    """Before a run: a GPU forgets the last one, and counts its peak anew; a CPU's allocator keeps
    what one step frees for the next (Linux with glibc), for otherwise every large tensor is asked
    for again page by page: a tenth of a step and more. Holds for the whole process."""
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
    """Bytes: allocated on a GPU since the run began, else of the whole process (on a Mac: now)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    held = psutil.Process().memory_info()
    return getattr(held, "peak_wset", held.rss)


@contextmanager
def interruptible(processes: int) -> Iterator[list[int]]:
    """Turns the first Ctrl-C or SIGTERM (a cluster's, a spot machine's) into an entry of the list
    it gives, so that no step is cut in two; a second one of the same kind is obeyed."""
    asked: list[int] = []

    def ask(number, _):
        if number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    # Several processes could not agree on the step to stop at.
    if processes > 1 or threading.current_thread() is not threading.main_thread():
        signals = ()
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Lines:
    """A file for tqdm that turns each redrawing of the bar into a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self) -> None:
        pass


def has_front_end() -> bool:
    """Whether a person sees this notebook while it runs, as far as a kernel can know."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if os.environ.get(HEADLESS) or not hasattr(shell, "kernel"):
        return False
    with suppress(psutil.Error):
        parent = psutil.Process().parent()  # none of the first process of a container
        started_by = " ".join(parent.cmdline() if parent else ())
        return not any(name in started_by for name in ("papermill", "nbconvert", "nbclient"))
    return True


def progress_bar(total_tokens: int, done: int = 0, shown: bool = True) -> tqdm:
    """Tokens done, tokens/s and time left: a live bar for people, a line every 10 s for logs."""
    settings = {"mininterval": 1, "dynamic_ncols": True}
    if not (sys.stderr.isatty() or has_front_end()):
        settings = {"mininterval": 10, "file": _Lines(), "ncols": 120}
    settings |= {"maxinterval": float("inf"), "unit": " tokens", "unit_scale": True}
    return tqdm(total=total_tokens, initial=done, disable=not shown, **settings)
