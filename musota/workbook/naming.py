"""Names of runs, their titles and commands, and the folders in which results belong."""

import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from musota.config import Experiment, RedesignedConfig
from musota.errors import MusotaError, find_named
from musota.files import as_path, read_sealed, sha256
from musota.registry import REGISTRY

ROWS = {"optimized_twin": "baseline", "redesigned_twin": "modern_twin"}  # of the registry


def checkout() -> Path | None:
    """The repository that this package or the working folder lies in; None if there is none."""
    places = (Path(__file__).absolute().parents[2], Path.cwd(), *Path.cwd().parents)
    found = (place for place in places if (place / "notebooks" / "01_data.ipynb").exists())
    return next(found, None)


def results_root() -> Path:
    """Where results belong by default: `results` of the repository, else of the working folder."""
    return (checkout() or Path.cwd()) / "results"


def shown(path: Path) -> Path:
    """A path as it is printed: from the repository on, where it lies inside."""
    root = checkout()
    return path.relative_to(root) if root and path.is_relative_to(root) else path


def find_folders(name: str, root: str | os.PathLike, profile: str) -> list[Path]:
    """The folders of the runs that `name` means, found without importing torch.

    `name` is a run's folder, or the name, title or folder name of runs in `root/profile` (or in
    another folder of root: `study/optimized`). Raises MusotaError, with the nearest name, where
    there is none.
    """
    path = as_path(ROWS.get(name, name))
    if (path / "config.json").exists():
        return [path]
    folder, known = as_path(root) / (path.parent if path.parent.name else profile), {}
    for config in sorted(folder.glob("*/config.json")):
        with suppress(MusotaError):  # damaged
            recorded = read_sealed(config)
            for each in {config.parent.name, recorded["name"], recorded.get("title")} - {None}:
                known.setdefault(each, []).append(config.parent)
    if not known:
        raise MusotaError(f"There is no run {name!r}: {folder} holds none.")
    return find_named("run", path.name, dict(sorted(known.items())))


def folder_of(root: Path, profile: str) -> str:
    """The folder of a profile in `root`; `profile-TEXT` if that is the only one with runs."""
    found = {config.parents[1].name for config in root.glob("*/*/config.json")}
    others = [name for name in found if name.startswith(f"{profile}-")]
    return others[0] if profile not in found and len(others) == 1 else profile


def safe_name(text: str) -> str:
    """`text` as a file name; with a hash of the whole where it cannot stay as it is."""
    safe = re.sub(r"[^\w.,=@+-]+", "-", text, flags=re.ASCII)[:120]
    return safe if safe == text else f"{safe}-{sha256(text.encode())[:8]}"


def is_module(model: str) -> bool:
    """Whether a model is named FILE.py:NAME, a module of the user's own, or its `_twin`."""
    return ".py:" in model


def run_name(model: str, changed: Mapping) -> str:
    """The name of a run, `optimized,epochs=4,learning_rate=0.002`; of a module, FILE.NAME@hash of
    the file."""
    model = ROWS.get(model, model)
    if is_module(model):
        file, _, name = model.rpartition(":")
        suffix = "_twin" * name.endswith("_twin")
        file_sha256 = sha256(as_path(file).read_bytes())
        model = f"{Path(file).stem}.{name.removesuffix('_twin')}@{file_sha256[:6]}{suffix}"
    texts = {f: f"{v:.9g}" if isinstance(v, float) else v for f, v in changed.items()}
    return ",".join([model, *(f"{field}={text}" for field, text in texts.items())])


def title_of(model: str, experiment: Experiment, changed: Mapping) -> str:
    """What people read for a run: the model, and its changes in words."""
    model = ROWS.get(model, model)
    if model in REGISTRY:
        title = REGISTRY[model].title
    else:
        title = model.rpartition(":")[2].removesuffix("_twin")
        if model.endswith("_twin"):
            modern = isinstance(experiment.model, RedesignedConfig)
            title = f"Transformer matched to {title} ({'modern' if modern else 'GPT-2 style'})"
    words = {field: f"{field.replace('_', ' ')} {value}" for field, value in changed.items()}
    if epochs := changed.get("epochs"):
        words["epochs"] = f"{epochs} epoch{'s' * (epochs != 1)}"
    return ", ".join([title, *words.values()])


def train_command(model: str, changed: Mapping, **options) -> str:
    """The command line that repeats a run; `options` without a value (0, empty) are left out."""
    words = ["musota", "train", model]
    for name, value in options.items():
        words += [f"--{name}", str(value)] if value else []
    for field, value in changed.items():
        words += ["--set", f"{field}={value}"]
    return shlex.join(words)
