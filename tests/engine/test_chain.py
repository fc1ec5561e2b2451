"""Chains: every hop from the last one's student, in the head grouping it learned; resumed anywhere; one report."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.cli import main
from tinymim.distill import relation_losses
from tinymim.engine import distill, distill_chain, pretrain
from tinymim.engine.build import build_method
from tinymim.engine.chain import parse_chain
from tinymim.engine.recipe import load_recipe
from tinymim.errors import ConfigError
from tinymim.models import ViT, save_student

HOPS = [
    {"student_args": dict(depth=2, embed_dim=48, num_heads=2)},
    {"student_args": dict(depth=2, embed_dim=32, num_heads=2)},
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(16):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8))
        coarse.resize((60, 50), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """8 heads where the students have 2: the wrong grouping would show."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    save_student(ViT(img_size=32, embed_dim=64, depth=3, num_heads=8), path)
    return path


def options(photos, teacher, **more):
    return (
        dict(
            chain=f"{teacher}:small:tiny",
            data=photos,
            img_size=32,
            batch_size=8,
            epochs=3,
            workers=0,
            device="cpu",
            cfg_options={"hops": HOPS, "watch_every": 0},
        )
        | more
    )


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_each_student_teaches_in_the_grouping_it_learned(photos, teacher, tmp_path, capsys):
    """The second hop compares 8 heads, not the first student's own 2; the file says so to any later run."""
    result = distill_chain(**options(photos, teacher, out=tmp_path / "chain"))
    said = capsys.readouterr().out
    assert "relations of 8 heads (of its blocks), 8 channels each, student 6" in said
    assert "relations of 8 heads (of its own relations), 6 channels each, student 4" in said
    assert [hop.relations for hop in result.hops] == [(2, 8), (2, 8)]
    assert result.student == tmp_path / "chain/2_tiny/student.pth"
    told = json.loads((tmp_path / "chain/chain.json").read_text())
    assert [hop["teacher"] for hop in told["hops"]] == [str(teacher), str(tmp_path / "chain/1_small/student.pth")]

    middle = str(tmp_path / "chain/1_small/student.pth")
    config = load_recipe("tinymim_tiny_from_mae_base", {"teacher": middle, "img_size": 32} | HOPS[1])
    method, _ = build_method(config)
    assert method.relation_heads == 8
    images = torch.randn(2, 3, 32, 32)
    method.eval()
    from tinymim.distill import read

    taps = {side: read(getattr(method, side), images, {2: ("q", "k", "v")})[2] for side in ("student", "teacher")}
    expected = relation_losses(taps["student"], taps["teacher"], 8, ("qk", "vv"), True)
    assert method.losses(images, images)["qk"].item() == pytest.approx(expected["qk"].item(), rel=1e-5)
    config.target_block = 1  # elsewhere its blocks have their own heads
    assert build_method(config)[0].relation_heads == 2
    config.target_block, config.relation_heads = None, 4
    assert build_method(config)[0].relation_heads == 4


