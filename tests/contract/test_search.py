"""The search: steps, the log that a stopped search goes on with, latency, refusals; with a score that costs nothing."""

import json
import math

import pytest
import torch

from tinymim.contract.limits import Limits
from tinymim.contract.search import Contraction
from tinymim.errors import CheckFailed, CheckpointError, ConfigError, DataError
from tinymim.files import sha256_file
from tinymim.models import ViT, model_from_checkpoint

LIMITS = Limits(params=6e4, macs=3e5)


@pytest.fixture
def start():
    torch.manual_seed(0)
    return ViT(img_size=32, embed_dim=48, depth=4, num_heads=3)


class Scored:
    """Prefers depth to width; counts its calls; may be interrupted at one of them."""

    def __init__(self, stop=None, **values):
        self.calls, self.stop, self.values = [], stop, values

    def __call__(self, candidate):
        self.calls.append((candidate.step, candidate.factor))
        assert candidate.student.is_file()
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        if candidate.factor in self.values:
            value = self.values[candidate.factor]
            if isinstance(value, Exception):
                raise value
            return value
        return candidate.config["depth"] + candidate.config["embed_dim"] / 1000


def log(out):
    rows = [json.loads(line) for line in (out / "candidates.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_steps_lead_to_the_limits(start, tmp_path, capsys):
    search = Contraction(start, LIMITS, out=tmp_path / "out", score=Scored())
    result = search.run()
    assert not LIMITS.over(result.chosen[-1]["params"], result.chosen[-1]["macs"])
    way = [sum(LIMITS.over(row["params"], row["macs"]).values()) for row in result.chosen]
    assert way == sorted(way, reverse=True)
    assert way[-1] == 0
    assert len(way) > 2
    share = -2 * math.log(0.8)
    for at, (before, row) in enumerate(zip(way, result.chosen[1:], strict=False)):
        same = [each for each in result.rows if each["step"] == row["step"]]
        assert row["score"] == max(each["score"] for each in same)
        after = [sum(LIMITS.over(each["params"], each["macs"]).values()) for each in same]
        assert max(after) < before
        assert at or max(after) <= before - share  # the first step's is not halved: all four factors can do it
    model, file = model_from_checkpoint(result.student, say=False)
    assert sum(p.numel() for p in model.parameters()) == result.chosen[-1]["params"]
    assert file.meta["contracted"] == [row["change"] for row in result.chosen[1:]]
    kept = {path.name for path in (tmp_path / "out/candidates").iterdir()}
    assert kept == {f"{row['step']:02d}-{row['factor']}" for row in result.chosen}
    said = json.loads((tmp_path / "out/result.json").read_text("utf-8"))
    assert said["student_sha256"] == sha256_file(result.student)
    assert said["chosen"] == result.chosen
    assert f"step 1: {result.chosen[1]['change']} is the best of" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [1, 6])
def test_a_stopped_search_goes_on(start, tmp_path, stop):
    whole = Contraction(start, LIMITS, out=tmp_path / "whole", score=Scored())
    whole.run()
    stopped = Scored(stop)
    with pytest.raises(KeyboardInterrupt):
        Contraction(start, LIMITS, out=tmp_path / "out", score=stopped).run()
    again = Scored()
    result = Contraction(start, LIMITS, out=tmp_path / "out", score=again).run()
    assert log(tmp_path / "out") == log(tmp_path / "whole")
    assert len(again.calls) == len(whole.score.calls) - (stop - 1)
    assert sha256_file(result.student) == sha256_file(tmp_path / "whole/student.pth")
    idle = Scored()
    assert Contraction(start, LIMITS, out=tmp_path / "out", score=idle).run().chosen == result.chosen
    assert not idle.calls


def test_another_search_is_refused(start, tmp_path):
    Contraction(start, Limits(params=9e4), out=tmp_path / "out", score=Scored()).run()
    with pytest.raises(ConfigError, match="holds another search"):
        Contraction(start, Limits(params=8e4), out=tmp_path / "out", score=Scored()).run()
    with pytest.raises(ConfigError, match="holds another search"):
        Contraction(start, Limits(params=9e4), out=tmp_path / "out", score=Scored(), settings={"steps": 1}).run()


def test_a_changed_file_or_log_is_refused(start, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        Contraction(start, LIMITS, out=out, score=Scored(stop=3)).run()
    file = out / "candidates/00-start/student.pth"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="not the file that was scored"):
        Contraction(start, LIMITS, out=out, score=Scored()).run()
    file.write_bytes(content)
    lines = (out / "candidates.jsonl").read_text("utf-8")
    (out / "candidates.jsonl").write_text(lines[:-20], "utf-8")
    with pytest.raises(DataError, match="line 2"):
        Contraction(start, LIMITS, out=out, score=Scored()).run()


def test_a_start_that_cannot_be_scored_leaves_the_folder_free(start, tmp_path):
    wrong = ConfigError("no such teacher", "it is not there", "give another")
    with pytest.raises(ConfigError, match="no such teacher"):
        Contraction(start, LIMITS, out=tmp_path / "out", score=Scored(start=wrong)).run()
    Contraction(start, LIMITS, out=tmp_path / "out", score=Scored(), settings={"teacher": "other"}).run()


def test_candidates_without_a_score_are_not_chosen(start, tmp_path):
    wrong = ConfigError("36 channels", "12 heads do not fit", "choose")
    values = {"N": math.nan, "D": wrong, "E": 1.0}
    result = Contraction(start, Limits(params=9e4), out=tmp_path / "a", score=Scored(**values)).run()
    why = {row["factor"]: row["why"] for row in result.rows if row["step"] == 1}
    assert why["N"] == "its score is nan"
    assert why["D"] == "36 channels: 12 heads do not fit"
    assert why["E"] is None
    assert result.chosen[1]["factor"] in {"E", "M"}
    bad = Scored(**dict.fromkeys("NDEM", math.nan))
    with pytest.raises(CheckFailed, match="could be chosen") as error:
        Contraction(start, Limits(params=9e4), out=tmp_path / "b", score=bad).run()
    assert "its score is nan" in error.value.why


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(), "no limits"),
        (Limits(params=1e9), "nothing to do"),
        (Limits(params=1e9, macs=1e12), "nothing to do"),
        (Limits(params=10), "no model of this kind keeps 1e-05 M parameters"),
    ],
)
def test_limits_that_make_no_search_are_refused(start, tmp_path, limits, message):
    with pytest.raises(ConfigError, match=message):
        Contraction(start, limits, out=tmp_path / "out", score=Scored())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [dict(shrink=0), dict(shrink=1.5), dict(parallel=0)])
