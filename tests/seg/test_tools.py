"""The tools as a user calls them: train and test, two processes, MMSegmentation's own trainer, ADE20K's folder."""

import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import prepare_ade20k  # noqa: E402
import test_seg  # noqa: E402
import train_seg  # noqa: E402


def told(options):
    """--cfg-options as typed."""
    return [f"{key}={str(value).replace(' ', '')}" for key, value in options.items()]


def run(*command, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=env, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_train_then_test(scenes, small, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["upernet_tinymim_demo", "--data-root", str(scenes), "--work-dir", str(folder), "--cfg-options"]
    assert train_seg.main([*arguments, *told(small(**{"train_cfg.max_iters": 2}))]) == 0
    out = capsys.readouterr().out
    assert f"next:    python tools/test_seg.py upernet_tinymim_demo {folder}/segmentor.pth --data-root {scenes}" in out
    assert (folder / "report.html").is_file()
    result = tmp_path / "result.json"
    assert test_seg.main([str(folder / "segmentor.pth"), "--json", str(result)]) == 0
    assert "next:    tinymim-export" in capsys.readouterr().out
    assert json.loads(result.read_text())["mIoU"] == json.loads((folder / "result.json").read_text())["mIoU"]


def test_dry_run(scenes, small, tmp_path, capsys, monkeypatch):
    """Memory, time and FLOP of the run, counted on its own model; nothing is written."""
    from tinymim.seg import estimate_segmentor

    monkeypatch.chdir(tmp_path)
    arguments = ["upernet_tinymim_demo", "--data-root", str(scenes), "--dry-run", "--cfg-options"]
    assert train_seg.main([*arguments, *told(small(**{"train_cfg.max_iters": 2}))]) == 0
    said = capsys.readouterr().out
    assert "2 steps of" in said
    assert "M trained parameters" in said
    assert not list(tmp_path.iterdir())
    few, many = (
        estimate_segmentor(
            "upernet_tinymim_demo",
            data_root=scenes,
            cfg_options=small(**{"train_cfg.max_iters": steps, "train_dataloader.batch_size": batch}),
        )
        for steps, batch in ((2, 2), (4, 4))
    )
    assert few.flop_per_crop == many.flop_per_crop > 1e6
    assert few.bytes_per_crop == many.bytes_per_crop
    assert many.gib - few.gib == pytest.approx(2 * 1.5 * few.bytes_per_crop / 2**30)
    assert f"{few.flop_per_crop * 4 / 1e18:.3g} EFLOP" in str(few)


def test_bad_input_exits_2_with_three_parts(scenes, small, tmp_path, capsys):
    assert train_seg.main(["upernet_tinymim_demo", "--data-root", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_seg.py: error: there is no folder")
    assert "\n  why: " in error
    assert "\n  fix: " in error
    assert train_seg.main(["upernet_tinymim_xxl"]) == 2
    assert test_seg.main([str(ROOT / "mmseg_configs" / "upernet_tinymim_demo.py")]) == 2
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_on_the_cpu_count_and_score_as_one(scenes, small, tmp_path):
    """torchrun with gloo: 2 x batch 2, five validation photos, each counted once; a resume changes nothing."""
    options = told(small(**{"train_cfg.max_iters": 4}))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train = ["tools/train_seg.py", "upernet_tinymim_demo", "--data-root", scenes, "--work-dir", tmp_path / "run"]
    code, out, err = run(*command, *train, "--cfg-options", *options)
    assert code == 0, err[-3000:]
    assert "2 process(es) x batch 2 = 4 photos a step" in out
    assert out.count("mIoU") == 2  # from one process: at the validation and at the end
    before = json.loads((tmp_path / "run" / "result.json").read_text())
    assert before["images"] == 5
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "checkpoints" / "iter_4.pth").unlink()
    code, out, err = run(*command, *train, "--resume", "--cfg-options", *options)
    assert code == 0, err[-3000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    assert test_seg.main([str(tmp_path / "run" / "segmentor.pth"), "--json", str(tmp_path / "one.json")]) == 0
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["confusion"] == before["confusion"]


@pytest.mark.slow
def test_mmsegs_own_trainer_takes_our_configs(scenes, small, tmp_path):
    """What `mim train mmsegmentation CONFIG` runs."""
    import mmseg

    tool = Path(mmseg.__file__).parent / ".mim" / "tools" / "train.py"
    config = ROOT / "mmseg_configs" / "upernet_tinymim_demo.py"
    data = {f"{split}_dataloader.dataset.data_root": scenes for split in ("train", "val", "test")}
    options = told(
        small(
            **{
                "train_cfg.max_iters": 2,
                "train_dataloader.persistent_workers": False,
                "val_dataloader.persistent_workers": False,
                **data,
            }
        )
    )
    code, out, err = run(tool, config, "--work-dir", tmp_path / "run", "--cfg-options", *options)
    assert code == 0, err[-3000:]
    assert (tmp_path / "run" / "segmentor.pth").is_file()
    assert "from scratch" in out
    code, out, err = run(
        tool, config, "--work-dir", tmp_path / "b", "--cfg-options", *options, "model.decode_head.num_classes=5"
    )
    assert code != 0
    assert "model.decode_head.num_classes=12" in err
    code, out, err = run(
        tool.with_name("test.py"),
        config,
        tmp_path / "run" / "segmentor.pth",
        "--work-dir",
        tmp_path / "test",
        "--tta",
        "--cfg-options",
        *options,
    )
    assert code == 0, err[-3000:]
    assert "5 photos" in out


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
    monkeypatch.setattr(prepare_ade20k, "COUNTS", {"train": 3, "val": 2})

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=archive.parent, **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{archive.name}", prepare_ade20k.sha1_of(archive)
    server.shutdown()
    server.server_close()


def test_prepare_ade20k(release, tmp_path, capsys):
    url, sha1 = release
    out = tmp_path / "data"
    assert prepare_ade20k.main(["--out", str(out), "--url", url, "--sha1", sha1]) == 0
    told = capsys.readouterr().out
    assert "150 classes" in told
    assert "next:    python tools/train_seg.py mmseg_configs/upernet_tinymim_b.py" in told
    assert [p.name for p in out.iterdir()] == ["ADEChallengeData2016"]
    assert prepare_ade20k.main(["--check", str(out / "ADEChallengeData2016")]) == 0
    next((out / "ADEChallengeData2016" / "images" / "training").iterdir()).unlink()
    assert prepare_ade20k.main(["--check", str(out / "ADEChallengeData2016")]) == 2
    assert "has 2 training and 2 validation pairs" in capsys.readouterr().err


def test_a_wrong_download_leaves_nothing_behind(release, tmp_path, capsys):
    url, _ = release
    out = tmp_path / "data"
    assert prepare_ade20k.main(["--out", str(out), "--url", url]) == 2
    assert prepare_ade20k.SHA1 in capsys.readouterr().err
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


def test_the_full_release_and_other_folders_are_recognised(tmp_path, scenes, capsys):
    (tmp_path / "images").mkdir()
    assert prepare_ade20k.main(["--check", str(tmp_path)]) == 2
    assert "full ADE20K release" in capsys.readouterr().err
    assert prepare_ade20k.main(["--check", str(scenes)]) == 2
    assert "not ADE20K" in capsys.readouterr().err