@pytest.mark.parametrize("at", [(1, 3), (2, 4)], ids=["first hop", "second hop"])
def test_interrupted_in_the_middle_of_a_hop(photos, teacher, tmp_path, monkeypatch, at):
    from tinymim.engine.loop import StepLoop

    whole = distill_chain(**options(photos, teacher, out=tmp_path / "whole"))
    original = StepLoop.run_iter

    def interrupt(self, batch):
        original(self, batch)
        hop = len([p for p in (tmp_path / "cut").iterdir() if p.is_dir()])
        if (hop, self.iter) == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepLoop, "run_iter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill_chain(**options(photos, teacher, out=tmp_path / "cut"))
    monkeypatch.setattr(StepLoop, "run_iter", original)
    with pytest.raises(ConfigError, match="already holds a run"):
        distill_chain(**options(photos, teacher, out=tmp_path / "cut"))
    with pytest.raises(ConfigError, match="holds the chain"):
        distill_chain(**options(photos, teacher, out=tmp_path / "cut", chain=f"{teacher}:tiny:tiny", resume=True))
    result = distill_chain(**options(photos, teacher, out=tmp_path / "cut", resume=True))
    for name in ("1_small", "2_tiny"):
        assert losses(tmp_path / "cut" / name) == losses(whole.out / name)
    a, b = (torch.load(r.student, weights_only=True)["model"] for r in (whole, result))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_options_of_the_first_teacher_alone(photos, tmp_path, capsys):
    """A file that does not tell its heads, and a block that only it has; the students are read where they learned."""
    torch.manual_seed(0)
    model = ViT(img_size=32, embed_dim=64, depth=4, num_heads=8)
    torch.save({"model": model.state_dict()}, tmp_path / "foreign.pth")
    more = options(
        photos,
        tmp_path / "foreign.pth",
        teacher_heads=8,
        cfg_options={"hops": HOPS, "watch_every": 0, "target_block": 3, "targets": ["qk+vv:1"]},
    )
    result = distill_chain(**more, out=tmp_path / "chain")
    assert [hop.relations for hop in result.hops] == [(1, 8), (1, 8)]
    said = capsys.readouterr().out
    assert "foreign.pth, block 3: relations of 8 heads (of its blocks)" in said
    assert "student.pth, block 1: relations of 8 heads (of its own relations)" in said
    (tmp_path / "chain/2_tiny/checkpoints/step_00000006.pth").unlink()
    told = json.loads((tmp_path / "chain/chain.json").read_text())
    (tmp_path / "chain/chain.json").write_text(json.dumps({**told, "hops": told["hops"][:1]}))
    again = distill_chain(**more, out=os.path.relpath(tmp_path / "chain"), resume=True)  # another spelling
    state = torch.load(tmp_path / "chain/2_tiny/checkpoints/step_00000004.pth", weights_only=True)
    assert again.hops[1].seconds > state["seconds"] > 0  # what ran before the interruption counts


def test_a_later_hop_is_checked_before_the_first(photos, teacher, tmp_path):
    for change, words in (
        ({"targets": ["qk+vv@3"]}, "target block 3 does not exist in the teacher"),
        ({"teachers": [dict(teacher=str(teacher))]}, "teachers in addition to a chain"),
        ({"hops": [HOPS[0], HOPS[1] | {"target_block": 3}]}, "target block 3 does not exist in the teacher"),
    ):
        with pytest.raises(ConfigError, match=words):
            distill_chain(**options(photos, teacher, out=tmp_path / "x", cfg_options={"hops": HOPS} | change))
        assert not (tmp_path / "x").exists()


def test_relations_of_several_blocks(photos, teacher, tmp_path):
    """A student that teaches: its own groups where it learned them, its heads elsewhere, and a choice for both."""
    first = distill_chain(
        **options(
            photos,
            teacher,
            out=tmp_path / "one",
            chain=f"{teacher}:small",
            cfg_options={"hops": HOPS[:1], "watch_every": 0},
        )
    )

    def heads(**more):
        config = load_recipe("tinymim_tiny_from_mae_base", {"teacher": str(first.student), "img_size": 32} | HOPS[1])
        config.update(more)
        method, _ = build_method(config)
        return [target.teacher_block for target in method.targets], method.relation_heads

    assert heads() == ([2], 8)
    assert heads(targets=["qk+vv@1"]) == ([1], 2)
    with pytest.raises(ConfigError, match="relations of the blocks 1, 2"):
        heads(targets=["qk@1", "qk@2"])
    assert heads(targets=["qk@1", "qk@2"], relation_heads=4) == ([1, 2], 4)


