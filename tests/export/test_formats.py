"""``tinymim-export --format``: the files are run by their own runtime and give what the .onnx file gives."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.export import tiny
from tinymim.errors import CheckFailed, ConfigError, TinyMIMError
from tinymim.files import sha256_file
from tinymim_export import cli
from tinymim_export.formats import FORMATS, REFUSED, base, convert
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.predictor import Predictor

pytest.importorskip("openvino")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def onnx(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("it's tiny") / "seg.onnx"
    tiny.write_segmentor(path)
    return path


@pytest.fixture(scope="module")
def photos(onnx) -> Path:
    """Photos of several kinds."""
    folder, random = onnx.parent / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i, (mode, size) in enumerate((("RGB", (90, 70)), ("L", (64, 64)), ("P", (33, 61)), ("RGBA", (80, 50)))):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        coarse.convert(mode).save(folder / f"{i}.png")
    return folder


def say(*words) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main([*map(str, words)])
    return code, out.getvalue()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_openvino_gives_what_the_file_gives(onnx, photos, tmp_path, precision):
    out = tmp_path / "made.xml"
    words = ["--from", onnx, "--format", "openvino", "--out", out, "--precision", precision, "--photos", photos]
    code, said = say(*words, "--json", tmp_path / "made.json")
    assert code == 0, said
    assert f"next: tinymim bench {out} --runtime openvino" in said
    told = json.loads((tmp_path / "made.json").read_text("utf-8"))
    assert told["precision"] == precision
    assert told["source_sha256"] == sha256_file(onnx)
    assert {name: about["sha256"] for name, about in told["files"].items()} == {
        name: sha256_file(tmp_path / name) for name in ("made.xml", "made.bin")
    }
    assert told["rows"][0]["source"] == "photos"
    assert told["rows"][0]["equal_pixels"] > 0.98
    mine, theirs = Predictor(out, runtime="openvino"), Predictor(onnx)
    assert mine.classes == theirs.classes
    assert mine.contract["mean"] == theirs.contract["mean"]
    photo = np.asarray(Image.open(photos / "0.png").resize((96, 64)))
    assert (mine.mask(photo) == theirs.mask(photo)).mean() > 0.98
    named = (mine.engine.meta.get("precision") or {}).get("name", "fp32")
    assert (named, mine.engine.verified) == (precision, None)


def test_the_weights_of_fp16_take_half(onnx, tmp_path):
    sizes = {}
    for precision in ("fp32", "fp16"):
        convert(onnx, tmp_path / f"{precision}.xml", format="openvino", precision=precision)
        sizes[precision] = (tmp_path / f"{precision}.bin").stat().st_size
    assert sizes["fp16"] < 0.7 * sizes["fp32"]


def test_an_int8_file_stays_int8(onnx, photos, tmp_path):
    out = tmp_path / "int8.xml"
    words = ["--precision", "int8", "--calibration", photos, "--calibration-count", 4, "--photos", photos]
    code, said = say("--from", onnx, "--format", "openvino", "--out", out, *words)
    assert code == 0, said
    assert "int8.xml: int8" in said
    assert "FakeQuantize" in out.read_text("utf-8")
    assert open_engine(out, runtime="openvino").meta["precision"]["name"] == "int8"
    with pytest.raises(ConfigError, match="needs photos"):
        convert(onnx, tmp_path / "x.xml", format="openvino", precision="int8")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["int8.bin", "int8.xml"]


def test_other_values_leave_no_file(onnx, photos, tmp_path, monkeypatch):
    class Wrong(type(FORMATS["openvino"])):
        def write(self, source, out, precision, start):
            tiny.write_segmentor(source.with_name("other.onnx"), seed=3)
            return super().write(source.with_name("other.onnx"), out, precision, start)

    monkeypatch.setitem(base.FORMATS, "openvino", Wrong())
    with pytest.raises(CheckFailed, match="does not give what"):
        convert(onnx, tmp_path / "x.xml", format="openvino", photos=photos)
    assert not [*tmp_path.iterdir()]


def test_what_is_refused(onnx, tmp_path, capsys):
    for words, why in (
        (["--format", "openvino"], "--format and --out belong together"),
        (["--format", "openvino", "--out", "x.onnx"], "is no name for OpenVINO IR"),
        (["--format", "openvino", "--out", "x.xml", "--onnx", "y.onnx"], "--format does one thing"),
        (["--format", "nonsense", "--out", "x.xml"], "known: executorch, openvino"),
        (["--format", "executorch", "--out", "x.pte"], "cannot start at an .onnx file"),
        *((["--format", name, "--out", "x"], REFUSED[name][:40]) for name in REFUSED),
    ):
        assert cli.main(["--from", str(onnx), *words]) == 2, words
        assert why in capsys.readouterr().err
    (tmp_path / "bad.xml").write_text("<net/>", "utf-8")
    with pytest.raises(TinyMIMError):
        open_engine(tmp_path / "bad.xml", runtime="openvino")


def test_the_table_of_formats_names_all():
    text = (ROOT / "docs" / "formats.md").read_text("utf-8")
    for name in (*FORMATS, *REFUSED):
        assert f"| `{name}` |" in text, name
