"""Training a segmentor: files, exact resume, Ctrl-C, NaN, damaged data, a full disk, testing, loading."""

import json
import multiprocessing
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from tests.attack.forked import fork
from tinymim.errors import CheckFailed, CheckpointError, ConfigError, DataError, TinyMIMError
from tinymim.models import save_student
from tinymim.models.vit import ViT
from tinymim.seg import TinyMIMBackbone, load_segmentor, test_segmentor, train_segmentor
from tinymim.seg.checks import check_batch
from tinymim.seg.config import find_config, model_outline, plain_batch_norm
from tinymim.seg.hooks import RunFolderHook

DEMO = "upernet_tinymim_demo"


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(scenes, small, tmp_path_factory):
    """An uninterrupted run of 6 steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train_segmentor(DEMO, work_dir=folder, data_root=scenes, cfg_options=small())


def test_run_folder(trained, scenes):
    folder = trained.work_dir
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6, 6]
    assert {"loss", "decode.loss_ce", "aux.loss_ce", "lr"} <= set(lines(folder)[0])
    assert lines(folder)[-1]["mIoU"] == trained.miou
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["iter_4.pth", "iter_6.pth"]
    assert json.loads((folder / "env.json").read_text())["versions"]["torch"]
    assert json.loads((folder / "result.json").read_text())["mIoU"] == trained.miou
    cfg = Config.fromfile(str(folder / "config.py"))
    assert cfg.train_dataloader.dataset.data_root == str(scenes)
    assert not list(folder.rglob("*.part"))
    assert trained.images == 5
    assert 0 < trained.constant_miou < 0.2


def test_segmentor_file_is_clean_and_gives_the_same_scores(trained):
    content = torch.load(trained.segmentor, weights_only=True)
    assert set(content) == {"state_dict", "meta"}
    meta = content["meta"]
    assert len(meta["classes"]) == len(meta["palette"]) == 12
    assert meta["metrics"]["mIoU"] == trained.miou
    assert (meta["step"], meta["backbone"]["num_heads"], meta["student_sha256"]) == (6, 2, None)
    assert meta["mean"] == [123.675, 116.28, 103.53]
    again = test_segmentor(None, trained.segmentor)
    assert np.array_equal(again.confusion, trained.confusion)
    from_iter = test_segmentor(trained.work_dir / "config.py", trained.work_dir / "checkpoints" / "iter_6.pth")
    assert np.array_equal(from_iter.confusion, trained.confusion)


def test_a_segmentor_feeds_a_backbone(trained, tmp_path):
    """load_weights and init_cfg take segmentor.pth too."""
    model, cfg = load_segmentor(trained.segmentor)
    options = {k: v for k, v in cfg.model.backbone.items() if k not in ("type", "init_cfg")}
    backbone = TinyMIMBackbone(**options, init_cfg=dict(type="Pretrained", checkpoint=str(trained.segmentor)))
    backbone.init_weights()
    assert torch.equal(backbone.fpn1[0].weight, model.backbone.fpn1[0].weight)


def test_mmseg_inference_takes_the_loaded_segmentor(trained, scenes):
    from mmseg.apis import inference_model

    model, _ = load_segmentor(trained.segmentor)
    photo = sorted((scenes / "images" / "validation").iterdir())[0]
    assert inference_model(model, str(photo)).pred_sem_seg.shape == (80, 96)


def test_test_time_augmentation(trained):
    result = test_segmentor(None, trained.segmentor, tta=True)
    assert result.images == 5
    assert not np.array_equal(result.confusion, trained.confusion)
    assert result.confusion.sum() == trained.confusion.sum()


def test_resume_after_kill_9_is_bit_identical(trained, scenes, small, tmp_path):
    """Killed after step 3 (checkpoint at 2); resumed with two workers; same losses, same weights."""
    folder = tmp_path / "run"
    after = RunFolderHook.after_train_iter

    def kill(self, runner, batch_idx, **rest):
        after(self, runner, batch_idx, **rest)
        if batch_idx + 1 == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def train():
        RunFolderHook.after_train_iter = kill
        train_segmentor(DEMO, work_dir=folder, data_root=scenes, cfg_options=small())
        return 0

    assert fork(train, tmp_path / "said.txt") == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]
    (folder / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # a line cut off by the kill
    result = train_segmentor(
        DEMO,
        work_dir=folder,
        data_root=scenes,
        resume=True,
        cfg_options=small(**{"train_dataloader.num_workers": 2, "train_dataloader.persistent_workers": True}),
    )
    assert lines(folder) == lines(trained.work_dir)
    assert np.array_equal(result.confusion, trained.confusion)
    ours, theirs = (torch.load(r.segmentor, weights_only=True)["state_dict"] for r in (result, trained))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_resume_reads_no_batch_again(trained, scenes, small, tmp_path, monkeypatch):
    folder = shutil.copytree(trained.work_dir, tmp_path / "run")
    (folder / "checkpoints" / "iter_6.pth").unlink()
    read = []
    from tinymim.seg.dataset import LoadPhoto

    load = LoadPhoto.transform
    monkeypatch.setattr(LoadPhoto, "transform", lambda self, r: (read.append(r["img_path"]), load(self, r))[1])
    train_segmentor(DEMO, work_dir=folder, data_root=scenes, resume=True, cfg_options=small())
    assert len([path for path in read if "training" in path]) == 2 * 2  # steps 5 and 6
    assert lines(folder) == lines(trained.work_dir)


def test_ctrl_c_saves_and_resumes(trained, scenes, small, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    after = RunFolderHook.after_train_iter

    def press(self, runner, batch_idx, **rest):
        after(self, runner, batch_idx, **rest)
        if batch_idx + 1 == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolderHook, "after_train_iter", press)
        with pytest.raises(KeyboardInterrupt):
            train_segmentor(DEMO, work_dir=folder, data_root=scenes, cfg_options=small())
    assert (folder / "checkpoints" / "iter_3.pth").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train_segmentor(DEMO, work_dir=folder, data_root=scenes, resume=True, cfg_options=small())
    assert lines(folder) == lines(trained.work_dir)


def test_resume_makes_up_for_a_missing_validation_and_repeats_none(trained, scenes, small, tmp_path):
    folder = shutil.copytree(trained.work_dir, tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text()
    again = train_segmentor(DEMO, work_dir=folder, data_root=scenes, resume=True, cfg_options=small())
    assert (folder / "metrics.jsonl").read_text() == whole
    assert again.miou == trained.miou
    (folder / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    train_segmentor(DEMO, work_dir=folder, data_root=scenes, resume=True, cfg_options=small())
    assert (folder / "metrics.jsonl").read_text() == whole


def test_nan_loss_stops_dumps_and_keeps_the_last_good_checkpoint(scenes, small, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    forward = TinyMIMBackbone.forward
    calls = []

    def spoil(self, images):
        calls.append(1)
        return tuple(level * (float("nan") if len(calls) == 4 else 1.0) for level in forward(self, images))

    monkeypatch.setattr(TinyMIMBackbone, "forward", spoil)
    with pytest.raises(CheckFailed, match="step 4 is not finite"):
        train_segmentor(DEMO, work_dir=folder, data_root=scenes, cfg_options=small())
    batch = torch.load(folder / "bad_batch_4_rank0.pth", weights_only=True)
    assert len(batch["inputs"]) == len(batch["labels"]) == len(batch["files"]) == 2
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["iter_2.pth"]
    model, _ = load_segmentor(folder / "segmentor.pth")
    assert all(p.isfinite().all() for p in model.parameters())


def test_damaged_photos_are_skipped_counted_and_named(scenes, small, tmp_path, capsys):
    root = shutil.copytree(scenes, tmp_path / "scenes")
    photo = sorted((root / "images" / "training").iterdir())[4]
    photo.write_bytes(photo.read_bytes()[:-500])
    for workers in (0, 2):
        options = small(**{"train_dataloader.num_workers": workers, "train_dataloader.persistent_workers": workers > 0})
        result = train_segmentor(DEMO, work_dir=tmp_path / f"run{workers}", data_root=root, cfg_options=options)
        out = capsys.readouterr().out
        assert out.count(f"{photo.name} (another one is used; 1 so far)") == 1
        assert out.count("1 damaged photo(s) skipped, 1 times in all") == 1
        assert lines(result.work_dir)[-2]["skipped_photos"] == 1
        assert not multiprocessing.active_children()  # data workers ended with the run


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wrong_label_id_met_in_training_names_the_file(scenes, small, tmp_path, monkeypatch, workers):
    """The check at the start looks at a sample of the labels only; here at none."""
    from PIL import Image

    root = shutil.copytree(scenes, tmp_path / "scenes")
    for label in (root / "annotations" / "training").iterdir():
        Image.fromarray(np.full((80, 96), 77, np.uint8)).save(label)
    monkeypatch.setattr("tinymim.data.folders.check_labels", lambda layout: None)
    options = small(**{"train_dataloader.num_workers": workers, "train_dataloader.persistent_workers": workers > 0})
    with pytest.raises(DataError, match=r"\.png holds the label id 77") as caught:
        train_segmentor(DEMO, work_dir=tmp_path / "run", data_root=root, cfg_options=options)
    assert caught.value.fix.startswith("correct the file")


def test_a_full_disk_is_our_error_and_keeps_the_older_checkpoint(scenes, small, tmp_path, monkeypatch):
    """RLIMIT_FSIZE as a full disk, from the second checkpoint on."""
    folder = tmp_path / "run"
    save = RunFolderHook.save_now
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, runner, step):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(self, runner, step)

    monkeypatch.setattr(RunFolderHook, "save_now", fill)
    try:
        with pytest.raises(TinyMIMError, match=r"cannot write .*iter_4\.pth"):
            train_segmentor(DEMO, work_dir=folder, data_root=scenes, cfg_options=small())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["iter_2.pth"]
    load_segmentor(folder / "segmentor.pth")


def test_student_and_its_hash_and_another_model(scenes, small, tmp_path, capsys):
    from tinymim.files import sha256_file

    student = ViT(img_size=32, embed_dim=24, depth=4, num_heads=2)
    save_student(student, tmp_path / "student.pth", {})
    options = small(**{"train_cfg.max_iters": 1})
    result = train_segmentor(
        DEMO, work_dir=tmp_path / "run", data_root=scenes, student=tmp_path / "student.pth", cfg_options=options
    )
    assert "loaded" in capsys.readouterr().out
    content = torch.load(result.segmentor, weights_only=True)
    assert content["meta"]["student_sha256"] == sha256_file(tmp_path / "student.pth")
    assert "student.pth" not in content["meta"]["config"]
    change = (content["state_dict"]["backbone.blocks.1.mlp.fc1.weight"] - student.blocks[1].mlp.fc1.weight).abs().max()
    assert change < 0.01  # one small step away from the student's weights
    with pytest.raises(ConfigError, match=r"model\.backbone\.embed_dim=24"):
        train_segmentor(
            DEMO,
            work_dir=tmp_path / "b",
            data_root=scenes,
            student=tmp_path / "student.pth",
            cfg_options={"train_cfg.max_iters": 1},
        )
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train_segmentor(DEMO, work_dir=tmp_path / "c", data_root=scenes, student=tmp_path / "absent.pth")


def test_used_folders_and_other_models(trained, scenes, small, tmp_path):
    with pytest.raises(ConfigError, match="--overwrite"):
        train_segmentor(DEMO, work_dir=trained.work_dir, data_root=scenes, cfg_options=small())
    with pytest.raises(ConfigError, match="no run to resume"):
        train_segmentor(DEMO, work_dir=tmp_path / "new", data_root=scenes, resume=True, cfg_options=small())
    with pytest.raises(ConfigError, match=r"another model .*model\.decode_head"):
        train_segmentor(
            DEMO,
            work_dir=trained.work_dir,
            data_root=scenes,
            resume=True,
            cfg_options=small(**{"model.decode_head.channels": 8}),
        )


def test_amp_is_bfloat16_on_the_cpu(trained, scenes, small, tmp_path):
    """Nearly the losses of float32; float32 weights; validated in float32."""
    result = train_segmentor(
        DEMO,
        work_dir=tmp_path / "run",
        data_root=scenes,
        amp=True,
        device="cpu",
        cfg_options=small(**{"train_cfg.max_iters": 3}),
    )
    ours, theirs = (lines(r.work_dir)[0]["loss"] for r in (result, trained))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.02)
    state = torch.load(result.segmentor, weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    again = test_segmentor(None, result.segmentor)
    assert np.array_equal(again.confusion, result.confusion)


def test_other_samplers_are_refused(scenes, small, tmp_path):
    with pytest.raises(ConfigError, match="cannot skip"):
        train_segmentor(
            DEMO,
            work_dir=tmp_path / "run",
            data_root=scenes,
            cfg_options=small(**{"train_dataloader.sampler.type": "InfiniteSampler"}),
        )


def test_files_that_are_no_segmentor(trained, tmp_path):
    save_student(ViT(img_size=32, embed_dim=24, depth=2, num_heads=2), tmp_path / "student.pth", {})
    with pytest.raises(CheckpointError, match="holds no segmentor"):
        load_segmentor(tmp_path / "student.pth")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_segmentor(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="does not fit the config"):
        load_segmentor(trained.segmentor, DEMO)
    content = torch.load(trained.segmentor, weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match="--config"):
        load_segmentor(tmp_path / "bare.pth")


def test_other_classes_at_test_time(trained, tmp_path):
    from tests.seg.test_folders import BOTH, make

    with pytest.raises(DataError, match="knows 12 classes"):
        test_segmentor(None, trained.segmentor, data_root=make(tmp_path, BOTH))


def test_classes_in_another_order_or_of_other_names(trained, scenes, tmp_path, capsys):
    """The same labels under other ids: matched by name, with the same scores; other names are refused."""
    folder, order = shutil.copytree(scenes, tmp_path / "scenes"), np.r_[[3, 1, 2, 0], 11:3:-1]
    meta = json.loads((folder / "dataset.json").read_text())
    changed = meta | {key: [meta[key][i] for i in order] for key in ("classes", "palette")}
    changed["classes"][0] = changed["classes"][0].upper() + " "
    (folder / "dataset.json").write_text(json.dumps(changed))
    table = np.arange(256, dtype=np.uint8)
    table[:12] = np.argsort(order)
    for label in folder.glob("annotations/*/*.png"):
        Image.fromarray(table[np.asarray(Image.open(label))]).save(label)
    result = test_segmentor(None, trained.segmentor, data_root=folder)
    assert "in another order than the folder's; they were matched by name" in capsys.readouterr().out
    assert result.classes == changed["classes"]
    np.testing.assert_array_equal(result.confusion, trained.confusion[np.ix_(order, order)])
    changed["classes"][5] = "something else"
    (folder / "dataset.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=r"has other classes than .*\n  why: its class \d+ is .*\n.*use its names"):
        test_segmentor(None, trained.segmentor, data_root=folder)
    (folder / "dataset.json").unlink()
    result = test_segmentor(None, trained.segmentor, data_root=folder)
    assert "only one of segmentor and folder names its classes; they were matched by number" in capsys.readouterr().out
    assert len(result.to_dict()["class_IoU"]) == 12


def test_a_batch_of_one_is_refused_before_anything_is_written(scenes, small, tmp_path):
    """By training and by its dry run; a model without batch normalisation after pooling trains on."""
    from tinymim.seg import estimate_segmentor

    one = small(**{"train_dataloader.batch_size": 1, "train_cfg.max_iters": 1})
    for start in (estimate_segmentor, lambda *a, **k: train_segmentor(*a, work_dir=tmp_path / "run", **k)):
        with pytest.raises(ConfigError, match=r"batch of one .*\n.*psp_modules\.0.*\n.*train_dataloader\.batch_size=2"):
            start(DEMO, data_root=scenes, cfg_options=one)
    assert not (tmp_path / "run").exists()
    one |= {"model.decode_head.pool_scales": (2, 3)}
    estimate_segmentor(DEMO, data_root=scenes, cfg_options=one)
    cfg, state = find_config("pidnet_s_camvid"), torch.get_rng_state()
    plain_batch_norm(cfg)
    cfg.train_dataloader.batch_size = 1
    with pytest.raises(ConfigError, match=r"backbone\.spp"):
        check_batch(cfg, model_outline(cfg))
    assert torch.equal(torch.get_rng_state(), state)


def test_camvid_learns_within_a_few_steps(shared, tmp_path):
    """Real photos, void ignored: 16 steps of a tiny model beat the untrained one."""
    options = {
        "train_cfg.max_iters": 16,
        "train_cfg.val_interval": 100,
        "optim_wrapper.optimizer.lr": 3e-3,
        "train_dataloader.batch_size": 4,
        "train_dataloader.num_workers": 0,
        "val_dataloader.num_workers": 0,
        "val_dataloader.dataset.indices": 8,
        "train_dataloader.dataset.pipeline.3.crop_size": (96, 96),
        "model.data_preprocessor.size": (96, 96),
        "model.backbone.img_size": (96, 96),
        "model.backbone.depth": 4,
        "model.backbone.out_indices": (0, 1, 2, 3),
        "model.backbone.embed_dim": 24,
        "model.backbone.num_heads": 2,
        "model.decode_head.in_channels": [24] * 4,
        "model.decode_head.channels": 16,
        "model.auxiliary_head.in_channels": 24,
        "model.auxiliary_head.channels": 16,
        "default_hooks.checkpoint.log_interval": 1,
    }
    result = train_segmentor(
        "upernet_tinymim_t_light_camvid",
        work_dir=tmp_path / "run",
        data_root=shared / "data" / "camvid",
        cfg_options=options,
    )
    losses = [line["loss"] for line in lines(result.work_dir) if "loss" in line]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert result.images == 8
    assert result.confusion.sum() < 8 * 480 * 360  # void pixels are not counted
    assert result.aacc > 0.2


def test_a_folder_that_is_taken_is_named_by_its_option(trained, scenes, small):
    with pytest.raises(
        ConfigError, match=r"already holds a run[\s\S]*--overwrite to start again, or --work-dir \S+run-2"
    ):
        train_segmentor(DEMO, work_dir=trained.work_dir, data_root=scenes, cfg_options=small())


def test_losses_may_be_read_a_step_later_as_on_a_gpu(trained, scenes, small, tmp_path, monkeypatch):
    """The same run; and a loss that is not finite is found before anything is saved, with its own batch."""
    from tinymim.seg import loop

    monkeypatch.setattr(loop, "READ_AT_ONCE", ())
    options = small(**{"default_hooks.checkpoint.log_interval": 4, "default_hooks.checkpoint.interval": 3})
    late = train_segmentor(DEMO, work_dir=tmp_path / "late", data_root=scenes, cfg_options=options)
    wanted = [line for line in lines(trained.work_dir) if line.get("step") in (4, 6)]
    assert lines(late.work_dir) == wanted
    whole, theirs = (torch.load(r.segmentor, weights_only=True)["state_dict"] for r in (late, trained))
    assert all(torch.equal(whole[key], theirs[key]) for key in theirs)
    forward, calls = TinyMIMBackbone.forward, []

    def spoil(self, images):
        calls.append(1)
        return tuple(level * (float("nan") if len(calls) == 5 else 1.0) for level in forward(self, images))

    monkeypatch.setattr(TinyMIMBackbone, "forward", spoil)
    with pytest.raises(CheckFailed, match="step 5 is not finite"):
        train_segmentor(DEMO, work_dir=tmp_path / "nan", data_root=scenes, cfg_options=options)
    assert torch.load(tmp_path / "nan" / "bad_batch_5_rank0.pth", weights_only=True)["step"] == 5
    assert [p.name for p in (tmp_path / "nan" / "checkpoints").iterdir()] == ["iter_3.pth"]


def test_validations_restart_no_workers_and_take_several_photos(scenes, small, tmp_path, monkeypatch):
    from torch.utils.data import dataloader

    from tinymim.seg import inference

    started, sizes = [], []
    init, predict = dataloader._MultiProcessingDataLoaderIter.__init__, inference.predict
    monkeypatch.setattr(
        dataloader._MultiProcessingDataLoaderIter,
        "__init__",
        lambda self, loader: (started.append(loader.batch_size), init(self, loader))[1],
    )
    monkeypatch.setattr(
        inference, "predict", lambda model, batch: (sizes.append(len(batch["inputs"])), predict(model, batch))[1]
    )
    options = {"train_cfg.val_interval": 2, "train_dataloader.num_workers": 1, "val_dataloader.num_workers": 1}
    train_segmentor(DEMO, work_dir=tmp_path / "run", data_root=scenes, cfg_options=small(**options))
    assert started == [2, inference.PHOTOS]  # one set for training, one for three validations
    assert sizes == [5, 5, 5]
