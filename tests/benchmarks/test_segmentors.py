"""tools/compare_segmentors.py: one table of models of one budget; finished stages are kept, others refused."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.export.foreign import SMALL
from tinymim.benchmarks import segmentors as tool
from tinymim.benchmarks.segmentors_pictures import SIDE, THUMB
from tinymim.benchmarks.segmentors_table import unpack
from tinymim.demo.scenes import write_scenes
from tinymim.errors import ConfigError, DataError
from tinymim.files import sha256_file

OURS = {
    "model.backbone.embed_dim": 24,
    "model.backbone.num_heads": 2,
    "model.backbone.depth": 4,
    "model.backbone.out_indices": (0, 1, 2, 3),
    "model.decode_head.in_channels": [24] * 4,
    "model.decode_head.channels": 8,
    "model.auxiliary_head.in_channels": 24,
    "model.auxiliary_head.channels": 8,
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Ours and DeepLabV3+, both tiny, given as files; trained, exported, scored and timed."""
    from tinymim.models import ViT, save_student
    from tinymim.seg.config import config_text, find_config, merge_options

    folder = tmp_path_factory.mktemp("compare")
    data = write_scenes(folder / "scenes", train=6, val=3, size=(96, 80), seed=3)
    for name, options in (
        ("upernet_tinymim_t_64_camvid", OURS),
        ("deeplabv3plus_r18_camvid", SMALL["deeplabv3plus_r18_camvid"]),
    ):
        cfg = find_config(name)
        merge_options(cfg, options)
        (folder / f"{name}.py").write_text(config_text(cfg))
    save_student(ViT(img_size=32, embed_dim=24, depth=4, num_heads=2), folder / "student.pth")
    arguments = [
        "--data-root",
        data,
        "--out",
        folder / "out",
        "--steps",
        2,
        "--batch-size",
        2,
        "--size",
        64,
        64,
        "--crop",
        48,
        48,
        "--workers",
        0,
        "--threads",
        1,
        "--seconds",
        0.1,
        "--student",
        folder / "student.pth",
        "--models",
        *sorted(folder.glob("*_camvid.py")),
    ]
    arguments = [str(value) for value in arguments]
    assert tool.main(arguments) == 0
    return folder / "out", arguments


@pytest.mark.slow
def test_the_table_joins_training_export_score_and_timing(compared):
    out, _ = compared
    results = json.loads((out / "compare.json").read_text())
    assert results["kind"] == "tinymim.compare"
    assert set(results["models"]) == {"upernet_tinymim_t_64_camvid", "deeplabv3plus_r18_camvid"}
    timed = {row["sha256"] for row in results["measure"]["rows"]}
    for name, seeds in results["models"].items():
        stages = seeds["0"]
        assert stages["export"]["sha256"] == stages["score"]["sha256"]
        assert stages["export"]["sha256"] in timed
        assert stages["score"]["mIoU"] == pytest.approx(stages["train"]["miou"], abs=1e-4)
        assert (stages["train"]["student_sha256"] is None) == ("deeplab" in name)
        assert stages["train"]["lr"] == (0.01 if "deeplab" in name else 5e-4)
        assert (out / name / "seed0" / f"{name}.onnx").is_file()
    text = (out / "compare.md").read_text()
    assert f"| upernet_tinymim_t_64_camvid | file {sha256_file(out.parent / 'student.pth')[:12]} |" in text
    assert "| deeplabv3plus_r18_camvid | scratch |" in text
    assert "stretched to 64x64; 2 steps of 2 crops of 48x48" in text


