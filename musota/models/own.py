"""A module of the reader's own, as a model of this workbook: trained, scored and sampled alike."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musota.errors import MusotaError
from musota.models.base import CausalLM
from musota.plan.architectures import OwnConfig
from musota.plan.own import logits_of


class OwnModel(CausalLM):
    """Its hidden states are the author's logits; nothing else of its inside is known."""

    def __init__(self, config: OwnConfig):
        nn.Module.__init__(self)  # the embeddings of a CausalLM are not its own
        self.config, self.compiled, self.tokenizer = config, None, None
        self.module = config.build()
        if not config.n_parameters:  # one that does not even run is told here, too
            raise MusotaError(f"{config.source} has no parameters, so nothing to train.")
        ids = torch.zeros(1, config.max_seq_len, dtype=torch.long)
        with torch.random.fork_rng([]), torch.no_grad():  # what its first call makes is saved, too
            logits_of(self.module.eval(), ids)
        self.module.train()

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        compiled = self.compiled if self.training else None
        return (compiled or logits_of)(self.module, input_ids)  # (B, T, V)

    def compile_layers(self, on: bool = True) -> None:
        """The whole module, of whose parts nothing is known."""
        torch.compiler.reset()
        self.compiled = torch.compile(logits_of, dynamic=False, fullgraph=True) if on else None

    def logits_of(self, hidden: Tensor) -> Tensor:
        return hidden

    def loss_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden.float().flatten(0, -2), targets.flatten())

    def score_of(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = zip(hidden, targets, strict=True)  # one at a time, for the memory
        nats = [F.cross_entropy(row.float(), y, reduction="none") for row, y in rows]
        return torch.stack(nats), hidden.argmax(-1) == targets

    def health(self, input_ids: Tensor) -> dict:
        return {}

    def ledger_group(self, name: str) -> str:
        """The author's own parts: the first name below the module."""
        return name.split(".")[1].replace("_", " ")

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Every matrix but those of embeddings."""
        tables = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        return parameter.dim() >= 2 and not any(parameter is table for table in tables)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Copies: tied weights have two names for one memory, which a file refuses."""
        held = super().state_dict(*args, **kwargs)
        for name, value in held.items():
            held[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return held
