"""``--teacher-segmentor``: the losses by hand, what the teacher sees and says, what it leaves in a run, resume."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from tests.attack.forked import fork
from tests.engine.processes import launch
from tests.export.foreign import SMALL
from tests.seg.conftest import CROPS, WIDTH
from tests.seg.test_others import STEPS
from tests.seg.test_processes import SAME
from tinymim.cli import main
from tinymim.data.folders import read_layout
from tinymim.errors import CheckpointError, ConfigError, DataError
from tinymim.seg import distillation, estimate_segmentor, load_segmentor, train_segmentor
from tinymim.seg.config import find_config, merge_options
from tinymim.seg.distillation import SegTeacher, channel_kl, load_teacher, pixel_kl, set_teacher
from tinymim.seg.hooks import RunFolderHook

DEMO = "upernet_tinymim_demo"
HALF_OF = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # KL((3/4, 1/4) || (1/2, 1/2))


def settings(**given):
    return Config(dict(distillation.teacher_settings(given)))


@pytest.fixture(scope="module")
def train(scenes, small):
    """Train the small config for 4 steps, under a teacher if one is given."""

    def run(folder, teacher=None, options=(), **more):
        steps = {"train_cfg.max_iters": 4, "train_cfg.val_interval": 4}
        return train_segmentor(
            DEMO,
            work_dir=folder,
            teacher_segmentor=teacher,
            **{"data_root": scenes, **more},
            cfg_options=small(**steps | dict(options)),
        )

    return run


@pytest.fixture(scope="module")
def teacher(scenes, tmp_path_factory):
    """A tiny SegFormer that knows the classes of the scenes."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    name = "segformer_b0_camvid"
    more = {"optim_wrapper.optimizer.lr": 0.02, "param_scheduler": []}
    return train_segmentor(name, work_dir=folder, data_root=scenes, cfg_options=STEPS | SMALL[name] | more).segmentor


@pytest.fixture(scope="module")
def taught(train, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught") / "run"
    train(folder, teacher, {"teacher.channel": 3.0})
    return folder


def lines(folder):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if "loss" in line]


def state(folder):
    return torch.load(folder / "segmentor.pth", weights_only=True)["state_dict"]


def changed(file, path, change):
    """A copy of a segmentor's file whose content ``change`` edits."""
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


# The losses


def test_pixel_kl_by_hand():
    """Two photos of two positions; at the first the teacher says 3 : 1, at the others what the student says."""
    student = torch.zeros(2, 2, 1, 2)
    teacher = torch.zeros(2, 2, 1, 2)
    teacher[0, 0, 0, 0] = math.log(3)
    share = torch.tensor([[[1.0, 0.5]], [[1.0, 1.0]]])
    assert pixel_kl(student, teacher, share).item() == pytest.approx(HALF_OF / 1.5 / 2, rel=1e-6)
    teacher[0, 0, 0, 0] = math.log(9)  # (3 : 1 at T = 2)
    assert pixel_kl(student, teacher, share, 2.0).item() == pytest.approx(4 * HALF_OF / 1.5 / 2, rel=1e-6)


def test_channel_kl_by_hand():
    """One photo, two classes of three positions, the last of them padding; the second class is as the student's."""
    student, teacher = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    teacher[0, 0, 0] = torch.tensor([math.log(3), 0.0, 1e4])
    share = torch.tensor([[[1.0, 1.0, 0.0]]])
    assert channel_kl(student, teacher, share, 1.0).item() == pytest.approx(HALF_OF / 2, rel=1e-6)
    share[0, 0, 1] = 0.5
    by_hand = 6 / 7 * math.log(9 / 7) + 1 / 7 * math.log(3 / 7)  # KL((6/7, 1/7) || (2/3, 1/3))
    assert channel_kl(student, teacher, share, 1.0).item() == pytest.approx(by_hand / 2, rel=1e-5)
    teacher[0, 0, 0, 0] = 4 * math.log(3)
    assert channel_kl(student, teacher, share, 4.0).item() == pytest.approx(16 * by_hand / 2, rel=1e-5)


@pytest.mark.parametrize("loss", [pixel_kl, channel_kl])
def test_an_equal_student_has_no_loss_and_padding_no_gradient(loss):
    torch.manual_seed(0)
    teacher, share = 5 * torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.ones(2, 3, 4, dtype=torch.float64)
    share[1, :, 2:] = 0
    share[0, 2] = 0.3
    assert abs(loss(teacher.clone(), teacher, share)) < 1e-12
    student = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    value = loss(student, teacher, share)
    assert value > 0.1
    (gradient,) = torch.autograd.grad(value, student)
    assert not gradient[1, :, :, 2:].any()
    assert gradient[:, :, :, :2].all()
    teacher[1, :, :, 2:] = 1e3
    assert loss(student, teacher, share) == value
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, share), student)