@pytest.mark.slow
def test_the_best_file_is_found_and_timed(compared):
    out, arguments = compared
    ours = [word for word in arguments if not word.endswith("deeplabv3plus_r18_camvid.py")]
    assert tool.main([*ours, "--stages", "tune", "measure"]) == 0
    results = json.loads((out / "compare.json").read_text())
    stages = results["models"]["upernet_tinymim_t_64_camvid"]["0"]
    timed = {row["sha256"] for row in results["measure"]["rows"]}
    assert {stages["export"]["sha256"], stages["tune"]["sha256"]} <= timed
    assert stages["tune"]["winner"] is None or stages["tune"]["winner"]["drop"] <= 0.5


@pytest.mark.slow
def test_finished_stages_are_kept_and_another_budget_is_refused(compared, monkeypatch, capsys):
    out, arguments = compared
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed0/*.*")}
    for stage in ("train", "export", "score"):
        monkeypatch.setattr(tool, stage, lambda *_: pytest.fail("a finished stage was run again"))
    assert tool.main([*arguments, "--stages", "train", "export", "score"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/seed0/*.*")}
    assert "next: tinymim bench" in capsys.readouterr().out
    elsewhere = [*arguments, "--stages", "train", "export", "score", "--results", str(out / "compare.json")]
    elsewhere[elsewhere.index("--out") + 1] = str(out.parent / "elsewhere")  # another machine: no files, the numbers
    assert tool.main(elsewhere) == 0
    models = [json.loads((folder / "compare.json").read_text())["models"] for folder in (out, out.parent / "elsewhere")]
    assert models[0] == models[1]
    arguments[arguments.index("--steps") + 1] = "3"
    assert tool.main(arguments) == 2
    assert "was trained with steps=2" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_show_the_labels_and_every_file(compared):
    out, _ = compared
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.size == (SIDE + 3 * THUMB[0], 4 * THUMB[1])  # three photos; photo, label, two files
        label = np.asarray(sheet)[THUMB[1] : 2 * THUMB[1], SIDE : SIDE + THUMB[0]]
    palette = {tuple(colour) for colour in json.loads((out.parent / "scenes" / "dataset.json").read_text())["palette"]}
    assert {tuple(map(int, colour)) for colour in np.unique(label.reshape(-1, 3), axis=0)} <= palette | {(0, 0, 0)}


@pytest.mark.parametrize(("row", "seed"), [("..", "0"), ("", "0"), ("a/b", "0"), ("a", "x")])
def test_rows_of_a_file_stay_in_the_folder(row, seed, tmp_path):
    results = {"kind": "tinymim.compare", "models": {row: {seed: {"train": {"miou": 0.5}}}}}
    (tmp_path / "compare.json").write_text(json.dumps(results))
    with pytest.raises(DataError, match="names a row or seed"):
        unpack(tmp_path / "compare.json", tmp_path / "out")
    assert [*tmp_path.iterdir()] == [tmp_path / "compare.json"]


def test_nothing_to_measure(tmp_path, capsys):
    assert tool.main(["--out", str(tmp_path), "--stages", "measure"]) == 2
    assert "no exported model" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*tool.MODELS, "fpn_tinymim_t_camvid", "upernet_tinymim_t_64_camvid_512"])
def test_all_models_see_the_same_photos(name):
    args = tool.argparse.ArgumentParser()
    tool.add_arguments(args)
    cfg = tool.configuration({"config": name}, args.parse_args([]), seed=5)
    steps = [dict(step) for step in cfg.train_dataloader.dataset.pipeline if step.type != "GenerateEdge"]
    assert steps[2:4] == [
        dict(type="RandomResize", scale=(512, 512), ratio_range=(0.75, 1.5), keep_ratio=False),
        dict(type="RandomCrop", crop_size=(256, 256), cat_max_ratio=0.75),
    ]
    kinds = [step.type for step in cfg.val_dataloader.dataset.pipeline]
    assert kinds == ["LoadPhoto", "Resize", "LoadLabel", "PackSegInputs"]
    assert [step.type for step in cfg.test_pipeline] == ["LoadImageFromFile", "Resize", "PackSegInputs"]
    assert (cfg.randomness.seed, cfg.train_cfg.max_iters, cfg.param_scheduler[-1].end) == (5, 2000, 2001)


def parse(*words):
    parser = tool.argparse.ArgumentParser()
    tool.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


ROWS = ["--rows", "camvid_segmentors"]


def test_the_shipped_rows_are_configs_with_options_they_have(tmp_path):
    words = ("relation", "mae", "relation_4", "feature_4", "class_token_4", "first", "teacher")
    (tmp_path / "student.pth").touch()
    args = parse(*ROWS, "--students", *(f"{word}={tmp_path / 'student.pth'}" for word in words), "--size", 0, 0)
    rows = tool.find_rows(args)
    assert len(rows) > 12
    for row in rows.values():
        cfg = tool.configuration(row, args, seed=1)
        assert [step.type for step in cfg.val_dataloader.dataset.pipeline] == [
            "LoadPhoto",
            "LoadLabel",
            "PackSegInputs",
        ]
        assert cfg.param_scheduler[-1]["end"] == args.steps + 1
    frozen = tool.configuration(rows["dinov2_s_frozen"], args, seed=1).model.backbone
    assert (frozen.frozen, frozen.img_size) == (True, (518, 518))


def test_own_rows(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text('rows = {"a": dict(config="segformer_b0_camvid")}')
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "mine.py", "mine.py"):
        assert tool.find_rows(parse("--rows", file)) == {"a": {"config": "segformer_b0_camvid"}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "vit_t_relatoin"], "no row 'vit_t_relatoin'"),
        (["--models", "vit_t_mae"], "add --students mae=student.pth"),
        (["--models", "vit_t_mae", "--students", "mae=nowhere.pth"], "add --students mae=student.pth"),
        (["--models", "segformer_b0", "--labels", "3"], "has 3 labelled training photos"),
        (["--models", "segformer_b0", "--reference", "segformer"], "the rows are segformer_b0"),
        (["--models", "segformer_b0", "--results", "nowhere.json"], "nowhere.json"),
    ],
)
def test_rows_that_cannot_be_run(words, said, tmp_path, capsys):
    data = write_scenes(tmp_path / "scenes", train=3, val=1, size=(96, 80), seed=3)
    assert tool.main([*ROWS, "--out", str(tmp_path / "out"), "--data-root", str(data), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_learns_from_a_trained_one_only(tmp_path):
    (tmp_path / "student.pth").touch()
    words = [*ROWS, "--out", tmp_path / "out", "--students", f"relation={tmp_path / 'student.pth'}"]
    with pytest.raises(ConfigError, match="learns from 'dinov2_s', which is not trained"):
        tool.find_rows(parse(*words, "--models", "vit_t_relation_taught"))


def test_few_labels(tmp_path):
    """Drawn by the seed; the others' labels are nowhere; made once."""
    data = write_scenes(tmp_path / "scenes", train=6, val=2, size=(96, 80), seed=3)
    args, kept = parse("--data-root", data, "--out", tmp_path / "out", "--labels", 2), []
    for seed in (0, 1):
        labelled, rest = tool.few_labels(args, seed)
        kept.append({path.stem for path in (labelled / "images" / "training").iterdir()})
        assert kept[-1] == {path.stem for path in (labelled / "annotations" / "training").iterdir()}
        unlabelled = [path for path in rest.rglob("*") if path.is_file()]
        assert len(kept[-1]) == 2
        assert len(unlabelled) == 4
        assert not kept[-1] & {path.stem for path in unlabelled}
        assert len(list((labelled / "annotations" / "validation").iterdir())) == 2
        assert (labelled / "dataset.json").read_bytes() == (data / "dataset.json").read_bytes()
    assert kept[0] != kept[1]
    before = (labelled / "dataset.json").stat().st_mtime_ns
    assert tool.few_labels(args, 1) == (labelled, rest)
    assert (labelled / "dataset.json").stat().st_mtime_ns == before
