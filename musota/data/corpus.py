"""Corpora, and the windows that a model is trained on.

Tokenizers and tokens are cached in `$MUSOTA_CACHE` (else ~/.cache/musota), under names made of
hashes of what they were made from: a changed text is never read from the cache.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from musota.config import check_value
from musota.data.sources import KNOWN_TEXTS, LONG_LINE, RECIPE, SPLITS, content_hash, read_texts
from musota.data.tokenizer import SMALLEST_VOCABULARY, TextTokenizer
from musota.errors import MusotaError
from musota.files import cache_folder, sha256, write_text, write_whole

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
        plain = re.sub(r"[^\w.-]+", "-", self.name).strip("-")[:60]
        return KNOWN_TEXTS.get(self.text_hash, f"{plain}-{self.text_hash[:8]}")

    @property
    def valid_sha256(self) -> str:
        """A hash of the valid tokens: runs with equal hashes can be compared."""
        return hashlib.sha256(self.valid.numpy()).hexdigest()

    def split(self, name: str) -> Tensor:
        return getattr(self, name)

    def statistics(self) -> pd.DataFrame:
        """A table by split: words, tokens, tokens per word, share of `<unk>`, bytes."""
        tokens = {name: len(self.split(name)) for name in SPLITS}
        unknown = {name: int((self.split(name) == self.tokenizer.unknown).sum()) for name in SPLITS}
        table = pd.DataFrame({"words and line ends": self.words, "tokens": tokens})
        table["tokens per word"] = table["tokens"] / table["words and line ends"]
        table["unk rate"] = pd.Series(unknown) / table["words and line ends"]
        table["bytes"] = pd.Series(self.bytes)
        return table

    def limited(self, train_tokens: int | None, valid_tokens: int | None) -> "Corpus":
        """The corpus with its splits cut to so many tokens (test as many as valid; None: all),
        each at the last line end that fits. Raises MusotaError for a limit that is no whole
        number."""
        splits, words, sizes = {}, dict(self.words), dict(self.bytes)
        for name, limit in zip(SPLITS, (train_tokens, valid_tokens, valid_tokens), strict=True):
            splits[name] = self.split(name)
            if limit is None or len(splits[name]) <= check_value("limit", limit, int, 0):
                continue
            ends = (splits[name][:limit] == self.tokenizer.line_end).nonzero()
            cut = int(ends[-1]) + 1 if len(ends) else 0
            cut = cut if cut > limit / 2 else limit  # a very long line is cut anywhere
            splits[name] = splits[name][:cut]
            text = self.tokenizer.decode(splits[name])
            words[name], sizes[name] = _words(text), len(text.encode())
        fingerprint = _fingerprint(splits)
        return replace(self, **splits, words=words, bytes=sizes, fingerprint=fingerprint)


def load_corpus(
    name: str = "auto", vocab_size: int = 50_000, data_dir: str | os.PathLike | None = None
) -> Corpus:
    """The corpus `name`, tokenized (or from the cache).

    `name` is `wikitext-2`, `wikitext-2-raw`, `wikitext-103`, `wikitext-103-raw`, `python-docs`, the
    path of a folder with train.txt, valid.txt and test.txt, the path of one text, which is split
    90/5/5 (any file may be .gz), `hf:NAME` or `hf:NAME:CONFIG` of the Hugging Face hub, or `auto`:
    wikitext-2 where it is available, else python-docs. `data_dir` (default `$MUSOTA_DATA_DIR`) may
    hold local copies in folders named like the corpora. Raises MusotaError.
    """
    vocab_size = check_value("vocab_size", vocab_size, int, SMALLEST_VOCABULARY)
    data_dir = data_dir or os.environ.get("MUSOTA_DATA_DIR")
    name, source, texts = read_texts(str(name), data_dir)
    for split, text in texts.items():
        if not text.strip():
            raise MusotaError(f"The {split} text of {name} is empty: put text into it.")
    in_long = sum(len(line) for line in texts["train"].splitlines() if len(line) >= LONG_LINE)
    shortest = LONG_LINE if in_long > len(texts["train"]) / 2 else LONG_LINE // 3
    train_lines = set(_long_lines(texts["train"], shortest))
    for split in SPLITS[1:]:
        lines = _long_lines(texts[split], shortest)
        repeated = sum(line in train_lines for line in lines)
        if repeated > REPEATED_SHARE * len(lines):
            share = f"{repeated / len(lines):.0%}"
            source += f"; {share} of the longer lines of {split} are also in train"

    hashes = {split: sha256(text.encode()) for split, text in texts.items()}
    made_by = RECIPE, metadata.version("tokenizers"), str(vocab_size)
    tokenizer_key = content_hash(*made_by, hashes["train"])
    path = _cached(
        f"tokenizer-{tokenizer_key}.json",
        lambda to: TextTokenizer.train(texts["train"], vocab_size).save(to),
    )
    tokenizer = TextTokenizer.load(path)
    tokens = {}
    for split, text in texts.items():
        file_name = f"tokens-{content_hash(tokenizer_key, hashes[split])}.bin"
        path = _cached(file_name, lambda to, text=text: to.write_bytes(tokenizer.encode(text)))
        # Mapped from the file, tokens take no memory of their own.
        tokens[split] = torch.from_file(str(path), size=path.stat().st_size // 4, dtype=torch.int32)
    text_hash = content_hash(*hashes.values())
    if text_hash in KNOWN_TEXTS:  # in any folder
        name = KNOWN_TEXTS[text_hash]
    elif name in KNOWN_TEXTS.values():
        name += " (another text)"
    return Corpus(
        name,
        **tokens,
        words={split: _words(text) for split, text in texts.items()},
        bytes={split: len(text.encode()) for split, text in texts.items()},
        tokenizer=tokenizer,
        fingerprint=_fingerprint(tokens),
        text_hash=text_hash,
        source=source,
    )


def window_count(n_tokens: int, length: int) -> int:
    """The number of training windows of an epoch."""
    return (n_tokens - length) // length


def window_starts(n_tokens: int, length: int, seed: int, epoch: int) -> Tensor:
    """The starts of an epoch's training windows in training order, (windows,) int64.

    Windows of `length` inputs and their targets tile the stream from a random offset below
    `length`. Offset and order depend on (seed, epoch) alone; the number of windows on neither.
    Raises MusotaError if the stream is too short for one window.
    """
    count = window_count(n_tokens, length)
    if count < 1:
        few = f"The training text has {n_tokens} tokens, too few for windows of {length}"
        raise MusotaError(f"{few}: use more text or a shorter max_seq_len.")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(length, (1,), generator=generator))
    return offset + length * torch.randperm(count, generator=generator)


def _cached(name: str, write: Callable[[Path], object]) -> Path:
    """The path of a cache file, which `write(path)` makes if it is missing or damaged."""
    path = cache_folder() / name
    hash_path = path.with_suffix(".sha256")
    exist = path.exists() and hash_path.exists()
    if not exist or hash_path.read_bytes() != sha256(path.read_bytes()).encode():
        write_whole(path, write)
        write_text(hash_path, sha256(path.read_bytes()))
    return path


def _fingerprint(splits: dict[str, Tensor]) -> str:
    """A hash of the tokens of all splits."""
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(f"{name} {len(splits[name])} ".encode())
        digest.update(splits[name].numpy())
    return digest.hexdigest()[:16]


def _words(text: str) -> int:
    """The words and line ends of a text; by line, since a list of all words takes much memory."""
    return sum(len(line.split()) + 1 for line in text.split("\n")) - 1


def _long_lines(text: str, shortest: int) -> list[int]:
    """Hashes of the lines of at least `shortest` characters."""
    return [hash(line) for line in text.splitlines() if len(line) >= shortest]
