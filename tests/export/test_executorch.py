"""``--format executorch``: the .pte runs on ExecuTorch's own runtime and gives what the .onnx file gives."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.export.conftest import CLASSES, write_segmentor
from tinymim import cli
from tinymim.errors import ConfigError, DataError
from tinymim_export import cli as export_cli
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.predictor import Predictor

pytest.importorskip("executorch")


@pytest.mark.slow
def test_a_program_gives_what_the_onnx_file_gives(tmp_path, capsys):
    write_segmentor(tmp_path / "segmentor.pth")
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for i, size in enumerate(((96, 64), (120, 90))):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i}.png")
    start = ["--checkpoint", str(tmp_path / "segmentor.pth")]
    made, told = tmp_path / "seg.pte", tmp_path / "made.json"
    words = ["--format", "executorch", "--out", str(made), "--photos", str(tmp_path / "photos"), "--json", str(told)]
    assert export_cli.main([*start, *words]) == 0
    assert f"next: tinymim bench {made} --runtime executorch" in capsys.readouterr().out
    row = json.loads(told.read_text())["rows"][0]
    assert row["source"] == "photos"
    assert row["cosine"] > 0.99999
    assert row["equal_pixels"] > 0.999
    assert export_cli.main([*start, "--onnx", str(tmp_path / "seg.onnx")]) == 0
    mine, theirs = Predictor(made, runtime="executorch"), Predictor(tmp_path / "seg.onnx")
    assert mine.classes == theirs.classes == CLASSES
    photo = np.asarray(Image.open(tmp_path / "photos" / "1.png"))
    assert (mine.mask(photo) == theirs.mask(photo)).mean() > 0.999
    two = random.standard_normal((2, 3, 64, 96)).astype(np.float32)
    np.testing.assert_allclose(mine.engine.run(two), theirs.engine.run(two), atol=1e-3)
    assert mine.engine.placement()["ExecuTorch XNNPACK"]["XnnpackBackend"] > 0
    out = str(tmp_path / "mask.png")
    assert (
        cli.main(["predict", str(made), str(tmp_path / "photos/0.png"), "--runtime", "executorch", "--out", out]) == 0
    )
    assert cli.main(["bench", str(made), "--runtime", "executorch", "--runs", "10"]) == 0
    with pytest.raises(ConfigError, match="another size"):
        mine.engine.run(two[:, :, :32])


def test_what_is_no_program(tmp_path):
    (tmp_path / "bad.pte").write_bytes(b"no program")
    with pytest.raises(DataError, match="cannot read"):
        open_engine(tmp_path / "bad.pte", runtime="executorch")
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match="is no ExecuTorch program"):
        open_engine(tmp_path / "a.onnx", runtime="executorch")
