"""Intervals, comparisons and the plan's rules, on made-up runs."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from musota.errors import MusotaError
from musota.lab import plan_rules, stats, verdicts
from musota.lab.verdicts import Verdict, compare, compare_with_matched
from musota.registry import experiments


def make_run(loss=5.0, seed=0, title="a", losses=None, noise=0.0, diverged_at=None, **changes):
    """A run at the plan's size, with what a Run has, but without a folder. Each block of its valid
    text differs by `noise` an epoch."""
    losses = loss + 0.1 * np.arange(30)[::-1] if losses is None else np.array(losses)
    generator = np.random.default_rng(seed)
    blocks = generator.normal(0, 0.5, 30)  # hard and easy texts, the same every epoch
    nats = losses[:, None] + blocks - blocks.mean() + generator.normal(0, noise, (len(losses), 30))
    epochs = np.arange(1, len(losses) + 1)
    columns = {"epoch": epochs, "step": 100 * epochs, "tokens": 100_000 * epochs}
    summary = {"ppl": np.exp(loss), "valid_loss": loss, "accuracy": 0.3}
    summary["valid_block_tokens"] = [1024] * 30
    run = {
        "title": title, "name": title, "path": f"results/{title}-seed{seed}", "seed": seed,
        "experiment": experiments["optimized"].with_(warmup_steps=10), "key": title,
        "profile": "full", "config": {"corpus": {"name": "wikitext-2"}}, "valid_text": "text",
        "summary": summary if len(losses) else {}, "valid_loss": np.inf if diverged_at else loss,
        "valid_block_nats": (1024 * nats).tolist(), "health": [],
        "history": pd.DataFrame({**columns, "ppl": np.exp(nats.mean(1))}),
        "steps": pd.DataFrame({"step": [5, 20, 30, 40], "loss": 6, "grad_norm": [9, 0.5, 2, 0.5]}),
        "finished": not diverged_at and len(losses) >= 10,
        "diverged": bool(diverged_at), "diverged_at": diverged_at,
        "ended": bool(diverged_at) or len(losses) >= 10, "total_steps": 3000,
    }  # fmt: skip
    return SimpleNamespace(**{**run, **changes})


def seeds(*losses, **changes):
    return [make_run(loss, seed, **changes) for seed, loss in enumerate(losses)]


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    tokens = np.full(60, 1000)
    for _ in range(200):
        difference = generator.normal(0.02, 0.1, 60)  # by block
        interval = stats.block_bootstrap(difference * tokens, tokens)
        assert interval.mean == pytest.approx(difference.mean())
        covered += interval.low <= 0.02 <= interval.high
    assert 180 <= covered <= 199


def test_intervals_over_seeds_are_students():
    interval = stats.seed_interval([0.1, 0.2, 0.3])
    assert interval.mean == pytest.approx(0.2)
    assert interval.high - 0.2 == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-5)
    losses = {"a": {0: 6.0, 1: 6.1}, "b": {0: 5.8, 1: 5.93}, "c": {0: 6.2, 1: 6.28}}
    effect = stats.pooled_contrast(losses, "a", "b")
    # By hand: means 6.05, 5.865, 6.24; a seed effect of ±0.05167; (3 − 1)(2 − 1) = 2 degrees.
    residuals = np.array([0.0016667, -0.0133333, 0.0116667] * 2)
    sd = np.sqrt(np.sum(residuals**2) / 2)
    assert effect.mean == pytest.approx(-0.185)
    assert effect.high - effect.mean == pytest.approx(4.302653 * sd, rel=1e-4)
    one_seed = {run: {0: row[0]} for run, row in losses.items()}
    assert "no interval" in str(stats.pooled_contrast(one_seed, "a", "b"))


def test_with_one_seed_the_measured_spread_of_seeds_decides():
    for difference, decision in ((-0.04, "better"), (0.036, "tie"), (0.038, "worse")):
        found = compare(make_run(5 + difference), make_run(5.0, title="b"))
        assert found.decision == decision and found.value == pytest.approx(difference)
    assert found.high - found.value == pytest.approx(2 * 2**0.5 * stats.SEED_SPREAD)
    assert "one seed; the interval is from the spread of seeds at profile study" in found.reason


def test_the_reason_says_where_test_disagrees_with_valid():
    a, b = make_run(5.0), make_run(5.0, title="b")
    for run, loss in ((a, 5.1), (b, 5.0)):
        run.summary["test_loss"] = loss
    assert compare(a, b).decision == "tie"
    assert compare(a, b).reason.endswith("; on test worse, +0.100 nats/token [+0.063, +0.137]")
    a.summary["test_loss"] = 5.01
    assert "test" not in compare(a, b).reason.replace("study", "")


def test_with_several_seeds_their_interval_decides():
    b = seeds(5.1, 5.11, 5.1, title="b")
    assert compare_with_matched(seeds(5.2, 5.21, 5.22), b).decision == "hurts"
    assert compare_with_matched(seeds(5.0, 5.01, 4.99), b).decision == "helps"
    wide = compare(seeds(5.0, 5.3, 4.9), b)  # further apart on average than one seed's yardstick
    assert wide.decision == "tie" and wide.low < 0 < wide.high and "3 seeds" in wide.reason
    close = compare(seeds(5.09, 5.1, 5.09), b)  # nearer than the yardstick, but always so
    assert close.decision == "better"
    # Seeds without a partner are left out.
    found = compare([*seeds(5.0, 5.01), make_run(9.0, 7)], seeds(5.1, 5.112, 5.1, title="b"))
    assert found.decision == "better" and "2 seeds" in found.reason
    assert "valid PPL 149.2 against 165.0" in found.reason
    apart = compare(make_run(5.0, seed=0), make_run(5.1, seed=1, title="b"))
    assert apart.decision == "better" and "no seed in common" in apart.reason


def test_a_diverged_run_loses_and_an_unfinished_one_is_named():
    diverged = make_run(diverged_at=120, losses=[], title="b")
    found = compare(make_run(6.0), diverged)
    assert found.decision == "better" and "b, seed 0, diverged at step 120" in found.reason
    assert compare(diverged, make_run(6.0)).decision == "worse"
    unfinished = make_run(6.0, title="b", losses=[7, 6.5, 6])
    found = compare(make_run(5.0), unfinished)
    assert found.decision == "unfinished" and found.value is None and found.good is None
    assert found.reason == "b, seed 0, after epoch 3"
    alike = make_run(5.0, experiment=experiments["baseline"])  # of the same title
    assert compare(make_run(6.0, losses=[7, 6.5, 6]), alike).decision == "unfinished"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], make_run(), "a run, or several, on each side"),
        ("optimized", make_run(), "runs that have ended an epoch, not 'optimized'"),
        (make_run(), make_run(valid_text="other"), "were validated on different tokens"),
        ([make_run(), make_run(seed=1, title="b")], make_run(), "differ in the seed alone"),
    ],
)
def test_what_cannot_be_compared_raises_one_sentence(a, b, message):
    with pytest.raises(MusotaError, match=message):
        compare(a, b)


def test_a_sentence_has_every_part_of_its_verdict():
    verdict = Verdict("Better?", "tie", -0.01, -0.04, 0.02, verdicts.NATS, "one seed", "wait")
    words = "Better? Tie (-0.010 nats/token [-0.040, +0.020]; one seed). Next: wait."
    assert str(verdict) == words and str(Verdict("Rank", "ok", 1234.5)) == "Rank: Ok (1,234)."


def test_the_bigram_is_the_baseline_to_beat():
    ppls = {"uniform": 8192, "unigram": 800, "bigram": 200, "trigram": 170}
    found = [verdicts.against_ngrams(make_run(np.log(ppl)), ppls) for ppl in (206, 204, 196, 194)]
    judged = [(verdict.decision, verdict.good) for verdict in found]
    assert judged == [("no", False), ("tie", None), ("tie", None), ("yes", True)]
    assert verdicts.least_to_beat(ppls).value == 200
    reported = verdicts.least_to_beat(ppls, 402.2)
    assert reported.good is False and "402 was reported" in reported.reason


def plan(part, run, baseline=None):
    """The plan's verdict with `part` in its question, if there is one."""
    found = plan_rules.plan_verdicts(run, baseline)
    return next((verdict for verdict in found if part in verdict.question), None)


