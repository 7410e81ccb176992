"""The house: which room may know which. Rooms are folders of `musota/`; arrows go one way."""

import ast
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import musota
from musota.data import sources
from musota.models.dense import DenseTransformer
from musota.models.sharing import ARCHITECTURES
from musota.plan.architectures import KINDS, DenseConfig
from musota.plan.profiles import profiles
from musota.training.optimizer import OPTIMIZERS
from musota.training.schedule import SCHEDULES

HOUSE = Path(__file__).resolve().parent.parent / "musota"
FLOORS = ["errors", "files", "plan", "data", "models", "training", "studies", "workbook"]
LEAF, ITS_READERS = "rules", {"training", "studies", "workbook"}
KEPT_OUT = {"matplotlib", "ipywidgets", "IPython", "click", "papermill"}


def imported(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return names + [f"{node.module}.{alias.name}" for node in froms for alias in node.names]


def may(room: str, other: str) -> bool:
    if other == LEAF or room == LEAF:
        return room == other or room in ITS_READERS or other == "errors"
    return FLOORS.index(other) <= FLOORS.index(room)


def test_arrows_go_one_way_and_the_lower_rooms_know_no_front_end():
    offenders = []
    for path in sorted(HOUSE.rglob("*.py")):
        room = path.relative_to(HOUSE).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        for name in imported(path):
            package, other = [*name.split("."), ""][:2]
            upwards = package == "musota" and not may(room, other)
            if upwards or (package in KEPT_OUT and room != "workbook"):
                offenders.append(f"{path.relative_to(HOUSE)} imports {name}")
    assert offenders == []


@dataclass(frozen=True)
class ToyConfig(DenseConfig):
    """An architecture of one's own, with a field of its own."""

    window: int = 3


class Toy(DenseTransformer):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        assert config.window == 3


def test_a_corpus_an_optimizer_a_schedule_and_an_architecture_are_a_row_each(
    text_folder, tmp_path, monkeypatch
):
    read, plain = sources._read_folder, torch.optim.SGD
    monkeypatch.setitem(sources.SOURCES, "notes", lambda: ("my notes", read(text_folder)))
    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda groups, _: plain(groups, lr=0.0))
    monkeypatch.setitem(SCHEDULES, "linear", lambda progress: 1 - progress)
    monkeypatch.setitem(KINDS, "toy", ToyConfig)
    monkeypatch.setitem(ARCHITECTURES, ToyConfig, f"{__name__}:Toy")

    corpus = musota.load_corpus("notes", 300).limited(profiles["tiny"])
    model = ToyConfig(vocab_size=300, max_seq_len=24, n_layer=1, d_model=32, n_head=2)
    training = musota.TrainConfig(1, 0.1, 5, 32, 1, optimizer="sgd", schedule="linear")
    experiment = musota.Experiment(model, training)
    run = musota.train(experiment, corpus, tmp_path / "toy")
    assert run.finished and run.config["corpus"]["name"] == "notes"
    assert musota.Run(tmp_path / "toy").experiment == experiment  # read again by its kind
    assert isinstance(run.load_model(), Toy)
    falling = run.steps[run.steps.step >= 5].learning_rate
    np.testing.assert_allclose(np.diff(falling, 2), 0, atol=1e-9)
    with pytest.raises(musota.MusotaError, match="Unknown optimizer 'sgdd': did you mean 'sgd'"):
        musota.train(experiment.with_(optimizer="sgdd"), corpus, tmp_path / "other")


# Parameters; the last value of the first and of the last but one; the sum of all magnitudes.
FROZEN = {
    "original": (259, -0.017388789, -0.0088261897, 892402.59),
    "optimized": (259, 0.001521173, 0.010685204, 892517.97),
    "baseline": (148, -0.011016826, 1.0, 238155.31),
    "simplified": (207, 0.0031136819, 0.0057680514, 310896.65),
    "redesigned": (135, -0.027844774, 0.0, 388688.88),
}


def test_the_weights_a_seed_gives_stay_the_same():
    """Names, order and initialisation of parameters: committed runs can be trained again."""
    torch.manual_seed(0)
    for name, (tensors, *numbers) in FROZEN.items():
        parameters = list(musota.build_model(musota.experiments[name].model).parameters())
        assert len(parameters) == tensors, name
        found = [float(parameters[index].detach().flatten()[-1]) for index in (0, -2)]
        found.append(sum(float(one.detach().abs().double().sum()) for one in parameters))
        assert found == pytest.approx(numbers, rel=1e-5), name  # other CPUs round otherwise
