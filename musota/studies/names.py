"""Do the blocks' names mean anything? What each block alone tells of a token and its context."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.models.base import CausalLM
from musota.models.health import evaluating, hooked
from musota.rules.stats import MIN_BLOCKS, TAILS
from musota.studies.probes import require_blocks
from musota.training.runs import Run

WINDOWS = 400  # of valid text, half to fit the probes on, half to test them
RESAMPLES = 1000
RIDGE = 1e-2  # of the mean variance of a block's cells
# What the plan's names would lead one to expect, where a probe can say.
EXPECTED = {
    "position": "P", "previous token": "C1", "sentence start": "S", "punctuation": "S",
    "frequency": "K", "capital": "E", "digit": "M",
}  # fmt: skip


def measure_names(run: Run, corpus: Corpus) -> dict:
    """`names_of` a run's best model. Raises MusotaError for a run without its checkpoint."""
    return names_of(run.load_model(), corpus)


def names_of(model: CausalLM, corpus: Corpus) -> dict:
    """`similarity` (N, N) between blocks · `reads`: by property and block, the balanced accuracy
    of a linear probe beyond that of one fitted to shuffled labels, with its 95 % interval over
    windows · `moves`: by block, the share of a word's variance that its context explains, beyond
    shuffled contexts, with its interval over words · `words`, how many. All after the last layer.

    Raises MusotaError for a model without blocks, and for too little text.
    """
    require_blocks(model)
    layout = model.config.layout
    length = min(model.config.max_seq_len, len(corpus.valid) // 8)  # windows to fit on, and to test
    if length < 2:
        raise MusotaError(f"{len(corpus.valid)} tokens of valid text are too few for probes.")
    count = min(WINDOWS, len(corpus.valid) // length)
    ids = corpus.valid[: count * length].view(count, length).long()
    cells = stream(model, ids)[:, 1:]  # the first token of a window has nothing before it
    blocks = dict(zip(layout.names, cells.split(layout.sizes, -1), strict=True))
    flat = {name: block.flatten(0, 1) for name, block in blocks.items()}
    labels = properties(corpus, ids)
    generator = np.random.default_rng(0)
    return {
        "similarity": [[similarity(a, b) for b in flat.values()] for a in flat.values()],
        "blocks": list(blocks),
        "reads": {
            name: {block: reads(x, of, generator) for block, x in blocks.items()}
            for name, of in labels.items()
        },
        **moves(flat, ids, generator),
    }


@torch.no_grad()
def stream(model: CausalLM, ids: Tensor) -> Tensor:
    """The residual stream after the last layer: (W, T) tokens to (W, T, C), in cell order."""
    seen = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].cpu()))
    with hooked([hook]), evaluating(model):
        for some in ids.split(16):
            model.hidden_states(some.to(model.device))
    return torch.cat(seen).float()


