"""What a run keeps: an epoch's measurements, checkpoints to go on from, the best weights, the
summary. The trainer calls, and is read and restored."""

import math
import time

import torch
from torch import Tensor

from musota.files import sha256
from musota.models.base import CausalLM, weights_sha256
from musota.models.sharing import build_model, save_model
from musota.training.evaluate import blocks_of, health_of, metrics_of, samples_of, score_in_memory
from musota.training.machine import about_machine, autocast_on, peak_memory
from musota.training.optimizer import load_state_tensors, state_tensors
from musota.training.runs import Run

COPY_SECONDS = 600  # between copies to a slower disk; a run ends with one, however it ends
# Of the trainer's state, besides tensors: what goes back to a checkpoint with it.
KEPT = ("step", "applied", "update_ratio", "remedies", "summary")


@torch.no_grad()
def kept_model(trainer) -> CausalLM:
    """What is measured and kept: the model, or one with the average of its weights."""
    if not trainer.average:
        return trainer.model
    torch.manual_seed(trainer.seed)  # as the model was built; every step seeds anew
    model = build_model(trainer.experiment.model)
    model.load_state_dict(trainer.model.state_dict())
    for name, parameter in model.named_parameters():
        if name in trainer.average:
            parameter.copy_(trainer.average[name])
    return model.to(trainer.device)


def end_epoch(trainer) -> None:
    """Measure on valid, keep the weights if they are the best yet, and record it all."""
    if not trainer.folder.writes:
        return
    corpus, epoch = trainer.corpus, trainer.step // trainer.steps_per_epoch
    model = kept_model(trainer)
    with autocast_on(trainer.device, trainer.accelerator.mixed_precision):
        nats, hits = score_in_memory(model, corpus.valid, trainer.tell)
        samples = samples_of(model, corpus)
        health = health_of(model, corpus, trainer.tell)
    measured = metrics_of(nats, hits, corpus.words["valid"], corpus.bytes["valid"])
    measured = {"valid_loss": measured.pop("loss"), **measured}
    block_nats, block_tokens = blocks_of(nats)
    trainer.record(
        {
            "kind": "epoch",
            "epoch": epoch,
            "step": trainer.step,
            "tokens": trainer.tokens_seen,
            "seconds": round(trainer.seconds, 3),
            "train_loss": float(trainer.epoch_nats) / trainer.windows,
            **measured,
            "samples": samples,
            "valid_block_nats": block_nats,
            "health": {"update_ratio": trainer.update_ratio, **health},
        }
    )
    if measured["valid_loss"] < trainer.summary.get("valid_loss", math.inf):
        weights = model.state_dict()
        trainer.best_unsaved = {name: value.detach().clone() for name, value in weights.items()}
        blocks = {"valid_block_tokens": block_tokens, "valid_block_nats": block_nats}
        trainer.summary |= {"best_epoch": epoch, **measured, **blocks}
    trainer.summary |= {"finished": False, "epochs_done": epoch}


def checkpoint(trainer) -> None:
    """Save what to resume from, and the best weights if that is still to be done."""
    folder, scaler, best = trainer.folder, trainer.accelerator.scaler, trainer.best_unsaved
    trainer.saved_at = time.monotonic()
    if not folder.writes:
        return
    folder.trouble = ""
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    # Until best/ holds them, the best weights are in the checkpoint, which is written first.
    tensors |= {f"best.{name}": value for name, value in (best or {}).items()}
    tensors |= {f"average.{name}": value for name, value in trainer.average.items()}
    tensors |= {"epoch_nats": trainer.epoch_nats, **state_tensors(trainer.optimizer)}
    state = {name: getattr(trainer, name) for name in (*KEPT, "choices", "seconds")}
    state |= {"device": trainer.device.type, "scaler": scaler.state_dict() if scaler else None}
    saved = folder.save_checkpoint(tensors, state)
    if saved and best is not None and folder.attempt(lambda: _save_best(trainer, best)):
        trainer.best_unsaved = None
    if trainer.copy and time.monotonic() - trainer.copied_at > COPY_SECONDS:
        folder.attempt_copy(trainer.copy)
        trainer.copied_at = time.monotonic()


def _save_best(trainer, weights: dict[str, Tensor]) -> None:
    best = trainer.folder.checkpoints / "best"
    best.mkdir(exist_ok=True)  # fails, as it should, where the run's folder has vanished
    save_model(best, trainer.experiment.model, weights, trainer.corpus.tokenizer)
    files = sorted(path for path in best.iterdir() if not path.name.startswith("."))
    trainer.summary["best_files"] = {path.name: sha256(path.read_bytes()) for path in files}


def restore(trainer, saved: tuple[dict[str, Tensor], dict]) -> None:
    """Go on from what `checkpoint` saved."""
    tensors, state = saved
    weights, average, best = (
        {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
        for part in ("model.", "average.", "best.")
    )
    trainer.model.load_state_dict(weights)
    for name, value in average.items():
        trainer.average[name].copy_(value)
    load_state_tensors(trainer.optimizer, tensors)
    trainer.epoch_nats.copy_(tensors["epoch_nats"])
    if state["scaler"] and trainer.accelerator.scaler:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    for name in KEPT:
        setattr(trainer, name, state[name])
    trainer.best_unsaved = best or None
    if best:  # whose files are not known to be whole
        trainer.summary.pop("best_files", None)
    trainer.started = time.perf_counter() - state["seconds"]
    write_summary(trainer)  # of that moment again, should a later one stand there


def finish(trainer) -> None:
    """The test split, once, with the best epoch's weights; then the summary is complete."""
    folder, corpus = trainer.folder, trainer.corpus
    if not folder.writes:
        return
    if trainer.best_unsaved is not None:
        checkpoint(trainer)
    if trainer.best_unsaved is not None or not folder.attempt(folder.write_metrics):
        return  # the disk is full, or has vanished: not finished
    final_weights, seconds = weights_sha256(kept_model(trainer)), trainer.seconds
    best = Run(folder.path).load_model().to(trainer.device)
    with autocast_on(trainer.device, trainer.accelerator.mixed_precision), torch.no_grad():
        scored = score_in_memory(best, corpus.test, trainer.tell)
    measured = metrics_of(*scored, corpus.words["test"], corpus.bytes["test"])
    trainer.summary |= {f"test_{key}": value for key, value in measured.items()}
    trainer.summary |= {
        "finished": True,
        "weights_sha256": final_weights,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(trainer.tokens_seen / seconds, 1),
    }
    write_summary(trainer)


def write_summary(trainer) -> None:
    """What has been measured, and on what; nothing before the first epoch has ended."""
    about = {
        "parameters": sum(trainer.ledger.values()),
        "parameter_ledger": trainer.ledger,
        "flops_per_token": trainer.experiment.model.flops_per_token,
        "peak_memory_bytes": peak_memory(trainer.device),
        **about_machine(trainer.device),
    }
    trainer.folder.write_summary({**trainer.summary, **about} if trainer.summary else {})
