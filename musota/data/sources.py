"""Sources of texts: a table from corpus name to its reader, and the user's own files."""

import ast
import gzip
import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import chain, product
from pathlib import Path

from musota.data.tokenizer import progress
from musota.errors import MusotaError, find_named
from musota.files import as_path, cache_folder, write_text

SPLITS = ("train", "valid", "test")
# Names of a split's file, with or without "wiki." before and with any of ENDINGS.
FILE_NAMES = {"train": ["train"], "valid": ["valid", "validation", "val", "dev"], "test": ["test"]}
ENDINGS = (".txt", ".tokens", ".raw", ".txt.gz", ".tokens.gz", ".raw.gz")
SHARES = {"train": (0, 0.90), "valid": (0.90, 0.95), "test": (0.95, 1)}  # of one text
HUB_PREFIX = "hf:"  # before the name of any other dataset of the hub
HUB_TEXTS = ("wikitext-2", "wikitext-2-raw", "wikitext-103", "wikitext-103-raw")
HUB_REPOSITORY = "Salesforce/wikitext"
HUB_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
HUB_TIMEOUT = 5  # seconds
UNAVAILABLE = "is not on this machine and the Hugging Face hub does not provide it"
DOCS_PACKAGES = ("numpy", "pandas", "matplotlib")
LONG_LINE = 60  # characters; python-docs has no line of this length in two splits
RECIPE = "4"  # raise when the same text should give other tokens or another python-docs
# Texts that are recognised in any folder, by `Corpus.text_hash`.
KNOWN_TEXTS = {"db03aa7174452ad8": "wikitext-2"}


def content_hash(*parts: str) -> str:
    """A short hash of the parts, in order."""
    data = b"".join(b"%d:%b" % (len(part), part) for part in map(str.encode, parts))
    return hashlib.sha256(data).hexdigest()[:16]


def read_texts(name: str, data_dir) -> tuple[str, str, dict[str, str]]:
    """(corpus name, description of its source, text by split)."""
    if name == "auto":
        try:
            return read_texts("wikitext-2", data_dir)
        except HubUnreachable:
            name, source, texts = read_texts("python-docs", data_dir)
            return name, f"{source}; wikitext-2 {UNAVAILABLE}", texts
    place = find_text(name, data_dir)
    if place is None:
        return (name, *SOURCES[name]()) if name in SOURCES else _read_dataset(name)
    if place.is_dir():
        named = name if name in (*HUB_TEXTS, *SOURCES) else place.resolve().name
        return named, "local folder", _read_folder(place)
    texts = _split_text(read_text(place))
    stem = Path(place.resolve().name.removesuffix(".gz")).stem
    return stem, f"local file {place.name}, split 90/5/5", texts


