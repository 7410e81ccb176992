"""Corpora, the byte-level BPE tokenizer, and the windows a model is trained on.

Nothing is read stale: tokenizers and tokens are cached under names made of hashes of what they were
made from (`$MUSOTA_CACHE`, else `~/.cache/musota`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from musota.config import MusotaError, Profile, nearest_name
from musota.files import write_whole

SPLITS = ("train", "valid", "test")
HUB_REPOSITORY = "Salesforce/wikitext"
HUB_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
HUB_CONFIGS = {
    name: f"{name}-v1"
    for name in ("wikitext-2", "wikitext-2-raw", "wikitext-103", "wikitext-103-raw")
}
HUB_TIMEOUT = 5  # seconds
DOCS_PACKAGES = ("numpy", "pandas", "matplotlib", "torch")
UNKNOWN, LINE_END = "<unk>", "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens
PIECE = 2**20  # characters of text, or tokens, that are looked at together
RECIPE = "1"  # raise when the same text should give other tokens or another python-docs


class TextTokenizer:
    """Byte-level BPE over lines. `decode(encode(text)) == text` for any text.

    Every line end becomes `<|endoftext|>`; a literal `<unk>` in the text is one token.
    """

    def __init__(self, backend: Tokenizer):
        self.backend = backend
        # Special tokens stand for line ends only: the same characters in a text are just text.
        backend.encode_special_tokens = True
        self.line_end = backend.token_to_id(LINE_END)
        self.unknown = backend.token_to_id(UNKNOWN)

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int) -> TextTokenizer:
        """BPE merges learned on `text`. Raises MusotaError for a vocabulary under 258."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise MusotaError(
                f"vocab_size={vocab_size} is below the {SMALLEST_VOCABULARY} that 256 bytes and "
                "two special tokens need: raise it."
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[UNKNOWN, LINE_END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        lines = (line for piece in pieces for line in piece.split("\n"))
        backend.train_from_iterator(lines, trainer)
        # The trainer makes both tokens special; `<unk>` shall be found in texts, line ends not.
        described = json.loads(backend.to_str())
        for token in described["added_tokens"]:
            token["special"] = token["content"] == LINE_END
        return cls(Tokenizer.from_str(json.dumps(described)))

    @property
    def size(self) -> int:
        """Tokens really in use; BPE may run out of merges before `vocab_size`."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32."""
        lines = self.backend.encode_batch_fast(text.split("\n"))
        end = [self.line_end]
        ids = [part for line in lines for part in (line.ids, end)][:-1]
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in ids])

    def decode(self, ids) -> str:
        """The text of token ids (any 1-D sequence of whole numbers)."""
        ids = np.asarray(ids, dtype=np.int64)
        lines = np.split(ids, np.flatnonzero(ids == self.line_end))
        pieces = [lines[0], *(line[1:] for line in lines[1:])]
        decode = self.backend.decode
        return "\n".join(decode(piece.tolist(), skip_special_tokens=False) for piece in pieces)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TextTokenizer:
        """Read what `save` wrote."""
        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: str | os.PathLike) -> None:
        """Write `tokenizer.json`."""
        self.backend.save(str(path))


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
    fingerprint: str
    source: str  # where the text came from, for people

    def split(self, name: str) -> Tensor:
        return getattr(self, name)

    def statistics(self) -> pd.DataFrame:
        """One row a split: words, tokens, tokens per word, share of `<unk>`, bytes."""
        rows = {}
        for name in SPLITS:
            tokens, words = self.split(name), self.words[name]
            rows[name] = {
                "words and line ends": words,
                "tokens": len(tokens),
                "tokens per word": len(tokens) / words,
                "unk rate": int((tokens == self.tokenizer.unknown).sum()) / words,
                "bytes": self.bytes[name],
            }
        return pd.DataFrame(rows).T.astype(
            {"words and line ends": int, "tokens": int, "bytes": int}
        )

    def limited(self, profile: Profile) -> Corpus:
        """The corpus cut to a profile's token counts, each split at its last line end that fits.

        Test is cut like valid. Raises MusotaError if a split has no line end within its limit.
        """
        limits = (profile.train_tokens, profile.valid_tokens, profile.valid_tokens)
        splits, words, sizes = {}, {}, {}
        for name, limit in zip(SPLITS, limits, strict=True):
            tokens = self.split(name)
            if limit is None or len(tokens) <= limit:
                splits[name], words[name], sizes[name] = (
                    tokens,
                    self.words[name],
                    self.bytes[name],
                )
                continue
            ends = (tokens[:limit] == self.tokenizer.line_end).nonzero()
            if not len(ends):
                raise MusotaError(
                    f"The first {limit} tokens of {name} hold no line end to cut at: break the "
                    "text into lines."
                )
            splits[name] = tokens[: int(ends[-1]) + 1]
            text = self.tokenizer.decode(splits[name])
            words[name], sizes[name] = _count(text)
        fingerprint = _fingerprint(splits)
        return replace(self, **splits, words=words, bytes=sizes, fingerprint=fingerprint)


