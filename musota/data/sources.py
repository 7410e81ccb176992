"""Where texts come from: a table, corpus name -> how to read it, and folders of one's own."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from itertools import chain, pairwise
from pathlib import Path

from musota.errors import MusotaError, nearest_name
from musota.files import as_path, cache_folder, write_text

SPLITS = ("train", "valid", "test")
# What people call a split's file, before any of ENDINGS.
FILE_NAMES = {
    "train": ("train", "wiki.train"),
    "valid": ("valid", "validation", "val", "dev", "wiki.valid"),
    "test": ("test", "wiki.test"),
}
ENDINGS = (".txt", ".tokens", ".raw")
SHARES = (0.90, 0.95, 1.0)  # where the splits of one text end
HUB_REPOSITORY = "Salesforce/wikitext"
HUB_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
HUB_TIMEOUT = 5  # seconds
DOCS_PACKAGES = ("numpy", "pandas", "matplotlib", "torch")
PIECE = 2**20  # characters of text, or tokens, that are looked at together
RECIPE = "3"  # raise when the same text should give other tokens or another python-docs
# Texts that are recognised wherever they lie (see `Corpus.text_hash`).
KNOWN_TEXTS = {"wikitext-2": "5eaed3defaa96076"}


def content_hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(str(len(data)).encode() + b":" + data)
    return digest.hexdigest()[:16]


# A text is a function: it gives the text in pieces of PIECE characters or so that end at line ends,
# where there are any.
Text = Callable[[], Iterator[str]]


def read_texts(name: str, data_dir) -> tuple[str, str, dict[str, Text]]:
    """(corpus name, where it came from, text by split)."""
    if name == "auto":
        try:
            return read_texts("wikitext-2", data_dir)
        except HubUnreachable as error:
            name, source, texts = read_texts("python-docs", data_dir)
            return name, f"{source}; instead of wikitext-2, because {error.reason}", texts
    local = as_path(data_dir) / name if data_dir else None
    if name in SOURCES:
        if local and os.path.isdir(local):
            return name, "local copy", _read_folder(local)
        return (name, *SOURCES[name]())
    for place in filter(None, (as_path(name), local)):
        if os.path.isdir(place):  # unlike Path's, it bears names that no file can have
            return place.resolve().name, "local folder", _read_folder(place)
        if os.path.isfile(place):
            texts = {split: partial(_read_file, place, split) for split in SPLITS}
            return place.resolve().stem, f"local file {place.name}, split 90/5/5", texts
    if "/" in name or os.sep in name:
        raise MusotaError(
            f"There is no folder {name}: give one with train.txt, valid.txt and test.txt, or the "
            "path of one text."
        )
    raise nearest_name("corpus", name, ["auto", *SOURCES])


def recognised(name: str, source: str, text_hash: str) -> str:
    """What a text is by its content: nobody's folder makes a text WikiText-2, or hides that it is.
    What comes from the hub's pinned revision is what it is called."""
    for known, its_hash in KNOWN_TEXTS.items():
        if text_hash == its_hash:
            return known
        if name == known and source.startswith("local"):
            return f"{name} (another text)"
    return name


def _read_folder(folder: Path) -> dict[str, Text]:
    texts = {}
    for split, names in FILE_NAMES.items():
        paths = [folder / f"{name}{ending}" for name in names for ending in ENDINGS]
        found = next((path for path in paths if path.exists()), None)
        if not found:
            raise MusotaError(
                f"The folder {folder} has no {split}.txt: it needs train.txt, valid.txt and "
                "test.txt. One text is named by its own path."
            )
        texts[split] = partial(_read_file, found)
    return texts


def _read_file(path: Path, split: str | None = None) -> Iterator[str]:
    """A file, or a split's share of it, in pieces. Raises MusotaError where it cannot be read or is
    not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            source = io.StringIO(_share(file.read(), split)) if split else file
            yield from _in_pieces(iter(lambda: source.readline(PIECE), ""))
    except UnicodeDecodeError:
        raise MusotaError(f"{path} is not UTF-8: convert it, for example with iconv.") from None
    except OSError as error:
        raise MusotaError(f"{path} cannot be read: {error.strerror}.") from None


def _in_pieces(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined, without white space before line ends: local and hub WikiText differ in it."""
    piece, held = [], 0
    for line in lines:
        piece.append(line.rstrip() + "\n" if line.endswith("\n") else line)
        held += len(line)
        if held >= PIECE:
            yield "".join(piece)
            piece, held = [], 0
    yield "".join(piece)


def _share(text: str, split: str) -> str:
    """A split's share of a text. Splits end with a paragraph; where none ends nearby, with a line;
    failing that anywhere."""
    cuts = [0]
    for share in SHARES:
        start, near = round(share * len(text)), len(text) // 100
        ends = [text.find(end, start, start + near) + len(end) for end in ("\n\n", "\n")]
        cuts.append(next((end for end in ends if end >= start + 1), start))
    at = SPLITS.index(split)
    return text[cuts[at] : cuts[at + 1]]


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

    reason = _hub_trouble()
    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = was_offline or reason is not None
    try:
        rows = datasets.load_dataset(HUB_REPOSITORY, f"{name}-v1", revision=HUB_REVISION)
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


def _python_docs() -> tuple[str, dict[str, Text]]:
    """Docstrings of the standard library and four big packages, split 90/5/5 by docstring."""
    versions = [f"{name} {metadata.version(name)}" for name in DOCS_PACKAGES]
    key = content_hash(RECIPE, sys.version, *versions)
    paths = {split: cache_folder() / f"python-docs-{key}-{split}.txt" for split in SPLITS}
    if not all(path.exists() for path in paths.values()):
        for split, text in _collect_docs().items():
            write_text(paths[split], text)
    texts = {split: partial(_read_file, path) for split, path in paths.items()}
    return "docstrings of the Python libraries installed here", texts


def _collect_docs() -> dict[str, str]:
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in DOCS_PACKAGES:
        roots += map(Path, importlib.util.find_spec(name).submodule_search_locations)
    left_out = {"site-packages", "test", "tests", "__pycache__"}
    found = ((root, path) for root in roots for path in sorted(root.rglob("*.py")))
    files = [path for root, path in found if left_out.isdisjoint(path.relative_to(root).parts)]
    with ProcessPoolExecutor() as pool:
        documents = set(chain.from_iterable(pool.map(docstrings, files, chunksize=32)))
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())
    cuts = [0, *(round(share * len(ordered)) for share in SHARES)]
    parts = [ordered[start:end] for start, end in pairwise(cuts)]
    return {split: "\n\n".join(part) + "\n" for split, part in zip(SPLITS, parts, strict=True)}


def docstrings(path: Path) -> list[str]:
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


# Adding a corpus is a row here: what reads it returns (where it came from, text by split).
HUB_TEXTS = ("wikitext-2", "wikitext-2-raw", "wikitext-103", "wikitext-103-raw")
SOURCES: dict[str, Callable[[], tuple[str, dict[str, Text]]]] = {
    **{name: partial(_read_hub, name) for name in HUB_TEXTS},
    "python-docs": _python_docs,
}
