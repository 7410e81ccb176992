"""What an experiment is: a model, how to train it, and what a person may change in both."""

import ast
import contextlib
import dataclasses
from dataclasses import dataclass

from musota.errors import MusotaError, nearest_name
from musota.plan import architectures
from musota.plan.architectures import KINDS, ModelConfig, RedesignedConfig, describe, model_config


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, linear warm-up then cosine to 0, all counted in optimizer steps."""

    epochs: int = 30
    learning_rate: float = 1e-4
    warmup_steps: int = 2000
    batch_size: int = 4
    accumulation_steps: int = 8
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    optimizer: str = "adamw"  # a row of training/optimizer.py
    schedule: str = "cosine"  # a row of training/schedule.py
    averaging: float = 0.0  # share of the steps so far that an average of the weights mostly spans
    started_from: str = ""  # hash of another run's weights; empty: freshly initialised

    def __post_init__(self):
        architectures.check_fields(self)

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps


@dataclass(frozen=True)
class Experiment:
    """A model and how to train it; equal when both are, whatever they are called. A model that was
    matched to another (a dense twin, the redesign) remembers to which, to be matched anew."""

    model: ModelConfig
    training: TrainConfig
    twin_of: ModelConfig | None = dataclasses.field(default=None, compare=False)

    def with_(self, **changes) -> "Experiment":
        """A copy with fields of the model or of the training changed, by name."""
        known = [{f.name for f in dataclasses.fields(part)} for part in (self.model, self.training)]
        for name in changes.keys() - known[0] - known[1]:
            raise nearest_name("experiment field", name, sorted(self.fields()))
        in_model = {name: changes.pop(name) for name in known[0] & changes.keys()}
        return Experiment(
            dataclasses.replace(self.model, **in_model),
            dataclasses.replace(self.training, **changes),
            None if in_model else self.twin_of,  # another model is no longer a twin
        )

    def fields(self) -> dict:
        """Every field of model and training by name; what a run was started from, if anything."""
        fields = dataclasses.asdict(self.model) | dataclasses.asdict(self.training)
        return {name: value for name, value in fields.items() if name != "started_from" or value}

    def differences(self, base: "Experiment") -> list[str]:
        """What was changed in `base`, as `field=value`; in a model that is matched to another, what
        was changed in that other: the rest follows."""
        before, after = base.fields(), self.fields()
        if self.twin_of and base.twin_of:
            before, after = base._asked(), self._asked()
        return [
            f"{name}={value if isinstance(value, str) else format(value, '.9g')}"
            for name, value in after.items()
            if before.get(name) != value
        ]

    def _asked(self) -> dict:
        """The fields that the size of a matched model follows from."""
        fields = Experiment(self.twin_of, self.training).fields()
        if isinstance(self.model, RedesignedConfig):
            fields |= {"n_block": self.model.n_block, "without": self.model.without}
        return fields

    def to_dict(self) -> dict:
        """For JSON; `from_dict` is the inverse."""
        described = {"model": describe(self.model), "training": dataclasses.asdict(self.training)}
        return described | ({"twin_of": describe(self.twin_of)} if self.twin_of else {})

    @classmethod
    def from_dict(cls, data: dict) -> "Experiment":
        """Raises MusotaError for fields or kinds it does not know; missing ones take defaults."""
        try:
            other = data.get("twin_of")
            training = TrainConfig(**data["training"])
            return cls(model_config(data["model"]), training, other and model_config(other))
        except (AttributeError, KeyError, TypeError) as error:
            raise MusotaError(f"Not the description of an experiment: {error}.") from None


def check_changes(changes) -> dict:
    """What a person wants changed, by field: a dict, or the text of one. Raises MusotaError for a
    field or a value that no experiment has."""
    if isinstance(changes, str):  # from papermill's command line
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            changes = ast.literal_eval(changes)
    if not isinstance(changes, dict):
        raise MusotaError(f'changes must be like {{"learning_rate": 0.003}}, not {changes!r}.')
    configs = (*KINDS.values(), TrainConfig)
    known = {f.name: f for config in configs for f in dataclasses.fields(config)}
    for name, value in changes.items():
        if name not in known:
            raise nearest_name("field", name, sorted(known))
        architectures.check_field(known[name], value)
    return changes
