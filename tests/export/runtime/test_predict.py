"""``tinymim predict``: photos, folders, videos; the example; a machine with numpy, Pillow and onnxruntime only."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.export import tiny
from tests.export.camvid import TorchEngine
from tinymim import cli
from tinymim.errors import ConfigError, DataError
from tinymim_export.precision.variants import apply_variants
from tinymim_export.runtime.metadata import load_proto, save_proto, write_metadata
from tinymim_export.runtime.pictures import Video, VideoWriter, blend, count_ids, overlaid, palette_for
from tinymim_export.runtime.predict import predict
from tinymim_export.runtime.predictor import Predictor, read_photo
from tinymim_export.runtime.resize import resize_bilinear

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def photos(camvid):
    return sorted((camvid / "images" / "validation").iterdir())


@pytest.fixture(scope="session")
def variants(camvid_files, tmp_path_factory):
    """The free file as a mask file, as one that takes uint8 pixels, and as both."""
    import onnx

    root = tmp_path_factory.mktemp("variants")

    def masks(proto):
        graph = proto.graph
        ids = [
            onnx.helper.make_node("ArgMax", ["logits"], ["ids"], axis=1, keepdims=0),
            onnx.helper.make_node("Cast", ["ids"], ["mask"], to=onnx.TensorProto.UINT8),
        ]
        graph.node.extend(ids)
        del graph.output[:]
        graph.output.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.UINT8, ["n", "h", "w"]))
        return proto

    made = {"free": Path(camvid_files["free"])}
    pixels = apply_variants(load_proto(made["free"]), ["pixels"])
    for name, proto in (("pixels", pixels), ("mask", masks(load_proto(made["free"]))), ("pixels mask", masks(pixels))):
        made[name] = root / f"{name}.onnx"
        save_proto(proto, made[name])
    return made


def test_a_photo(camvid_files, photos, tmp_path, capsys):
    mask, told = tmp_path / "mask.png", tmp_path / "told.json"
    argv = ["predict", camvid_files["free"], str(photos[0]), "--out", str(mask), "--overlay", "--alpha", "0.4"]
    assert cli.main([*argv, "--json", str(told), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "next: tinymim bench" in out
    with Image.open(mask) as image:
        assert image.mode == "P"
        ids, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    photo = read_photo(photos[0])
    assert ids.shape == photo.shape[:2] == (360, 480)
    np.testing.assert_array_equal(ids, Predictor(camvid_files["free"], threads=1).mask(photo))
    about = TorchEngine(camvid_files["whole"]).meta
    np.testing.assert_array_equal(colours, np.array(about["palette"], np.uint8)[ids])
    value = json.loads(told.read_text())
    row = value["rows"][0]
    assert value["kind"] == "tinymim.predict"
    assert row["size"] == [360, 480]
    assert row["ms"] > 0
    assert sum(row["share"].values()) == pytest.approx(1)
    for name, share in row["share"].items():
        assert share == pytest.approx((ids == about["classes"].index(name)).mean())
    with Image.open(tmp_path / "mask_overlay.jpg") as image:
        over = np.asarray(image).astype(int)
    assert over.shape[1] == 480
    assert over.shape[0] > 360  # the legend
    assert np.abs(over[:360] - (0.6 * photo + 0.4 * colours)).mean() < 6  # JPEG
    assert cli.main([*argv, "--threads", "1"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert cli.main([*argv, "--threads", "1", "--overwrite"]) == 0


def test_logits_are_the_models(camvid_files, photos):
    photo = Image.open(photos[1])
    ours = Predictor(camvid_files["free"], threads=1).logits(photo)
    theirs = Predictor(engine=TorchEngine(camvid_files["whole"])).logits(photo)
    assert ours.shape == (11, 360, 480)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_folder_of_odd_names(camvid_files, photos, tmp_path, capsys):
    """Names that are not UTF-8, dangling links, pipes, label maps: the photos get masks, the rest a line."""
    folder, name = tmp_path / "d", os.fsdecode(b"q\xff.jpg")
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
        shutil.copy(photos[0], folder / part / "a.jpg")
    (folder / "images" / "a.jpg").rename(folder / "images" / name)
    (folder / "images" / "z.jpg").symlink_to("/nonexistent")
    os.mkfifo(folder / "images" / "pipe.jpg")
    told, table = tmp_path / "told.json", tmp_path / "told.md"
    argv = ["predict", camvid_files["free"], str(folder), "--out", str(tmp_path / "masks"), "--threads", "1"]
    assert cli.main([*argv, "--overlay", "--json", str(told)]) == 0
    out = capsys.readouterr().out
    assert "passed over broken links, or no regular files: images/pipe.jpg, images/z.jpg" in out
    assert "passed over label maps: annotations" in out
    assert [Path(row["source"]).name for row in json.loads(told.read_text())["rows"]] == [name]
    assert sorted(p.name for p in (tmp_path / "masks" / "images").iterdir()) == sorted(
        [os.fsdecode(b"q\xff.png"), os.fsdecode(b"q\xff_overlay.jpg")]
    )
    predict(camvid_files["free"], folder, tmp_path / "again", threads=1, quiet=True).to_markdown(table)
    assert "q\\udcff" in table.read_text("utf-8")


def test_a_folder_with_damaged_and_sideways_photos(camvid_files, photos, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "masks"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(photos[0], folder / "a.jpg")
    Image.open(photos[0]).save(folder / "a.png")
    (folder / "cut.jpg").write_bytes(photos[1].read_bytes()[:2000])
    (folder / "notes.txt").write_text("no photo")
    upright = Image.open(photos[2])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "deep" / "turned.png", exif=exif)
    told = tmp_path / "told.json"
    argv = ["predict", camvid_files["free"], str(folder), "--out", str(out), "--json", str(told), "--threads", "1"]
    assert cli.main(argv) == 1  # one photo could not be read
    printed = capsys.readouterr().out
    assert f"skipped: {folder / 'cut.jpg'} (" in printed
    assert "3 written, 1 skipped" in printed
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))
    assert written == ["a.jpg.png", "a.png.png", "deep/turned.png"]
    np.testing.assert_array_equal(
        np.asarray(Image.open(out / "deep" / "turned.png")), Predictor(camvid_files["free"], threads=1).mask(upright)
    )
    assert json.loads(told.read_text())["skipped"][0]["photo"] == str(folder / "cut.jpg")


def test_nothing_readable(camvid_files, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="no photos in"):
        predict(camvid_files["free"], tmp_path / "photos", tmp_path / "masks", threads=1)
    (tmp_path / "photos" / "a.jpg").write_text("hello")
    with pytest.raises(DataError, match="can be read"):
        predict(camvid_files["free"], tmp_path / "photos", tmp_path / "masks", threads=1, quiet=True)
    assert not (tmp_path / "masks").exists()


def test_options_that_make_no_sense(camvid_files, photos, tmp_path):
    shutil.copy(photos[0], tmp_path / "p.jpg")
    Image.open(photos[0]).save(tmp_path / "p.png")
    (tmp_path / "v.mp4").write_text("no video")
    for source, out, options, words in (
        ("p.jpg", "mask.jpg", {}, "cannot be .jpg"),
        ("p.png", "p.png", dict(overwrite=True), "is the photo"),
        ("p.jpg", "mask.png", dict(alpha=2), "not possible"),
        ("none.jpg", "mask.png", {}, "does not exist"),
        (".", "mask.png", {}, "is not a folder"),
        (".", "masks", {}, "is inside"),
        ("v.mp4", "v.avi", {}, "cannot become"),
        ("v.mp4", "v.mp4", dict(overwrite=True), "is the video"),
        ("v.mp4", "o.mp4", {}, "cannot read the video"),
        ("p.jpg", "mask.png", dict(classes=["a"]), "has its own class names"),
        ("p.jpg", "mask.png", dict(mode="tiled"), "unknown"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            predict(camvid_files["free"], tmp_path / source, tmp_path / out, threads=1, quiet=True, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.jpg", "p.png", "v.mp4"]


def test_a_file_of_another_origin(camvid_files, photos, tmp_path, capsys):
    """Without metadata: normalisation and names from options, colours of our own."""
    proto = load_proto(camvid_files["free"])
    del proto.metadata_props[:]
    save_proto(proto, tmp_path / "bare.onnx")
    (tmp_path / "names.txt").write_text("\n".join(f"thing {i}" for i in range(11)) + "\n")
    argv = [
        "predict",
        str(tmp_path / "bare.onnx"),
        str(photos[0]),
        "--out",
        str(tmp_path / "mask.png"),
        "--threads",
        "1",
    ]
    assert cli.main(argv) == 2
    assert "does not say how photos are normalised" in capsys.readouterr().err
    argv += ["--mean", "123.675", "116.28", "103.53", "--std", "58.395", "57.12", "57.375"]
    assert cli.main([*argv, "--classes", str(tmp_path / "names.txt"), "--json", str(tmp_path / "told.json")]) == 0
    (row,) = json.loads((tmp_path / "told.json").read_text())["rows"]
    assert all(name.startswith("thing ") for name in row["share"])
    assert cli.main([*argv, "--overwrite", "--classes", str(tmp_path / "none.txt")]) == 2
    with Image.open(tmp_path / "mask.png") as image:
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]


def test_a_mask_file_decides_before_the_resize(variants, photos):
    """Half-size photos of a mask file: every other pixel of what the logits file decides at that size."""
    photo = read_photo(photos[0])
    small = resize_bilinear(photo, (180, 240))
    for name in ("mask", "pixels mask"):
        predictor = Predictor(variants[name], threads=1)
        predictor.rule = {"scale": [240, 180], "keep_ratio": False}
        mask = predictor.mask(photo)
        assert "the file decides before the resize" in predictor.notes[0]
        at_small = Predictor(variants["free"], threads=1)
        at_small.rule = {}
        assert (mask == at_small.mask(small).repeat(2, 0).repeat(2, 1)).mean() > 0.9999
        with pytest.raises(ConfigError, match="gives masks, no logits"):
            predictor.logits(photo)
    sliding = Predictor(variants["mask"], threads=1, mode="whole")
    sliding.mode, sliding.crop, sliding.stride = "slide", (96, 128), (64, 85)
    with pytest.raises(ConfigError, match="cannot run in windows"):
        sliding.mask(photo)


def load_example():
    spec = importlib.util.spec_from_file_location("segment_photo", ROOT / "examples" / "segment_photo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["free", "pixels", "mask", "pixels mask", "fixed"])
def test_the_example_gives_the_same_mask(name, variants, camvid_files, photos, tmp_path, capsys):
    file, photo = variants.get(name, camvid_files["fixed"]), tmp_path / "photo.jpg"
    shutil.copy(photos[3], photo)
    load_example().main(str(file), str(photo))
    theirs = np.asarray(Image.open(tmp_path / "photo_mask.png"))
    ours = Predictor(file, threads=1, resize_to_file=name == "fixed").mask(read_photo(photo))
    np.testing.assert_array_equal(theirs, ours)
    assert Image.open(tmp_path / "photo_overlay.png").size == (480, 360)
    assert "%  Road" in capsys.readouterr().out


def test_the_example_is_short_and_alone():
    text = (ROOT / "examples" / "segment_photo.py").read_text()
    assert "tinymim_export" not in text.replace("tinymim-export", "")
    assert {line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))} == {
        "json",
        "sys",
        "pathlib",
        "numpy",
        "onnxruntime",
        "PIL",
    }


@pytest.fixture
def clip(photos, tmp_path):
    """Three frames of 180 x 240 as an .mp4, ten a second."""
    pytest.importorskip("av")
    writer = VideoWriter(tmp_path / "clip.mp4", Fraction(10))
    for photo in photos[:3]:
        writer.add(resize_bilinear(read_photo(photo), (180, 240)))
    writer.close()
    return tmp_path / "clip.mp4"


def test_a_video(camvid_files, clip, tmp_path, capsys):
    argv = ["predict", camvid_files["free"], str(clip), "--threads", "1"]
    assert cli.main([*argv, "--out", str(tmp_path / "over.mp4"), "--json", str(tmp_path / "told.json")]) == 0
    (row,) = json.loads((tmp_path / "told.json").read_text())["rows"]
    assert (row["frames"], row["size"], row["mask"]) == (3, [180, 240], None)
    assert cli.main([*argv, "--out", str(tmp_path / "frames")]) == 0
    frames, over = list(Video(clip)), Video(tmp_path / "over.mp4")
    assert over.rate == 10
    predictor = Predictor(camvid_files["free"], threads=1)
    for i, (frame, seen) in enumerate(zip(frames, over, strict=True), 1):
        mask = predictor.mask(frame)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "frames" / f"{i:06d}.png")), mask)
        assert (
            np.abs(seen.astype(int) - blend(frame, mask, predictor.palette, 0.5)).mean() < 12
        )  # H.264 and its colours
    capsys.readouterr()
    assert cli.main([*argv, "--out", str(tmp_path / "over.mp4")]) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_a_sideways_video_is_turned_upright(clip, tmp_path):
    import av

    turned = tmp_path / "turned.mp4"
    with av.open(str(clip)) as given, av.open(str(turned), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV writes no rotation")
        stream.set_display_rotation(90)
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    straight, upright = next(iter(Video(clip))), next(iter(Video(turned)))
    np.testing.assert_array_equal(upright, np.rot90(straight))


def test_video_without_pyav(camvid_files, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    assert cli.main(["predict", camvid_files["free"], str(clip), "--out", str(tmp_path / "o.mp4")]) == 2
    assert 'pip install "tinymim[video]"' in capsys.readouterr().err
    assert not (tmp_path / "o.mp4").exists()


def test_a_video_that_ends_in_the_middle(camvid_files, clip, tmp_path, capsys):
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:3000])
    assert cli.main(["predict", camvid_files["free"], str(tmp_path / "cut.mp4"), "--out", str(tmp_path / "o.mp4")]) == 2
    assert "cannot read the video" in capsys.readouterr().err
    assert not list(tmp_path.glob("*o.mp4*"))


def test_colours_and_legend():
    palette = palette_for(256)
    assert len(set(palette)) == 256
    picture = np.full((90, 120, 3), 50, np.uint8)
    entries = [(f"class number {i}", palette[i + 1]) for i in range(5)] + [("\u9053\u8def", (9, 8, 7))]
    out = np.asarray(overlaid(picture, np.zeros((90, 120), np.uint8), palette, 0.0, entries))
    np.testing.assert_array_equal(out[:90], picture)
    assert out.shape[1] == 120
    below = {tuple(map(int, colour)) for colour in out[90:].reshape(-1, 3)}
    assert {*palette[1:6], (9, 8, 7)} <= below


TARGET = """
import sys
from tinymim.cli import main
for argv in ARGV:
    code = main(argv)
    assert code == 0, (argv, code)
