"""Recorded runs and probes, from run folders and from the packed files of committed results.

What the packed files hold is in docs/robustness.md. Where a run stands both in a folder and packed,
the folder counts. What a run is called never decides anything: runs are the same by experiment,
corpus fingerprint and seed.
"""

import io
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

import pandas as pd

from musota.errors import MusotaError
from musota.files import as_path, jsonable, sha256, write_together
from musota.training.runs import Run

PACKED = ("runs.jsonl", "epochs.jsonl", "steps.parquet", "probes.json")
SUMS = "SHA256SUMS"
# What no page shows is not packed: of some parts the steps, and fields of an epoch, by part.
BARE = ("path", "sweep")
HIDDEN = dict.fromkeys(BARE, ("samples", "health", "valid_block_nats"))
HIDDEN["root_causes"] = ("samples",)
SMALL = {"compression": "zstd", "compression_level": 19, "use_dictionary": ["run"]}
BEGUN = ("metrics.jsonl", "summary.json")  # what tells a run's folder from a saved model's


def read_runs(folder: str | os.PathLike, part: str = "") -> tuple[list[Run], dict[str, str]]:
    """The runs of a results folder, or of a `part` (sub-folder) of it, by path and in no other
    order; and why the rest was left out, by path: damaged, or no epoch yet.

    Raises MusotaError for packed records that are damaged, and for two runs equal in all that a
    run is (experiment, corpus, seed).
    """
    folder, left_out = as_path(folder), {}
    found = {path: run for path, run in _packed(folder).items() if _part_of(path) == part}
    begun = (path for name in BEGUN for path in (folder / part).glob(f"*/{name}"))
    for place in sorted({path.parent for path in begun}):
        path = place.relative_to(folder).as_posix()
        try:
            run = Run(place)
            run.records  # noqa: B018  damage is seen here, not in the middle of a page
            found[path] = run
        except MusotaError as error:  # where it was packed before, that copy is shown
            left_out[path] = f"damaged: {error}"
    runs, paths = [], {}
    for path, run in sorted(found.items()):
        if not (run.summary or run.diverged):
            left_out[path] = "no epoch has ended yet"
            continue
        if (other := paths.setdefault(run.identity, path)) != path:
            raise MusotaError(
                f"{other} and {path} hold the same run (experiment, corpus and seed are equal): "
                "delete one of them."
            )
        runs.append(run)
    return runs, left_out


def load_runs(folder: str | os.PathLike) -> list[Run]:
    """Every run in a results folder that has finished at least one epoch, by path: run folders
    and committed records alike. What is left out is named in the output."""
    runs, left_out = read_runs(folder)
    for path, reason in left_out.items():
        print(f"{as_path(folder) / path} is left out: {reason}")
    return [run for run in runs if run.summary]


def read_probes(folder: str | os.PathLike) -> dict[str, dict]:
    """What was measured besides runs, by name (`part/name` in a part). Raises MusotaError for
    damage."""
    folder, probes = as_path(folder), {}
    _packed(folder)  # makes sure that nothing is damaged
    for path in [*folder.glob("probes.json"), *_probe_files(folder)]:
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            data = json.loads(path.read_bytes())
            probes |= data if name == "probes" else {name: data}
        except (ValueError, TypeError):
            raise MusotaError(f"{path} is damaged: delete it, and it is measured anew.") from None
    return probes