def find_text(name: str, data_dir) -> Path | None:
    """The folder or file of a corpus; None for `auto`, a dataset of the hub, and one of SOURCES
    without a local copy. Raises MusotaError if there is no such corpus."""
    known = ("auto", *HUB_TEXTS, *SOURCES)
    if not name:  # as a path it would be this folder
        raise MusotaError(f"Name a corpus: {', '.join(known)}, a folder or a file.")
    is_named = name in known or name.startswith(HUB_PREFIX)
    places = [as_path(data_dir) / name] if data_dir else []
    if not is_named:
        places.insert(0, as_path(name))
    for place in places:
        if os.path.isdir(place) or os.path.isfile(place):  # unlike Path's they accept any string
            return place
    if is_named:
        return None
    if "/" in name or os.sep in name:
        raise MusotaError(f"There is no {name}: give the path of a folder or of one text.")
    return find_named("corpus", name, known)  # always raises here


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, exactly as `load_corpus` reads it. Raises MusotaError."""
    open_text = gzip.open if as_path(path).suffix.lower() == ".gz" else open
    try:
        with open_text(as_path(path), "rt", encoding="utf-8-sig") as file:
            return _clean(file.read())
    except UnicodeDecodeError:
        raise MusotaError(f"{path} is not UTF-8: convert it, for example with iconv.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise MusotaError(f"{path} cannot be read: {error.args[-1]}.") from None


def _clean(text: str) -> str:
    """`text` without white space before line ends, which differs among WikiText copies."""
    *lines, last = text.split("\n")
    return "\n".join([*map(str.rstrip, lines), last])


def _read_folder(folder: Path) -> dict[str, str]:
    texts = {}
    for split, names in FILE_NAMES.items():
        paths = [folder / "".join(parts) for parts in product(("", "wiki."), names, ENDINGS)]
        found = next((path for path in paths if path.exists()), None)
        if not found:
            raise MusotaError(f"{folder} has no {split}.txt: for one text, give the file itself.")
        texts[split] = read_text(found)
    return texts


def _split_text(text: str, shares: dict[str, tuple] = SHARES) -> dict[str, str]:
    """A text by split. Each split ends with a paragraph, else a line, if one ends nearby."""

    def cut(share: float) -> int:
        start, near = round(share * len(text)), len(text) // 100
        ends = [text.find(end, start, start + near) + len(end) for end in ("\n\n", "\n")]
        return next((end for end in ends if end > start > 0), start)

    return {split: text[cut(start) : cut(end)] for split, (start, end) in shares.items()}


class HubUnreachable(MusotaError):
    """The corpus is neither on this machine nor available from the hub."""


def _load_dataset(name: str, place: str, config: str | None, revision: str | None = None):
    """Where a dataset was found, and its rows by split: in the folder `place`, on the hub or, where
    that does not provide it within seconds, in the cache. Raises MusotaError."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    source, refused, was_offline = "the Hugging Face hub", None, datasets.config.HF_HUB_OFFLINE
    try:
        if os.path.isdir(place):
            source = "local dataset"
        else:
            HfApi().dataset_info(place, revision=revision, timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub's client raises many types
        source, refused, datasets.config.HF_HUB_OFFLINE = "the Hugging Face cache", error, True
    try:
        return source, datasets.load_dataset(place, config, revision=revision)
    except Exception as error:
        failed = f"{name} {UNAVAILABLE}" if refused else f"{name} cannot be loaded"
        reason = f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split()):.300}"
        if refused:
            unknown = isinstance(refused, RepositoryNotFoundError | HFValidationError)
            reason = "there is none, or a private one" if unknown else type(refused).__name__
        raise (HubUnreachable if refused else MusotaError)(
            f"{failed} ({reason}): check the name and the network, put train.txt, valid.txt "
            f"and test.txt into $MUSOTA_DATA_DIR/{name}/, or copy a Hugging Face datasets cache "
            "to this machine, or use the corpus python-docs."
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _text_of(rows, column: str) -> str:
    """The text of a dataset's rows, each of which ends a line."""
    lines = (line.removesuffix("\n") for line in rows[column] if line is not None)
    return _clean("\n".join(lines) + "\n")


def _read_dataset(name: str) -> tuple[str, str, dict[str, str]]:
    """(name, source, text by split) of one of HUB_TEXTS, `hf:NAME` or `hf:NAME:CONFIG`. Its text is
    the column `text`, or its only column of strings. Splits that it lacks are cut off its train."""
    place, _, config = name.removeprefix(HUB_PREFIX).partition(":")
    revision = None
    if name in HUB_TEXTS:
        place, config, revision = HUB_REPOSITORY, f"{name}-v1", HUB_REVISION
    source, rows = _load_dataset(name, place, config or None, revision)
    splits = {split: next(filter(rows.get, names), None) for split, names in FILE_NAMES.items()}
    if not splits["train"]:
        raise MusotaError(f"{name} has no rows in a split `train`, only in {', '.join(rows)}.")
    kinds = rows["train"].features
    strings = [one for one, kind in kinds.items() if "string" in str(getattr(kind, "dtype", ""))]
    column, *others = ["text"] if "text" in strings else strings or [None]
    if others or not column:
        columns = f"has no column `text`, nor a single one of strings, among {', '.join(kinds)}"
        raise MusotaError(f"{name} {columns}: write the text into a folder or a file.")
    texts = {split: _text_of(rows[one], column) for split, one in splits.items() if one}
    if missing := [split for split in SPLITS if not splits[split]]:
        shares = {"train": (0, 0.95), missing[0]: (0.95, 1)} if len(missing) == 1 else SHARES
        texts |= _split_text(texts["train"], shares)
        source += f", {' and '.join(missing)} cut off train, 5% each"
    if name not in HUB_TEXTS and os.path.isdir(place):
        name = f"{HUB_PREFIX}{Path(place).resolve().name}:{config}".rstrip(":")
    return name, source, {split: texts[split] for split in SPLITS}


def _python_docs() -> tuple[str, dict[str, str]]:
    """Docstrings of the standard library and three packages, split 90/5/5."""
    versions = [f"{name} {metadata.version(name)}" for name in DOCS_PACKAGES]
    folder = cache_folder() / f"python-docs-{content_hash(RECIPE, sys.version, *versions)}"
    if not all((folder / f"{split}.txt").exists() for split in SPLITS):
        folder.mkdir(exist_ok=True)
        roots = [sysconfig.get_paths()["stdlib"]]
        for name in DOCS_PACKAGES:
            roots += importlib.util.find_spec(name).submodule_search_locations
        for split, documents in _split(_documents(roots)).items():
            write_text(folder / f"{split}.txt", "\n\n".join(documents) + "\n")
    return "docstrings of the Python libraries installed here", _read_folder(folder)


def _documents(roots: list[str]) -> set[str]:
    """The docstrings of the source files in folders, without tests."""
    left_out = {"site-packages", "test", "tests", "__pycache__"}
    found = ((root, path) for root in roots for path in Path(root).rglob("*.py"))
    files = [path for root, path in found if left_out.isdisjoint(path.relative_to(root).parts)]
    return set(chain.from_iterable(map(docstrings, progress(files, "reading files"))))


def _split(documents: set[str]) -> dict[str, list[str]]:
    """Documents by split, in random order. Those of valid and test that repeat a long line of an
    earlier split are left out."""
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())
    parts, known = {}, set()
    for split, shares in SHARES.items():
        start, end = (round(share * len(ordered)) for share in shares)
        parts[split] = [one for one in ordered[start:end] if known.isdisjoint(_content_lines(one))]
        known.update(*map(_content_lines, parts[split]))
    return parts


def _content_lines(document: str) -> set[str]:
    """The long lines of a document, without case, punctuation and indentation."""
    shortest = LONG_LINE * 2 // 3  # spacing may differ between copies
    lines = [line for line in document.splitlines() if len(line) >= shortest]
    return {" ".join(re.findall(r"\w+", line.lower())) or line.strip() for line in lines}


def docstrings(path: Path) -> list[str]:
    """The docstrings of a source file of at least 20 words. The file is parsed, not run."""
    try:
        module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []  # written for other Python versions, or a template
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(one) or "" for one in _statements(module) if isinstance(one, kinds)]
    # Escapes in a docstring can give characters that UTF-8 cannot encode.
    cleaned = [text.encode(errors="replace").decode().strip() for text in found]
    return [text for text in cleaned if len(text.split()) >= 20]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A node and the statements in it; `ast.walk` visits expressions too, which takes longer."""
    yield node
    for part in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, part, ()):
            yield from _statements(child)


# A corpus of its own is one row: its reader returns (description of the source, text by split).
SOURCES: dict[str, Callable[[], tuple[str, dict[str, str]]]] = {"python-docs": _python_docs}
