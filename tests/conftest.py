import os
import signal
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test uses it

import pytest
import torch

import musota
from musota.data.corpus import load_corpus
from musota.data.sources import docstrings
from musota.training import trainer

try:
    from scripts import fast_cpu
except SystemExit:  # without g++
    fast_cpu = None

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
EXPERIMENT = musota.Experiment(  # MU-SOTA, two epochs of a second
    musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=1),
    musota.TrainConfig(2, learning_rate=3e-3, warmup_steps=5, batch_size=4, accumulation_steps=4),
)
STILL = EXPERIMENT.with_(dropout=0.0)


@contextmanager
def each_step(before=lambda state: None, after=lambda state: None):
    """Within it `before(state)` and `after(state)` are called at every training step."""
    train_step = trainer.train_step

    def step(state, batches):
        before(state)
        done = train_step(state, batches)
        after(state)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        yield


def interrupted_at(step):
    """Within it there is a Ctrl-C in the middle of a step."""

    def before(state):
        if state.step + 1 == step:
            signal.raise_signal(signal.SIGINT)

    return each_step(before)


def in_a_process(code, *arguments, **environment):
    """A fresh interpreter, for what is decided at import."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def flip_bit(path, place):
    """Damages a file: one bit of one byte."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.unlink()  # what is mapped from it stays
    path.write_bytes(data)


class Recurrent(torch.nn.Module):
    """An LSTM with tied weights; to keep its state for the next call is a fault."""

    def __init__(self, vocab_size=512, width=16, keeps_state=False):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.recurrence = torch.nn.LSTM(width, width, 2, batch_first=True, dropout=0.1)
        self.output = torch.nn.Linear(width, vocab_size)
        self.output.weight = self.embedding.weight
        self.keeps_state, self.state = keeps_state, None

    def forward(self, ids):
        same = self.state is not None and self.state[0].shape[1] == len(ids)
        hidden, state = self.recurrence(self.embedding(ids), self.state if same else None)
        if self.keeps_state:
            self.state = tuple(one.detach() for one in state)
        return (self.output(hidden),)


class OneLength(torch.nn.Embedding):
    """Mixes exactly `length` positions, each with those before it."""

    def __init__(self, vocab_size, length):
        super().__init__(vocab_size, vocab_size)
        self.length = length

    def forward(self, ids):
        return torch.ones(self.length, self.length).tril() @ super().forward(ids)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Within it, `elements` is the size of the largest tensor that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            held = out.untyped_storage().nbytes() // out.element_size()
            self.elements = max(self.elements, held)
        return out


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests share a cache of their own and use neither the hub nor a local WikiText."""
    os.environ["MUSOTA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("MUSOTA_DATA_DIR", None)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Real English, on every machine: docstrings of the standard library's top-level modules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = [text for path in sorted(library.glob("*.py")) for text in docstrings(path)]
    folder = tmp_path_factory.mktemp("texts") / "docs"
    folder.mkdir()
    for split, low, high in (("train", 0, 0.8), ("valid", 0.8, 0.9), ("test", 0.9, 1)):
        part = documents[int(low * len(documents)) : int(high * len(documents))]
        (folder / f"{split}.txt").write_text("\n\n".join(part) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder):
    """A small corpus at the size of the `tiny` profile."""
    return load_corpus(str(text_folder), 512).limited(12_000, 3_000)


@pytest.fixture(scope="session")
def short(corpus):
    """Its first tokens: an epoch of eleven steps."""
    return corpus.limited(4000, 1200)


def shaken(config):
    """A model without zero weights, as trained ones are."""
    torch.manual_seed(0)
    model = musota.build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="session")
def finished(short, tmp_path_factory):
    """EXPERIMENT trained on `short`. Do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return musota.train(EXPERIMENT, short, folder, name="finished")


@pytest.fixture(scope="session")
def still(short, tmp_path_factory):
    """STILL trained on `short`: the random numbers of dropout depend on the shapes."""
    return musota.train(STILL, short, tmp_path_factory.mktemp("still"))


@pytest.fixture(scope="session")
def runs(short, tmp_path_factory):
    """MU-SOTA with two seeds, and its parameter-matched transformer. Do not change them."""
    folder = tmp_path_factory.mktemp("results") / "tiny"
    experiments = {"optimized": EXPERIMENT, "baseline": musota.twin(EXPERIMENT)}
    found = []
    for name, seed in (("optimized", 0), ("optimized", 1), ("baseline", 0)):
        how = {"seed": seed, "name": name}
        how["options"] = musota.RunOptions(about={"title": f"the {name} model"})
        found.append(musota.train(experiments[name], short, folder / f"{name}-seed{seed}", **how))
    return found
