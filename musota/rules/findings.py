"""What every rule returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One rule's answer. `verdict` is a short fixed word or letter for programs to compare."""

    rule: str
    verdict: str
    saw: str
    threshold: str
    conclusion: str
    next_step: str = ""
    since: int | None = None  # the first epoch it speaks of, where it has one

    @property
    def short(self) -> str:
        """The finding without its threshold."""
        step = f" {self.next_step[0].upper()}{self.next_step[1:]}." if self.next_step else ""
        return f"{self.rule}: {self.saw} — {self.conclusion}.{step}"

    @property
    def sentence(self) -> str:
        step = f" Next: {self.next_step}." if self.next_step else ""
        return f"{self.rule}: {self.saw} ({self.threshold}) — {self.conclusion}.{step}"


def judged(about: tuple[str, str, str], *cases: tuple) -> Finding:
    """The finding about (rule, saw, threshold) of the first case that holds: each is (whether it
    does, verdict, conclusion, next step if any, …)."""
    (rule, saw, threshold), (_, verdict, *said) = about, next(case for case in cases if case[0])
    return Finding(rule, verdict, saw, threshold, *said)


def not_applicable(rule: str, reason: str) -> Finding:
    scope = "the plan speaks of wikitext-2, V 50,000, full budget"
    conclusion = "not applicable here: read the run against the measured rungs instead"
    return Finding(rule, "not applicable", reason, scope, conclusion)
