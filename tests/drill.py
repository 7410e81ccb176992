"""Kills training at random moments and checks that the end is the same as without.

    python tests/drill.py --kills 50

Each round trains a small run in a process of its own, kills it at a random time or in the middle of
writing a file, repeats the call, and compares weights and metrics.jsonl (but for clock readings)
with those of a run that was never killed. Exits 1 if any differ. Linux.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
CLOCKS = {"seconds", "tokens_per_second"}


def train_in_a_child(corpus: str, folder: Path, kill_at_write: int = 0) -> int:
    """Process id of a fork that trains, and with `kill_at_write` kills itself inside that write."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        import torch

        import musota
        from musota.training import checkpoint

        torch.set_num_threads(1)
        if kill_at_write:
            _die_inside_write(kill_at_write)
        checkpoint.CHECKPOINT_SECONDS = 0.2  # many checkpoints inside an epoch
        model = musota.MuConfig(vocab_size=512, max_seq_len=48, n_layer=2)
        experiment = musota.Experiment(model, musota.TrainConfig(3, 3e-3, 15, 4, 1))
        text = musota.load_corpus(corpus, 512).limited(5_000, 1_500)
        musota.train(experiment, text, folder)
        status = 0
    finally:
        os._exit(status)


def _die_inside_write(number: int) -> None:
    """Kill this process in the middle of its n-th write of a file."""
    written, write_bytes = 0, Path.write_bytes

    def cut(path, data):
        nonlocal written
        written += 1
        if written == number:
            write_bytes(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_bytes(path, data)

    Path.write_bytes = cut


def ended(folder: Path) -> tuple:
    """The weights' hash and the history."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    history = [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]
    return summary["weights_sha256"], history


def wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def drill(corpus: str, kills: int) -> list[str]:
    """How each round went: "same", "differs" or "failed"."""
    import musota.training.trainer  # noqa: F401  imported once, before the forks

    chance, started, results = random.Random(0), time.monotonic(), []
    with TemporaryDirectory() as root:
        folder = Path(root) / "undisturbed"
        assert wait(train_in_a_child(corpus, folder)) == 0, "the undisturbed run failed"
        duration, expected = time.monotonic() - started, ended(folder)
        while len(results) < kills:
            folder, by_write = Path(root) / f"round-{len(results)}", len(results) % 2
            child = train_in_a_child(corpus, folder, chance.randint(1, 12) if by_write else 0)
            if not by_write:
                time.sleep(chance.uniform(0.1, 0.8) * duration)
                os.kill(child, signal.SIGKILL)
            if os.WIFSIGNALED(wait(child)):  # before it ended
                failed = wait(train_in_a_child(corpus, folder))
                same = not failed and ended(folder) == expected
                results.append("failed" if failed else "same" if same else "differs")
                print(f"round {len(results)}: killed, then {results[-1]}", flush=True)
            shutil.rmtree(folder)
    return results


if __name__ == "__main__":
    results = drill("python-docs", int(sys.argv[-1]) if len(sys.argv) > 1 else 50)
    print(f"{results.count('same')} of {len(results)} ended as the undisturbed run")
    sys.exit(results.count("same") < len(results))