def similarity(a: Tensor, b: Tensor) -> float:
    """Linear CKA of two sets of cells of the same tokens, (n, c) each: 1 where one is the other
    turned and scaled, 0 where they share nothing (Kornblith et al. 2019)."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    shared, own_a, own_b = ((x.mT @ y).norm() ** 2 for x, y in ((a, b), (a, a), (b, b)))
    return float(shared / (own_a * own_b).sqrt().clamp_min(1e-30))


def properties(corpus: Corpus, ids: Tensor) -> dict[str, Tensor]:
    """What is known of tokens 1 … T−1 of every window, as classes: (W, T−1) int64 each."""
    tokenizer, size = corpus.tokenizer, corpus.tokenizer.size
    texts = [tokenizer.backend.decode([i], skip_special_tokens=False).strip() for i in range(size)]
    own = {
        "capital": torch.tensor([text[:1].isupper() for text in texts]),
        "digit": torch.tensor([any(map(str.isdigit, text)) for text in texts]),
        "punctuation": torch.tensor([not any(map(str.isalnum, text)) for text in texts]),
    }
    ends = torch.tensor([text in (".", "!", "?") for text in texts])
    ends[tokenizer.line_end] = True
    kind = torch.zeros(size, dtype=torch.long)  # of a token: 0 plain word
    for number, of in enumerate(own.values(), start=1):
        kind[of] = number
    counts = torch.bincount(corpus.train.long(), minlength=size).double()
    order = counts.argsort(descending=True)
    share = (counts[order].cumsum(0) - counts[order] / 2) / counts.sum()
    decile = torch.empty(size, dtype=torch.long)
    decile[order] = (10 * share).long().clamp_max(9)  # each holds a tenth of the running text
    now, before = ids[:, 1:], ids[:, :-1]
    return {
        "position": torch.arange(1, ids.shape[1]).expand_as(now) * 4 // ids.shape[1],
        "previous token": kind[before],
        "sentence start": ends[before].long(),
        "frequency": decile[now],
        **{name: of[now].long() for name, of in own.items()},
    }


def reads(cells: Tensor, labels: Tensor, generator: np.random.Generator) -> list[float]:
    """(W, T, c) cells and (W, T) classes to [mean, low, high] (the ends from ten windows on):
    balanced accuracy on the second half of the windows of a linear probe fitted to the first, minus
    that of one fitted to the labels in a shuffled order (selectivity, Hewitt and Liang 2019)."""
    half, labels = len(cells) // 2, labels.unique(return_inverse=True)[1]
    order = torch.from_numpy(generator.permutation(labels.numel()))
    shuffled = labels.flatten()[order].view_as(labels)
    found = []
    for of in (labels, shuffled):
        guess = _probe(cells[:half].flatten(0, 1), of[:half].flatten(), cells[half:])
        classes = torch.nn.functional.one_hot(of[half:], int(labels.max()) + 1)
        hits = (guess == of[half:]).unsqueeze(-1) * classes
        found.append((hits.sum(1).numpy(), classes.sum(1).numpy()))  # (windows, classes)
    windows = len(labels) - half
    picked = generator.integers(windows, size=(RESAMPLES, windows))
    every = np.concatenate([np.arange(windows)[None], picked])
    recalls = [hits[every].sum(1) / np.maximum(total[every].sum(1), 1) for hits, total in found]
    values = recalls[0].mean(-1) - recalls[1].mean(-1)
    return [float(values[0]), *_ends(values[1:], windows)]


def _ends(values: np.ndarray, of: int) -> list[float]:
    """Of a 95 % interval, from resampled values; fewer than ten things have none."""
    return [] if of < MIN_BLOCKS else np.quantile(values, TAILS).tolist()


def _probe(x: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    """Classes of `other` by weighted ridge regression onto the classes of x: (n, c), (n,)."""
    classes = torch.nn.functional.one_hot(labels).double()
    weight = (1 / classes.sum(0).clamp_min(1))[labels].unsqueeze(-1)  # every class counts alike
    mean, spread = x.double().mean(0), x.double().std(0).clamp_min(1e-6)

    def features(cells: Tensor) -> Tensor:
        scaled = (cells.double() - mean) / spread
        return torch.cat([scaled, torch.ones_like(scaled[..., :1])], -1)

    f = features(x)
    normal = f.mT @ (weight * f)
    normal += RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype)
    return (features(other) @ torch.linalg.solve(normal, f.mT @ (weight * classes))).argmax(-1)


def moves(blocks: Mapping[str, Tensor], ids: Tensor, generator: np.random.Generator) -> dict:
    """Of every word that stands at least four times after each of its two commonest predecessors:
    how much of its variance in a block tells the two kinds of context apart."""
    now, before = ids[:, 1:].flatten().numpy(), ids[:, :-1].flatten().numpy()
    shares = {name: [] for name in blocks}
    for word in np.unique(now):
        places = np.flatnonzero(now == word)
        kinds, counts = np.unique(before[places], return_counts=True)
        if len(kinds) < 2 or np.sort(counts)[-2] < 4:
            continue
        pair = kinds[np.argsort(-counts, kind="stable")[:2]]
        places = places[np.isin(before[places], pair)]
        kind = before[places] == pair[0]
        for name, block in blocks.items():
            x = block[places].double().numpy()
            shuffled = np.mean([_explained(x, generator.permutation(kind)) for _ in range(10)])
            shares[name].append(_explained(x, kind) - shuffled)
    found, words = {}, len(next(iter(shares.values())))
    for name, values in shares.items() if words else ():
        values = np.array(values)
        picked = values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
        found[name] = [float(values.mean()), *_ends(picked, len(values))]
    return {"moves": found, "words": words}


def _explained(x: np.ndarray, kind: np.ndarray) -> float:
    """The share of the variance of (n, c) that lies between the two kinds."""
    centred = x - x.mean(0)
    between = sum(part.sum() * np.square(centred[part].mean(0)).sum() for part in (kind, ~kind))
    total = np.square(centred).sum()
    return float(between / total) if total > 1e-9 * np.square(x).sum() else 0.0  # it stands still