@pytest.mark.parametrize(
    ("ppl", "letter", "bottom_line"),
    [(199.9, "A", "validated"), (250, "A", "compare"), (300, "B", "compare"),
     (300.1, "B", "redesign"), (350.1, "C", "redesign")],
)  # fmt: skip
def test_the_plans_two_scales(ppl, letter, bottom_line):
    run = make_run(np.log(ppl))
    run.summary["ppl"] = ppl
    assert plan("scenarios", run).decision == letter
    assert plan("bottom line", run).decision == bottom_line
    assert plan("under 200", run).decision == ("no" if ppl > 200 else "yes")
    assert plan("option 3", run).decision == ("yes" if ppl > 300 else "undecided")
    assert plan("under 200", seeds(5.2, 5.5, 4.9)).decision == "undecided"  # the interval decides


def test_in_scenario_b_the_baseline_decides_what_comes_next():
    for baseline, step in [(5.71, "50 epochs or more"), (5.6, "simplify"), (None, "train the")]:
        other = baseline and make_run(baseline, title="b", experiment=experiments["baseline"])
        assert step in plan("scenarios", make_run(5.7), other).next_step
        simplify = plan("option 3", make_run(5.7), other).decision
        assert simplify == {5.6: "yes", None: "undecided"}.get(baseline, "no")
    unfinished = make_run(losses=[6.0] * 3, title="b", experiment=experiments["baseline"])
    assert "train the" in plan("scenarios", make_run(5.7), unfinished).next_step
    assert "not compared" in plan("option 3", make_run(5.7), unfinished).reason
    going, baseline = make_run(losses=[6.0] * 3), make_run(5.7, experiment=experiments["baseline"])
    assert plan("option 3", going, baseline).decision == "undecided"


