"""Corpora: reading, recognising, tokenizing, caching, limits and training windows."""

import gzip
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import pandas as pd
import pytest
import torch
from conftest import flip_bit, in_a_process

from musota.data import sources
from musota.data.corpus import load_corpus, window_starts
from musota.data.tokenizer import LONGEST_WORD, TextTokenizer
from musota.errors import MusotaError
from musota.files import as_path

ODD = [
    "",
    "\n\n\ntabs\tand  double  spaces \n trailing \n\n",
    "emoji 😀🏳️‍🌈, accents é è ﬁ, 漢字, عربى\n one line without an end",
    "an <unk> word, <unk><unk>, <UNK> and <|endoftext|> spelled out\n",
    "\r carriage \x0b vertical \u2028 separators \x00 nul\n",
    "a word of its own " + "abc" * 3000,
]


def test_any_text_survives_the_tokenizer_and_the_tokenizer_its_file(text_folder, tmp_path):
    tokenizer = TextTokenizer.train((text_folder / "train.txt").read_text("utf-8"), 400)
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(OSError):
        tokenizer.save(tmp_path / "nowhere" / "tokenizer.json")
    for text in ODD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert (ids == tokenizer.line_end).sum() == text.count("\n")
        assert (ids == tokenizer.unknown).sum() == text.count("<unk>")
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < 400)
        # Long words are cut, so that time does not grow with their square.
        assert all(len(tokenizer.decode([token]).encode()) <= LONGEST_WORD for token in ids)
        assert (TextTokenizer.load(tmp_path / "tokenizer.json").encode(text) == ids).all()


def _folder(path, **texts):
    path.mkdir(exist_ok=True)
    for split in sources.SPLITS:
        (path / f"{split}.txt").write_text(texts.get(split, "a few words\n" * 30), "utf-8")
    return path


def test_a_text_is_read_and_counted_as_by_hand(tmp_path):
    folder = _folder(tmp_path / "mine", valid="\ufeff né a \t\r\n b\n\nc <unk> \n")
    for split, usual in (("train", "wiki.train.tokens"), ("valid", "dev.raw")):
        (folder / f"{split}.txt").rename(folder / usual)
    corpus, text = load_corpus(folder, 300), " né a\n b\n\nc <unk>\n"
    assert corpus.name == "mine" and sources.read_text(folder / "dev.raw") == text
    assert corpus.tokenizer.decode(corpus.valid) == text  # no white space at line ends
    assert corpus.words["valid"] == 5 + 4  # né a b c <unk>, and four line ends
    assert corpus.bytes["valid"] == len(text.encode())
    assert corpus.valid.dtype == torch.int32 and corpus.valid.dim() == 1
    assert corpus.statistics().loc["valid", "unk rate"] == pytest.approx(1 / 9)


