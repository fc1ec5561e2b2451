"""``tinymim eval`` against tools/test_seg.py on real photos: whole, windows, padding, thresholds; bad files."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.export.camvid import SLIDE, TorchEngine, write_folder, write_segmentor
from tinymim import cli
from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim.seg import test_segmentor
from tinymim.seg.metric import SegMetric
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.metadata import load_proto, save_proto, write_metadata
from tinymim_export.runtime.miou import evaluate
from tinymim_export.runtime.predictor import Predictor, window_places


def their_masks(monkeypatch, checkpoint, camvid):
    """Scores and masks (photo -> uint8 (H, W)) of the PyTorch model, by the code of tools/test_seg.py."""
    masks, process = {}, SegMetric.process

    def record(self, batch, samples):
        for sample in samples:
            mask = sample["pred_sem_seg"]["data"][0].numpy().astype(np.uint8)
            masks[Path(sample["img_path"]).stem] = mask
        process(self, batch, samples)

    monkeypatch.setattr(SegMetric, "process", record)
    return test_segmentor(None, checkpoint, data_root=camvid, device="cpu"), masks


def hold(result, masks_folder, theirs, masks):
    """mIoU within 0.01 points, 99.99 % of the pixels equal, and masks worth comparing."""
    assert result.names == sorted(masks)
    ours = {name: np.asarray(Image.open(masks_folder / f"{name}.png")) for name in masks}
    total = sum(mask.size for mask in masks.values())
    equal = sum(int((ours[name] == mask).sum()) for name, mask in masks.items())
    shares = np.bincount(np.concatenate([m.ravel() for m in masks.values()])) / total
    assert (shares > 0.005).sum() >= min(len(result.classes), 8), shares
    assert equal / total >= 0.9999
    assert abs(result.miou - theirs.miou) < 1e-4
    assert result.constant_miou == pytest.approx(theirs.constant_miou, abs=1e-12)
    assert result.confusion.sum() == theirs.confusion.sum()
    return equal / total


CASES = {
    "whole": dict(),
    "windows": dict(test=SLIDE),
    "windows of a photo that is smaller": dict(test='mode="slide", crop_size=(300, 300), stride=(200, 200)'),
    "stretched, corners aligned": dict(
        resize='dict(type="Resize", scale=(300, 250), keep_ratio=False)', align_corners=True
    ),
    "no resize": dict(resize=""),
    "half, OpenCV's other path": dict(resize='dict(type="Resize", scale=(240, 180), keep_ratio=False)'),
    "padded to a multiple": dict(pad="dict(size_divisor=64)", pad_val=1, align_corners=True),
    "padded to a size, in windows": dict(pad="dict(size=(256, 320))", test=SLIDE),
}


@pytest.mark.parametrize("name", CASES)
def test_the_host_does_what_mmsegmentation_does(name, camvid, tmp_path, monkeypatch):
    """The network is PyTorch's on both sides, so the host's part is what is compared."""
    checkpoint = write_segmentor(tmp_path / "seg.pth", camvid, **CASES[name])
    engine = TorchEngine(checkpoint)
    result = evaluate(None, camvid, engine=engine, masks=tmp_path / "masks", quiet=True)
    assert result.notes == []
    hold(result, tmp_path / "masks", *their_masks(monkeypatch, checkpoint, camvid))
    if "pad" in name:
        assert engine.shapes[0][2:] == ((256, 320) if "multiple" in name else (96, 128))


@pytest.mark.parametrize("head", ["threshold=0.55,", ""])
def test_one_channel_is_decided_by_threshold(head, shared, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", shared / "data" / "camvid", count=2, binary=True)
    checkpoint = write_segmentor(tmp_path / "seg.pth", data, classes=2, channels=1, head=head)
    result = evaluate(None, data, engine=TorchEngine(checkpoint), masks=tmp_path / "masks", quiet=True)
    hold(result, tmp_path / "masks", *their_masks(monkeypatch, checkpoint, data))


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_file_scores_as_the_model(mode, camvid_files, camvid, tmp_path, monkeypatch, capsys):
    """The command on a real .onnx against test_seg.py; windows of a fixed file against those of its model."""
    file = camvid_files["free"] if mode == "whole" else camvid_files["fixed"]
    told = tmp_path / "eval.json"
    argv = ["eval", file, "--data", str(camvid), "--masks", str(tmp_path / "masks"), "--json", str(told)]
    assert cli.main([*argv, "--markdown", str(tmp_path / "eval.md"), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert f"(onnxruntime cpu, {mode}): mIoU " in out
    assert "next: tinymim predict" in out
    value = json.loads(told.read_text())
    assert value["kind"] == "tinymim.eval"
    assert value["sha256"] == open_engine(file, threads=1).sha256
    result = evaluate(file, camvid, threads=1, quiet=True)
    assert value["mIoU"] == result.miou
    assert value["photos"]["right"] == result.right_IC.tolist()
    hold(result, tmp_path / "masks", *their_masks(monkeypatch, camvid_files[mode], camvid))
    assert (tmp_path / "eval.md").read_text().startswith(f"`{Path(file).name}` (onnxruntime cpu, {mode}, sha256 ")


def test_counts_of_photos_add_up(camvid_files, camvid):
    result = evaluate(camvid_files["free"], camvid, threads=1, limit=2, quiet=True)
    every = evaluate(camvid_files["free"], camvid, threads=1, quiet=True)
    assert result.names == every.names[::2]
    assert result.images == 2
    assert "--limit: 2 of 4 photos, evenly spread" in result.notes
    for counts, of_confusion in (
        (every.right_IC, every.confusion.diagonal()),
        (every.labelled_IC, every.confusion.sum(1)),
        (every.predicted_IC, every.confusion.sum(0)),
    ):
        assert counts.dtype == np.int64
        assert counts.shape == (4, 11)
        np.testing.assert_array_equal(counts.sum(0), of_confusion)
    np.testing.assert_array_equal(every.right_IC[::2], result.right_IC)


def test_windows_are_placed_as_mmsegmentation_places_them():
    assert window_places(200, 96, 64) == [(0, 96), (64, 160), (104, 200)]
    assert window_places(96, 96, 64) == [(0, 96)]
    assert window_places(50, 96, 64) == [(0, 50)]


def test_a_file_of_one_size(camvid_files, camvid):
    with pytest.raises(ConfigError, match=r"takes 96x128 only, the photo comes to 200x267") as caught:
        evaluate(camvid_files["fixed"], camvid, mode="whole", threads=1, quiet=True)
    assert "leave --mode whole out, add --resize-to-file" in caught.value.fix
    result = evaluate(camvid_files["fixed"], camvid, resize_to_file=True, threads=1, limit=1, quiet=True)
    assert result.mode == "stretched"
    assert "stretched to 96x128" in result.notes[0]
    free = [
        evaluate(camvid_files["free"], camvid, resize_to_file=word, threads=1, quiet=True) for word in (True, False)
    ]
    assert [result.mode for result in free] == ["whole", "whole"]
    assert free[0].miou == free[1].miou
    assert "takes any size, so nothing is stretched" in free[0].notes[0]
    with pytest.raises(ConfigError, match="windows are not stretched"):
        evaluate(camvid_files["fixed"], camvid, resize_to_file=True, mode="slide", threads=1, quiet=True)
    with pytest.raises(ConfigError, match="says nothing about windows"):
        evaluate(camvid_files["free"], camvid, mode="slide", threads=1, quiet=True)


def test_windows_of_a_file_whose_size_is_not_the_contracts(camvid, tmp_path):
    """Windows take the file's size and the contract's overlap, and the result says so."""
    checkpoint = write_segmentor(tmp_path / "seg.pth", camvid, test=SLIDE)
    predictor = Predictor(engine=TorchEngine(checkpoint, size=(48, 64)))
    assert (predictor.crop, predictor.stride) == ((48, 64), (32, 42))
    assert predictor.notes == [
        "windows of 48x64 every 32x42 pixels, the size of the file; not 96x128 as its contract says"
    ]
    predictor.rule = {"scale": None}
    with pytest.raises(ConfigError, match=r"takes 48x64 only, a window comes to 48x61"):
        predictor.mask(np.zeros((50, 61, 3), np.uint8))


def strip(file, out, **metadata):
    """The same graph without our metadata, as another tool would write it."""
    proto = load_proto(file)
    del proto.metadata_props[:]
    write_metadata(proto, metadata)
    save_proto(proto, out)
    return str(out)


def test_a_file_of_another_origin(camvid_files, camvid, tmp_path, capsys):
    bare = strip(camvid_files["free"], tmp_path / "bare.onnx")
    assert cli.main(["eval", bare, "--data", str(camvid)]) == 2
    assert "add what it was trained with, e.g. ImageNet's --mean 123.675" in capsys.readouterr().err
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # torchvision's units of the same numbers
    ours = evaluate(bare, camvid, mean=mean, std=std, threads=1, limit=1, quiet=True)
    units = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    theirs = evaluate(strip(bare, tmp_path / "b.onnx", **units), camvid, threads=1, limit=1, quiet=True)
    assert ours.miou == theirs.miou
    assert ours.mode == "whole"
    with pytest.raises(ConfigError, match="says itself how photos are normalised"):
        evaluate(camvid_files["free"], camvid, mean=mean, std=std, threads=1)
    with pytest.raises(ConfigError, match="belong together"):
        evaluate(bare, camvid, mean=mean, threads=1)


def test_wrong_classes_are_refused(camvid_files, camvid, shared, tmp_path):
    binary = write_folder(tmp_path / "binary", shared / "data" / "camvid", count=1, binary=True)
    with pytest.raises(DataError, match="knows 11 classes"):
        evaluate(camvid_files["free"], binary, threads=1, quiet=True)
    bare = strip(camvid_files["free"], tmp_path / "bare.onnx", mean=[120.0] * 3, std=[60.0] * 3)
    with pytest.raises(DataError, match="knows 11 classes"):
        evaluate(bare, binary, threads=1, quiet=True)


def test_classes_in_another_order_are_matched_by_name(camvid_files, camvid, tmp_path):
    folder = shutil.copytree(camvid, tmp_path / "data")
    meta = json.loads((folder / "dataset.json").read_text())
    table = np.r_[np.arange(11)[::-1], 11:256].astype(np.uint8)
    for label in folder.glob("annotations/*/*.png"):
        Image.fromarray(table[np.asarray(Image.open(label))]).save(label)
    meta = meta | {"classes": meta["classes"][::-1], "palette": meta["palette"][::-1]}
    (folder / "dataset.json").write_text(json.dumps(meta))
    theirs, ours = (
        evaluate(camvid_files["free"], data, threads=1, limit=1, quiet=True, masks=tmp_path / masks)
        for data, masks in ((camvid, "theirs"), (folder, "ours"))
    )
    np.testing.assert_array_equal(ours.confusion, theirs.confusion[::-1, ::-1])
    assert [note for note in ours.notes if "matched by name" in note]
    first, second = (np.asarray(Image.open(tmp_path / m / f"{ours.names[0]}.png")) for m in ("theirs", "ours"))
    np.testing.assert_array_equal(second, table[first])
    label = sorted((folder / "annotations" / "validation").glob("*.png"))[0]
    Image.fromarray(np.full(first.shape, 255, np.uint8)).save(label)
    with pytest.raises(DataError, match="no pixel of the labels of these 1 photos counts"):
        evaluate(camvid_files["free"], folder, threads=1, limit=1, quiet=True)
    meta["classes"][0] = "something else"
    (folder / "dataset.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="has other classes than"):
        evaluate(camvid_files["free"], folder, threads=1, quiet=True)


def test_values_that_are_no_numbers(camvid, tmp_path):
    engine = TorchEngine(write_segmentor(tmp_path / "seg.pth", camvid))
    engine.run = lambda images: np.full((1, 11, *images.shape[2:]), np.nan, np.float32)
    with pytest.raises(CheckFailed, match="values that are not numbers"):
        evaluate(None, camvid, engine=engine, quiet=True)


def test_files_that_cannot_be_scored(camvid_files, camvid, tmp_path, capsys):
    whole = Path(camvid_files["free"]).read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    proto = load_proto(camvid_files["free"])
    proto.opset_import[0].version = 99
    save_proto(proto, tmp_path / "new.onnx")
    for file, words in (
        (tmp_path / "none.onnx", "does not exist"),
        (tmp_path / "cut.onnx", "cut.onnx"),
        (tmp_path / "new.onnx", "opset"),
        (strip(camvid_files["free"], tmp_path / "b.onnx", part="backbone"), "is a backbone"),
    ):
        assert cli.main(["eval", str(file), "--data", str(camvid)]) == 2, file
        assert words in capsys.readouterr().err
    for options, words in (
        (["--data", str(tmp_path / "nowhere")], "there is no folder"),
        (["--data", str(camvid), "--split", "train"], "no photos in"),
        (["--data", str(camvid), "--limit", "0"], "leaves no photo"),
        (["--data", str(camvid), "--precision", "bf16"], "setting of OpenVINO"),
        (["--data", str(camvid), "--provider", "tensorrt"], "TensorrtExecutionProvider"),
        (["--data", str(camvid), "--masks", str(camvid / "annotations/validation")], "lies in the data folder"),
    ):
        assert cli.main(["eval", camvid_files["free"], *options]) == 2
        assert words in capsys.readouterr().err


def test_units_of_mean_and_std(camvid_files, camvid, tmp_path):
    bare = strip(camvid_files["free"], tmp_path / "bare.onnx")
    for mean, std in (([123.675, 116.28, 103.53], [0.229, 0.224, 0.225]), ([0.4] * 3, [58.0] * 3)):
        with pytest.raises(ConfigError, match="different units"):
            evaluate(bare, camvid, mean=mean, std=std, threads=1, limit=1, quiet=True)


def test_the_next_command_repeats_the_options(camvid_files, camvid, tmp_path, capsys):
    argv = ["eval", camvid_files["fixed"], "--data", str(camvid), "--limit", "1", "--resize-to-file", "--threads", "1"]
    assert cli.main([*argv, "--markdown", str(tmp_path / "new folder" / "a.md")]) == 0
    assert (tmp_path / "new folder" / "a.md").is_file()
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    assert "--limit 1 --resize-to-file --threads 1" in told
    told = told.removeprefix("next: tinymim ").replace("eval.json", str(tmp_path / "e.json"))
    assert cli.main(shlex.split(told.replace("--masks masks", f"--masks {tmp_path / 'masks'}"))) == 0
    assert (tmp_path / "e.json").is_file()


def test_openvino_scores_the_same_file(camvid_files, camvid):
    pytest.importorskip("openvino")
    ours = evaluate(camvid_files["free"], camvid, runtime="openvino", threads=1, limit=1, quiet=True)
    assert ours.engine == "openvino cpu f32"
    assert ours.miou == pytest.approx(
        evaluate(camvid_files["free"], camvid, threads=1, limit=1, quiet=True).miou, abs=1e-4
    )
