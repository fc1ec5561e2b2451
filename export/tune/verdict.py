"""PROMOTED or REJECTED, and why: pure decisions on measured candidates. No files, no clock, no runtime.

A candidate is one file on one runtime. It is promoted when its mIoU falls by no more than the budget allows, it is at
least ``min_speedup`` times as fast as the FP32 original on the first runtime (beyond chance, where that is above 1),
and it keeps the latency budget. The measured figures decide; where a 95 % interval exceeds a limit, or cannot be
distinguished from "no difference", a remark says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinymim_export.bench.stats import distinguishable, pairwise_ratio
from tinymim_export.precision.base import by_block

BASELINE, PROMOTED, REJECTED = "BASELINE", "PROMOTED", "REJECTED"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Budget:
    """What a candidate has to keep.

    Args:
        max_miou_drop: Points (percent) of mIoU it may lose against the FP32 original.
        min_speedup: Times as fast as the FP32 original.
        latency_budget: Largest median in milliseconds; None: no such limit.
    """

    max_miou_drop: float = 0.5
    min_speedup: float = 1.2
    latency_budget: float | None = None

    def __str__(self) -> str:
        words = f"at most {self.max_miou_drop:g} points of mIoU lost, at least {self.min_speedup:g} times as fast"
        return words + (f", at most {self.latency_budget:g} ms" if self.latency_budget is not None else "")


@dataclass
class Candidate:
    """One file on one runtime, timed and scored. Scores are fractions, times milliseconds, intervals 95 %."""

    name: str  # "int8 + attention"
    precision: str  # of the file: fp32, fp16, int8, ...
    graph: list[str]  # variants applied
    runtime: str
    provider: str
    arithmetic: str | None  # OpenVINO's compute type: f32, bf16 (the key of tune.json since 0.1)
    engine: str  # the three in words
    file: str
    sha256: str
    file_mib: float
    shape: tuple[int, ...]
    threads: int
    runs: int
    p50_ms: float
    p50_interval: Interval
    p90_ms: float
    original_ms: float  # p50 of the original timed in turns with it
    speed_up: tuple[float, float, float]  # the original's time over its own, the median of all rounds, and its interval
    steady: bool
    mIoU: float
    mIoU_interval: Interval
    drop: float  # original's mIoU minus this one's
    drop_interval: Interval
    gpu: str | None = None  # where the provider is one's
    gain: tuple[float, float, float] | None = None  # as speed_up, against the plain FP32 file on the same runtime
    class_IoU: dict[str, float | None] = field(default_factory=dict)
    images: int = 0
    mode: str = ""
    data: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # see explain.facts; and "excluded" blocks
    verdict: str = REJECTED
    reasons: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """File and engine: what makes it one measurement."""
        return self.sha256, self.engine

    def __str__(self) -> str:
        ratio, low, high = self.speed_up
        return (
            f"{self.name} on {self.engine}: {self.p50_ms:.1f} ms, {ratio:.2f} times as fast ({low:.2f} to {high:.2f}), "
            f"mIoU {100 * self.mIoU:.2f} % ({signed(-self.drop)}): {self.verdict}"
        )


def signed(fraction: float) -> str:
    """A difference of two fractions in points: +0.12, -1.30, 0.00."""
    text = f"{100 * fraction:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def change(candidate: Candidate) -> str:
    """Change of the mIoU against the original in points, with its interval."""
    low, high = candidate.drop_interval
    return f"{signed(-candidate.drop)} ({signed(-high)} to {signed(-low)})"


def decide(candidate: Candidate, budget: Budget) -> tuple[str, list[str], list[str]]:
    """The verdict on a candidate.

    Returns:
        (PROMOTED or REJECTED, reasons, remarks): reasons give the grounds, remarks say how sure it is.
    """
    against, remarks = [], []
    points, (low, high) = 100 * candidate.drop, (100 * v for v in candidate.drop_interval)
    span = f"({low:.2f} to {high:.2f})"
    if not points <= budget.max_miou_drop:  # NaN is not a score
        against.append(f"loses {points:.2f} points of mIoU {span}, more than {budget.max_miou_drop:g}")
        if low <= budget.max_miou_drop:
            remarks.append("the interval of the loss reaches below the budget: scoring more photos might clear it")
    elif high > budget.max_miou_drop:
        remarks.append(f"the interval of the mIoU loss {span} exceeds the budget: score more photos to be sure")
    if not distinguishable(low, high, than=0):
        remarks.append("its mIoU is not distinguishable from the original's")
    ratio, slow, fast = candidate.speed_up
    span = f"({slow:.2f} to {fast:.2f})"
    slower = not ratio >= budget.min_speedup
    if budget.min_speedup > 1 and not distinguishable(slow, fast):
        against.append(f"{ratio:.2f} times as fast {span}: not distinguishable from the original's speed")
    elif slower:
        words = "slower than the original: " if fast < 1 else "only "
        close = abs(ratio - budget.min_speedup) < 0.01
        against.append(f"{words}{ratio:.{3 if close else 2}f} times as fast {span}, less than {budget.min_speedup:g}")
    elif slow < budget.min_speedup:
        remarks.append(f"the interval of the speed-up {span} reaches below {budget.min_speedup:g}: time it longer")
    limit, (least, most) = budget.latency_budget, candidate.p50_interval
    if limit is not None and not candidate.p50_ms <= limit:
        against.append(f"takes {candidate.p50_ms:.1f} ms ({least:.1f} to {most:.1f}), more than {limit:g}")
    elif limit is not None and most > limit:
        remarks.append(f"the interval of its time ({least:.1f} to {most:.1f} ms) exceeds {limit:g} ms")
    if candidate.facts.get("excluded"):
        remarks.append(f"left in float: {', '.join(candidate.facts['excluded'])}")
    if not candidate.steady:
        remarks.append("the machine was busy or throttling while it was timed: measure again")
    if too_slow(candidate, budget) and by_block(candidate.precision):
        against += why_slow(candidate.facts)
    if against:
        return REJECTED, against, remarks
    return PROMOTED, [f"{ratio:.2f} times as fast {span}, mIoU {change(candidate)} points"], remarks


def too_slow(candidate: Candidate, budget: Budget) -> bool:
    """Whether speed or latency rule a candidate out."""
    ratio, low, high = candidate.speed_up
    late = budget.latency_budget is not None and candidate.p50_ms > budget.latency_budget
    doubtful = budget.min_speedup > 1 and not distinguishable(low, high)
    return late or doubtful or not ratio >= budget.min_speedup


def loses_too_much(candidate: Candidate, budget: Budget) -> bool:
    """Whether the mIoU rules a candidate out."""
    return not 100 * candidate.drop <= budget.max_miou_drop


def why_slow(facts: Mapping[str, Any]) -> list[str]:
    """Sentences on what keeps an INT8 file from being fast."""
    out = []
    if facts.get("nodes"):
        out.append("nodes: " + ", ".join(f"{count} on {name}" for name, count in facts["nodes"].items()))
    if facts.get("unfused_pairs"):
        out.append(f"{facts['unfused_pairs']} quantise/dequantise pairs were left unfused: rounding that gains nothing")
    features = facts.get("cpu_features")
    if features is None:
        out.append("whether the processor has VNNI or AMX is unknown here")
    elif not (features.get("VNNI") or features.get("AMX-INT8")):
        out.append("the processor has neither VNNI nor AMX: INT8 products are no faster than float ones")
    elif not features.get("AMX-INT8"):
        out.append("the processor has VNNI but no AMX")
    if facts.get("top_operators"):
        out.append(
            "most of its time: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in facts["top_operators"])
        )
    return out


def variants_that_pay(candidates: Sequence[Candidate], engine: str) -> list[str]:
    """Graph variants that, alone on the FP32 file, made it faster on this engine beyond chance."""
    return [
        candidate.graph[0]
        for candidate in candidates
        if candidate.engine == engine
        and candidate.precision == "fp32"
        and len(candidate.graph) == 1
        and candidate.gain is not None
        and candidate.gain[1] > 1
    ]


def contenders(candidates: Sequence[Candidate], within: float = 1.1, most: int = 4) -> list[Candidate]:
    """The promoted candidates that may be the fastest, fastest first.

    Compared by their speed-ups: the machine may have been busier in one round than in another.
    """
    promoted = sorted((c for c in candidates if c.verdict == PROMOTED), key=lambda c: -c.speed_up[0])
    return [c for c in promoted if within * c.speed_up[2] >= promoted[0].speed_up[0]][:most]


def choose(finalists: Sequence[Candidate], times: Sequence[Sequence[float]]) -> tuple[Candidate, str]:
    """One winner of candidates timed in turns, compared round by round.

    It is the fastest; of those not distinguishable from it the one that loses least mIoU (to 0.01 points), then the
    smallest file.

    Args:
        finalists: Promoted candidates, at least one.
        times: Their times, ms, rounds in step.

    Returns:
        (winner, why it won).
    """
    order = sorted(range(len(finalists)), key=lambda i: -pairwise_ratio(times[0], times[i])[0])
    fastest = order[0]
    tied = [i for i in order if i == fastest or not distinguishable(*pairwise_ratio(times[i], times[fastest])[1:])]
    best = min(tied, key=lambda i: (round(100 * finalists[i].drop, 2), finalists[i].file_mib))

    def against(i: int) -> str:
        ratio, low, high = pairwise_ratio(times[best], times[i])
        name = f"{finalists[i].name} on {finalists[i].engine}"
        return f"{name} ({ratio:.2f} times as fast in turns, {low:.2f} to {high:.2f})"

    if len(tied) == 1:
        behind = "".join(f"; next: {against(i)}" for i in order[1:2])
        return finalists[best], f"the fastest promoted candidate{behind}"
    others = ", ".join(against(i) for i in tied if i != best)
    return finalists[best], f"not distinguishable in speed from {others}; it loses less mIoU or is the smaller file"
