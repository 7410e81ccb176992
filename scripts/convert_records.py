"""Converts records written by commit 7fbc80a to the form of this version.

PYTHONPATH=CHECKOUT_OF_7fbc80a python scripts/convert_records.py SOURCE TARGET [--run NAME]

SOURCE is one profile's results folder of that commit, packed or not; TARGET is results/<profile>
here. `--run` converts one run folder only, finished or not (at least one epoch). Runs that no
class builds any more are appended to results/redesign/path_runs.csv in the old form.
"""
# ruff: noqa: I001 (`musota` is the package of that commit)

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from musota.files import jsonable, sha256, write_bytes, write_json, write_sealed
from musota.plan.profiles import scaled
from musota.plan.registry import TUNED, find_experiment
from musota.training.runs import Run
from musota.workbook.records import load_runs, read_probes, read_runs

TITLES = {
    "original": "MU-SOTA, original settings",
    "original_twin": "Transformer matched to original (GPT-2 style)",
    "optimized": "MU-SOTA, optimized settings",
    "baseline": "Transformer matched to optimized (GPT-2 style)",
    "simplified": "MU-SOTA, simplified",
    "simplified_twin": "Transformer matched to simplified (GPT-2 style)",
    "redesigned": "Redesign",
    "modern_twin": "Transformer matched to the redesign (modern)",
    "tuned": "MU-SOTA, its best learning rate",
}
SHORT = "max_seq_len=128,batch_size=6,accumulation_steps=4,epochs=3,warmup_steps=100"
RENAMED = {
    "original,learning_rate=0.01,epochs=3,warmup_steps=100": "original_rate_0.01",
    "original_twin,learning_rate=0.002,epochs=3,warmup_steps=100": "original_twin",
    "redesigned,without=embedding norm,whole queries,names_3_epochs": "first_redesign_3_epochs",
    "redesigned,without=": "redesigned_with_names",
}
# Hashes of the valid tokens of the recorded corpora, by fingerprint; 7fbc80a did not record them.
VALID_SHA256 = {
    "f42f5ea1785d6708": "4a2855ea197261d6c498ffe3472ac0d433d611c05364ad75ea01116e93821381",
    "0c0a46fd0cab1c8c": "d1266ce049a625a4888907e828cf7dc1b792529109fa372cc671054d94bb5a52",
}
PROBES = ("ladder", "root_causes/ladder", "root_causes/ablations")


def new_name(run: Run) -> str:
    name = run.path.name.removesuffix(f"-seed{run.seed}").replace(f",{SHORT}", "_3_epochs")
    name = name.replace("dense_twin", "matched").replace("dense_GPT-2_twin", "GPT-2_matched")
    return RENAMED.get(name, name.replace(",", "_").replace("=", "_"))


def buildable(run: Run) -> bool:
    """Whether this version builds the run's model and trains it as it was trained."""
    without = set(getattr(run.experiment.model, "without", "names").split(","))
    return without - {"blocks", "gate"} == {"names"} and not run.experiment.training.averaging


def new_experiment(run: Run) -> dict:
    """The run's experiment in the new form; in the old one where it is not buildable."""
    experiment = {part: run.experiment.to_dict()[part] for part in ("model", "training")}
    if buildable(run):
        del experiment["training"]["averaging"]
        if "without" in experiment["model"]:
            without = experiment["model"].pop("without").split(",")
            experiment["model"] |= {part: part not in without for part in ("blocks", "gate")}
    return experiment