def test_grids_are_averaged_over_areas():
    assert torch.allclose(
        distillation._areas(2, 3, torch.float32, torch.device("cpu")),
        torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]),
    )
    x = torch.randn(2, 3, 12, 18)
    assert torch.allclose(distillation._averaged(x, (4, 6)), torch.nn.functional.avg_pool2d(x, 3), atol=1e-6)
    assert torch.allclose(distillation._averaged(x, (5, 7)).mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    assert distillation._averaged(x, (12, 18)) is x


def samples_of(teacher, photos, size):
    logits = teacher.logits(photos, size)
    return [
        SegDataSample(
            gt_sem_seg=PixelData(data=torch.full((1, *size), 255)),  # ignored labels: the teacher knows these pixels
            teacher_logits=PixelData(data=each),
            metainfo=dict(img_shape=photo.shape[1:]),
        )
        for each, photo in zip(logits, photos, strict=True)
    ]


def test_a_student_that_is_its_teacher_has_no_loss(teacher):
    model, _ = load_segmentor(teacher)
    both = SegTeacher(model, settings(channel=3.0))
    photos = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 64), (50, 64))]
    samples = samples_of(both, photos, (64, 64))
    own = both.logits(photos, (64, 64))
    for value in both.losses(own, samples).values():
        assert abs(value) < 1e-6
    other = both.losses(own + torch.randn_like(own), samples)
    assert other.keys() == {"loss_teacher_kl", "loss_teacher_channel"}
    assert min(other.values()) > 0.01
    weighted = SegTeacher(model, settings(kl=0, channel=6.0)).losses(own.flip(1), samples)
    assert weighted["loss_teacher_channel"] == 2 * both.losses(own.flip(1), samples)["loss_teacher_channel"]
    assert "loss_teacher_kl" not in weighted


def test_one_score_for_two_classes_is_two_logits():
    class Head:
        out_channels = 1

    scores = torch.randn(2, 1, 3, 3)
    logits = distillation._logits(Head(), scores)
    assert torch.allclose(logits.softmax(1)[:, 1:], scores.sigmoid())
    with pytest.raises(ConfigError, match=r"gives \(2, 3, 3\)"):
        distillation._logits(Head(), scores[:, 0])


# What the teacher sees and says


def test_it_normalises_raw_pixels_itself_and_pads_like_the_student(teacher, tmp_path):
    def other_pixels(content):
        content["meta"]["config"] = content["meta"]["config"].replace("123.675, 116.28, 103.53", "10.0, 20.0, 30.0")

    model, cfg = load_segmentor(changed(teacher, tmp_path / "other.pth", other_pixels))
    assert cfg.model.data_preprocessor.mean == [10.0, 20.0, 30.0]
    photo = torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8)
    std = torch.tensor(cfg.model.data_preprocessor.std)[:, None, None]
    seen = torch.zeros(1, 3, 64, 96)
    seen[0, :, :40, :64] = (photo.float().flip(0) - torch.tensor([10.0, 20.0, 30.0])[:, None, None]) / std
    with torch.no_grad():
        wanted = model(seen)
    assert torch.equal(SegTeacher(model, settings()).logits([photo], (64, 96)), wanted)


def reorder(content):
    """The same segmentor with its classes the other way round."""
    content["meta"]["classes"].reverse()
    for name in ("weight", "bias"):
        content["state_dict"][f"decode_head.conv_seg.{name}"] = content["state_dict"][
            f"decode_head.conv_seg.{name}"
        ].flip(0)


def loaded(path, scenes, **options):
    cfg = find_config(DEMO)
    merge_options(cfg, {**CROPS, **options})
    set_teacher(cfg, path)
    return load_teacher(cfg, read_layout(scenes), "cpu")


def test_classes_in_another_order_are_matched_by_name(teacher, scenes, tmp_path, capsys):
    def turn(content):  # no order that is its own inverse
        content["meta"]["classes"] = [*content["meta"]["classes"][4:], *content["meta"]["classes"][:4]]
        for name in ("weight", "bias"):
            key = f"decode_head.conv_seg.{name}"
            content["state_dict"][key] = content["state_dict"][key].roll(-4, 0)

    photos = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    own, _ = load_segmentor(teacher)
    plain = loaded(teacher, scenes).logits(photos, (64, 64))
    assert "another order" not in capsys.readouterr().out
    for change in (reorder, turn):
        other = loaded(changed(teacher, tmp_path / "other.pth", change), scenes)
        assert "another order" in capsys.readouterr().out
        assert torch.equal(other.logits(photos, (64, 64)), plain)
        assert not torch.equal(other.model(torch.zeros(1, 3, 64, 64)), own(torch.zeros(1, 3, 64, 64)))


