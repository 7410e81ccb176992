"""Corpora, and the windows a model is trained on.

Nothing is read stale: tokenizers and tokens are cached under names made of hashes of what they were
made from (`$MUSOTA_CACHE`, else `~/.cache/musota`).
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

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from musota.data import sources
from musota.data.sources import SPLITS, content_hash
from musota.data.tokenizer import SMALLEST_VOCABULARY, TextTokenizer
from musota.errors import MusotaError
from musota.files import cache_folder, write_whole
from musota.plan.profiles import Profile

LONG_LINE, KNOWN_SHARE = 60, 0.01  # bytes; more of valid's lines than that in train are told


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus. Splits are 1-D int32 tensors; counts are of the text behind them."""

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    words: dict[str, int]  # by split; line ends count as words, as in the published counts
    bytes: dict[str, int]  # by split; UTF-8
    tokenizer: TextTokenizer
    fingerprint: str  # of the tokens: what a run was trained on
    text_hash: str  # of the lines of the whole text, whatever their order, vocabulary or cut
    source: str  # where the text came from, for people

    @property
    def label(self) -> str:
        """A name for folders: two texts never share one, unless both are WikiText-2."""
        if self.name in sources.KNOWN_TEXTS.values():
            return self.name
        plain = re.sub(r"[^\w.-]+", "-", self.name).strip("-")[:60]
        return f"{plain}-{self.text_hash[:8]}"

    def split(self, name: str) -> Tensor:
        return getattr(self, name)

    def statistics(self) -> pd.DataFrame:
        """One row a split: words, tokens, tokens per word, share of `<unk>`, bytes."""
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

    def limited(self, profile: Profile) -> "Corpus":
        """The corpus cut to a profile's token counts, each split at its last line end that fits;
        test like valid."""
        limits = (profile.train_tokens, profile.valid_tokens, profile.valid_tokens)
        splits, words, sizes = {}, dict(self.words), dict(self.bytes)
        for name, limit in zip(SPLITS, limits, strict=True):
            splits[name] = self.split(name)
            if limit is None or len(splits[name]) <= limit:
                continue
            ends = (splits[name][:limit] == self.tokenizer.line_end).nonzero()
            cut = int(ends[-1]) + 1 if len(ends) else 0
            cut = cut if cut > limit / 2 else limit  # an endless line is cut anywhere
            splits[name] = splits[name][:cut]
            words[name], sizes[name] = _count(self.tokenizer.decode(splits[name]))
        fingerprint = _fingerprint(splits)
        return replace(self, **splits, words=words, bytes=sizes, fingerprint=fingerprint)