def new_config(run: Run) -> dict:
    """The contents of config.json."""
    row, profile = run.config["name"].split(",")[0], run.config["profile"]
    row = {"redesigned_twin": "modern_twin"}.get(row, row)
    base = run.experiment if row in TUNED else scaled(find_experiment(row), profile)
    differing = [change.partition("=")[0] for change in run.experiment.differences(base)]
    changes = {field: run.experiment.fields()[field] for field in differing}
    command = f"musota train {row} --profile {profile} --corpus {run.config['corpus']['name']}"
    command += "".join(f" --set {field}={value}" for field, value in changes.items())
    command += f" --seed {run.seed}" * (run.seed > 0)
    command += " --precision bf16" * (run.config["precision"] == "bf16")
    command += " --compile" * bool(run.config["compile"])
    title = TITLES[row] + (f", {changes['epochs']} epochs" if "epochs" in changes else "")
    title += f", learning rate {changes['learning_rate']:g}" if "learning_rate" in changes else ""
    about = {"name": new_name(run), "title": title, "profile": profile}
    about |= {"experiment": new_experiment(run), "changes": changes, "command": command}
    if sha256_of_valid := VALID_SHA256.get(run.fingerprint):
        about["corpus"] = run.config["corpus"] | {"valid_sha256": sha256_of_valid}
    return about | {key: value for key, value in run.config.items() if key not in about}


def convert_folder(run: Run, target: Path, ablations: dict) -> None:
    """Write the run folder, with the `ablations` measured on its weights."""
    data = b""
    for record in sorted(run.records, key=lambda record: record["step"]):
        if record["kind"] == "step":  # the shortest decimals of its float32 values
            floats = {n: float(str(np.float32(v))) for n, v in record.items() if type(v) is float}
            record = {"kind": "step"} | record | floats
        data += (json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode()
    folder = target / f"{new_name(run)}-seed{run.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / "config.json", new_config(run))
    write_bytes(folder / "metrics.jsonl", data)
    known = {"metrics_sha256": sha256(data), "metrics_bytes": len(data)}
    write_sealed(folder / "summary.json", {**run.summary, **known})
    if measured := ablations.get(run.summary.get("weights_sha256")):
        write_json(folder / "ablations.json", measured)


def table_row(run: Run) -> dict:
    """A run as a row of a csv."""
    losses = {name: [*run.history.get(name, [])] for name in ("valid_loss", "train_loss")}
    losses["clean_train_loss"] = [epoch["clean_train_loss"] for epoch in run.health]
    return {
        "name": new_name(run),
        "seed": run.seed,
        "experiment": json.dumps(new_experiment(run)),
        "fingerprint": run.fingerprint,
        "train_tokens": run.config["corpus"]["tokens"]["train"],
        **{name: json.dumps(values) for name, values in losses.items()},
        "best_valid_loss": str(run.summary.get("valid_loss", "")),
        "diverged": str(run.diverged).lower(),
    }


def convert_all(source: Path, target: Path) -> None:
    probes, runs = read_probes(source), load_runs(source)
    ablations = {p["weights"]: p for p in probes.values() if {"weights", "nats"} <= p.keys()}
    for run in filter(buildable, runs):
        convert_folder(run, target, ablations)
    for name in probes.keys() & PROBES:
        file = name.replace("root_causes/", "grid_")
        if name.endswith("ladder"):
            file = f"ngrams-{probes[name]['fingerprint']}"
        write_json(target / f"{file}.json", probes[name])
    path = target.parent / "redesign" / "path_runs.csv"
    runs = [run for run in runs if not buildable(run)] + read_runs(source, "path")[0]
    runs.sort(key=new_name)
    if rows := [{"profile": target.name} | table_row(run) for run in runs]:
        path.parent.mkdir(exist_ok=True)
        appended = {"mode": "a", "header": not path.exists()}
        pd.DataFrame(rows).to_csv(path, index=False, lineterminator="\n", **appended)
    for part, name in {"root_causes": "grid", "sweep": "sweep", "tries": "tries"}.items():
        if rows := [*map(table_row, read_runs(source, part)[0])]:
            pd.DataFrame(rows).to_csv(target / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--run", help="name of a run folder in SOURCE, with its seed")
    given = parser.parse_args()
    if given.run:
        convert_folder(Run(given.source / given.run), given.target, {})
    else:
        convert_all(given.source, given.target)
