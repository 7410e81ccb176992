"""Corpora, and the windows that a model is trained on.

Tokenizers and tokens are cached in `$MUSOTA_CACHE` (else ~/.cache/musota), under names made of
hashes of what they were made from: a changed text is never read from the cache.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from musota.data import sources
from musota.data.sources import LONG_LINE, SPLITS, content_hash
from musota.data.tokenizer import SMALLEST_VOCABULARY, TextTokenizer
from musota.errors import MusotaError
from musota.files import cache_folder, write_together

REPEATED_SHARE = 0.01  # a larger share of valid's long lines in train is reported


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus. Splits are 1-D int32 tensors; counts are those of their text."""

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    words: dict[str, int]  # by split; line ends count as words, as in published counts
    bytes: dict[str, int]  # by split; UTF-8
    tokenizer: TextTokenizer
    fingerprint: str  # hash of the tokens
    text_hash: str  # hash of the whole text, whatever the vocabulary or limit
    source: str  # a description of where the text came from

    @property
    def label(self) -> str:
        """A name for folders, different for different texts."""
        if self.text_hash in sources.KNOWN_TEXTS:
            return sources.KNOWN_TEXTS[self.text_hash]
        plain = re.sub(r"[^\w.-]+", "-", self.name).strip("-")[:60]
        return f"{plain}-{self.text_hash[:8]}"

    @property
    def valid_sha256(self) -> str:
        """A hash of the valid tokens: runs with equal hashes can be compared."""
        return hashlib.sha256(self.valid.numpy()).hexdigest()

    def split(self, name: str) -> Tensor:
        return getattr(self, name)

    def statistics(self) -> pd.DataFrame:
        """A table by split: words, tokens, tokens per word, share of `<unk>`, bytes."""
        rows = {}
        for name, words in self.words.items():
            tokens = self.split(name)
            rows[name] = {
                "words and line ends": words,
                "tokens": len(tokens),
                "tokens per word": len(tokens) / words,
                "unk rate": int((tokens == self.tokenizer.unknown).sum()) / words,
                "bytes": self.bytes[name],
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def limited(self, train_tokens: int | None, valid_tokens: int | None) -> "Corpus":
        """The corpus with its splits cut to so many tokens (test as many as valid; None: all),
        each at the last line end that fits."""
        limits = (train_tokens, valid_tokens, valid_tokens)
        splits, words, sizes = {}, dict(self.words), dict(self.bytes)
        for name, limit in zip(SPLITS, limits, strict=True):
            splits[name] = self.split(name)
            if limit is None or len(splits[name]) <= limit:
                continue
            ends = (splits[name][:limit] == self.tokenizer.line_end).nonzero()
            cut = int(ends[-1]) + 1 if len(ends) else 0
            cut = cut if cut > limit / 2 else limit  # a very long line is cut anywhere
            splits[name] = splits[name][:cut]
            words[name], sizes[name] = _count(self.tokenizer.decode(splits[name]))
        fingerprint = _fingerprint(splits)
        return replace(self, **splits, words=words, bytes=sizes, fingerprint=fingerprint)


def load_corpus(
    name: str = "auto", vocab_size: int = 50_000, data_dir: str | os.PathLike | None = None
) -> Corpus:
    """The corpus `name`, tokenized (or from the cache).

    `name` is `wikitext-2`, `wikitext-2-raw`, `wikitext-103`, `wikitext-103-raw`, `python-docs`, the
    path of a folder with train.txt, valid.txt and test.txt, the path of one text, which is split
    90/5/5, or `auto`: wikitext-2 where it is available, else python-docs. `data_dir` (default
    `$MUSOTA_DATA_DIR`) may hold local copies in folders named like the corpora. Raises MusotaError.
    """
    if not isinstance(vocab_size, int) or vocab_size < SMALLEST_VOCABULARY:
        raise MusotaError(
            f"vocab_size must be a whole number of at least {SMALLEST_VOCABULARY}, every byte and "
            f"two special tokens, not {vocab_size!r}."
        )
    data_dir = data_dir or os.environ.get("MUSOTA_DATA_DIR")
    name, source, texts = sources.read_texts(str(name), data_dir)
    found = {split: _survey(texts[split](), f"The {split} text of {name}") for split in SPLITS}
    for split in SPLITS[1:]:
        repeated = np.isin(found[split].long_lines, found["train"].long_lines)
        if repeated.sum() > REPEATED_SHARE * len(repeated):
            source += f"; {repeated.mean():.0%} of the longer lines of {split} are also in train"

    def pieces(split: str, doing: str) -> Iterable[str]:
        """The text of a split, with a progress bar after two seconds."""
        size = 1 + found[split].bytes // sources.PIECE
        return tqdm(texts[split](), doing, size, unit="MB", delay=2)

    def learn(path: Path) -> None:
        learned_from = pieces("train", "learning a tokenizer from train")
        TextTokenizer.train(learned_from, vocab_size).save(path)

    def tokenize(split: str, path: Path) -> None:
        with path.open("wb") as file:
            for piece in pieces(split, f"tokenizing {split}"):
                file.write(tokenizer.encode(piece).tobytes())

    made_by = sources.RECIPE, metadata.version("tokenizers"), str(vocab_size)
    tokenizer_key = content_hash(*made_by, found["train"].sha256)
    tokenizer = TextTokenizer.load(_cached(f"tokenizer-{tokenizer_key}.json", learn))
    tokens = {}
    for split in SPLITS:
        file_name = f"tokens-{content_hash(tokenizer_key, found[split].sha256)}.bin"
        path = _cached(file_name, partial(tokenize, split))
        # Mapped from the file, tokens take no memory of their own.
        tokens[split] = torch.from_file(str(path), size=path.stat().st_size // 4, dtype=torch.int32)
    text_hash = content_hash(*(found[split].sha256 for split in SPLITS))
    return Corpus(
        sources.recognised(name, source, text_hash),
        **tokens,
        words={split: found[split].words for split in SPLITS},
        bytes={split: found[split].bytes for split in SPLITS},
        tokenizer=tokenizer,
        fingerprint=_fingerprint(tokens),
        text_hash=text_hash,
        source=source,
    )


def window_starts(n_tokens: int, length: int, seed: int, epoch: int) -> Tensor:
    """The starts of an epoch's training windows in training order, (windows,) int64.

    Windows of `length` inputs and their targets tile the stream from a random offset below
    `length`. Offset and order depend on (seed, epoch) alone; the number of windows on neither.
    Raises MusotaError if the stream is too short for one window.
    """
    count = (n_tokens - length) // length
    if count < 1:
        raise MusotaError(
            f"The training text has {n_tokens} tokens, too few for windows of {length}: use more "
            "text or a shorter max_seq_len."
        )
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(length, (1,), generator=generator))
    return offset + length * torch.randperm(count, generator=generator)


def _cached(name: str, write: Callable[[Path], object]) -> Path:
    """The path of a cache file, which `write(path)` makes if it is missing or damaged."""
    path = cache_folder() / name
    hash_path = path.with_suffix(".sha256")
    if not (path.exists() and hash_path.exists() and hash_path.read_bytes() == _file_hash(path)):
        written = []

        def write_and_hash(target: Path) -> None:
            write(target)
            written.append(_file_hash(target))

        write_together({path: write_and_hash, hash_path: lambda to: to.write_bytes(written[0])})
    return path


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()


class _Survey(NamedTuple):
    """Facts of a text."""

    sha256: str
    words: int
    bytes: int
    long_lines: np.ndarray  # hashes of the lines of at least LONG_LINE characters


def _survey(pieces: Iterable[str], what: str) -> _Survey:
    """Raises MusotaError if the text is all white space."""
    digest, words, size, blank, long_lines = hashlib.sha256(), 0, 0, True, array("q")
    for piece in pieces:
        digest.update(piece.encode())
        long_lines.extend(hash(line) for line in piece.splitlines() if len(line) >= LONG_LINE)
        more_words, more_bytes = _count(piece)
        words, size, blank = words + more_words, size + more_bytes, blank and not piece.strip()
    if blank:
        raise MusotaError(f"{what} is empty: put text into it.")
    return _Survey(digest.hexdigest(), words, size, np.frombuffer(long_lines, np.int64))


def _fingerprint(splits: dict[str, Tensor]) -> str:
    """A hash of the tokens of all splits."""
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(f"{name} {len(splits[name])} ".encode())
        digest.update(splits[name].numpy())
    return digest.hexdigest()[:16]


def _count(text: str) -> tuple[int, int]:
    """Words (line ends counted as words) and UTF-8 bytes of a text."""
    return len(text.split()) + text.count("\n"), len(text.encode())