def test_other_classes_are_refused(teacher, train, tmp_path):
    def rename(content):
        content["meta"]["classes"][3] = "lamp"

    def fewer(content):
        content["meta"]["config"] = content["meta"]["config"].replace("'num_classes': 12", "'num_classes': 11")
        for name in ("weight", "bias"):
            key = f"decode_head.conv_seg.{name}"
            content["state_dict"][key] = content["state_dict"][key][:11]
        content["meta"]["classes"].pop()

    for change, said in ((rename, "'lamp'"), (fewer, "knows 11 classes")):
        with pytest.raises(DataError, match=said):
            train(tmp_path / "run", changed(teacher, tmp_path / "other.pth", change))
    assert not (tmp_path / "run").exists()


def test_refused_before_anything_is_written(train, teacher, tmp_path, scenes):
    student = tmp_path / "student.pth"
    torch.save({"state_dict": {}}, student)
    for file, kind, said in (
        (tmp_path / "none.pth", CheckpointError, "no teacher at"),
        (student, CheckpointError, "holds no segmentor"),
    ):
        with pytest.raises(kind, match=said):
            train(tmp_path / "run", file)
    for options, said in (
        ({"teacher.kl": 1.0}, "teacher without a file"),
        ({"teacher.chanel": 1.0}, "did you mean 'teacher.channel'"),
        ({"teacher.temperature": 0}, "teacher.temperature=0"),
        ({"teacher.kl": -1}, "teacher.kl=-1"),
        ({"teacher.kl": [1, 2]}, r"teacher.kl=\[1, 2\]"),
        ({"teacher.kl": 0.0}, "would teach nothing"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            train(tmp_path / "run", None if said == "teacher without a file" else teacher, options)
        assert str(caught.value.fix)
    with pytest.raises(ConfigError, match=r"unknown key 'teacher.lk' in the config"):
        train(tmp_path / "run", teacher, {"+teacher.lk": 1.0})
    assert not (tmp_path / "run").exists()


def test_a_cascade_neither_teaches_nor_is_taught(teacher):
    model, _ = load_segmentor(teacher)
    cascade = MODELS.build(
        dict(
            type="CascadeEncoderDecoder",
            num_stages=1,
            backbone=dict(type="ResNetV1c", depth=18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,)),
            decode_head=[dict(type="FCNHead", in_channels=64, in_index=0, channels=8, num_convs=1, num_classes=12)],
        )
    )
    with pytest.raises(ConfigError, match="is a CascadeEncoderDecoder with a ModuleList"):
        SegTeacher(model, settings()).teach(cascade)


@pytest.mark.parametrize("patch", [pytest.param(8, marks=pytest.mark.slow), 14])
def test_a_teacher_of_another_patch_size(train, scenes, tmp_path, patch):
    """A plain ViT with a linear head, 8 x 8 or 5 x 5 logits, for a student whose logits are 16 x 16."""
    options = {
        **{key: value for key, value in CROPS.items() if "num_workers" in key or "size" in key},
        "train_cfg.max_iters": 1,
        "model.backbone.patch_size": patch,
        "model.backbone.depth": 2,
        "model.backbone.out_indices": (1,),
        "model.backbone.embed_dim": WIDTH,
        "model.backbone.num_heads": 2,
        "model.decode_head.in_channels": WIDTH,
        "model.decode_head.channels": WIDTH,
    }
    big = train_segmentor("linear_tinymim_t_camvid", work_dir=tmp_path / "big", data_root=scenes, cfg_options=options)
    found = loaded(big.segmentor, scenes)
    grid = math.ceil(64 / patch)
    assert found.logits([torch.zeros(3, 64, 64, dtype=torch.uint8)], (64, 64)).shape == (1, 12, grid, grid)
    train(tmp_path / "run", big.segmentor, {"train_cfg.max_iters": 1, "teacher.channel": 3})
    (line,) = lines(tmp_path / "run")
    assert line["decode.loss_teacher_kl"] > 0
    assert line["decode.loss_teacher_channel"] > 0


# What it leaves in a run


def test_the_run_and_its_files(taught, train, teacher, tmp_path):
    """The teacher's name and sha256, its losses; no tensor of it, and an unchanged teacher."""
    before = torch.load(teacher, weights_only=True)["state_dict"]
    plain = train(tmp_path / "plain").work_dir
    first, other = lines(taught)[0], lines(plain)[0]
    parts = [value for name, value in first.items() if ".loss" in name]
    assert first["loss"] == pytest.approx(sum(parts), rel=1e-6)
    assert len(parts) == 4
    assert first["decode.loss_ce"] == other["decode.loss_ce"]  # the same photos, drop path and first weights
    ours, theirs = state(taught), state(plain)
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    checkpoint = torch.load(taught / "checkpoints" / "iter_4.pth", weights_only=False)
    assert checkpoint["state_dict"].keys() == theirs.keys()
    moments = [
        len(torch.load(f / "checkpoints/iter_4.pth", weights_only=False)["optimizer"]["state"]) for f in (taught, plain)
    ]
    assert moments[0] == moments[1]
    noted = json.loads((taught / "env.json").read_text())["inputs"]["teacher"]
    meta = torch.load(taught / "segmentor.pth", weights_only=True)["meta"]
    assert noted["file"] == "segmentor.pth"
    assert meta["teacher_sha256"] == noted["sha256"]
    assert str(teacher) not in meta["config"]
    assert "'channel': 3.0" in meta["config"]
    assert Config.fromfile(str(taught / "config.py")).teacher.checkpoint == str(teacher)
    assert "teacher" not in json.loads((plain / "env.json").read_text())["inputs"]
    assert "teacher" not in (plain / "config.py").read_text()
    after = torch.load(teacher, weights_only=True)["state_dict"]
    assert all(torch.equal(before[key], after[key]) for key in before)
    load_segmentor(taught / "segmentor.pth")


def test_gradients_reach_the_student_alone(teacher, scenes, small):
    """Of the KL alone: every weight of backbone and decode head, none of the teacher's, not the auxiliary head's."""
    cfg = find_config(DEMO)
    merge_options(cfg, small())
    found = loaded(teacher, scenes)
    model = MODELS.build(cfg.model).train()
    found.teach(model)
    photos = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 64, 64), 255))) for _ in photos]
    ready = model.data_preprocessor({"inputs": photos, "data_samples": samples}, True)
    model.loss(ready["inputs"], ready["data_samples"])["decode.loss_teacher_kl"].backward()
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    with_some = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_some == {"backbone", "decode_head"}
    assert "auxiliary_head" in without
    assert all(p.grad is None and not p.requires_grad for p in found.model.parameters())
    assert not found.model.training
    assert not any(p is q for p in model.parameters() for q in found.model.parameters())


