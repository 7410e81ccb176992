import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT

from musota.data import sources
from musota.data.corpus import load_corpus, window_starts
from musota.data.tokenizer import LONGEST_WORD, TextTokenizer
from musota.errors import MusotaError

ODD = [
    "",
    "\n",
    "one line without an end",
    "\n\n\ntabs\tand  double  spaces \n trailing \n\n",
    "emoji 😀🏳️‍🌈, accents é è ﬁ, 漢字, عربى\n",
    "an <unk> word, <unk><unk>, <UNK> and <|endoftext|> spelled out\n",
    "\r carriage \x0b vertical \u2028 separators \x00 nul\n",
    "a word of its own " + "abc" * 3000,
]


@pytest.fixture(scope="module")
def tokenizer(text_folder):
    return TextTokenizer.train([(text_folder / "train.txt").read_text("utf-8")], 400)


@pytest.mark.parametrize("text", ODD)
def test_any_text_survives_the_tokenizer_and_the_tokenizer_its_file(tokenizer, text, tmp_path):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids == tokenizer.line_end).sum() == text.count("\n")
    assert (ids == tokenizer.unknown).sum() == text.count("<unk>")
    assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < 400)
    # Long words are cut, so that time does not grow with their square.
    assert all(len(tokenizer.decode([token]).encode()) <= LONGEST_WORD for token in ids)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert (TextTokenizer.load(tmp_path / "tokenizer.json").encode(text) == ids).all()


def _folder(path, **texts):
    path.mkdir(exist_ok=True)
    for split in sources.SPLITS:
        (path / f"{split}.txt").write_text(texts.get(split, "a few words\n" * 30), "utf-8")
    return path


def test_counts_words_line_ends_and_bytes_by_hand(tmp_path):
    corpus = load_corpus(_folder(tmp_path / "mine", valid="né a b\n\nc <unk>\n"), 300)
    assert corpus.name == "mine"
    assert corpus.words["valid"] == 5 + 3  # né a b c <unk>, and three line ends
    assert corpus.bytes["valid"] == len("né a b\n\nc <unk>\n".encode())
    assert corpus.valid.dtype == torch.int32 and corpus.valid.dim() == 1
    assert corpus.statistics().loc["valid", "unk rate"] == pytest.approx(1 / 8)


def test_nothing_is_read_stale_and_only_train_teaches_the_tokenizer(tmp_path):
    folder = _folder(tmp_path / "c")
    before = load_corpus(folder, 300)
    assert torch.equal(before.train, load_corpus(folder, 300).train)
    (folder / "valid.txt").write_text("zebra words entirely\n" * 30, "utf-8")
    after = load_corpus(folder, 300)
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer.decode(after.valid).startswith("zebra words")
    assert after.tokenizer.backend.to_str() == before.tokenizer.backend.to_str()


@pytest.mark.parametrize("name", ["tokens-*.bin", "tokenizer-*.json"])
def test_a_damaged_cache_is_made_anew(name, text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path))
    before = load_corpus(text_folder, 400)
    for path in tmp_path.glob(name):
        data = bytearray(path.read_bytes())
        path.unlink()  # the tensors of `before` are mapped from it
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = load_corpus(text_folder, 400)
    assert again.fingerprint == before.fingerprint
    assert again.tokenizer.backend.to_str() == before.tokenizer.backend.to_str()


def test_white_space_at_line_ends_does_not_count(tmp_path):
    local = load_corpus(_folder(tmp_path / "d", valid=" = Title = \n \n text \n"), 300)
    hub = load_corpus(_folder(tmp_path / "e", valid=" = Title =\n\n text\n"), 300)
    assert local.fingerprint == hub.fingerprint


def test_limits_cut_at_a_line_end_and_recount(text_folder):
    whole = load_corpus(text_folder, 512)
    cut = whole.limited(5000, 800)
    assert 4000 < len(cut.train) <= 5000 and len(cut.valid) <= 800
    assert torch.equal(cut.valid, whole.valid[: len(cut.valid)])
    assert cut.valid[-1] == whole.tokenizer.line_end
    text = whole.tokenizer.decode(cut.valid)
    assert cut.words["valid"] == len(text.split()) + text.count("\n")
    assert cut.fingerprint != whole.fingerprint and cut.text_hash == whole.text_hash
    assert whole.limited(None, None).train is whole.train