from tinymim_export.precision import PRECISIONS
from tinymim_export.tune.targets import targets
assert list(PRECISIONS)[:3] == ["fp32", "fp16", "int8"] and "openvino" in targets()  # the registries need no onnx
heavy = {"torch", "torchvision", "timm", "mmengine", "mmseg", "mmcv", "cv2", "onnx", "scipy"}
assert not heavy & {name.partition(".")[0] for name in sys.modules}
"""


def test_a_machine_with_numpy_pillow_and_onnxruntime_only(camvid, camvid_files, photos, tmp_path):
    """``pip install --no-deps .`` beside the three packages, nothing else importable: every light verb, the example."""
    source, box = tmp_path / "source", tmp_path / "box"
    for name in ("tinymim", "export", "mmseg_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(box)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    for name in ("numpy", "PIL", "onnxruntime"):
        package = Path(importlib.util.find_spec(name).origin).parent
        libraries = {"numpy": "numpy.libs", "PIL": "pillow.libs", "onnxruntime": "onnxruntime.libs"}[name]
        for folder in (package, package.with_name(libraries)):
            if folder.is_dir():
                (box / folder.name).symlink_to(folder)

    def run(*arguments):  # -S: no site-packages but the box
        done = subprocess.run(
            [sys.executable, "-S", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(box), "PATH": os.environ["PATH"]},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    file, photo = camvid_files["free"], str(tmp_path / "photo.jpg")
    shutil.copy(photos[0], photo)
    argv = [
        ["eval", file, "--data", str(camvid), "--limit", "1", "--masks", "eval"],
        ["predict", file, photo, "--out", "mask.png", "--overlay"],
        ["bench", file, "--runs", "10", "--size", "64", "96", "--threads", "1", "--json", "bench.json"],
        ["report", file, "bench.json", "--out", "report.html"],
    ]
    printed = run("-c", TARGET.replace("ARGV", repr(argv)))
    assert "mIoU" in printed
    run(str(ROOT / "examples" / "segment_photo.py"), file, photo)
    ours, theirs = (np.asarray(Image.open(tmp_path / name)) for name in ("mask.png", "photo_mask.png"))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, np.asarray(Image.open(tmp_path / "eval" / f"{photos[0].stem}.png")))


def test_one_photo_that_fails_does_not_stop_the_others(tmp_path, capsys):
    """A fixed-size file without a rule: one photo of another size, one damaged, two right ones after them."""
    file = tiny.write_segmentor(tmp_path / "fixed.onnx")
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a", (70, 96)), ("c", (64, 96)), ("d", (64, 96))):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"no photo")
    assert cli.main(["predict", str(file), str(folder), "--out", str(tmp_path / "masks"), "--overlay"]) == 1
    out = capsys.readouterr().out
    assert "2 written, 2 skipped" in out
    assert f"skipped: {folder / 'a.png'} (fixed.onnx takes 64x96 only" in out
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == [
        "c.png",
        "c_overlay.jpg",
        "d.png",
        "d_overlay.jpg",
    ]
    with pytest.raises(ConfigError, match="takes 64x96 only"):
        predict(file, folder / "a.png", tmp_path / "m.png", quiet=True)


def test_strips_and_blocks_give_what_the_whole_gives(tmp_path, monkeypatch):
    """A photo too wide for one strip of windows, and an overlay of many blocks."""
    proto = tiny.segmentor_proto(free=True)
    windows = {"mode": "slide", "crop": [32, 40], "slide_stride": [20, 28], "scale": None, "pad": {"size_divisor": 8}}
    write_metadata(proto, {"resize": windows})
    save_proto(proto, tmp_path / "slide.onnx")
    photo = np.random.default_rng(0).integers(0, 256, (77, 301, 3), np.uint8)
    plain = Predictor(tmp_path / "slide.onnx", threads=1)
    mask, logits = plain.mask(photo), plain.logits(photo)
    np.testing.assert_array_equal(mask, logits.argmax(0))
    monkeypatch.setattr("tinymim_export.runtime.predictor.STRIP", 3 * 32 * 90)
    strips = Predictor(tmp_path / "slide.onnx", threads=1)
    assert len({columns.start for _, columns, _ in strips._slide(photo)}) == 4
    np.testing.assert_array_equal(strips.logits(photo), logits)
    np.testing.assert_array_equal(strips.mask(photo), mask)
    whole, counts = np.asarray(overlaid(photo, mask, palette_for(3), 0.5, [])), count_ids(mask)
    monkeypatch.setattr("tinymim_export.runtime.pictures.BLOCK", 1000)
    np.testing.assert_array_equal(np.asarray(overlaid(photo, mask, palette_for(3), 0.5, [])), whole)
    np.testing.assert_array_equal(whole[:77], blend(photo, mask, palette_for(3), 0.5))
    assert count_ids(mask).tolist() == counts.tolist() == np.bincount(mask.ravel(), minlength=256).tolist()


def test_a_photo_too_large_to_run_whole_is_refused(tmp_path, monkeypatch):
    file = tiny.write_segmentor(tmp_path / "free.onnx", free=True)
    photo = np.zeros((640, 960, 3), np.uint8)
    monkeypatch.setattr("tinymim_export.runtime.predictor.free_memory", lambda: 10_000_000)
    with pytest.raises(ConfigError, match="too large to run whole") as caught:
        Predictor(file, threads=1).mask(photo)
    assert "--mode slide" in caught.value.fix
    assert Predictor(file, threads=1, mode="slide").mask(photo).shape == (640, 960)  # windows of the exported size


PEAK = """
import sys
from tinymim_export.runtime.predict import predict
predict(*sys.argv[1:], overlay=True, threads=1, quiet=True)
lines = open("/proc/self/status").read().splitlines()  # getrusage would count the process that started this one
print(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_the_memory_of_a_large_photo_is_a_few_times_its_pixels(mode, tmp_path):
    """8000 x 6000: 137 MiB of pixels. Reading, mask, overlay and its JPEG hold them about five times (before: 19)."""
    proto, windows = tiny.segmentor_proto(free=True), {"crop": [512, 512], "slide_stride": [448, 448], "scale": None}
    rule = windows if mode == "slide" else {"scale": [96, 64], "keep_ratio": True}
    write_metadata(proto, {"resize": rule | {"mode": mode}})
    save_proto(proto, tmp_path / "file.onnx")
    Image.fromarray(np.zeros((6000, 8000, 3), np.uint8)).save(tmp_path / "large.jpg")
    argv = [str(tmp_path / name) for name in ("file.onnx", "large.jpg", "mask.png")]
    done = subprocess.run([sys.executable, "-c", PEAK, *argv], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 1000