def load_corpus(
    name: str = "auto", vocab_size: int = 50_000, data_dir: str | os.PathLike | None = None
) -> Corpus:
    """Read, tokenize (or fetch from the cache) and count a corpus.

    `name` is `wikitext-2`, `wikitext-2-raw`, `wikitext-103`, `wikitext-103-raw`, `python-docs`, the
    path of a folder with train.txt, valid.txt and test.txt, or `auto`: wikitext-2 where it can be
    had, else python-docs. `data_dir` (default `$MUSOTA_DATA_DIR`) may hold local copies in folders
    named like the corpora. Raises MusotaError saying what is wrong and what to do.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise MusotaError(f"corpus must be a name or the path of a folder, not {name!r}.")
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise MusotaError(f"vocab_size must be a whole number, not {vocab_size!r}.")
    if vocab_size < SMALLEST_VOCABULARY:
        TextTokenizer.train([], vocab_size)  # the one sentence about small vocabularies
    name = os.fspath(name)
    name, source, texts = _read_texts(name, data_dir or os.environ.get("MUSOTA_DATA_DIR"))
    keys, counts = {}, {}
    for split in SPLITS:
        keys[split], counts[split], blank = _survey(texts[split]())
        if blank:
            raise MusotaError(f"The {split} text of {name} is empty: put text into it.")
    tokenizer_key = _hash(RECIPE, metadata.version("tokenizers"), str(vocab_size), keys["train"])
    tokenizer_path = _cached(
        f"tokenizer-{tokenizer_key}.json",
        lambda path: TextTokenizer.train(texts["train"](), vocab_size).save(path),
    )
    tokenizer = TextTokenizer.load(tokenizer_path)

    tokens = {}
    for split in SPLITS:
        encoded = _encoded(tokenizer, texts[split](), counts[split][1], split)
        name_of_file = f"tokens-{_hash(tokenizer_key, keys[split])}.bin"
        path = _cached(name_of_file, partial(_write_arrays, encoded))
        # Mapped from the disk: WikiText-103 needs no room of its own in memory.
        length = path.stat().st_size // 4
        tokens[split] = torch.from_file(str(path), size=length, dtype=torch.int32)
    return Corpus(
        name=name,
        **tokens,
        words={split: counts[split][0] for split in SPLITS},
        bytes={split: counts[split][1] for split in SPLITS},
        tokenizer=tokenizer,
        fingerprint=_fingerprint(tokens),
        source=source,
    )


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


def cache_folder() -> Path:
    folder = Path(os.environ.get("MUSOTA_CACHE", Path.home() / ".cache" / "musota"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MusotaError(
            f"The cache folder {folder} cannot be made ({error.strerror}): set MUSOTA_CACHE to a "
            "folder that can be written."
        ) from None
    return folder


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


def _write_arrays(arrays: Iterable[np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        for array in arrays:
            file.write(array.tobytes())


def _encoded(
    tokenizer: TextTokenizer, pieces: Iterable[str], size: int, what: str
) -> Iterator[np.ndarray]:
    """Token ids of each piece; many lines at once, on all cores. Longer work shows its progress."""
    bar = tqdm(
        total=size, desc=f"tokenizing {what}", unit="B", unit_scale=True, delay=5, mininterval=5
    )
    with bar:
        for piece in pieces:
            yield tokenizer.encode(piece)
            bar.update(len(piece.encode()))


def _survey(pieces: Iterable[str]) -> tuple[str, tuple[int, int], bool]:
    """A hash of a text, its words and bytes (see `_count`), and whether it is all white space."""
    digest, words, size, blank = hashlib.sha256(), 0, 0, True
    for piece in pieces:
        digest.update(piece.encode())
        blank = blank and not piece.strip()
        more = _count(piece)
        words, size = words + more[0], size + more[1]
    return digest.hexdigest(), (words, size), blank


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(str(len(data)).encode() + b":" + data)
    return digest.hexdigest()[:16]


def _fingerprint(splits: dict[str, Tensor]) -> str:
    """A hash of the tokens themselves: the same wherever and however they were made."""
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(f"{name} {len(splits[name])} ".encode())
        for part in splits[name].split(PIECE):
            digest.update(part.numpy())
    return digest.hexdigest()[:16]


def _count(text: str) -> tuple[int, int]:
    """Words (line ends counted as words) and UTF-8 bytes of a text."""
    return len(text.split()) + text.count("\n"), len(text.encode())


# --- where texts come from ---


# A text is a function: it gives the text in pieces of about a megabyte that end at line ends.
Text = Callable[[], Iterator[str]]


def _read_texts(name: str, data_dir) -> tuple[str, str, dict[str, Text]]:
    """(corpus name, where it came from, text by split)."""
    if name == "auto":
        try:
            return _read_texts("wikitext-2", data_dir)
        except HubUnreachable as error:
            docs = _read_texts("python-docs", data_dir)
            return (docs[0], f"{docs[1]}; instead of wikitext-2, because {error.reason}", docs[2])
    if name == "python-docs":
        return name, "docstrings of the Python libraries installed here", _python_docs()
    local = Path(data_dir or "") / name
    if name in HUB_CONFIGS:
        if data_dir and _is_folder(local):
            return name, "local copy", _read_folder(local)
        return (name, *_read_hub(name))
    if _is_folder(Path(name)):
        return Path(name).resolve().name, "local folder", _read_folder(Path(name))
    if data_dir and _is_folder(local):
        return local.name, "local folder", _read_folder(local)
    if os.sep in name or "/" in name:
        raise MusotaError(
            f"There is no folder {name}: give one with train.txt, valid.txt and test.txt."
        )
    raise nearest_name("corpus", name, ["auto", *HUB_CONFIGS, "python-docs"])


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_folder(folder: Path) -> dict[str, Text]:
    for split in SPLITS:
        if not (folder / f"{split}.txt").exists():
            raise MusotaError(
                f"The folder {folder} has no {split}.txt: it needs train.txt, valid.txt and "
                "test.txt."
            )
    return {split: partial(_read_file, folder / f"{split}.txt") for split in SPLITS}


def _read_file(path: Path) -> Iterator[str]:
    """A file in pieces. Raises MusotaError where it cannot be read or is not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _in_pieces(file)
    except UnicodeDecodeError:
        try:
            path.read_bytes().decode()  # whole, for the place in the file
        except UnicodeDecodeError as error:
            place = f"{path} is not UTF-8 (byte {error.start})"
        raise MusotaError(f"{place}: convert it, for example with iconv.") from None
    except OSError as error:
        raise MusotaError(f"{path} cannot be read: {error.strerror}.") from None