@pytest.mark.parametrize(("n", "length"), [(1000, 7), (101, 10), (15, 7), (50, 25)])
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
    assert len(counts) == 1  # the same number each epoch
    assert n - 2 * length <= counts.pop() * length <= n
    assert len(offsets) > min(3, length - 1)


def test_windows_depend_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = window_starts(5000, 10, seed=0, epoch=4)
    torch.manual_seed(2)
    assert torch.equal(first, window_starts(5000, 10, seed=0, epoch=4))
    for other in (window_starts(5000, 10, 0, 5), window_starts(5000, 10, 1, 4)):
        assert not torch.equal(first, other)
    assert not torch.equal(first, first.sort().values)
    with pytest.raises(MusotaError, match="too few for windows of 10"):
        window_starts(15, 10, 0, 0)


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("valid", None, "has no valid.txt"),
        ("test", b" \n", "The test text of .* is empty"),
        ("train", b"fine \xff\xfe not", "is not UTF-8"),
    ],
)
def test_bad_folders_get_one_sentence(tmp_path, split, content, message):
    path = _folder(tmp_path / "f") / f"{split}.txt"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(MusotaError, match=message):
        load_corpus(tmp_path / "f", 300)


@pytest.mark.parametrize(
    ("name", "vocab_size", "message"),
    [
        ("wikitext2", 300, "did you mean 'wikitext-2'"),
        ("./nowhere", 300, "There is no folder"),
        ("python-docs", 200, "vocab_size must be a whole number of at least 258"),
        ("python-docs", "512", "vocab_size must be a whole number"),
        (None, 300, "Unknown corpus"),
    ],
)
def test_bad_names_and_vocabularies_get_one_sentence(name, vocab_size, message):
    with pytest.raises(MusotaError, match=message):
        load_corpus(name, vocab_size)


def test_a_local_copy_is_preferred_to_the_hub(tmp_path):
    _folder(tmp_path / "wikitext-2", train="a local copy\n" * 40)
    corpus = load_corpus("auto", 300, data_dir=tmp_path)
    assert (corpus.name, corpus.source) == ("wikitext-2 (another text)", "local copy")
    assert corpus.tokenizer.decode(corpus.train).startswith("a local copy")


def test_auto_falls_back_on_python_docs_and_reports_it(monkeypatch, text_folder):
    texts = sources._read_folder(text_folder)
    monkeypatch.setitem(sources.SOURCES, "python-docs", lambda: ("docstrings", texts))
    corpus = load_corpus("auto", 300)
    assert corpus.name == "python-docs"
    assert corpus.source.startswith("docstrings; wikitext-2 is not on this machine and the Hugging")


def test_python_docs_are_split_by_document_without_repeats(monkeypatch, tmp_path):
    package = tmp_path / "library"
    (package / "tests").mkdir(parents=True)
    (package / "broken.py").write_text("def (:\n")
    words = "word " * 25
    for number in range(200):
        body = f'"""Module {number} {words}"""\n\ndef f():\n    """Same everywhere {words}"""\n'
        (package / f"m{number}.py").write_text(body + 'def g():\n    """short"""\n')
    (package / "tests" / "t.py").write_text(f'"""Test {words}"""\n')
    monkeypatch.setattr(sources, "DOCS_PACKAGES", ())
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(package)})
    texts = sources._collect_docs()
    documents = [texts[split].strip().split("\n\n") for split in sources.SPLITS]
    assert list(map(len, documents)) == [181, 10, 10]  # 200 modules and the repeated one once
    assert "Test word" not in str(documents) and "short" not in str(documents)
    assert documents[0] != sorted(documents[0])