def test_nothing_is_read_stale_or_damaged_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path / "cache"))
    folder = _folder(tmp_path / "c")
    before = load_corpus(folder, 300)
    for path in [*(tmp_path / "cache").glob("*.bin"), *(tmp_path / "cache").glob("*.json")]:
        flip_bit(path, path.stat().st_size // 2)
    assert load_corpus(folder, 300).fingerprint == before.fingerprint
    for path in (tmp_path / "cache").glob("*.sha256"):
        path.write_bytes(b"\xff")
    assert load_corpus(folder, 300).fingerprint == before.fingerprint
    (folder / "valid.txt").write_text("zebra words entirely\n" * 30, "utf-8")
    after = load_corpus(folder, 300)
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer.decode(after.valid).startswith("zebra words")
    # Only train teaches the tokenizer.
    assert after.tokenizer.backend.to_str() == before.tokenizer.backend.to_str()


def test_several_threads_can_fill_one_cache(text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(lambda _: load_corpus(text_folder, 320), range(4)))
    assert len({corpus.fingerprint for corpus in loaded}) == 1
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_limits_cut_at_a_line_end_and_recount(text_folder, tmp_path):
    whole = load_corpus(text_folder, 512)
    cut = whole.limited(5000, 800)
    assert 4000 < len(cut.train) <= 5000 and len(cut.valid) <= 800
    assert torch.equal(cut.valid, whole.valid[: len(cut.valid)])
    assert cut.valid[-1] == whole.tokenizer.line_end
    text = whole.tokenizer.decode(cut.valid)
    assert cut.words["valid"] == len(text.split()) + text.count("\n")
    assert cut.fingerprint != whole.fingerprint and cut.text_hash == whole.text_hash
    assert cut.valid_sha256 != whole.valid_sha256
    assert whole.limited(None, None).train is whole.train
    assert load_corpus(text_folder, 10**12).tokenizer.size < 10**5  # which no memory would hold
    with pytest.raises(MusotaError, match="limit must be a whole number"):
        whole.limited(5.5, None)
    endless = load_corpus(_folder(tmp_path / "e", train=">title\n" + "字 and so on " * 2000), 300)
    assert len(endless.limited(40, 40).train) == 40


@pytest.mark.parametrize(("n", "length"), [(1000, 7), (15, 7), (50, 25)])
def test_windows_tile_the_stream_from_a_random_offset(n, length):
    counts, offsets = set(), set()
    for epoch in range(30):
        ordered = window_starts(n, length, seed=3, epoch=epoch).sort().values
        offset = int(ordered[0])
        counts.add(len(ordered))
        offsets.add(offset)
        assert 0 <= offset < length  # and no token is predicted twice
        assert torch.equal(ordered, offset + length * torch.arange(len(ordered)))
        assert ordered[-1] + length < n  # its last target exists
    (count,) = counts  # the same number each epoch
    assert n - 2 * length <= count * length <= n
    assert len(offsets) > min(3, length - 1)


def test_windows_depend_on_seed_and_epoch_alone():
    first, _, again = (window_starts(5000, 10, 0, 4), torch.rand(1), window_starts(5000, 10, 0, 4))
    assert torch.equal(first, again) and not torch.equal(first, first.sort().values)
    for other in (window_starts(5000, 10, 0, 5), window_starts(5000, 10, 1, 4)):
        assert not torch.equal(first, other)
    with pytest.raises(MusotaError, match="too few for windows of 10"):
        window_starts(15, 10, 0, 0)


@pytest.mark.parametrize(
    ("name", "vocab_size", "message"),
    [
        ("wikitext2", 300, "did you mean 'wikitext-2'"),
        ("./nowhere", 300, "There is no ./nowhere: give the path of a folder or"),
        ("python-docs", 200, "vocab_size must be a whole number of at least 258"),
        ("python-docs", "512", "vocab_size must be a whole number"),
        ("no valid", 300, "has no valid.txt"),
        ("blank", 300, "The test text of .* is empty"),
        ("bytes", 300, "is not UTF-8"),
        ("no gzip.gz", 300, "no gzip.gz cannot be read: Not a gzipped file"),
        ("half.txt.gz", 300, "half.txt.gz cannot be read: Compressed file ended before"),
        ("hf:me/nothing", 300, "hub does not provide it .OfflineModeIsEnabled"),
        ("hf:", 300, "hub does not provide it .there is none, or a private one"),
    ],
)
def test_what_cannot_be_loaded_gets_one_sentence(name, vocab_size, message, tmp_path):
    (_folder(tmp_path / "no valid") / "valid.txt").unlink()
    _folder(tmp_path / "blank", test=" \n")
    (_folder(tmp_path / "bytes") / "train.txt").write_bytes(b"fine \xff\xfe not")
    (tmp_path / "no gzip.gz").write_bytes(b"plain text")
    (tmp_path / "half.txt.gz").write_bytes(gzip.compress(b"a few words" * 30)[:-9])
    with pytest.raises(MusotaError, match=message):
        load_corpus(name, vocab_size, data_dir=tmp_path)


def test_auto_falls_back_on_python_docs_and_reports_it(monkeypatch, text_folder):
    texts = sources._read_folder(text_folder)
    monkeypatch.setitem(sources.SOURCES, "python-docs", lambda: ("docstrings", texts))
    corpus = load_corpus("auto", 300)
    assert corpus.name == "python-docs"
    assert corpus.source.startswith("docstrings; wikitext-2 is not on this machine and the Hugging")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(MusotaError, match="wikitext-2 cannot be loaded .ZeroDivisionError"):
        load_corpus("auto", 300)  # the hub answered


def test_a_folder_of_that_name_does_not_rename_wikitext(monkeypatch, tmp_path):
    (tmp_path / "wikitext-103").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_dict({"text": ["a line"]})
    loaded = "the Hugging Face cache", dict.fromkeys(("train", "validation", "test"), rows)
    monkeypatch.setattr(sources, "_load_dataset", lambda *_: loaded)
    assert sources.read_texts("wikitext-103", None)[:2] == ("wikitext-103", loaded[0])


def test_python_docs_are_split_by_document_without_repeated_lines(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "broken.py").write_text("def (:\n")
    words = "word " * 25
    (tmp_path / "tests" / "t.py").write_text(f'"""Test {words}"""\n')
    for number in range(200):
        line = f"many words of a line that starts with {number % 150} and goes on to its end"
        line = line.title() + "!" if number % 2 else line
        body = f'"""Module {number} {words}\n\n    {line}\n"""\n'
        for name, docstring in (("f", f"Same {words}"), ("g", "short")):
            body += f'try:\n  pass\nexcept:\n  def {name}():\n    """{docstring}"""\n'
        (tmp_path / f"m{number}.py").write_text(body)
    documents = sources._documents([tmp_path])
    parts = sources._split(documents)
    assert len(documents) == 201 and len(parts["train"]) == 181  # the repeated one counts once
    assert "Test word" not in str(documents) and "short" not in str(documents)
    assert parts["train"] != sorted(parts["train"])
    lines = [{one.split("\n")[-1].lower().strip(" !") for one in part} for part in parts.values()]
    assert lines[1] and lines[2]
    assert not (lines[0] & lines[1] or lines[0] & lines[2] or lines[1] & lines[2])


CACHED = """
import json, pathlib, shutil, sys, datasets, pandas, musota
from musota.data import sources
source = pathlib.Path(sys.argv[1])
files = {}
for split in ("train", "validation", "test"):
    files[split] = str(source / f"{split}.parquet")
    pandas.DataFrame({"text": ["", f" = {split} = \\n"] * 50}).to_parquet(files[split])
datasets.load_dataset("parquet", data_files=files)
made = next(source.rglob("dataset_info.json")).parent
for owner, name, config, revision in (
    ("Salesforce", "wikitext", "wikitext-2-v1", sources.HUB_REVISION),
    ("me", "set", "default", "0" * 40),
):
    place = source / "datasets" / f"{owner}___{name}" / config / "0.0.0" / revision
    shutil.copytree(made, place)
    info = json.loads((made / "dataset_info.json").read_text())
    info.update(dataset_name=name, config_name=config)
    (place / "dataset_info.json").write_text(json.dumps(info))
    for path in place.glob("parquet-*.arrow"):
        path.rename(place / path.name.replace("parquet-", f"{name}-"))
corpus = musota.load_corpus("auto", 300)
assert corpus.name == "wikitext-2 (another text)" and corpus.source == "the Hugging Face cache"
assert corpus.tokenizer.decode(corpus.valid) == "\\n = validation =\\n" * 50
copied = musota.load_corpus("hf:me/set", 300)
assert copied.fingerprint == corpus.fingerprint and copied.source == "the Hugging Face cache"
try:
    musota.load_corpus("hf:me/set:other", 300)
except musota.MusotaError as error:
    assert "does not provide it (OfflineModeIsEnabled)" in str(error)
"""


def test_the_datasets_cache_is_enough_without_a_hub(tmp_path):
    """A cache as `datasets` keeps it, made by it and put where WikiText's would be."""
    done = in_a_process(CACHED, tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_silent_hub_is_answered_within_seconds(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # and never answer
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        started = time.perf_counter()
        code = "import musota\nmusota.load_corpus('wikitext-103')"
        done = in_a_process(code, **hub, HF_HOME=str(tmp_path))
    assert time.perf_counter() - started < 40  # importing torch and datasets included
    assert "hub does not provide it" in done.stderr and "or use the corpus" in done.stderr


PARAGRAPHS = "".join(f"part {n} says\nnothing new\n\n" for n in range(400))


@pytest.mark.parametrize(("text", "end"), [(PARAGRAPHS, "\n\n"), ("字" * 9000, "")])
def test_one_text_is_split_and_its_source_says_so(text, end, tmp_path):
    (tmp_path / "input.txt").write_text(text, "utf-8")
    corpus = load_corpus(tmp_path / "input.txt", 300)
    assert corpus.name == "input" and "input.txt, split 90/5/5" in corpus.source
    parts = [corpus.tokenizer.decode(corpus.split(split)) for split in sources.SPLITS]
    assert "".join(parts) == text
    for part, share in zip(parts, (0.90, 0.05, 0.05), strict=True):
        assert len(part) / len(text) == pytest.approx(share, abs=0.015) and part.endswith(end)


def test_a_text_is_known_by_its_content(text_folder, tmp_path, monkeypatch):
    posing = shutil.copytree(text_folder, tmp_path / "wikitext-2")
    other = load_corpus("auto", 300, data_dir=tmp_path)
    assert other.name == "wikitext-2 (another text)" and other.source.startswith("local folder")
    assert other.label.endswith(other.text_hash[:8])
    monkeypatch.setitem(sources.KNOWN_TEXTS, other.text_hash, "wikitext-2")
    assert load_corpus(text_folder, 300).label == load_corpus(posing, 300).label == "wikitext-2"
    assert load_corpus(text_folder, 400).text_hash == other.text_hash  # other tokens of it
    # The same lines in another order are another text, with a folder of its own.
    lines = (posing / "train.txt").read_text("utf-8").splitlines(keepends=True)
    (posing / "train.txt").write_text("".join(sorted(lines)), "utf-8")
    shuffled = load_corpus(posing, 300)
    assert shuffled.name == "wikitext-2 (another text)"
    assert shuffled.label not in ("wikitext-2", other.label)


def test_paths_may_begin_with_a_tilde_and_there_may_be_no_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MUSOTA_CACHE", "~/kept")
    _folder(tmp_path / "mine")
    assert load_corpus("~/mine", 300).name == load_corpus("mine", 300, data_dir="~").name == "mine"
    assert [*(tmp_path / "kept").glob("tokens-*")]
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nobody has a home
    monkeypatch.delenv("MUSOTA_CACHE")
    with pytest.raises(MusotaError, match="cannot be used as a path here"):
        load_corpus(tmp_path / "mine", 300)


def test_decode_refuses_what_is_no_list_of_ids_and_paths_are_utf_8(corpus):
    for wrong in (torch.tensor([[1, 2]]), [-1], [2**40], 5, [1.7], ["a"], None):
        with pytest.raises(MusotaError, match="decode needs the token ids of one text"):
            corpus.tokenizer.decode(wrong)
    assert corpus.tokenizer.decode([]) == ""
    with pytest.raises(MusotaError, match="is not UTF-8: rename it"):
        as_path("caf\udce9.txt")


def test_compressed_files_are_read_like_others(tmp_path):
    folder = _folder(tmp_path / "plain", valid="one\r\ntwo\n" * 20)
    packed = shutil.copytree(folder, tmp_path / "packed")
    for split in sources.SPLITS:
        path = packed / f"{split}.txt"
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load_corpus(packed, 300).fingerprint == load_corpus(folder, 300).fingerprint
    one = load_corpus(packed / "train.txt.gz", 300)
    assert one.name == "train" and one.source == "local file train.txt.gz, split 90/5/5"


def _dataset(path, monkeypatch, **splits):
    """The corpus name of a folder that `datasets` can load: a table as parquet for each split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "cache")
    (path / "my set").mkdir()
    for split, columns in splits.items():
        pd.DataFrame(columns).to_parquet(path / "my set" / f"{split}.parquet")
    return f"hf:{path / 'my set'}"


ROWS = [f"Row {n} has a sentence of its own, and a second one that ends it." for n in range(400)]


def test_a_dataset_is_read_like_a_folder_of_its_text(tmp_path, monkeypatch):
    texts = {"train": [*ROWS[:300], None], "validation": ROWS[300:350], "test": ROWS[350:]}
    columns = {split: {"label": range(len(t)), "sentence": t} for split, t in texts.items()}
    corpus = load_corpus(_dataset(tmp_path, monkeypatch, **columns), 300)
    lines = {split: "\n".join(filter(None, rows)) + "\n" for split, rows in texts.items()}
    folder = _folder(tmp_path / "f", valid=lines.pop("validation"), **lines)
    assert corpus.fingerprint == load_corpus(folder, 300).fingerprint
    assert corpus.name == "hf:my set" and corpus.source == "local dataset"
    assert corpus.label == f"hf-my-set-{corpus.text_hash[:8]}"  # a name for folders


def test_a_dataset_that_lacks_splits_has_them_cut_off_its_train(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    corpus = load_corpus(_dataset(tmp_path / "a", monkeypatch, train={"text": ROWS}), 300)
    (tmp_path / "one.txt").write_text("\n".join(ROWS) + "\n")
    assert corpus.fingerprint == load_corpus(tmp_path / "one.txt", 300).fingerprint  # 90/5/5
    assert corpus.source == "local dataset, valid and test cut off train, 5% each"
    assert corpus.name == "hf:my set"
    splits = {"train": {"text": ROWS[:200]}, "test": {"text": ROWS[200:]}}
    corpus = load_corpus(_dataset(tmp_path, monkeypatch, **splits), 300)
    texts = [corpus.tokenizer.decode(corpus.split(split)) for split in sources.SPLITS]
    assert "".join(texts) == "\n".join(ROWS) + "\n" and texts[2].startswith("Row 200 ")
    assert len(texts[0]) / len("".join(texts[:2])) == pytest.approx(0.95, abs=0.01)
    assert corpus.source == "local dataset, valid cut off train, 5% each"


@pytest.mark.parametrize("rows", [ROWS, [f"a short row, {n}" + "th" * 5 for n in range(400)]])
def test_what_valid_repeats_of_train_is_reported(rows, tmp_path, monkeypatch):
    splits = {"train": rows, "valid": [*rows[:20], *(row[::-1] for row in rows[:60])]}
    splits["test"] = [row.upper() for row in rows]
    name = _dataset(tmp_path, monkeypatch, **{split: {"text": t} for split, t in splits.items()})
    folder = _folder(tmp_path / "f", **{split: "\n".join(t) for split, t in splits.items()})
    for each in (name, folder):
        source = load_corpus(each, 300).source
        assert source.endswith("; 25% of the longer lines of valid are also in train")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"n": [1, 2]}}, "has no column `text`, nor a single one .* among n: write"),
        ({"train": {"a": ["x"], "b": ["y"]}}, "nor a single one of strings, among a, b"),
        ({"test": {"text": ["x"]}}, "has no rows in a split `train`, only in test."),
        ({}, "my set cannot be loaded .*: check the name"),
    ],
)
def test_a_dataset_that_cannot_be_used_gets_one_sentence(splits, message, tmp_path, monkeypatch):
    with pytest.raises(MusotaError, match=message):
        load_corpus(_dataset(tmp_path, monkeypatch, **splits), 300)
