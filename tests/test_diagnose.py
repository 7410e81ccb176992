import dataclasses

import numpy as np
import pandas as pd
import pytest

from musota import diagnose


@pytest.mark.parametrize(
    ("ppl", "letter"), [(120, "A"), (250, "A"), (250.1, "B"), (350, "B"), (350.1, "C"), (900, "C")]
)
def test_scenarios(ppl, letter):
    assert diagnose.scenario(ppl, 0.3).verdict == letter


def test_ppl_decides_the_scenario_and_a_contradicting_accuracy_is_mentioned():
    assert "though the accuracy is under" in diagnose.scenario(240, 0.29).conclusion
    assert "though" not in diagnose.scenario(240, 0.31).conclusion
    assert "over that scenario's 20%–30%" in diagnose.scenario(300, 0.31).conclusion
    assert "though" not in diagnose.scenario(400, 0.24).conclusion
    assert "though the accuracy is over" in diagnose.scenario(400, 0.26).conclusion


def test_in_scenario_b_the_baseline_decides_what_comes_next():
    assert "50 epochs or more" in diagnose.scenario(300, 0.25, baseline_ppl=301).next_step
    assert "simplify" in diagnose.scenario(300, 0.25, baseline_ppl=299).next_step
    assert "train the baseline" in diagnose.scenario(300, 0.25).next_step


@pytest.mark.parametrize(
    ("ppl", "verdict"),
    [(199.9, "validated"), (200, "compare"), (300, "compare"), (300.1, "redesign")],
)
def test_bottom_line(ppl, verdict):
    assert diagnose.bottom_line(ppl).verdict == verdict


def test_the_bottom_line_mentions_the_stretch_goal_and_the_plans_contradiction():
    assert "stretch" in diagnose.bottom_line(99).conclusion
    assert "stretch" not in diagnose.bottom_line(101).conclusion
    assert "scenario B" in diagnose.bottom_line(340).conclusion
    assert "scenario B" not in diagnose.bottom_line(351).conclusion


@pytest.mark.parametrize(
    ("ppl", "verdict"),
    [(100, "optimistic"), (180, "optimistic"), (181, "conservative"), (250, "conservative"),
     (251, "neither")],
)  # fmt: skip
def test_expectations(ppl, verdict):
    assert diagnose.expectation(ppl, 0.4).verdict == verdict
    assert ("exceeded" in diagnose.expectation(ppl, 0.4).conclusion) == (ppl < 120)


def test_an_expectation_met_by_ppl_but_not_by_accuracy_says_so():
    assert "not by accuracy" in diagnose.expectation(150, 0.34).conclusion
    assert "not by accuracy" not in diagnose.expectation(150, 0.36).conclusion
    assert "not by accuracy" in diagnose.expectation(240, 0.24).conclusion


def _history(ppl):
    return pd.DataFrame({"epoch": range(1, len(ppl) + 1), "ppl": ppl})


def test_phases_of_a_run_that_stalls_in_the_middle():
    ppl = [*np.linspace(900, 400, 10), *np.full(10, 399.0), *np.linspace(390, 300, 10)]
    first, second, third = diagnose.phases(_history(ppl), 30)
    assert [f.verdict for f in (first, second, third)] == ["improving", "stalled", "improving"]
    assert [f.rule for f in (first, second, third)] == [
        "Epochs 1–10",
        "Epochs 11–20",
        "Epochs 21–30",
    ]
    assert "learning rates differ" in " ".join(first.conclusion.split())


def test_a_phase_improves_from_one_percent_on():
    base = [500.0] * 10
    (_, just), (_, not_quite) = (
        diagnose.phases(_history([*base, *[ppl] * 10]), 30) for ppl in (494.9, 495.1)
    )
    assert (just.verdict, not_quite.verdict) == ("improving", "stalled")


def test_phases_of_unfinished_and_short_runs():
    assert len(diagnose.phases(_history([500, 400, 300]), 30)) == 1
    short = diagnose.phases(_history([500, 400, 399.9]), 3)
    assert [f.rule for f in short] == ["Epoch 1", "Epoch 2", "Epoch 3"]
    assert [f.verdict for f in short] == ["too early to say", "improving", "stalled"]


@pytest.mark.parametrize(
    ("ppl", "comparison", "verdict"),
    [(300, "helps", "keep"), (300.1, "helps", "simplify"), (150, "hurts", "simplify"),
     (150, "undecided", "keep"), (150, None, "keep"), (None, "hurts", "simplify"),
     (None, "helps", "keep")],
)  # fmt: skip
def test_option_three(ppl, comparison, verdict):
    compared = comparison and diagnose.Finding("", comparison, "", "", "the architecture …")
    finding = diagnose.option_three(ppl, compared)
    assert finding.verdict == verdict and "provisional" not in finding.sentence
    if compared:
        one_seed = diagnose.Finding("", comparison, "", "", "provisional, seeds not measured: …")
        assert "provisional" in diagnose.option_three(ppl, one_seed).sentence