def _in_pieces(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined, without white space before line ends: local and hub WikiText differ in it."""
    piece, held = [], 0
    for line in lines:
        end = "\n" if line.endswith("\n") else ""
        piece.append(line.rstrip() + end)
        held += len(piece[-1])
        if held >= PIECE and end:
            yield "".join(piece)
            piece, held = [], 0
    yield "".join(piece)


class HubUnreachable(MusotaError):
    """The corpus is neither here nor to be had from the hub."""

    def __init__(self, name: str, reason: str):
        self.reason = reason
        super().__init__(
            f"{name} is not on this machine and {reason}. Three ways on: put train.txt, valid.txt "
            f"and test.txt into $MUSOTA_DATA_DIR/{name}/, copy a Hugging Face datasets cache that "
            "has it here, or use the corpus python-docs, which needs no download."
        )


def _read_hub(name: str) -> tuple[str, dict[str, Text]]:
    """From the Hugging Face datasets cache or the hub; HubUnreachable within seconds otherwise."""
    import datasets

    config = HUB_CONFIGS[name]
    reason = _hub_trouble()
    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = was_offline or reason is not None
    try:
        rows = datasets.load_dataset(HUB_REPOSITORY, config, revision=HUB_REVISION)
    except Exception as error:  # the hub's client raises many types; none may end in a traceback
        reason = reason or f"the Hugging Face hub failed ({type(error).__name__}: {error})"
        raise HubUnreachable(name, reason) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline

    def read(split: str) -> Iterator[str]:
        batches = rows[split].iter(batch_size=10_000)
        lines = (line.removesuffix("\n") + "\n" for batch in batches for line in batch["text"])
        return _in_pieces(lines)

    hub_splits = zip(SPLITS, ("train", "validation", "test"), strict=True)
    source = "the Hugging Face cache" if reason else "the Hugging Face hub"
    return source, {split: partial(read, hub_split) for split, hub_split in hub_splits}


def _hub_trouble() -> str | None:
    """Why the hub cannot be asked just now, or None. Answers within HUB_TIMEOUT or so."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().dataset_info(HUB_REPOSITORY, revision=HUB_REVISION, timeout=HUB_TIMEOUT)
    except Exception as error:  # whatever it is, the hub is of no use now
        return f"the Hugging Face hub does not answer ({type(error).__name__})"
    return None


# --- python-docs: a corpus on every machine ---


def _python_docs() -> dict[str, Text]:
    """Docstrings of the standard library and four big packages, split 90/5/5 by docstring."""
    versions = [f"{name} {metadata.version(name)}" for name in DOCS_PACKAGES]
    key = _hash(RECIPE, sys.version, *versions)
    paths = {split: cache_folder() / f"python-docs-{key}-{split}.txt" for split in SPLITS}
    if not all(path.exists() for path in paths.values()):
        for split, text in _collect_docs().items():
            write_whole(paths[split], lambda target, text=text: target.write_text(text, "utf-8"))
    return {split: partial(_read_file, path) for split, path in paths.items()}


def _collect_docs() -> dict[str, str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    roots = [library]
    for name in DOCS_PACKAGES:
        roots += map(Path, importlib.util.find_spec(name).submodule_search_locations)
    files = [
        path
        for root in roots
        for path in sorted(root.rglob("*.py"))
        if not {"site-packages", "test", "tests", "__pycache__"}
        & set(path.parts[len(root.parts) :])
    ]
    with ProcessPoolExecutor() as pool:
        found = pool.map(_docstrings, files, chunksize=32)
        documents = {document for documents in found for document in documents}
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())
    first, second = round(0.90 * len(ordered)), round(0.95 * len(ordered))
    parts = ordered[:first], ordered[first:second], ordered[second:]
    return {split: "\n\n".join(part) + "\n" for split, part in zip(SPLITS, parts, strict=True)}


def _docstrings(path: Path) -> list[str]:
    """Docstrings of a source file, parsed and not run; those under 20 words are left out."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []  # files for other Python versions, templates
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    found = (ast.get_docstring(node) or "" for node in nodes)
    # Escapes in a docstring can spell characters that UTF-8 has no bytes for.
    cleaned = (text.encode(errors="replace").decode().strip() for text in found)
    return [text for text in cleaned if len(text.split()) >= 20]
