"""The machine: precision, memory, progress, interruption."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
import threading
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from musota.files import sha256
from musota.plan.config import Experiment

COMPILE_STEPS = 2000  # a run of so many steps wins back the minute that compiling takes
HEADLESS = "MUSOTA_HEADLESS"  # set where progress goes to a log and not to a screen


def precision_for_device() -> str:
    """What pays here: bf16 on GPUs that really have it, fp16 on older ones, else full precision."""
    if not torch.cuda.is_available():
        return "no"
    # is_bf16_supported() says yes on a T4, which only emulates it.
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def default_choices(experiment: Experiment, device: torch.device, total_steps: int) -> dict:
    """A GPU takes a whole step at once, a CPU about 1,500 tokens. Compiling takes a GPU about a
    minute, which only a long run wins back, and brings a CPU nothing."""
    sequences, on_cpu = experiment.training.sequences_per_step, device.type == "cpu"
    few = max(1, min(sequences, 1536 // experiment.model.max_seq_len))
    return {
        "micro_batch": few if on_cpu else sequences,
        "compile": not on_cpu and total_steps >= COMPILE_STEPS,
    }


@cache
def _code_hash() -> str:
    """Of the code that decides what a run comes to."""
    house = Path(__file__).resolve().parents[1]
    rooms = (house / room for room in ("plan", "data", "models", "training"))
    files = sorted(path for room in rooms for path in room.glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)
    return sha256(text.replace(b"\r\n", b"\n"))[:12]  # git may write either


def about_machine(used: torch.device | None = None) -> dict:
    """What a measurement was taken on (`used`, by default the best device here), and when."""
    threads = torch.get_num_threads()
    device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if torch.cuda.is_available() and (used is None or used.type == "cuda"):
        device = torch.cuda.get_device_name()
    versions = {package: metadata.version(package) for package in ("torch", "tokenizers")}
    versions["musota"] = _code_hash()
    return {
        "device": device,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {"python": platform.python_version(), **versions},
    }


def prepare_memory(device: torch.device) -> None:
    """Before a run: a GPU counts its peak anew; a CPU's allocator keeps what one step frees for
    the next (Linux with glibc).

    By default every large tensor is handed back to the system and asked for again page by page,
    which costs a tenth of a training step and more. Holds for the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU since the run began, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # rusage would count what the parent process held at the start
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


class Interruption:
    """Turns the first Ctrl-C or SIGTERM (a cluster's, a spot machine's) into a wish, so that no
    step is cut in two; a second one of the same kind is obeyed."""

    signals = signal.SIGINT, signal.SIGTERM

    def __init__(self, processes: int):
        self.alone = processes == 1  # several could not agree on the step to stop at

    def __enter__(self):
        self.asked = 0
        self.main = self.alone and threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = [signal.signal(number, self._ask) for number in self.signals]
        return self

    def __exit__(self, *_):
        if self.main:
            for number, handler in zip(self.signals, self.before, strict=True):
                signal.signal(number, handler)

    def _ask(self, number, _):
        if self.asked == number:
            raise KeyboardInterrupt
        self.asked = number


class _Lines:
    """A file for tqdm that turns each redrawing of the bar into a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self) -> None:
        pass


def has_front_end() -> bool:
    """Whether a person sees this notebook while it runs, as far as a kernel can know."""
    if "IPython" not in sys.modules or os.environ.get(HEADLESS):
        return False
    if not hasattr(sys.modules["IPython"].get_ipython(), "kernel"):
        return False
    import psutil  # ipykernel brings it

    with contextlib.suppress(psutil.Error):
        started_by = " ".join(psutil.Process().parent().cmdline())
        return not any(name in started_by for name in ("papermill", "nbconvert", "nbclient"))
    return True


def progress_bar(total_tokens: int, done: int = 0, shown: bool = True) -> tqdm:
    """Tokens done, tokens/s and time left: a live bar for people, a line every 10 s for logs."""
    live = sys.stderr.isatty() or has_front_end()
    return tqdm(
        total=total_tokens,
        initial=done,
        disable=not shown,
        unit=" tokens",
        unit_scale=True,
        mininterval=1 if live else 10,
        maxinterval=float("inf"),
        file=None if live else _Lines(),
        ncols=None if live else 120,
        dynamic_ncols=live,
    )