@pytest.mark.parametrize("name", ["pidnet_s_camvid", pytest.param("deeplabv3plus_r18_camvid", marks=pytest.mark.slow)])
def test_heads_with_losses_of_their_own(name, scenes, teacher, tmp_path):
    """A PIDNet teaches what it predicts with, its second output; the other two heads keep their labels."""
    options = STEPS | SMALL[name] | {"train_cfg.max_iters": 1}
    result = train_segmentor(
        name, work_dir=tmp_path / "run", data_root=scenes, teacher_segmentor=teacher, cfg_options=options
    )
    (line,) = lines(tmp_path / "run")
    assert line["decode.loss_teacher_kl"] > 0
    assert ("decode.loss_sem_bd" in line) is name.startswith("pidnet")
    assert not any("aux" in key and "teacher" in key for key in line)
    again = loaded(result.segmentor, scenes)  # and as teachers
    assert again.logits([torch.zeros(3, 64, 64, dtype=torch.uint8)], (64, 64)).shape[:2] == (1, 12)


@pytest.mark.slow
def test_under_bfloat16_losses_are_float32(train, teacher, tmp_path):
    train(tmp_path / "run", teacher, {"train_cfg.max_iters": 1, "teacher.channel": 3}, amp=True, device="cpu")
    (line,) = lines(tmp_path / "run")
    value = line["decode.loss_teacher_kl"]
    assert value > 0
    assert torch.tensor(value).bfloat16().item() != value


def test_the_dry_run_counts_it(scenes, small, teacher, capsys):
    plain, both = (
        estimate_segmentor(DEMO, data_root=scenes, teacher_segmentor=file, cfg_options=small())
        for file in (None, teacher)
    )
    assert both.parameters == plain.parameters
    assert both.flop_per_image > plain.flop_per_image
    assert both.backward_flop_per_image == plain.backward_flop_per_image
    assert both.gib > plain.gib
    words = ["segment", DEMO, "--data-root", str(scenes), "--dry-run", "--teacher-segmentor", "none.pth"]
    assert main(words) == 2
    assert "no teacher at none.pth" in capsys.readouterr().err


