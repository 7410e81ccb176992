import os
import shutil
from dataclasses import replace

import pytest

import musota
from musota.errors import MusotaError
from musota.plan.config import TrainConfig
from musota.training import keeping
from musota.training.mirror import Mirror
from musota.workbook.session import Workbook

EXPERIMENT = musota.Experiment(
    musota.DenseConfig(vocab_size=512, max_seq_len=24, n_layer=1, d_model=16, n_head=2),
    TrainConfig(epochs=2, learning_rate=3e-3, warmup_steps=5, batch_size=16),
)


def _content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name[0] != "."
    }


def test_a_run_is_copied_with_each_checkpoint_and_goes_on_elsewhere(short, tmp_path):
    whole = musota.train(EXPERIMENT, short, tmp_path / "whole")
    here, drive, there = (Mirror(tmp_path / n, tmp_path / "drive") for n in ("a", "drive", "b"))
    musota.train(EXPERIMENT, short, here.local, stop_at=0.7, copy=here.push)
    assert _content(drive.local) == _content(here.local)
    shutil.rmtree(here.local)  # the machine is gone
    there.pull()
    run = musota.train(EXPERIMENT, short, there.local, copy=there.push)
    assert run.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert musota.Run(drive.local).finished
    assert _content(drive.local) == _content(there.local)


def test_the_run_that_got_further_is_taken(short, tmp_path):
    mirror = Mirror(tmp_path / "here", tmp_path / "drive")
    for folder, share in ((mirror.local / "r", 0.3), (mirror.remote / "r", 0.7)):
        musota.train(EXPERIMENT, short, folder, stop_at=share)
    further = _content(mirror.remote)
    mirror.pull()
    assert _content(mirror.local) == further
    musota.train(EXPERIMENT, short, mirror.local / "r")
    done = _content(mirror.local)
    mirror.pull()
    assert _content(mirror.local) == done


def test_what_a_drive_lost_or_cut_is_copied_again(short, tmp_path):
    mirror = Mirror(tmp_path / "here", tmp_path / "drive")
    musota.train(EXPERIMENT, short, mirror.local, copy=mirror.push)
    (mirror.remote / "metrics.jsonl").unlink()
    newest = max((mirror.remote / "checkpoints").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:100])
    mirror.push()
    assert _content(mirror.remote) == _content(mirror.local)
    before = newest.stat().st_ino
    mirror.push()
    assert newest.stat().st_ino == before  # not copied without need


def test_a_vanished_drive_does_not_stop_training_but_is_told_at_the_end(short, tmp_path, capsys):
    mirror = Mirror(tmp_path / "here", tmp_path / "drive")
    (tmp_path / "drive").rmdir()
    with pytest.raises(MusotaError, match="could not be copied to .*drive: it has vanished"):
        musota.train(EXPERIMENT, short, mirror.local, copy=mirror.push)
    assert "Not copied to" in capsys.readouterr().out
    assert musota.Run(mirror.local).finished
    assert not (tmp_path / "drive").exists()  # nothing is written where the drive was mounted
    with pytest.raises(MusotaError, match="could not be copied to .*drive: it has vanished"):
        musota.train(EXPERIMENT, short, mirror.local, copy=mirror.push)  # finished, still not there
    (tmp_path / "drive").mkdir()
    musota.train(EXPERIMENT, short, mirror.local, copy=mirror.push)
    assert musota.Run(mirror.remote).finished


def test_another_disk_under_the_same_name_is_not_the_drive(tmp_path):
    mirror = Mirror(tmp_path / "here", tmp_path / "drive")
    root, disk = mirror.root
    with pytest.raises(FileNotFoundError, match="vanished"):
        replace(mirror, root=(root, disk + 1)).part(mirror.local / "run").push()
    assert not [*mirror.remote.iterdir()]


def test_a_workbook_works_on_its_own_disk_and_saves_elsewhere(text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path / "machine-1"))
    given = {"profile": "tiny", "corpus": str(text_folder), "save_to": str(tmp_path / "drive")}
    book = Workbook(**given)
    assert str(book.folder).startswith(str(tmp_path / "machine-1"))
    run = book.train("baseline", stop_at=0.5)
    assert musota.Run(book.home / "baseline-seed0").history.equals(run.history)
    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path / "machine-2"))
    shutil.copytree(tmp_path / "machine-1", tmp_path / "machine-2",
                    ignore=shutil.ignore_patterns("work"))  # fmt: skip
    book = Workbook(**given)
    run = book.train("baseline")
    assert run.finished and book.recorded.names == ["baseline"]
    book.record("note", [], seen=1)
    assert (book.home / "note.json").exists()
    shutil.rmtree(tmp_path / "drive")
    (tmp_path / "drive").write_text("gone")
    with pytest.raises(MusotaError, match="could not be copied to .*make room there, or mount it"):
        book.record("note", [], seen=2)
    assert (book.folder / "note.json").exists()


def test_two_machines_at_one_drive_leave_each_others_runs_alone(short, tmp_path):
    here, there = (Mirror(tmp_path / name, tmp_path / "drive") for name in ("a", "b"))

    def go_on(share):
        run = there.local / "run"
        musota.train(EXPERIMENT, short, run, stop_at=share, copy=there.part(run).push)

    go_on(0.3)
    here.pull()  # a notebook is opened beside it, and writes its own results
    go_on(0.7)
    before = _content(there.remote)
    (here.local / "note.json").write_text("{}")
    here.push()
    assert _content(there.remote) == {**before, "note.json": b"{}"}
    go_on(1.0)
    here.push()
    assert musota.Run(there.remote / "run").finished and musota.Run(there.remote / "run").records


def test_copies_come_every_ten_minutes_and_what_goes_is_emptied_first(short, tmp_path, monkeypatch):
    emptied, truncate, copied = [], os.truncate, []
    mirror = Mirror(tmp_path / "results", tmp_path / "drive")
    monkeypatch.setattr(os, "truncate", lambda p, n: (emptied.append(p.name), truncate(p, n)))
    part = mirror.part(mirror.local / "run")

    def copy():
        copied.append(1)
        part.push()

    musota.train(EXPERIMENT.with_(epochs=4), short, part.local, copy=copy)
    assert len(copied) == 2  # with the first checkpoint, and at the end
    assert len(emptied) == 1 and len([*part.remote.glob("checkpoints/step-*")]) == 2
    monkeypatch.setattr(keeping, "COPY_SECONDS", -1)
    musota.train(EXPERIMENT.with_(epochs=4), short, part.local, resume=False, copy=copy)
    assert len(copied) == 2 + 4 + 1