def test_no_long_line_of_python_docs_is_in_two_splits():
    words = [f"w{number}" for number in range(40)]
    lines = [" ".join(words[start : start + 14]) for start in range(26)]
    documents = {
        f"Document {number} starts like this.\n{line}" for number, line in enumerate(lines)
    }
    documents |= {f"Another {n} says it, too.\n      {lines[n % 9].title()}!" for n in range(40)}
    parts = sources._split(documents)
    assert len(parts["train"]) == round(0.9 * len(documents))
    found = [
        {line.strip(" !").lower() for d in part for line in d.splitlines() if len(line) > 40}
        for part in parts.values()
    ]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


def _in_a_process(code, *arguments, **environment):
    """A fresh interpreter: for what is decided at import, and for memory of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


CACHED = """
import json, pathlib, sys, datasets, pandas, musota
from musota.data import sources
source = pathlib.Path(sys.argv[1])
files = {}
for split in ("train", "validation", "test"):
    files[split] = str(source / f"{split}.parquet")
    pandas.DataFrame({"text": ["", f" = {split} = \\n"] * 50}).to_parquet(files[split])
datasets.load_dataset("parquet", data_files=files)
kept = next(source.rglob("dataset_info.json")).parent
place = source / "datasets" / "Salesforce___wikitext" / "wikitext-2-v1" / "0.0.0"
place.mkdir(parents=True)
place = kept.rename(place / sources.HUB_REVISION)
info = json.loads((place / "dataset_info.json").read_text())
info.update(dataset_name="wikitext", config_name="wikitext-2-v1")
(place / "dataset_info.json").write_text(json.dumps(info))
for path in place.glob("parquet-*.arrow"):
    path.rename(place / path.name.replace("parquet-", "wikitext-"))
corpus = musota.load_corpus("auto", 300)
assert (corpus.name, corpus.source) == ("wikitext-2", "the Hugging Face cache"), corpus.source
assert corpus.tokenizer.decode(corpus.valid) == "\\n = validation =\\n" * 50
"""


def test_the_datasets_cache_is_enough_without_a_hub(tmp_path):
    """A cache as `datasets` keeps it, made by it and put where WikiText's would be."""
    done = _in_a_process(CACHED, tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_silent_hub_is_answered_within_seconds(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # and never answer
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        started = time.perf_counter()
        code = "import musota\nmusota.load_corpus('wikitext-103')"
        done = _in_a_process(code, **hub, HF_HOME=str(tmp_path))
    assert time.perf_counter() - started < 40  # importing torch and datasets included
    assert "hub does not provide it" in done.stderr and "or use the corpus" in done.stderr


def test_splits_are_found_under_their_usual_names(tmp_path):
    usual = load_corpus(_folder(tmp_path / "usual", valid="other words entirely\n" * 30), 300)
    for names in (
        "wiki.train.tokens wiki.valid.tokens wiki.test.tokens",
        "train.raw dev.raw test.txt",
    ):
        other = tmp_path / names[:5]
        other.mkdir()
        for split, name in zip(sources.SPLITS, names.split(), strict=True):
            shutil.copy(tmp_path / "usual" / f"{split}.txt", other / name)
        assert load_corpus(other, 300).fingerprint == usual.fingerprint


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("".join(f"part {n} says\nnothing new\n\n" for n in range(400)), "\n\n"),
        ("one line\n" + "of many words\n" * 400, "\n"),
        ("字" * 9000, ""),
    ],
    ids=["paragraphs", "lines", "no spaces"],
)
def test_one_text_is_split_and_its_source_says_so(text, end, tmp_path):
    (tmp_path / "input.txt").write_text(text, "utf-8")
    corpus = load_corpus(tmp_path / "input.txt", 300)
    assert corpus.name == "input" and "input.txt, split 90/5/5" in corpus.source
    parts = [corpus.tokenizer.decode(corpus.split(split)) for split in sources.SPLITS]
    assert "".join(parts) == text
    for part, share in zip(parts, (0.90, 0.05, 0.05), strict=True):
        assert len(part) / len(text) == pytest.approx(share, abs=0.015) and part.endswith(end)


