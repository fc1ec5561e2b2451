"""Decisions on made measurements: every limit from both sides, doubt that is said, ties, the choice of one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymim_export.tune.verdict import (
    BASELINE,
    PROMOTED,
    REJECTED,
    Budget,
    Candidate,
    choose,
    contenders,
    decide,
    loses_too_much,
    signed,
    too_slow,
    variants_that_pay,
    why_slow,
)

MODERN = {"AVX2": True, "AVX512": True, "VNNI": True, "AVX512-BF16": True, "AMX-INT8": True, "AMX-BF16": True}


def candidate(**changes):
    values = dict(
        name="int8",
        precision="int8",
        graph=[],
        runtime="onnxruntime",
        provider="cpu",
        arithmetic=None,
        engine="onnxruntime cpu",
        file="int8.onnx",
        sha256="a" * 64,
        file_mib=8.0,
        shape=(1, 3, 64, 96),
        threads=1,
        runs=30,
        p50_ms=50.0,
        p50_interval=(49.0, 51.0),
        p90_ms=55.0,
        original_ms=100.0,
        speed_up=(2.0, 1.9, 2.1),
        steady=True,
        mIoU=0.60,
        mIoU_interval=(0.55, 0.65),
        drop=0.001,
        drop_interval=(0.0005, 0.0015),
    )
    return Candidate(**(values | changes))


def test_a_clear_case_is_promoted_without_remarks():
    verdict, reasons, remarks = decide(candidate(), Budget(0.5, 1.2))
    assert verdict == PROMOTED
    assert reasons == ["2.00 times as fast (1.90 to 2.10), mIoU -0.10 (-0.15 to -0.05) points"]
    assert not remarks


@pytest.mark.parametrize(
    ("changes", "budget", "words"),
    [
        (
            dict(drop=0.008, drop_interval=(0.006, 0.01)),
            Budget(),
            "loses 0.80 points of mIoU (0.60 to 1.00), more than 0.5",
        ),
        (dict(speed_up=(1.1, 1.05, 1.15)), Budget(), "only 1.10 times as fast (1.05 to 1.15), less than 1.2"),
        (dict(speed_up=(1.196, 1.1, 1.3)), Budget(), "only 1.196 times as fast"),
        (dict(speed_up=(0.8, 0.7, 0.9)), Budget(), "slower than the original: 0.80 times as fast"),
        (dict(speed_up=(1.3, 0.9, 1.7)), Budget(), "not distinguishable from the original's speed"),
        (dict(), Budget(latency_budget=40), "takes 50.0 ms (49.0 to 51.0), more than 40"),
        (dict(drop=float("nan"), drop_interval=(float("nan"),) * 2), Budget(), "loses nan points"),
    ],
)
def test_each_limit_rejects(changes, budget, words):
    verdict, reasons, _ = decide(candidate(**changes), budget)
    assert verdict == REJECTED
    assert words in reasons[0]


@pytest.mark.parametrize(
    ("changes", "budget", "words"),
    [
        (dict(drop=0.004, drop_interval=(0.002, 0.006)), Budget(), "exceeds the budget: score more photos"),
        (dict(drop_interval=(-0.001, 0.003)), Budget(), "mIoU is not distinguishable from the original's"),
        (dict(speed_up=(1.3, 1.1, 1.5)), Budget(), "reaches below 1.2: time it longer"),
        (dict(), Budget(latency_budget=50.5), "exceeds 50.5 ms"),
        (dict(steady=False), Budget(), "busy or throttling"),
        (dict(facts={"excluded": ["block 3", "head"]}), Budget(), "left in float: block 3, head"),
        (dict(speed_up=(1.0, 0.9, 1.1)), Budget(min_speedup=1.0), "reaches below 1"),
    ],
)
def test_doubt_is_said_and_does_not_decide(changes, budget, words):
    verdict, _, remarks = decide(candidate(**changes), budget)
    assert verdict == PROMOTED
    assert any(words in text for text in remarks)


def test_a_rejected_loss_within_its_interval_says_so():
    verdict, _, remarks = decide(candidate(drop=0.006, drop_interval=(0.004, 0.008)), Budget())
    assert verdict == REJECTED
    assert any("more photos might clear it" in text for text in remarks)


def test_every_reason_is_named():
    worst = candidate(drop=0.1, drop_interval=(0.09, 0.11), speed_up=(0.5, 0.4, 0.6))
    _, reasons, _ = decide(worst, Budget(latency_budget=1))
    assert [any(word in text for text in reasons) for word in ("loses", "slower", "takes")] == [True] * 3


def test_slow_int8_is_explained():
    facts = {
        "nodes": {"CPUExecutionProvider": 400},
        "unfused_pairs": 5,
        "cpu_features": MODERN | {"AMX-INT8": False},
        "top_operators": [["QLinearMatMul", 0.37], ["Softmax", 0.22]],
    }
    slow = candidate(speed_up=(0.9, 0.8, 0.95), facts=facts)
    _, reasons, _ = decide(slow, Budget())
    assert reasons[1:] == [
        "nodes: 400 on CPUExecutionProvider",
        "5 quantise/dequantise pairs were left unfused: rounding that gains nothing",
        "the processor has VNNI but no AMX",
        "most of its time: QLinearMatMul 37 %, Softmax 22 %",
    ]
    assert len(decide(candidate(precision="fp32", speed_up=(0.9, 0.8, 0.95), facts=facts), Budget())[1]) == 1
    none = why_slow({"cpu_features": dict.fromkeys(MODERN, False)})
    assert none == ["the processor has neither VNNI nor AMX: INT8 products are no faster than float ones"]
    assert why_slow({"cpu_features": None}) == ["whether the processor has VNNI or AMX is unknown here"]
    assert not why_slow({"cpu_features": MODERN})


@given(
    st.floats(-0.05, 0.05),
    st.floats(0.5, 3),
    st.floats(0, 0.3),
    st.floats(0, 2),
    st.floats(0.5, 2),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_looser_budget_never_rejects_what_a_tighter_one_promotes(drop, ratio, width, points, speed, more, less):
    measured = candidate(
        drop=drop,
        drop_interval=(drop - 0.001, drop + 0.001),
        speed_up=(ratio, ratio * (1 - width), ratio * (1 + width)),
    )
    tight, loose = Budget(points, speed), Budget(points + more, speed * (1 - less))
    if decide(measured, tight)[0] == PROMOTED:
        assert decide(measured, loose)[0] == PROMOTED
    assert (decide(measured, tight)[0] == REJECTED) == (loses_too_much(measured, tight) or too_slow(measured, tight))


def test_graph_variants_are_kept_where_they_pay():
    def row(graph, gain, **more):
        return candidate(precision="fp32", graph=graph, gain=gain, **more)

    rows = [
        row([], None),
        row(["attention"], (1.2, 1.1, 1.3)),
        row(["pixels"], (1.01, 0.99, 1.03)),
        row(["attention", "pixels"], (1.2, 1.1, 1.3)),
        row(["attention"], (0.9, 0.8, 0.95), engine="openvino cpu f32"),
        row(["pixels"], (1.1, 1.05, 1.15), engine="openvino cpu f32"),
    ]
    assert variants_that_pay(rows, "onnxruntime cpu") == ["attention"]
    assert variants_that_pay(rows, "openvino cpu f32") == ["pixels"]


def test_contenders_are_the_promoted_near_the_fastest():
    def row(ratio, verdict=PROMOTED, **more):
        return candidate(speed_up=(ratio, ratio - 0.1, ratio + 0.1), verdict=verdict, **more)

    busy = row(2.9, p50_ms=500)  # its round was slower, not the file
    rows = [row(9, BASELINE), row(8, REJECTED), row(1.5), row(3), busy, row(2.7), row(2.6)]
    assert [c.speed_up[0] for c in contenders(rows)] == [3, 2.9, 2.7]
    assert not contenders(rows[:2])
    assert len(contenders([row(3 + i / 100) for i in range(8)])) == 4


def test_the_winner_is_chosen_round_by_round():
    """Its median over all rounds may be larger, where the machine was slow in other rounds of the other."""
    first, second = [10.0, 10, 10, 30, 30] * 8, [9.5, 9.5, 31, 29, 29] * 8
    assert np.median(second) > np.median(first)
    winner, why = choose([candidate(name="a", drop=0.002), candidate(name="b", drop=0.002)], [first, second])
    assert winner.name == "b"
    assert "a on onnxruntime cpu (0.9" in why


def test_one_winner():
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.2, (3, 40))
    fast, slow = (10 + noise[0]).tolist(), (14 + noise[1]).tolist()
    twin = (10 + noise[2]).tolist()
    a, b = candidate(name="a", drop=0.002), candidate(name="b", drop=0.001)
    winner, why = choose([a, b], [fast, slow])
    assert winner is a
    assert "fastest" in why
    winner, why = choose([a, b], [fast, twin])  # as fast as each other: the one that loses less
    assert winner is b
    assert "not distinguishable in speed from a on onnxruntime cpu" in why
    small = candidate(name="small", drop=0.00204, file_mib=2.0)  # the same loss to 0.01 points
    assert choose([a, small], [fast, twin])[0] is small
    assert choose([a], [[10.0]])[0] is a


def test_points_read_well():
    assert [signed(v) for v in (0.0012, -0.0130, 0.00001, -0.00001)] == ["+0.12", "-1.30", "0.00", "0.00"]
