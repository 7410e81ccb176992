from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from musota.rules import curves, findings, plan, stats, verdicts
from musota.rules.verdicts import root_cause_advice, root_causes

# --- the plan's rules ---


@pytest.mark.parametrize(
    ("ppl", "letter", "bottom_line"),
    [(199.9, "A", "validated"), (200, "A", "compare"), (250, "A", "compare"),
     (250.1, "B", "compare"), (300, "B", "compare"), (300.1, "B", "redesign"),
     (350, "B", "redesign"), (350.1, "C", "redesign")],
)  # fmt: skip
def test_the_plans_two_scales(ppl, letter, bottom_line):
    found = plan.scenario(ppl, 0.3), plan.bottom_line(ppl)
    assert [finding.verdict for finding in found] == [letter, bottom_line]


def test_accuracy_is_mentioned_and_in_scenario_b_the_baseline_decides_what_comes_next():
    for ppl, accuracy, said in [(240, 0.29, "under"), (240, 0.31, ""), (300, 0.31, "over")]:
        found = plan.scenario(ppl, accuracy).conclusion
        assert (f"though the accuracy is {said}" in found) == bool(said)
    for baseline, step in [(301, "50 epochs or more"), (299, "simplify"), (None, "train the")]:
        assert step in plan.scenario(300, 0.25, baseline).next_step


@pytest.mark.parametrize(
    ("ppl", "comparison", "verdict"),
    [(300, "helps", "keep"), (300.1, "helps", "simplify"), (150, "hurts", "simplify"),
     (150, "undecided", "keep"), (150, None, "keep"), (None, "hurts", "simplify"),
     (None, "helps", "keep")],
)  # fmt: skip
def test_option_three(ppl, comparison, verdict):
    compared = comparison and findings.Finding("", comparison, "", "", "provisional, …")
    finding = plan.option_three(ppl, compared)
    assert finding.verdict == verdict and ("provisional" in finding.saw) == bool(comparison)


def test_the_plans_thresholds_apply_to_its_own_setting_only():
    assert plan.plan_does_not_apply("wikitext-2", 50_000, "full") is None
    reason = plan.plan_does_not_apply("python-docs", 8192, "study")
    assert all(word in reason for word in ("python-docs", "8,192", "study"))
    assert "full budget" in plan.plan_does_not_apply("wikitext-2", 50_000, "full", False)
    assert [plan.plans_own_test(ppl).verdict for ppl in (403, 402)] == ["above", "below"]


def test_the_ladder_names_the_rungs_on_either_side():
    rungs = {"uniform": 8192, "unigram": 800, "bigram": 200, "trigram": 170}
    found = [plan.on_the_ladder(ppl, rungs) for ppl in (9000, 300, 200, 199.9, 100)]
    assert [f.verdict for f in found] == ["none", "unigram", "unigram", "bigram", "trigram"]
    assert "not yet the bigram (200)" in found[2].conclusion


# --- intervals ---


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    tokens = np.full(60, 1000)
    for trial in range(200):
        difference = generator.normal(0.02, 0.1, 60)  # nats a token, by block
        b = generator.normal(5, 0.5, 60)
        interval = stats.paired_bootstrap(
            (b + difference) * tokens, b * tokens, tokens, resamples=400, seed=trial
        )
        assert interval.mean == pytest.approx(difference.mean())
        covered += interval.low <= 0.02 <= interval.high
    assert 180 <= covered <= 199


def test_the_seed_interval_is_students():
    interval = stats.seed_interval([0.1, 0.2, 0.3])
    assert interval.mean == pytest.approx(0.2)
    assert interval.high - 0.2 == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        stats.seed_interval([0.1])


def test_a_pooled_contrast_equals_the_textbooks_two_way_table():
    losses = {"a": {0: 6.0, 1: 6.1}, "b": {0: 5.8, 1: 5.93}, "c": {0: 6.2, 1: 6.28}}
    contrast = {"a": -1, "b": 1}
    effect = stats.pooled_contrast(losses, contrast)
    # By hand: means 6.05, 5.865, 6.24; a seed effect of ±0.05167; (3 − 1)(2 − 1) = 2 degrees.
    residuals = np.array([0.0016667, -0.0133333, 0.0116667] * 2)
    sd = np.sqrt(np.sum(residuals**2) / 2)
    assert effect.mean == pytest.approx(-0.185)
    assert effect.high - effect.mean == pytest.approx(4.302653 * sd, rel=1e-4)
    one_seed = {cell: {0: row[0]} for cell, row in losses.items()}
    assert "no interval" in str(stats.pooled_contrast(one_seed, contrast))


