"""Pages of results: short, plain, true to the records, and whole in one file."""

import re
import shutil

import pytest
from conftest import EXPERIMENT, ROOT

import musota
from musota.errors import MusotaError
from musota.files import write_json
from musota.workbook import report
from musota.workbook.results import Results, ngrams_path

MODEL = EXPERIMENT.with_(n_layer=2)
COMMAND = "musota train optimized --profile tiny"


@pytest.fixture(scope="module")
def tiny(short, tmp_path_factory):
    """A results folder with a model, its parameter-matched transformer and n-gram baselines."""
    folder = tmp_path_factory.mktemp("results") / "tiny"
    about = musota.RunOptions(about={"title": "Mine | <b> $x$ __a__ b_c", "command": COMMAND})
    musota.train(MODEL, short, folder / "mine-seed0", name="mine", options=about)
    musota.train(musota.twin(MODEL), short, folder / "its-seed0", name="its")
    ngrams = {"ppl": {"bigram": 150.25, "trigram": 120.5}}
    write_json(ngrams_path(folder, short.fingerprint), ngrams)
    return folder


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A copy of committed results, with its page written anew."""
    folder = shutil.copytree(ROOT / "results" / "study", tmp_path_factory.mktemp("new") / "study")
    report.write_report(folder)
    return folder


def _shown(page: str) -> str:
    """What is visible of a page before anything is unfolded."""
    return re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)


def test_a_page_shows_the_recorded_numbers(tiny, tmp_path):
    (tmp_path / "link").symlink_to(tiny, target_is_directory=True)  # as `results` may be
    page = report.write_report(tmp_path / "link").read_text("utf-8")
    results = Results(tiny)
    for run in results.runs:
        numbers = f"{run.summary['ppl']:,.1f}", f"{run.summary['accuracy']:.1%}"
        assert any(all(n in line for n in numbers) for line in page.splitlines() if line[:1] == "|")
    best = min(run.summary["ppl"] for run in results.runs)
    assert f"**{best:,.1f}**" in page and "150.2" in page and "curves.png" in page
    assert COMMAND in page and page.count("<details>") == page.count("</details>") >= 5
    for picture in re.findall(r"\]\(([^)]+\.png)\)", page):
        assert (tiny / picture).exists()
    assert r"Mine \| &lt;b> \$x\$ \_\_a\_\_ b_c" in page  # text of a page is text
    page = (tiny / "report.html").read_text("utf-8")
    assert "Mine | &lt;b&gt; $x$ __a__ b_c" in page and "<b>" not in page


def test_the_html_page_needs_no_other_file(committed):
    page = (committed / "report.html").read_text("utf-8")
    assert len(page) < 3_000_000
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) > 3 and all(source.startswith("data:image/png") for source in sources)
    text = re.sub(r'src="[^"]*"', "", page)
    assert not re.findall(r"https?://|<script|<link|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_a_page_is_short_its_tables_narrow_and_a_tie_is_called_a_tie(committed):
    page = (committed / "README.md").read_text("utf-8")
    assert len(re.findall(r"\S*\w\S*", _shown(page))) <= 900
    heads = [line.split("\n")[0] for line in re.findall(r"^\|.*\|\n\| :?-.*$", page, re.MULTILINE)]
    assert len(heads) > 5 and all(len(re.split(r"(?<!\\)\|", head)) <= 10 for head in heads)
    assert "nan" not in page and not re.search(r"\d{12}", page)
    (line,) = (line for line in _shown(page).splitlines() if "architecture of “Redesign" in line)
    assert "Tie**" in line


def test_an_unfinished_run_gets_no_verdict(tiny, short, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    shutil.rmtree(folder / "its-seed0")
    half = musota.RunOptions(stop_at=0.5, about={"title": "The transformer"})
    musota.train(musota.twin(MODEL), short, folder / "its-seed0", options=half)
    whole = report.write_report(folder).read_text("utf-8")
    assert whole.count("1 of 2") == 3  # in the answer, the models and the runs
    page = _shown(whole)
    assert "**The transformer: 1 of 2 epochs.**" in page and "architecture of" not in page


def test_a_folder_without_models_still_has_a_page(tmp_path):
    assert "No model has finished" in report.write_report(tmp_path).read_text("utf-8")
    shutil.copy(ROOT / "results" / "study" / "grid.csv", tmp_path)  # notebook 06 alone
    page = report.write_report(tmp_path).read_text("utf-8")
    assert "root_causes.png" in page and (tmp_path / "root_causes.png").exists()
    (tmp_path / "README.md").write_text("my own")
    with pytest.raises(MusotaError, match="is not a report and is not replaced"):
        report.write_report(tmp_path)


def test_the_front_page_gets_one_table(tmp_path):
    readme, (begin, end) = tmp_path / "README.md", report.FRONT_MARKS
    readme.write_text(f"Before\n{begin}\nold\n{end}\nAfter\n")
    report.write_front_page(readme, ROOT / "results")
    text = readme.read_text("utf-8")
    assert text.startswith(f"Before\n{begin}\n\n| model ") and text.endswith(f"{end}\nAfter\n")
    rows = text.splitlines()[5:-3]
    assert "reported" in rows[0] and "402" in rows[0] and "trigram" in rows[-1]
    assert text.splitlines()[4] == "| :--- | ---: | ---: | ---: |"  # numbers on the right
    assert "old" not in text and all(row.count("|") == 5 for row in rows)
    assert text.count("**") == 4  # the best perplexity and accuracy
    readme.write_text(begin)
    with pytest.raises(MusotaError, match="each once"):
        report.write_front_page(readme, ROOT / "results")