def test_valid_text_that_is_also_in_train_is_reported(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "leaks")
    assert "also in train" not in load_corpus(_folder(tmp_path / "clean"), 300).source
    shutil.copy(folder / "train.txt", folder / "valid.txt")
    source = load_corpus(folder, 300).source
    assert "100% of the longer lines of valid are also in train" in source


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


# --- large texts ---


def test_an_endless_line_comes_in_bounded_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "PIECE", 500)
    text = "字 and so on " * 2000 + "end"
    folder = _folder(tmp_path / "folder", train=text)
    assert max(map(len, sources._read_file(folder / "train.txt"))) <= 500
    corpus = load_corpus(folder, 300)
    assert corpus.tokenizer.decode(corpus.train) == text
    assert len(corpus.limited(40, 40).train) == 40
    titled = load_corpus(_folder(tmp_path / "titled", train=f">title\n{text}"), 300)
    assert len(titled.limited(40, 40).train) == 40


def test_a_text_in_pieces_gives_the_tokens_of_the_whole(text_folder, monkeypatch, tmp_path):
    whole = load_corpus(text_folder, 400)
    monkeypatch.setattr(sources, "PIECE", 500)
    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path))
    pieces = list(sources._read_file(text_folder / "train.txt"))
    assert len(pieces) > 100 and all(piece.endswith("\n") for piece in pieces[:-1])
    in_pieces = load_corpus(text_folder, 400)
    assert in_pieces.fingerprint == whole.fingerprint
    assert (in_pieces.words, in_pieces.bytes) == (whole.words, whole.bytes)
    for split in sources.SPLITS:
        text = (text_folder / f"{split}.txt").read_text("utf-8")
        assert in_pieces.tokenizer.encode(text).tolist() == in_pieces.split(split).tolist()


# --- which text it is ---


def test_a_known_text_is_recognised_in_any_folder_and_no_other_text_is(
    text_folder, tmp_path, monkeypatch
):
    posing = shutil.copytree(text_folder, tmp_path / "wikitext-2")
    other = load_corpus(posing, 300)
    assert other.name == "wikitext-2 (another text)" and other.label.endswith(other.text_hash[:8])
    monkeypatch.setitem(sources.KNOWN_TEXTS, other.text_hash, "wikitext-2")
    for folder in (posing, text_folder):
        assert load_corpus(folder, 300).label == "wikitext-2"
    # The same lines in another order are another text, with a folder of its own.
    lines = (posing / "train.txt").read_text("utf-8").splitlines(keepends=True)
    (posing / "train.txt").write_text("".join(sorted(lines)), "utf-8")
    shuffled = load_corpus(posing, 300)
    assert shuffled.name == "wikitext-2 (another text)" and shuffled.label != "wikitext-2"


def test_two_texts_never_share_a_label_and_one_text_keeps_its_hash(text_folder, tmp_path):
    changed = shutil.copytree(text_folder, tmp_path / text_folder.name)
    with (changed / "train.txt").open("a") as file:
        file.write("One more line.\n")
    here, there = (load_corpus(folder, 300) for folder in (text_folder, changed))
    assert here.name == there.name and here.label != there.label
    assert here.valid_sha256 != here.limited(None, 500).valid_sha256
    larger = load_corpus(text_folder, 400)  # other tokens of the same text
    assert larger.text_hash == here.text_hash and larger.fingerprint != here.fingerprint


# --- reading ---


def test_read_text_reads_a_file_as_load_corpus_does(tmp_path):
    folder = _folder(tmp_path / "mine", valid="\ufeff one \r\ntwo\t\n\nthree words here \n")
    corpus = load_corpus(folder, 300)
    text = sources.read_text(folder / "valid.txt")
    assert corpus.tokenizer.decode(corpus.valid) == text == " one\ntwo\n\nthree words here\n"


def test_text_that_is_not_unicode_gets_one_sentence(tokenizer):
    with pytest.raises(MusotaError, match="lone surrogate"):
        tokenizer.encode("fine \ud800 not")


def test_several_threads_can_fill_one_cache(text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MUSOTA_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        corpora = list(threads.map(lambda _: load_corpus(text_folder, 320), range(4)))
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert not list(tmp_path.glob(".*"))  # no temporary file is left