def test_words_and_bad_input(photos, teacher, tmp_path, capsys):
    assert parse_chain("mae_large:base:small:tiny") == (
        "timm/vit_large_patch16_224.mae",
        ["tinymim_vit_base", "tinymim_vit_small", "tinymim_vit_tiny"],
    )
    assert parse_chain("x/y.pth:tinymim_vit_tiny") == ("x/y.pth", ["tinymim_vit_tiny"])
    for text, words in (
        ("mae_large", "no student"),
        ("mae_large:big", "unknown student 'big'"),
        (":tiny", "no student"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_chain(text)
    with pytest.raises(ConfigError, match="1 hops for 2 students"):
        distill_chain(**options(photos, teacher, out=tmp_path / "x", cfg_options={"hops": HOPS[:1]}))
    assert main(["distill", "--chain", "mae_large:tiny", "--teacher", "x.pth", "--data", str(photos)]) == 2
    assert "does not go with a chain" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no chain to resume"):
        distill_chain(**options(photos, teacher, out=tmp_path / "none", resume=True))


@pytest.mark.slow
def test_command_writes_one_report(photos, teacher, tmp_path):
    """A subprocess; dry run first, then two hops and the page of the chain."""
    recipe = tmp_path / "mine.py"
    base = load_recipe("tinymim_chain").filename
    recipe.write_text(f'_base_ = r"{base}"\nchain = r"{teacher}:small:tiny"\nhops = {HOPS!r}\n')
    words = [
        sys.executable,
        "-m",
        "tinymim",
        "distill",
        "--recipe",
        str(recipe),
        "--data",
        str(photos),
        "--img-size",
        "32",
        "--batch-size",
        "8",
        "--epochs",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    dry = subprocess.run([*words, "--dry-run"], capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("dry run:") == 2
    assert not (tmp_path / "run").exists()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run/report.html").read_text()
    assert "block 2, 8 heads" in page
    assert "1_small/report.html" in page
    assert (tmp_path / "run/2_tiny/report.html").is_file()
    assert "next:    tinymim finetune --student" in done.stdout


def test_several_teachers_at_once(photos, teacher, tmp_path):
    """The weighted sum of what each alone would give, the student run once; file and resume know all of them."""
    other = pretrain(
        "mae_tiny",
        data=photos,
        out=tmp_path / "mae",
        img_size=32,
        batch_size=8,
        epochs=1,
        workers=0,
        cfg_options={
            "student_args": dict(depth=2, embed_dim=48, num_heads=4),
            "watch_every": 0,
            "decoder": dict(dim=16, depth=1, heads=2),
        },
    )
    small = {"student_args": dict(depth=2, embed_dim=32, num_heads=2)}
    shared = dict(data=photos, img_size=32, batch_size=8, epochs=2, workers=0, device="cpu")
    result = distill(
        **shared,
        teacher=[str(teacher), f"{other.student}=0.5"],
        out=tmp_path / "two",
        cfg_options=small | {"targets": ["qk", "output"]},
    )
    assert set(result.losses) == {"t1_qk", "t1_output", "t2_qk", "t2_output", "loss"}
    records = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    for r in (r for r in records if "loss" in r):
        parts = r["t1_qk"] + r["t1_output"] + 0.5 * (r["t2_qk"] + r["t2_output"])
        assert r["loss"] == pytest.approx(parts, rel=1e-5)
    assert any(key.startswith("kl_t2_qk/head_04") for r in records for key in r)
    meta = torch.load(result.student, weights_only=True)["meta"]
    assert meta["teacher"] == "teacher.pth + student.pth"
    assert meta["relations"] is None  # 8 heads and 4
    again = distill(
        **shared,
        teacher=[str(teacher), f"{other.student}=0.5"],
        out=tmp_path / "two",
        resume=True,
        cfg_options=small | {"targets": ["qk", "output"]},
    )
    assert again.steps == result.steps

    config = load_recipe(
        "tinymim_tiny_from_mae_base",
        {
            "img_size": 32,
            "drop_path": 0.0,
            "teachers": [
                dict(teacher=str(teacher), targets=["vv"], target_block=2),
                dict(teacher=str(other.student), weight=2.0),
            ],
        }
        | small,
    )
    method, teachers = build_method(config)
    views = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    found = method.losses(*views)
    alone = [m.losses(views[0], view) for m, view in zip(method.methods, views[1:], strict=True)]
    assert set(found) == {"t1_vv", "t2_qk", "t2_vv", "loss"}
    assert found["loss"].item() == pytest.approx((alone[0]["loss"] + 2 * alone[1]["loss"]).item(), rel=1e-6)
    assert len(teachers) == 2


def test_bad_teachers(photos, teacher, tmp_path):
    shared = dict(data=photos, out=tmp_path / "x", img_size=32, batch_size=8, workers=0, device="cpu")
    for change, words in (
        (dict(teacher=[str(teacher), str(teacher)], teacher_weights=["a.pth"]), "2 teachers and 1 files"),
        (dict(teacher=[str(teacher), f"{teacher}=abc"]), "the weight 'abc'"),
        (dict(teacher=[str(teacher), f"{teacher}=-1"]), "the weight '-1'"),
        (dict(cfg_options={"teachers": [dict(teacher=str(teacher), wait=1)]}), "the keys of an entry are teacher"),
        (dict(cfg_options={"teachers": [dict(teacher=str(teacher), weight=0), dict(teacher=str(teacher))]}), "above 0"),
        (dict(cfg_options={"teacher": ""}), "no teacher"),
        (
            dict(teacher=str(teacher), cfg_options={"teachers": [dict(teacher=str(teacher))]}),
            "teachers are named twice",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            distill(**shared, overwrite=True, **change)