def load_corpus(
    name: str = "auto", vocab_size: int = 50_000, data_dir: str | os.PathLike | None = None
) -> Corpus:
    """Read, tokenize (or fetch from the cache) and count a corpus.

    `name` is `wikitext-2`, `wikitext-2-raw`, `wikitext-103`, `wikitext-103-raw`, `python-docs`, the
    path of a folder with train.txt, valid.txt and test.txt, the path of one text, which is split
    90/5/5, or `auto`: wikitext-2 where it can be had, else python-docs. `data_dir` (default
    `$MUSOTA_DATA_DIR`) may hold local copies in folders named like the corpora. Raises MusotaError.
    """
    if not isinstance(vocab_size, int) or vocab_size < SMALLEST_VOCABULARY:
        raise MusotaError(
            f"vocab_size must be a whole number of at least {SMALLEST_VOCABULARY}, every byte and "
            f"two special tokens, not {vocab_size!r}."
        )
    data_dir = data_dir or os.environ.get("MUSOTA_DATA_DIR")
    name, source, texts = sources.read_texts(str(name), data_dir)
    surveys = [_survey(texts[split](), f"The {split} text of {name}") for split in SPLITS]
    by_split = (dict(zip(SPLITS, column, strict=True)) for column in zip(*surveys, strict=True))
    keys, lines, words, sizes, long_lines = by_split
    for split in SPLITS[1:]:
        known = np.isin(long_lines[split], long_lines["train"])
        if known.sum() > KNOWN_SHARE * len(known):
            source += f"; {known.mean():.0%} of the longer lines of {split} stand in train, too"

    def pieces(split: str, doing: str) -> Iterable[str]:
        """Work of more than seconds shows its progress; a piece is about a megabyte."""
        return tqdm(texts[split](), doing, 1 + sizes[split] // sources.PIECE, unit="MB", delay=2)

    def learn(path: Path) -> None:
        learned_from = pieces("train", "learning a tokenizer from train")
        TextTokenizer.train(learned_from, vocab_size).save(path)

    def tokenize(split: str, path: Path) -> None:
        with path.open("wb") as file:
            for piece in pieces(split, f"tokenizing {split}"):
                file.write(tokenizer.encode(piece).tobytes())

    made_by = sources.RECIPE, metadata.version("tokenizers"), str(vocab_size)
    tokenizer_key = content_hash(*made_by, keys["train"])
    tokenizer = TextTokenizer.load(_cached(f"tokenizer-{tokenizer_key}.json", learn))
    tokens = {}
    for split, key in keys.items():
        file_name = f"tokens-{content_hash(tokenizer_key, key)}.bin"
        path = _cached(file_name, partial(tokenize, split))
        length = path.stat().st_size // 4  # mapped from the disk, it takes no memory of its own
        tokens[split] = torch.from_file(str(path), size=length, dtype=torch.int32)
    text_hash = content_hash(*map(str, lines.values()))
    name = sources.recognised(name, source, text_hash)
    fingerprint = _fingerprint(tokens)
    return Corpus(name, *tokens.values(), words, sizes, tokenizer, fingerprint, text_hash, source)


def window_starts(n_tokens: int, length: int, seed: int, epoch: int) -> Tensor:
    """Where this epoch's training windows begin, in the order they are taken; (windows,) int64.

    Windows of `length` inputs and their targets tile the stream from a random offset below
    `length`; offset and order depend on (seed, epoch) alone, their number on neither. Raises
    MusotaError if the stream is too short for one.
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
    """A file of the cache; made by `write(path)` if it is not there as it was made."""
    path = cache_folder() / name
    seal = path.with_suffix(".sha256")
    if not (path.exists() and seal.exists() and seal.read_bytes() == _file_hash(path)):
        write_whole(path, write)
        write_whole(seal, lambda target: target.write_bytes(_file_hash(path)))
    return path


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()


def _survey(pieces: Iterable[str], what: str) -> tuple[str, int, int, int, np.ndarray]:
    """Two hashes of a text, of it as it stands and of its lines in whatever order; its words and
    bytes (see `_count`); hashes of its longer lines. Raises MusotaError if it is all white space.
    """
    digest, lines, words, size, blank = hashlib.sha256(), 0, 0, 0, True
    long_lines = array("Q")
    for piece in pieces:
        digest.update(piece.encode())
        for line in map(str.encode, piece.splitlines()):
            hashed = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest())
            lines += hashed
            if len(line) >= LONG_LINE:
                long_lines.append(hashed)
        more_words, more_bytes = _count(piece)
        words, size = words + more_words, size + more_bytes
        blank = blank and not piece.strip()
    if blank:
        raise MusotaError(f"{what} is empty: put text into it.")
    return digest.hexdigest(), lines % 2**64, words, size, np.frombuffer(long_lines, np.uint64)


def _fingerprint(splits: dict[str, Tensor]) -> str:
    """A hash of the tokens themselves, however they were made."""
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(f"{name} {len(splits[name])} ".encode())
        digest.update(splits[name].numpy())
    return digest.hexdigest()[:16]


def _count(text: str) -> tuple[int, int]:
    """Words (line ends counted as words) and UTF-8 bytes of a text."""
    return len(text.split()) + text.count("\n"), len(text.encode())