def test_the_plans_thresholds_apply_to_its_own_setting_only():
    assert diagnose.plan_does_not_apply("wikitext-2", 50_000, "full") is None
    for setting, word in [
        (("python-docs", 50_000, "full"), "python-docs"),
        (("wikitext-2", 8192, "full"), "8,192"),
        (("wikitext-2", 50_000, "full", False), "not spent its full budget"),
        (("wikitext-2", 50_000, "study"), "study"),
    ]:
        assert word in diagnose.plan_does_not_apply(*setting)
        assert diagnose.not_applicable("Scenario", word).verdict == "not applicable"


def test_the_ladder_names_the_rungs_on_either_side():
    rungs = {"uniform": 8192, "unigram": 800, "bigram": 200, "trigram": 170}
    assert diagnose.on_the_ladder(300, rungs).verdict == "unigram"
    assert "not yet the bigram (200)" in diagnose.on_the_ladder(200, rungs).conclusion
    assert diagnose.on_the_ladder(199.9, rungs).verdict == "bigram"
    assert "better than every rung" in diagnose.on_the_ladder(100, rungs).conclusion
    assert diagnose.on_the_ladder(9000, rungs).verdict == "none"


def test_the_plans_own_test_is_shown_as_reported():
    assert diagnose.plans_own_test(403).verdict == "above"
    assert diagnose.plans_own_test(402).verdict == "below"
    assert "reported" in diagnose.plans_own_test(403).rule


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    tokens = np.full(60, 1000)
    covered = 0
    for trial in range(200):
        difference = generator.normal(0.02, 0.1, 60)  # nats a token, by block
        b = generator.normal(5, 0.5, 60)
        interval = diagnose.paired_bootstrap(
            (b + difference) * tokens, b * tokens, tokens, resamples=400, seed=trial
        )
        assert interval.mean == pytest.approx(difference.mean())
        covered += interval.low <= 0.02 <= interval.high
    assert 180 <= covered <= 199


def test_the_seed_interval_is_students():
    interval = diagnose.seed_interval([0.1, 0.2, 0.3])
    assert interval.mean == pytest.approx(0.2)
    assert interval.high - 0.2 == pytest.approx(4.303 * 0.1 / np.sqrt(3))
    with pytest.raises(ValueError, match="at least two"):
        diagnose.seed_interval([0.1])


def _summary(loss, blocks=40, noise=0.01, seed=0):
    per_block = loss + np.random.default_rng(seed).normal(0, noise, blocks)
    tokens = [1024] * blocks
    return {
        "valid_loss": float(per_block.mean()),
        "valid_block_tokens": tokens,
        "valid_block_nats": (per_block * 1024).tolist(),
    }


def test_one_seed_gives_a_provisional_verdict():
    finding, text, seeds = diagnose.helps_or_hurts({0: _summary(5.0)}, {0: _summary(5.2, seed=1)})
    assert finding.verdict == "helps" and text.high < 0 and seeds is None
    assert finding.conclusion.startswith("provisional, seeds not measured")
    finding, *_ = diagnose.helps_or_hurts({0: _summary(5.2)}, {0: _summary(5.0, seed=1)})
    assert finding.verdict == "hurts"


def test_several_seeds_decide_or_leave_it_open():
    def runs(losses):
        return {k: _summary(loss, seed=k) for k, loss in enumerate(losses)}

    finding, _, seeds = diagnose.helps_or_hurts(runs([5.0, 5.01, 4.99]), runs([5.2, 5.21, 5.2]))
    assert finding.verdict == "helps" and seeds.high < 0
    assert "provisional" not in finding.conclusion
    # The texts agree that it is better on average, the seeds do not.
    finding, text, seeds = diagnose.helps_or_hurts(runs([5.0, 5.3, 4.9]), runs([5.1, 5.1, 5.1]))
    assert text.side == -1 and seeds.side == 0 and finding.verdict == "undecided"


def test_too_little_text_or_unlike_texts_decide_nothing():
    few = {0: _summary(5.0, blocks=5)}, {0: _summary(6.0, blocks=5, seed=1)}
    assert diagnose.helps_or_hurts(*few)[0].verdict == "undecided"
    with pytest.raises(ValueError, match="different texts"):
        diagnose.helps_or_hurts({0: _summary(5.0)}, {0: _summary(5.0, blocks=39)})
    with pytest.raises(ValueError, match="no seed in common"):
        diagnose.helps_or_hurts({0: _summary(5.0)}, {1: _summary(5.0)})


def test_findings_read_as_sentences():
    for finding in (diagnose.scenario(300, 0.2), diagnose.bottom_line(90)):
        assert all(dataclasses.asdict(finding)[k] for k in ("rule", "verdict", "saw", "threshold"))
        assert finding.sentence.count("(") == finding.sentence.count(")")
