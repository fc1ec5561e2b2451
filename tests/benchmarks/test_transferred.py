"""tools/what_was_transferred.py on a student that a real run wrote: its numbers, pictures, page, and refusals."""

import json
import re
import shlex
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.analysis import attention_stats, cka
from tinymim.analysis.health import activation_outliers, head_kl
from tinymim.analysis.probes import embed_blocks, knn_accuracy
from tinymim.analysis.sides import batches_of, choose_photos, read_crops
from tinymim.benchmarks import transferred as tool
from tinymim.benchmarks import transferred_measure as measures
from tinymim.benchmarks.transferred_page import markdown, pictures, slug
from tinymim.cli import main as tinymim
from tinymim.data.photos import Photos
from tinymim.distill import qkv_at
from tinymim.files import sha256_file
from tinymim.models import ViT, model_from_checkpoint, save_student

SIZE, SVG = 32, "{http://www.w3.org/2000/svg}"
MODES = ["RGB", "L", "P", "RGBA"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos of two classes (grey, palette, transparent, damaged), a teacher, a distilled student, the arguments."""
    root = tmp_path_factory.mktemp("transferred")
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for bright, name in enumerate(("day", "night")):
            folder = root / "classes" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 128, (5, 6, 3)).repeat(8 + i, 0).repeat(8, 1) + 60 * bright
                Image.fromarray(pixels.astype(np.uint8)).convert(MODES[i % 4]).save(folder / f"{i}.png")
    (root / "classes" / "val" / "day" / "broken.png").write_bytes(b"no picture")
    torch.manual_seed(1)
    save_student(ViT(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=8), root / "teacher.pth")
    teacher, student, run = (str(root / name) for name in ("teacher.pth", "run/student.pth", "run"))
    words = f"--img-size {SIZE} --batch-size 8 --epochs 2 --workers 0 --device cpu --cfg-options student_args.depth=2"
    words += " student_args.embed_dim=24 student_args.num_heads=2 target_block=2 align=image relation_heads=4"
    classes = str(root / "classes")
    line = ["distill", "--data", f"{classes}/train", "--teacher", teacher, "--out", run, "--probe-data", classes]
    assert tinymim([*line, *words.split()]) == 0
    save_student(ViT(img_size=SIZE, embed_dim=20, depth=3, num_heads=2, rel_pos_bias=True), root / "other.pth")
    arguments = ["--teacher", teacher, "--target-block", "2", "--photos", f"{classes}/val", "--batch-size", "4"]
    arguments += ["--students", f"relations, 2 epochs={student}", f"other={root}/other.pth", "random=tinymim_vit_tiny"]
    arguments += ["--runs", f"relations, 2 epochs={run}", "--img-size", str(SIZE), "--labelled-classes", classes]
    return root, arguments


@pytest.fixture(scope="module")
def page(made):
    root, arguments = made
    assert tool.main([*arguments, "--out", str(root / "page")]) == 0
    return root / "page", json.loads((root / "page" / "transferred.json").read_text("utf-8"))


def changed(arguments, option, *values):
    """The arguments with other values of an option."""
    at = arguments.index(option)
    after = next((i for i in range(at + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    return [*arguments[:at], option, *values, *arguments[after:]]


def views(root, side):
    """Whatever photos the tool chose, in any order and batches: normalised for the student or the teacher."""
    files = sorted((root / "classes" / "val").glob("*/?.png"))
    crops = Photos(files, img_size=SIZE, train=False)
    x = torch.stack([crops[(0, i)]["image"] for i in range(len(files))]).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (x - mean) / std
    return x if side == SIZE else torch.nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True)


def test_numbers_are_those_of_the_analysis(made, page):
    root, _ = made
    _, found = page
    teacher, _ = model_from_checkpoint(root / "teacher.pth", say=False)
    student, file = model_from_checkpoint(root / "run" / "student.pth", say=False)
    own, taught = views(root, SIZE), views(root, 16)  # grids of 2 x 2
    assert (sum(found["batches"]), found["teacher_size"], found["photos"]["files"]) == (8, 16, 9)  # one is damaged
    about = found["students"]["relations, 2 epochs"]
    assert found["batches"] == [4, 4]
    stats = attention_stats(student, own)
    assert np.array(about["distance"]) == pytest.approx(stats["distance"].numpy(), rel=1e-4)
    stats = attention_stats(teacher, taught)
    assert np.array(found["teacher"]["distance"]) == pytest.approx(2 * stats["distance"].numpy(), rel=1e-4)
    assert np.array(found["teacher"]["entropy"]) == pytest.approx(stats["entropy"].numpy(), rel=1e-4)
    s, t = qkv_at(student, own, 2), qkv_at(teacher, taught, 2)
    for relation, kl in head_kl(s, t, 8).items():
        assert about["kl"][relation] == pytest.approx(kl.tolist(), rel=1e-3)
    assert about["kl_block"] == file.meta["relations"][0] == 2
    outliers = activation_outliers(student, own)
    assert [seen["fc1"] for seen in about["outliers"]] == pytest.approx([x["fc1"].ratio for x in outliers], rel=1e-3)
    assert found["students"]["other"]["kl"] is None  # 20 channels and 8 heads


def test_cka_of_the_batches_that_were_used(made, page):
    root, _ = made
    run, target = {"a": str(root / "run" / "student.pth")}, str(root / "teacher.pth")
    teacher, sides = measures.open_sides(target, None, None, run, None, SIZE)
    pixels, _ = read_crops(choose_photos(str(root / "classes" / "val"), 200)[0], SIZE, "photos")
    pairs = [(sides["a"].view(x), teacher.view(x)) for x in batches_of(pixels, 4)]
    torch.testing.assert_close(pairs[0][1].mean((2, 3)), pairs[0][0].mean((2, 3)), atol=0.05, rtol=0)
    expected = cka(sides["a"].model, teacher.model, pairs)
    assert expected.min() < 0.98
    assert np.array(page[1]["students"]["relations, 2 epochs"]["cka"]) == pytest.approx(expected.numpy(), abs=1e-5)


def test_knn_by_block_and_epoch(made, page):
    root, _ = made
    _, found = page
    student, _ = model_from_checkpoint(root / "run" / "student.pth", say=False)
    files = sorted((root / "classes" / "train").glob("*/?.png"))
    crops = Photos(files, img_size=SIZE, train=False)
    x = torch.stack([crops[(0, i)]["image"] for i in range(16)]).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    train, val = embed_blocks(student, [(x - mean) / std]), embed_blocks(student, [views(root, SIZE)])
    labels = torch.arange(2).repeat_interleave(8), torch.arange(2).repeat_interleave(4)
    for feature in ("class token", "patches"):
        top1 = [knn_accuracy(train[feature][i], labels[0], val[feature][i], labels[1]) for i in range(2)]
        assert found["students"]["relations, 2 epochs"]["knn"][feature] == top1
    assert [found["labelled"][part]["used"] for part in ("train", "val")] == [16, 8]
    logged = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    points = [[line["step"] / 2, line["knn_top1"]] for line in logged if "knn_top1" in line]  # 16 photos, 8 a step
    assert found["knn_epochs"] == {"relations, 2 epochs": points}
    assert [x for x, _ in points] == [0, 1, 2]


def test_pictures_and_page(made, page):
    root, _ = made
    folder, found = page
    text = (folder / "transferred.md").read_text("utf-8")
    links = re.findall(r"!\[[\w -]+\]\(([\w.]+)\)", text)
    assert sorted(links) == sorted(path.name for path in folder.glob("*.svg"))
    assert len(links) == 2 + 3 * 3
    for link in links:
        svg = ET.parse(folder / link).getroot()
        wide, high = (float(svg.get(key)) for key in ("width", "height"))
        for at in svg.iter(f"{SVG}circle"):
            assert 0 <= float(at.get("cx")) <= wide
            assert 0 <= float(at.get("cy")) <= high
    cells = list(ET.parse(folder / "relations_2_epochs_cka.svg").getroot().iter(f"{SVG}rect"))
    assert len(cells) == 2 * 3 + 1
    assert f"| {sha256_file(root / 'teacher.pth')} |" in text
    assert f"| {sha256_file(root / 'run' / 'student.pth')} |" in text
    assert f"| {sha256_file(root / 'run' / 'metrics.jsonl')} |" in text
    assert found["environment"]["cpu"] in text
    assert f"torch {found['environment']['versions']['torch']}" in text
    assert str(root) not in text  # no home folder travels
    assert "| relations, 2 epochs, block 1 |" in text  # of the last block only q, k, v are trained
    assert {path.suffix for path in folder.iterdir()} == {".svg", ".json", ".md"}


def test_what_is_typed_next(made, page, capsys, tmp_path):
    """Without labelled photos, and with nothing but random weights."""
    _, arguments = made
    short = [*arguments[: arguments.index("--runs")], "--img-size", str(SIZE), "--out", str(tmp_path / "a")]
    assert tool.main(short) == 0
    line = re.search(r"^next: (.+)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert re.fullmatch(r"tinymim segment \S+ --data-root FOLDER --student \S+\.pth --work-dir runs/seg.*", line)
    assert "k-NN" not in (tmp_path / "a" / "transferred.md").read_text("utf-8").split("## How")[0]
    assert tool.main(changed(short, "--students", "random=tinymim_vit_tiny")) == 0
    line = re.search(r"^next: (.+)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert shlex.split(line)[:3] == ["tinymim", "distill", "--teacher"]


@pytest.mark.parametrize(
    ("option", "values", "words"),
    [
        ("--students", ["student.pth"], "--students student.pth"),
        ("--students", ["a=", "b=x"], "--students a="),
        ("--students", ["x" * 40 + "=y"], "a name has 1 to 32 characters"),
        ("--students", ["A b=tinymim_vit_tiny", "a-b=tinymim_vit_tiny"], "two of --students are called a-b"),
        ("--students", ["a=missing.pth"], "missing.pth"),
        ("--students", ["a=tinymim_vit_tiny", "b={root}/teacher.pth"], "students of other grids"),
        ("--runs", ["else={root}/run"], "no student has this name"),
        ("--runs", ["other={root}/classes"], "no metrics.jsonl"),
        ("--target-block", ["4"], "the teacher has 3 blocks"),
        ("--photos", ["{root}/nowhere"], "nowhere"),
        ("--photos", ["{root}/classes/val/day/{{0,1}}.png"], "2 photos can be read"),
        ("--batch-size", ["3"], "--batch-size 4 or more"),
        ("--img-size", ["40"], "--img-size 48"),
        ("--labelled-classes", ["{root}/run"], "run"),
        ("--teacher", ["timm/resnet18"], "resnet18 is a ResNet"),
        ("--teacher", ["{root}/page/none.pth"], "none.pth"),
    ],
)
def test_what_is_refused_leaves_nothing(made, capsys, tmp_path, option, values, words):
    root, arguments = made
    given = changed(arguments, option, *(value.format(root=root) for value in values))
    if option == "--students":
        given = [*given[: given.index("--runs")], "--img-size", str(SIZE)]
    assert tool.main([*given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "fix:" in said
    assert not (tmp_path / "out").exists()


def invented(names, blocks, teacher_blocks):
    """Results of many models and blocks, without measuring."""

    def side(depth, **more):
        rows = [[1.0 + i, 2.0] for i in range(depth)]
        return dict(
            blocks=depth,
            width=8,
            heads=2,
            patch=16,
            trained_blocks=depth,
            sha256="0" * 64,
            distance=rows,
            entropy=rows,
            knn={},
            **{"from": "<b>a|b</b>.pth", **more},
        )

    cells = [[None if i == j else (i + j) / 40 for j in range(teacher_blocks)] for i in range(blocks)]
    more = dict(cka=cells, kl=None, kl_block=blocks, outliers=[{"qkv": None, "fc1": 3.0}] * blocks)
    return {
        "target_block": 12,
        "img_size": 64,
        "teacher_size": 56,
        "batches": [4],
        "photos": {"pattern": "<i>*", "files": 4, "list_sha256": "1" * 64},
        "labelled": None,
        "teacher": side(teacher_blocks),
        "students": {name: side(blocks, **more) for name in names},
        "outlier_limit": 20.0,
        "knn_epochs": {name: [(0.0, 0.1)] for name in names},
        "metrics": {},
        "command": "python tools/what_was_transferred.py",
        "environment": {"cpu": "c", "cores": 1, "platform": "p", "versions": {"python": "3"}},
    }


def test_many_students_deep_teachers_and_hostile_names():
    """More lines than colours, cells too narrow for numbers, values that are not there, a run of one point."""
    names = ["<script>&", *(f"student {i} with a long name" for i in range(9))]
    found = invented(names, 12, 24)
    drawn = pictures(found)
    assert len(drawn) == 10 * 3 + 1
    for text in drawn.values():
        svg = ET.fromstring(text)
        for label in svg.iter(f"{SVG}text"):
            assert 0 <= float(label.get("x")) <= float(svg.get("width"))
            assert 0 <= float(label.get("y")) <= float(svg.get("height"))
    assert {slug(name) for name in names} == {name.removesuffix("_cka.svg") for name in drawn if "_cka" in name}
    assert "stroke-dasharray:5 4" in drawn["knn_epochs.svg"]
    text = markdown(found)
    assert "<script>" not in text
    assert "<b>" not in text
    assert "inf times" in text
    assert "(block 11)" in text  # the best of the target block's column, where block 12 has none