# --- helps or hurts ---


def _summaries(*losses, blocks=40):
    """By seed: a summary with this valid loss, which differs by block of text."""
    tokens = [1024] * blocks
    found = {}
    for seed, loss in enumerate(losses):
        per_block = loss + np.random.default_rng(int(1000 * loss)).normal(0, 0.01, blocks)
        nats = (per_block * 1024).tolist()
        found[seed] = {
            "valid_loss": per_block.mean(), "valid_block_tokens": tokens, "valid_block_nats": nats
        }  # fmt: skip
    return found


def _compared(one, other):
    finding, intervals = verdicts.compared(one, other, "one against other")
    return finding, *intervals.values()


def test_one_seed_gives_a_provisional_verdict():
    finding, text = _compared(_summaries(5.0), _summaries(5.2))
    assert finding.verdict == "helps" and text.high < 0
    assert finding.conclusion.startswith("provisional, seeds not measured")
    assert _compared(_summaries(5.2), _summaries(5.0))[0].verdict == "hurts"


def test_several_seeds_decide_or_leave_it_open():
    finding, _, seeds = _compared(_summaries(5.0, 5.01, 4.99), _summaries(5.2, 5.21, 5.2))
    assert finding.verdict == "helps" and seeds.high < 0
    assert "provisional" not in finding.conclusion
    # The texts agree that it is better on average, the seeds do not.
    finding, text, seeds = _compared(_summaries(5.0, 5.3, 4.9), _summaries(5.1, 5.1, 5.1))
    assert text.side == -1 and seeds.side == 0 and finding.verdict == "undecided"


def test_too_little_text_or_unlike_texts_decide_nothing():
    few, _ = _compared(_summaries(5.0, blocks=9), _summaries(6.0, blocks=9))
    assert few.verdict == "undecided" and "too little text" in few.conclusion
    with pytest.raises(ValueError, match="different texts"):
        _compared(_summaries(5.0), _summaries(5.0, blocks=39))
    with pytest.raises(ValueError, match="no seed in common"):
        _compared(_summaries(5.0), {1: _summaries(5.0)[0]})


# --- plateau and oscillation, on drawn curves ---


def _epochs(losses, noise=0.0, seed=0, blocks=30):
    """(history, nats, tokens) with these valid losses; each block differs by `noise` an epoch."""
    generator = np.random.default_rng(seed)
    offsets = generator.normal(0, 0.5, blocks)  # hard and easy texts, the same every epoch
    per_block = [
        1024 * (loss + offsets - offsets.mean() + generator.normal(0, noise, blocks))
        for loss in losses
    ]
    valid_loss = [nats.sum() / (1024 * blocks) for nats in per_block]
    epochs = np.arange(1, len(losses) + 1)
    columns = {"epoch": epochs, "tokens": epochs * 100_000, "valid_loss": valid_loss}
    history = pd.DataFrame({**columns, "ppl": np.exp(valid_loss)})
    return history, per_block, [1024] * blocks


def _plateau(losses, planned_epochs=30, noise=0.0, seed=0, **rule):
    history, nats, tokens = _epochs(losses, noise, seed)
    return curves.plateau(history, planned_epochs, nats, tokens, **rule)


FLAT = [7.0, 6.6, 6.3, 6.15, 6.05, 6.0, *[6.0 - 0.0005 * k for k in range(1, 5)]]
SLOW = [7.0, 6.5, 6.2, 6.1, 6.0975, 6.095, 6.0925]


@pytest.mark.parametrize(
    ("losses", "planned", "noise", "verdict", "said"),
    [
        (FLAT, 30, 0.02, "plateau", "since epoch 6"),
        (FLAT, 10, 0.02, "plateau", "learning rate still too high"),  # after half of the epochs
        (6.5 - 0.08 * np.arange(12), 30, 0.05, "none", ""),
        ([7.0, 6.9, 6.9], 30, 0, "too early", ""),
        ([7.0, 6.5, 6.2, 6.2, 6.2, 6.2, 6.2, 5.9], 30, 0, "none", ""),  # a late gain ends it
        (SLOW, 30, 0.0001, "slow", "beyond the noise of the text"),
        ([7.0, 6.0, 5.5, 5.4, 5.5, 5.6, 5.7], 30, 0.01, "plateau", "overfitting"),
    ],
)
def test_plateau(losses, planned, noise, verdict, said):
    found = _plateau(losses, planned, noise)
    assert found.verdict == verdict and said in found.sentence
    assert ("still too high" in found.sentence) == (planned == 10)