def test_options_out_of_range_are_refused(start, tmp_path, words):
    with pytest.raises(ConfigError, match=f"--{min(words)}"):
        Contraction(start, LIMITS, out=tmp_path / "out", score=Scored(), **words)


def by_width(file):
    """A latency that only width and depth change, and that is longer with fewer heads."""
    config = model_from_checkpoint(file, say=False)[0].config
    return config["embed_dim"] * config["depth"] / 10 / config["num_heads"] ** 0.1


def test_latency_is_a_limit(start, tmp_path):
    limits = Limits(latency_ms=9.0)
    result = Contraction(start, limits, out=tmp_path / "out", score=Scored(), latency=by_width).run()
    assert result.chosen[-1]["latency_ms"] == by_width(result.student) <= 9.0
    slow = [row for row in result.rows if row["factor"] == "M"]  # an MLP changes nothing here
    assert slow
    assert all(row["score"] is None and "no nearer" in row["why"] for row in slow)
    with pytest.raises(ConfigError, match="nothing to do"):
        Contraction(start, Limits(latency_ms=900), out=tmp_path / "b", score=Scored(), latency=by_width).run()
    score = Scored()
    with pytest.raises(ConfigError, match=r"no model of this kind takes 0\.1 ms"):
        Contraction(start, Limits(latency_ms=0.1), out=tmp_path / "c", score=score, latency=by_width).run()
    assert not score.calls
    assert not (tmp_path / "c").exists()


def test_a_candidate_that_cannot_be_measured_is_not_chosen(start, tmp_path):
    def measured(file):
        config = model_from_checkpoint(file, say=False)[0].config
        if config["num_heads"] < 3:  # the smallest model, too
            raise CheckFailed("INT8 differs", "too much", "use fp32")
        return by_width(file)

    result = Contraction(
        start, Limits(latency_ms=12.0), out=tmp_path / "out", score=Scored(), latency=measured, shrink=0.1
    ).run()
    refused = [row for row in result.rows if row["why"] == "INT8 differs: too much"]
    assert refused
    assert {row["factor"] for row in refused} == {"D"}
    with pytest.raises(CheckFailed, match="INT8 differs"):
        Contraction(
            ViT(img_size=32, embed_dim=32, depth=2, num_heads=2),
            Limits(latency_ms=1.0),
            out=tmp_path / "b",
            score=Scored(),
            latency=measured,
        ).run()


@pytest.mark.slow
def test_candidates_in_parallel_give_the_same_search(start, tmp_path):
    one = Contraction(start, LIMITS, out=tmp_path / "one", score=depth_first).run()
    two = Contraction(start, LIMITS, out=tmp_path / "two", score=depth_first, parallel=2).run()
    assert log(tmp_path / "one") == log(tmp_path / "two")
    assert one.chosen[-1]["config"] == two.chosen[-1]["config"]


def depth_first(candidate):
    return candidate.config["depth"] + candidate.config["embed_dim"] / 1000