def test_the_plans_thresholds_apply_to_its_own_setting_only():
    assert plan_rules.plan_applies(make_run()) == ""
    small, corpus = experiments["optimized"].with_(vocab_size=8192), {"name": "python-docs"}
    other = make_run(experiment=small, profile="study", config={"corpus": corpus})
    reason = plan_rules.plan_applies(other)
    words = "python-docs", "8,192", "study", "sizes are not the plan's"
    assert all(word in reason for word in words)
    assert plan("thresholds apply", other).decision == "not applicable"
    assert not plan("scenarios", other) and not plan("under 200", other)
    both = [make_run(), make_run(seed=1, key="a", diverged_at=5)]
    assert "diverged at step 5" in plan("thresholds apply", both).reason
    part = {"name": "wikitext-2", "words": {"valid": 900}}
    assert "or a part" in plan_rules.plan_applies(make_run(config={"corpus": part}))
    short = experiments["optimized"].with_(epochs=10)
    assert "10 of the plan's 30 epochs" in plan_rules.plan_applies(make_run(experiment=short))
    assert plan("under 200", make_run(5.2, experiment=short)).decision == "yes"  # reached early
    assert not plan("under 200", make_run(5.5, experiment=short))
    assert "diverged at step 9" in plan_rules.plan_applies(make_run(diverged_at=9))
    baseline = make_run(6.1, experiment=experiments["baseline"], title="b")
    assert plan("own test", make_run(), baseline).decision == "above"


def test_the_plans_red_flags_while_training():
    flat = make_run(losses=[5.0] * 30)
    for run, improves, stops in ((make_run(), "yes", "no"), (flat, "no", "yes")):
        assert plan("continue to improve", run).decision == improves
        assert plan("after epoch 15", run).decision == stops