def test_the_plateau_rule_doubts_noise_and_can_be_moved():
    doubtful = [_plateau(SLOW, noise=0.02, seed=seed).verdict for seed in range(5)]
    assert "plateau" in doubtful and "slow" not in doubtful
    drawn = [7.0, 6.5, 6.2, 6.19, 6.19]
    assert _plateau(drawn, noise=0.01, window=3).verdict == "none"
    found = _plateau(drawn, noise=0.01, window=1, least_gain=0.02)
    assert (found.verdict, found.since) == ("plateau", 3)


def _steps(curve, seed=0):
    losses = curve(np.linspace(0, 1, 250)) + np.random.default_rng(seed).normal(0, 0.1, 250)
    return pd.DataFrame({"step": np.arange(1, 251) * 40, "loss": losses})


@pytest.mark.parametrize(
    ("curve", "verdict"),
    [
        (lambda x: 5 + 2 * np.exp(-4 * x), "none"),
        (lambda x: 6 + 0 * x, "none"),  # noise around a flat line
        (lambda x: 5.5 + 0.4 * np.sin(2 * np.pi * 5 * x), "oscillating"),
        (lambda x: 6 - x + 0.3 * np.sin(2 * np.pi * 4 * x), "oscillating"),
        (lambda x: 5.5 + 0.4 * np.exp(-(((x - 0.5) / 0.05) ** 2)), "none"),  # one bump
        (lambda x: np.interp(x, [0, 0.1, 0.5, 1], [6, 5, 8, 6.5]), "none"),  # undone in part
        (lambda x: 5.5 - x + np.where(x > 0.7, 12 * (x - 0.7), 0), "diverging"),
        (lambda x: 6 - x + np.where(x > 0.7, 12 * (x - 0.7), 0.3 * np.sin(25 * x)), "diverging"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_oscillation(curve, verdict, seed):
    found = curves.oscillation(_steps(curve, seed=seed), warmup_steps=400)
    assert found.verdict == verdict, found.sentence


def test_warm_up_is_not_taken_for_an_oscillation():
    wild = _steps(lambda x: 6 + np.where(x < 0.5, np.sin(2 * np.pi * 10 * x), 0))
    assert curves.oscillation(wild, warmup_steps=0).verdict == "oscillating"
    assert curves.oscillation(wild, warmup_steps=5000).verdict == "none"
    assert curves.oscillation(wild.head(40), warmup_steps=0).verdict == "too early"


# --- health statistics ---

HEALTHY = {
    "valid_loss": 5.0,
    "clean_train_loss": 4.95,
    "update_ratio": {"embedding": 5e-4, "output": 2e-3, "gate": 1e-3},
    "largest_score": 10.0,
    "attention_entropy": [2.0, 1.5],
    "gate_mean": [0.2, 0.4],
    "gate_spread": [0.1, 0.1],
    "gate_saturated": [0.0, 0.1],
    "effective_rank": 50.0,
}


def _health(grad_norms=(0.5, 2.0, 0.5), first=None, **last):
    epochs = [{**HEALTHY, **(first or {})}, {**HEALTHY, **last}]
    found = curves.health(epochs, grad_norms, grad_clip=1.0, d_model=64, length=96)
    return {finding.rule: finding for finding in found}


def test_a_healthy_run_is_called_healthy():
    found = _health()
    assert {finding.verdict for finding in found.values()} == {"good", "small"}
    assert "33%" in found["Clipped steps"].saw
    assert "5.0e-04 (embedding)" in found["Update of a step ÷ weights"].saw
    dense = {key: value for key, value in HEALTHY.items() if not key.startswith("gate")}
    rules = [finding.rule for finding in curves.health([dense], [0.5], 1.0, 64, 96)]
    assert rules == [rule for rule in found if rule != "Gate"]


@pytest.mark.parametrize(
    ("changes", "rule", "verdict"),
    [
        ({"update_ratio": {"a": 2e-5}, "first": {"update_ratio": {"a": 2e-5}}}, "Update", "low"),
        ({"update_ratio": {"a": 2e-2}, "first": {"update_ratio": {"a": 2e-2}}}, "Update", "high"),
        ({"grad_norms": (2.0, 3.0, 0.5)}, "Clipped", "high"),
        ({"clean_train_loss": 4.0}, "Train", "gap"),
        ({"valid_loss": 5.2}, "Train", "overfit"),
        ({"largest_score": 90.0}, "Largest", "growing"),
        ({"largest_score": 90.0, "first": {"largest_score": 80.0}}, "Largest", "good"),
        ({"attention_entropy": [2.0, 0.01]}, "Attention", "low"),
        ({"attention_entropy": [3.6, 3.59]}, "Attention", "uniform"),  # ln 96! / 96 = 3.60
        ({"gate_saturated": [0.9, 0.8]}, "Gate", "saturated"),
        ({"effective_rank": 20.0}, "Effective", "low"),
    ],
)
def test_each_statistic_out_of_its_band_is_named(changes, rule, verdict):
    found = {finding.rule.split()[0]: finding.verdict for finding in _health(**changes).values()}
    assert found.pop(rule) == verdict
    assert set(found.values()) <= {"good", "small"}


# --- root causes and probes, on drawn numbers ---


def _suspects(*cells):
    return [
        SimpleNamespace(name=f"too {cell}", before="base", after=cell, advice=f"mend {cell}")
        for cell in cells
    ]


def test_root_causes_are_judged_and_ranked():
    means = {"base": 6.0, "big": 5.5, "small": 5.97, "none": 6.0, "worse": 6.4, "wild": 12.0}
    losses = {
        cell: {seed: mean + 0.1 * seed + noise for seed, noise in enumerate((0.0, 0.004, -0.004))}
        for cell, mean in means.items()
    }
    losses["big"][0] += 0.006
    suspects = _suspects("worse", "wild", "none", "small", "big")
    causes = root_causes(suspects, losses, vocab_size=50_000)
    assert [cause.suspect.after for cause in causes] == ["big", "small", "none", "worse", "wild"]
    assert [cause.verdict for cause in causes] == ["cause", *["not a cause"] * 4]
    assert causes[-1].effect is None  # above ln 50,000 = 10.8 it has not trained
    assert causes[0].effect.high < -0.48  # and does not widen the intervals of the others
    assert causes[0].ppl_before == pytest.approx(np.exp(6.1), rel=0.01)
    assert root_cause_advice(causes[1:]) == "No suspect was found guilty."
    assert "mend big; measure again" in root_cause_advice(causes)
    generator = np.random.default_rng(0)
    noisy = {c: {s: generator.normal(row[s], 0.3) for s in row} for c, row in losses.items()}
    found = root_causes(suspects[2:4], noisy, vocab_size=50_000)
    assert {cause.verdict for cause in found} == {"undecided"}


@pytest.mark.parametrize(
    ("low", "middle", "high", "verdict", "next_step"),  # losses by rate; the usual rate is the low
    [([7.0], [6.0], [5.5], "edge", "widen"), ([5.0], [6.0], [6.5], "edge", "widen"),
     ([7.0], [5.0, 5.2], [5.5], "bracketed", "raise"), ([6.0], [5.98], [6.4], "bracketed", "")],
)  # fmt: skip
def test_a_sweep_says_where_its_best_is(low, middle, high, verdict, next_step):
    found = verdicts.best_rate({1e-4: low, 1e-3: middle, 1e-2: high}, 1e-4, "MU-SOTA")
    assert found.verdict == verdict and found.next_step.split(" ")[0] == next_step


@pytest.mark.parametrize(
    ("decayed", "held", "verdict"),  # of the second, more training explains the gain
    [(-0.15, -0.02, "noise"), (-0.15, -0.14, "not the rate"), (-0.02, 0.0, "not the rate"),
     (-0.06, -0.01, "undecided")],
)  # fmt: skip
def test_annealing_counts_only_what_the_held_rate_does_not_bring(decayed, held, verdict):
    generator, tokens = np.random.default_rng(0), np.full(40, 1024)
    before = 6 * tokens + generator.normal(0, 200, 40)
    after = [before + tokens * (gain + generator.normal(0, 0.02, 40)) for gain in (decayed, held)]
    found, intervals = verdicts.annealing(before, *after, tokens)
    assert found.verdict == verdict and bool(found.next_step) == (verdict == "noise")
    assert intervals["falling − held"].mean == pytest.approx(decayed - held, abs=0.02)


def test_data_halving_gives_nats_per_doubling():
    losses = {n: {s: 6 - 0.2 * np.log2(n) + 0.1 * s for s in (0, 1)} for n in (1, 2, 4)}
    found, slope = verdicts.data_halving(losses)
    assert found.verdict == "data-starved" and slope.mean == pytest.approx(-0.2)
    flat = {n: {s: 6 + 0.1 * s + 0.001 * (n == 2) for s in (0, 1)} for n in (1, 2, 4)}
    assert verdicts.data_halving(flat)[0].verdict == "not data-starved"
    found, slope = verdicts.data_halving({n: {0: row[0]} for n, row in losses.items()})
    assert found.verdict == "undecided" and "no interval" in found.saw