def pack(folder: str | os.PathLike) -> list[Path]:
    """Write the packed files of a results folder and remove what they hold now: probes, and run
    folders without checkpoints. Nothing is removed before all is written. Returns the files."""
    folder = as_path(folder).resolve()
    here = [p.parent.relative_to(folder).as_posix() for p in folder.glob("**/metrics.jsonl")]
    parts = sorted({_part_of(path) for path in [*_packed(folder), *here]})
    runs, left_out = [], set()
    for part in parts:
        found, left = read_runs(folder, part)
        runs, left_out = runs + found, left_out | left.keys()
    lines, epochs, steps = [], [], [pd.DataFrame({"run": []})]
    for run in runs:
        path = run.path.relative_to(folder).as_posix()
        kinds = {"step": [], "epoch": [], "event": []}
        part = _part_of(path)
        hidden = ("kind", *HIDDEN.get(part, ()))
        for record in run.records:
            kinds[record["kind"]].append({k: v for k, v in record.items() if k not in hidden})
        if part in BARE:
            kinds["step"] = []
        about = {"config": run.config, "summary": run.summary, "events": kinds["event"]}
        lines.append({"run": path, **about})
        epochs += [{"run": path, **record} for record in kinds["epoch"]]
        steps.append(pd.DataFrame(kinds["step"]).assign(run=path))
    table = pd.concat(steps, ignore_index=True)
    whole = {"run": "category", "step": "int32", "tokens": "int64"}
    kinds = dict.fromkeys(table, "float32") | {k: v for k, v in whole.items() if k in table}
    split = [name for name, kind in kinds.items() if kind == "float32"]  # by byte: half the size
    probes = json.dumps(read_probes(folder), ensure_ascii=False, indent=1) + "\n"
    contents = {
        "runs.jsonl": _lines(lines),
        "epochs.jsonl": _lines(epochs),
        "steps.parquet": table.astype(kinds).to_parquet(
            index=False, use_byte_stream_split=split, **SMALL
        ),
        "probes.json": probes.encode(),
    }
    sums = "".join(f"{sha256(data)}  {name}\n" for name, data in contents.items())
    writes = {
        folder / name: lambda target, data=data: target.write_bytes(data)
        for name, data in {**contents, SUMS: sums.encode()}.items()
    }
    no_longer_needed = _probe_files(folder)
    write_together(writes)
    for path in no_longer_needed:
        path.unlink()
    for run in runs:
        damaged = run.path.relative_to(folder).as_posix() in left_out
        if run.path.exists() and not damaged and not (run.path / "checkpoints").exists():
            shutil.rmtree(run.path)
    return [folder / name for name in PACKED]


def _probe_files(folder: Path) -> list[Path]:
    """The JSON files of the folder and its parts that belong to no run or saved model."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    alone = [path for path in files if not (path.parent / "config.json").exists()]
    return [path for path in alone if path.name != "probes.json"]


def _lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(jsonable(r), ensure_ascii=False) + "\n" for r in records).encode()


def _part_of(path: str) -> str:
    return path.rpartition("/")[0]


def _packed(folder: Path) -> dict[str, Run]:
    """The packed runs of a results folder by path. Raises MusotaError where a file is damaged."""
    path = folder / SUMS
    return _unpacked(folder.resolve(), path.read_bytes()) if path.exists() else {}


@lru_cache(maxsize=8)
def _unpacked(folder: Path, sums: bytes) -> dict[str, Run]:
    contents = {}
    for line in sums.decode().splitlines():
        expected, name = line.split(maxsplit=1)
        contents[name] = data = (folder / name).read_bytes() if (folder / name).exists() else b""
        if sha256(data) != expected:
            raise MusotaError(
                f"{folder / name} is missing, damaged or was changed by hand: restore it from git."
            )
    table, records = pd.read_parquet(io.BytesIO(contents["steps.parquet"])), {}
    for path, steps in table.groupby("run", observed=True, sort=False):
        records[path] = steps.drop(columns="run").assign(kind="step").to_dict("records")
    for epoch in map(json.loads, contents["epochs.jsonl"].splitlines()):
        records.setdefault(epoch.pop("run"), []).append({"kind": "epoch", **epoch})
    runs = {}
    for about in map(json.loads, contents["runs.jsonl"].splitlines()):
        path, events = about["run"], [{"kind": "event", **e} for e in about["events"]]
        own = records.get(path, []) + events
        runs[path] = Run.from_records(folder / path, about["config"], about["summary"], own)
    return runs
