"""What may go wrong in a step, and what is done about it; the trainer calls, and is changed."""

import math

import torch

from musota.errors import MusotaError
from musota.files import sha256
from musota.models.health import evaluating
from musota.rules.curves import oscillation
from musota.training import keeping
from musota.training.machine import is_out_of_memory
from musota.training.runs import read_metrics, steps_table

EXPLODED_NATS = 2.0  # so far above a uniform guess a training loss counts as exploded
LEAST_RATE_FACTOR = 0.25  # after two remedies that halved it


class Diverged(MusotaError):
    """The loss is no longer a number, or far above that of a guess."""


COMPILING = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


def known(error: Exception) -> Exception:
    """The error if `mend` can do something about it, without what holds on to the step's memory;
    raises it otherwise."""
    if not (isinstance(error, (*COMPILING, Diverged)) or is_out_of_memory(error)):
        raise error
    return error.with_traceback(None)


def refuse_bad_loss(trainer, loss: float, limit: float = math.inf) -> None:
    """Stop before a loss that is no number, or above `limit`, reaches a checkpoint."""
    if math.isfinite(loss) and loss <= limit:
        return
    batch = trainer.last_batch().cpu().numpy().tobytes()
    trainer.record({"kind": "event", "step": trainer.step, "event": "diverged"})
    raise Diverged(
        f"The training loss is {loss:.4g} at step {trainer.step} (batch {sha256(batch)[:12]}): "
        f"start over with a lower learning_rate than {trainer.training.learning_rate:g}, or with "
        f"auto_remedy=True. The last good checkpoint stays in {trainer.folder.checkpoints}."
    )


def limit_of(trainer) -> float:
    """The training loss above which a model has exploded."""
    return math.log(trainer.experiment.model.vocab_size) + EXPLODED_NATS


@torch.no_grad()
def bad_weights(trainer) -> Diverged | None:
    """The error if what the last step made of the weights is broken: by the loss, now, of windows
    that it was trained on."""
    if trainer.starts is None:  # no step since the last checkpoint
        return None
    some = trainer.last_batch()[: trainer.choices["micro_batch"], None]
    ids = trainer.tokens[some + trainer.span].long()
    with evaluating(trainer.model), trainer.accelerator.autocast():
        loss = trainer.model(ids[:, :-1], ids[:, 1:])[1]
    try:
        refuse_bad_loss(trainer, float(loss), limit_of(trainer))
    except Diverged as error:
        return error.with_traceback(None)
    return None


def mend(trainer, trouble: Exception) -> None:
    """After a step that failed. Raises what cannot be mended here."""
    trainer.optimizer.zero_grad()
    if is_out_of_memory(trouble):
        _take_less_memory(trainer)
    elif isinstance(trouble, Diverged):
        _go_back(trainer, trouble)
    else:
        reason = str(trouble).strip().splitlines()[0]
        trainer.tell(f"torch.compile failed, training goes on without it ({reason})")
        trainer.choices["compile"] = False
        trainer.model.compile_layers(False)


def _take_less_memory(trainer) -> None:
    """Halve the micro-batch."""
    held = trainer.choices["micro_batch"]
    if trainer.accelerator.num_processes > 1:
        raise MusotaError("Out of memory: start again with a smaller micro_batch.")
    if held == 1:
        other = "the plan's remedy is max_seq_len=160, which is another experiment"
        raise MusotaError(f"Out of memory with a single sequence: {other}.")
    if trainer.accelerator.scaler:  # it may have been between unscaling and the step
        trainer.accelerator.scaler._per_optimizer_states.clear()
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    trainer.choices["micro_batch"] = -(-held // 2)
    trainer.tell(f"out of memory: micro-batch {held} → {trainer.choices['micro_batch']}")


def _half_the_rate(trainer) -> float:
    """The next factor of the learning rate; 0 where remedies may not apply themselves any more."""
    factor = trainer.remedies["rate_factor"] / 2
    return factor if trainer.auto_remedy and factor >= LEAST_RATE_FACTOR else 0.0


def _go_back(trainer, error: Diverged) -> None:
    """To the last checkpoint at half the rate, if remedies may apply themselves."""
    factor = _half_the_rate(trainer)  # of now: twice back to one checkpoint, a quarter
    there = factor and trainer.folder.last
    bad, saved = trainer.step, trainer.folder.load_checkpoint() if there else None
    if saved is None:  # or not even the first could be written
        raise error
    keeping.restore(trainer, saved)
    trainer.remedies = {"rate_factor": factor, "step": trainer.step}
    trainer.starts = None
    trainer.tell(f"bad loss at step {bad}: back to step {trainer.step}, learning rate × {factor}")
    keeping.checkpoint(trainer)


def calm_down(trainer) -> None:
    """Half the rate where the training loss oscillates, if remedies may apply themselves."""
    if not (factor := _half_the_rate(trainer)):
        return
    steps = steps_table(read_metrics(trainer.folder.metrics, trainer.folder.path))
    since = max(trainer.training.warmup_steps, trainer.remedies["step"])
    found = oscillation(steps, since)
    if found.verdict in ("oscillating", "diverging"):
        trainer.remedies = {"rate_factor": factor, "step": trainer.step}
        trainer.tell(f"{found.conclusion}: learning rate × {factor}")
