"""tools/prepare_ade20k.py: ADE20K downloaded, verified, unpacked and checked; other folders are named."""

import http.server
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinymim.data import ade20k_release
from tinymim.demo.scenes import write_scenes

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import prepare_ade20k


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A tiny ADEChallengeData2016.zip, its sha1, and a server that gives it."""
    inside = tmp_path / "make" / "ADEChallengeData2016"
    for split, word, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(count):
            for kind, suffix, shape in (("images", "jpg", (8, 8, 3)), ("annotations", "png", (8, 8))):
                path = inside / kind / split / f"ADE_{word}_{i:08d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full(shape, i, np.uint8)).save(path)
    archive = tmp_path / "served" / "ADEChallengeData2016.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(inside.rglob("*")):
            file.write(path, path.relative_to(inside.parent))
    monkeypatch.setattr(ade20k_release, "COUNTS", {"train": 3, "val": 2})

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=archive.parent, **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{archive.name}", ade20k_release.sha1_of(archive)
    server.shutdown()
    server.server_close()


def test_prepare_ade20k(release, tmp_path, capsys):
    url, sha1 = release
    out = tmp_path / "data"
    assert prepare_ade20k.main(["--out", str(out), "--url", url, "--sha1", sha1]) == 0
    said = capsys.readouterr().out
    assert "150 classes" in said
    assert "next:    tinymim segment upernet_tinymim_b --data-root" in said
    assert [p.name for p in out.iterdir()] == ["ADEChallengeData2016"]
    assert prepare_ade20k.main(["--check", str(out / "ADEChallengeData2016")]) == 0
    next((out / "ADEChallengeData2016" / "images" / "training").iterdir()).unlink()
    assert prepare_ade20k.main(["--check", str(out / "ADEChallengeData2016")]) == 2
    assert "has 2 training and 2 validation pairs" in capsys.readouterr().err


def test_a_wrong_download_leaves_nothing_behind(release, tmp_path, capsys):
    url, _ = release
    out = tmp_path / "data"
    assert prepare_ade20k.main(["--out", str(out), "--url", url]) == 2
    assert ade20k_release.SHA1 in capsys.readouterr().err
    assert list(out.iterdir()) == []
    (out / "ADEChallengeData2016.zip").write_bytes(b"half a file")
    assert prepare_ade20k.main(["--out", str(out), "--url", url]) == 2
    assert "remove it" in capsys.readouterr().err


def test_offline_tells_what_to_do(tmp_path, capsys):
    assert prepare_ade20k.main(["--out", str(tmp_path), "--url", "http://127.0.0.1:9/ade.zip"]) == 2
    error = capsys.readouterr().err
    assert "cannot download" in error
    assert f"copy the file to {tmp_path}" in error
    assert list(tmp_path.iterdir()) == []


def test_the_full_release_and_other_folders_are_recognised(tmp_path, capsys):
    scenes = write_scenes(tmp_path / "scenes", train=2, val=2, size=(96, 80), seed=3)
    (tmp_path / "images").mkdir()
    assert prepare_ade20k.main(["--check", str(tmp_path)]) == 2
    assert "full ADE20K release" in capsys.readouterr().err
    assert prepare_ade20k.main(["--check", str(scenes)]) == 2
    assert "not ADE20K" in capsys.readouterr().err
