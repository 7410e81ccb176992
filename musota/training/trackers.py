"""Experiment trackers (TensorBoard, Weights & Biases, …), through accelerate's classes for them."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker

from musota.errors import find_named
from musota.files import write_text
from musota.training.checkpoint import RunDir

NAMES = {"loss": "train/loss", "learning_rate": "train/learning_rate"}  # of a record's numbers
NAMES |= {"grad_norm": "train/gradient_norm", "train_loss": "train/epoch_loss"}
NAMES |= {"valid_loss": "valid/loss", "ppl": "valid/ppl", "accuracy": "valid/accuracy"}


def check_trackers(log_with) -> tuple[str | GeneralTracker, ...]:
    """`log_with` as a tuple of names and trackers. Raises MusotaError for anything else."""
    given = log_with if isinstance(log_with, list | tuple) else (log_with,)
    for one in given:
        if not isinstance(one, GeneralTracker):
            find_named("tracker", one, LOGGER_TYPE_TO_CLASS)
    return tuple(dict.fromkeys(given))


class TensorBoard(TensorBoardTracker):
    """accelerate's tracker, but with the settings in the run itself, not in a run of their own."""

    def store_init_configuration(self, values: dict) -> None:
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, {}):
            self.writer.file_writer.add_summary(summary)


class Trackers:
    """The open trackers of a run. One that fails is reported and dropped: training goes on."""

    def __init__(self, log_with, folder: RunDir, settings: dict, step: int):
        """Opens them to continue after `step`; none in a process that does not write."""
        self.open: list[GeneralTracker] = []
        self.step, self.run, self.path = step, folder.path.name, folder.path / "trackers"
        if folder.writes and step == 0:  # what is there is of an earlier run
            shutil.rmtree(self.path, ignore_errors=True)
        for which in log_with if folder.writes else ():
            with self._dropping(which):
                tracker = which if isinstance(which, GeneralTracker) else self._tracker(which)
                tracker.start()
                tracker.store_init_configuration(settings)
                self.open.append(tracker)

    def _tracker(self, name: str) -> GeneralTracker:
        self.path.mkdir(exist_ok=True)
        if not (known := self.path / "id.txt").exists():  # a service finds a resumed run by it
            write_text(known, uuid.uuid4().hex[:8])
        number = known.read_text()
        if name == "tensorboard":
            return TensorBoard("", self.path, purge_step=self.step + 1)
        continued = {
            "trackio": {"name": f"{self.run}-{number}", "resume": "allow"},
            "wandb": {"name": self.run, "id": number, "resume": "allow", "dir": self.path},
        }
        return LOGGER_TYPE_TO_CLASS[name]("musota", **continued.get(name, {}))

    @contextmanager
    def _dropping(self, tracker: str | GeneralTracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a service or of another project's code: any
            self.open = [other for other in self.open if other is not tracker]
            name, what = getattr(tracker, "name", tracker), " ".join(str(error).split())
            reason = f"{type(error).__name__}: {what:.200}".rstrip(".: ")
            if isinstance(error, ImportError):
                reason = f"it is not installed (pip install {name})"
            print(f"\nTraining goes on without the tracker {name}: {reason}.", flush=True)

    def log(self, record: dict) -> None:
        """Send the numbers and the samples of a record of metrics.jsonl."""
        values = {name: record[key] for key, name in NAMES.items() if key in record}
        texts = [f"{sample['prompt']} … {sample['text']}" for sample in record.get("samples", ())]
        text = {"samples": "\n\n".join(" ".join(text.split()) for text in texts)} if texts else {}
        for tracker in self.open if values else ():
            with self._dropping(tracker):
                sent = values if tracker.name == "aim" else values | text  # it takes no text
                tracker.log(sent, step=record["step"])

    def close(self) -> None:
        for tracker in self.open:
            with self._dropping(tracker):
                tracker.finish()