@pytest.mark.slow
def test_mmengines_own_runner_does_not_pass_over_it(taught, tmp_path):
    cfg = Config.fromfile(str(taught / "config.py"))
    cfg.work_dir, cfg.experiment_name = str(tmp_path / "run"), "own"
    with pytest.raises(ConfigError, match="the config has a teacher"):
        Runner.from_cfg(cfg).train()


# Resume


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit(taught, train, teacher, tmp_path):
    after = RunFolderHook.after_train_iter

    def kill(self, runner, batch_idx, **rest):
        after(self, runner, batch_idx, **rest)
        if batch_idx + 1 == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        RunFolderHook.after_train_iter = kill
        train(tmp_path / "run", teacher, {"teacher.channel": 3.0})
        return 0

    assert fork(run, tmp_path / "said.txt") == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    train(tmp_path / "run", teacher, {"teacher.channel": 3.0}, resume=True)
    assert lines(tmp_path / "run") == lines(taught)
    ours, theirs = state(tmp_path / "run"), state(taught)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["not named", "a copy"])
def test_resume_is_exact_and_finds_its_teacher(taught, train, teacher, tmp_path, capsys, named):
    """From step 2, without naming the teacher, and from a copy of it elsewhere."""
    file = shutil.copy(teacher, tmp_path / "copy.pth") if named else None
    run = shutil.copytree(taught, tmp_path / "run")
    (run / "checkpoints" / "iter_4.pth").unlink()
    train(run, file, {"teacher.channel": 3.0}, resume=True)
    assert f"teacher: {file or teacher}" in capsys.readouterr().out
    assert lines(run) == lines(taught)
    ours, theirs = state(run), state(taught)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    inputs = [json.loads((folder / "env.json").read_text())["inputs"] for folder in (run, taught)]
    assert inputs[0]["teacher"]["sha256"] == inputs[1]["teacher"]["sha256"]


def test_another_teacher_or_other_weights_are_refused(taught, train, teacher, tmp_path):
    run, other = shutil.copytree(taught, tmp_path / "run"), changed(teacher, tmp_path / "other.pth", reorder)
    before = (run / "config.py").read_bytes()
    same = {"teacher.channel": 3.0}
    with pytest.raises(ConfigError, match="the run was started with another teacher") as caught:
        train(run, other, same, resume=True)
    assert "resume with the same --teacher-segmentor" in caught.value.fix
    for options, said in (
        ({}, r"teacher.channel: 3.0 -> 0.0"),
        ({**same, "teacher.kl": 2.0}, r"teacher.kl: 1.0 -> 2.0"),
        ({**same, "teacher.temperature": 2.0}, r"teacher.temperature: 1.0 -> 2.0"),
    ):
        for named in (None, teacher):
            with pytest.raises(ConfigError, match=said):
                train(run, named, options, resume=True)
    assert (run / "config.py").read_bytes() == before
    text = before.decode().replace(str(teacher), str(tmp_path / "gone.pth"))
    (run / "config.py").write_text(text)
    with pytest.raises(CheckpointError, match=r"no teacher at .*gone\.pth") as gone:
        train(run, None, same, resume=True)
    assert "--teacher-segmentor FILE" in gone.value.fix


@pytest.mark.slow
def test_a_run_without_a_teacher_gets_none(train, teacher, tmp_path):
    train(tmp_path / "run", None, {"train_cfg.max_iters": 1})
    with pytest.raises(ConfigError, match=r"teacher.kl: None -> 1.0"):
        train(tmp_path / "run", teacher, {"train_cfg.max_iters": 1}, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_on_two_processes_the_losses_of_one(scenes, small, teacher, tmp_path, strategy):
    def run(folder, batch, **more):
        options = small(**SAME, **{"train_dataloader.batch_size": batch, "teacher.channel": 3.0})
        train_segmentor(DEMO, work_dir=folder, data_root=scenes, teacher_segmentor=teacher, cfg_options=options, **more)
        return 0

    run(tmp_path / "one", 4)
    for rank, ended in enumerate(launch(2, lambda _: run(tmp_path / "two", 2, strategy=strategy), tmp_path / "said")):
        assert ended.code == 0, f"process {rank}: {ended.text[-3000:]}"
    for key in ("loss", "decode.loss_teacher_kl", "decode.loss_teacher_channel"):
        one, two = ([line[key] for line in lines(tmp_path / name)] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4), key
    assert state(tmp_path / "two").keys() == state(tmp_path / "one").keys()
