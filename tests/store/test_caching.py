"""``tinymim cache`` on real photos and a small timm classifier: targets, processes, kills, plan, check, errors."""

import json
import os
import random
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.attack.forked import child, command, fork
from tests.attack.kills import counted
from tinymim.cli import main
from tinymim.cli.cache import _part
from tinymim.data.replay import Replay, pairs, view_seed
from tinymim.errors import ConfigError
from tinymim.models.logit_teacher import load_logit_teacher
from tinymim.store import caching
from tinymim.store.job import SparseLogits
from tinymim.store.targets import TargetStore
from tinymim.store.writer import TargetWriter

CLASSES, K, EPOCHS, SIDE = 7, 3, 2, 32
VIEWS = {"img_size": SIDE, "scale": (0.3, 1.0), "rand_augment": "m5-n1", "erasing": 0.5}
OPTIONS = ["--img-size", SIDE, "--scale", 0.3, 1, "--rand-augment", "m5-n1", "--erasing", 0.5, "--topk", K]
OPTIONS += ["--epochs", EPOCHS, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--chunk", 4]
Setting = namedtuple("Setting", "photos weights")


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    """Eleven photos of several kinds, same names in sub-folders; the weights of a classifier with clear opinions."""
    folder = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    names = "a/0.png a/1.png b/0.png b/1.png b/c/0.png grey.png deep.png palette.png turned.jpg thin.png alpha.png"
    for i, name in enumerate(names.split()):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((70, 50 + i))
        exif = Image.Exif()
        exif[0x0112] = 6
        image = {
            "grey.png": image.convert("L"),
            "deep.png": Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257),
            "palette.png": image.convert("P"),
            "thin.png": image.resize((200, 3)),
            "alpha.png": image.convert("RGBA"),
        }.get(name, image)
        image.save(path, **(dict(exif=exif) if name == "turned.jpg" else {}))
    return Setting(folder / "photos", write_teacher(folder / "t.safetensors", 0))


def write_teacher(path: Path, seed: int, classes: int = CLASSES) -> Path:
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=classes)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def words(setting, out, *more):
    given = ["cache", "--teacher", "timm/test_vit", "--teacher-weights", setting.weights, "--data", setting.photos]
    return [str(word) for word in (*given, *OPTIONS, "--out", out, *more)]


def cache(setting, out, *more, code=0):
    assert main(words(setting, out, *more)) == code
    return out


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def probabilities(setting, views):
    """The teacher's predictions, by other means than ours: timm's model, its mean and deviation, one batch."""
    model = timm.create_model("test_vit", num_classes=CLASSES, checkpoint_path=str(setting.weights)).eval()
    x = torch.nn.functional.interpolate(views.float() / 255, (160, 160), mode="bicubic", antialias=True)
    cfg = model.pretrained_cfg
    x = (x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    with torch.no_grad():
        return model(x).softmax(-1)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_store_holds_what_the_teacher_says(mixed, setting, tmp_path, capsys):
    out = cache(setting, tmp_path / "s", *(["--mixup", 0.8, "--cutmix", 1.0] if mixed else []))
    store = TargetStore.open(out)
    assert len(store) == 11 * EPOCHS
    assert store.header["topk"] == K
    assert store.header["classes"] == CLASSES
    replay = Replay(**VIEWS, **(dict(mixup=0.8, cutmix=1.0) if mixed else {}))
    assert store.header["augmentation"] == replay.settings
    for epoch in range(EPOCHS):
        order = pairs(11, 0, epoch) if mixed else range(11)
        keys = [store.keys[i] for i in order]
        seeds = [view_seed(0, key, epoch) for key in keys]
        views = torch.stack([replay.view(setting.photos / key, seed) for key, seed in zip(keys, seeds, strict=True)])
        p_NC = probabilities(setting, replay.mix(views, seeds))
        for key, seed, p_C in zip(keys, seeds, p_NC, strict=True):
            found = store[key, epoch]
            assert found["seed"] == seed
            top = p_C.topk(K)
            np.testing.assert_array_equal(found["indices"], top.indices)
            np.testing.assert_allclose(found["values"], top.values, atol=5e-4)
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next:")][-1]
    assert line.startswith("next:    tinymim cache --teacher timm/test_vit")
    assert main(line.split()[2:]) == 0
    assert "differing classes 0.00%" in capsys.readouterr().out


def test_processes_parts_and_workers_write_the_same_bytes(setting, tmp_path, monkeypatch, capsys):
    whole = content(cache(setting, tmp_path / "one"))
    assert len(whole) == 2 + 3 * EPOCHS
    several = tmp_path / "several"
    pids = [child(lambda: command(words(setting, several)), tmp_path / f"{i}.log") for i in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 3
    assert content(several) == whole
    assert content(cache(setting, tmp_path / "workers", "--workers", 2)) == whole
    parts = tmp_path / "parts"
    capsys.readouterr()
    cache(setting, parts, "--part", "1/2")
    assert "3 chunks are left to other processes" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert content(cache(setting, parts)) == whole


def test_a_store_in_memory_is_written_and_checked(setting, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache(setting, f"memory://{tmp_path.name}")
    cache(setting, f"memory://{tmp_path.name}", "--check")
    cache(setting, tmp_path / "s")
    for name, here in content(tmp_path / "s").items():
        assert TargetStore.open(f"memory://{tmp_path.name}").place.read(name) == here


def test_work_goes_on_where_it_stopped(setting, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third chunk; again after a chunk was lost; then another epoch."""
    whole = content(cache(setting, tmp_path / "one"))
    out, write = tmp_path / "s", TargetWriter.write

    def interrupted(self, chunk, arrays):
        if (chunk.epoch, chunk.number) == (0, 2):
            raise KeyboardInterrupt
        write(self, chunk, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(TargetWriter, "write", interrupted)
        cache(setting, out, code=130)
    assert "the same command goes on" in capsys.readouterr().out
    assert len(content(out)) == 2 + 2
    before = (out / "chunks/00000/000000.safetensors").stat().st_mtime_ns
    cache(setting, out)
    (out / "chunks/00001/000001.safetensors").unlink()
    cache(setting, out)
    assert content(out) == whole
    assert (out / "chunks/00000/000000.safetensors").stat().st_mtime_ns == before
    cache(setting, out, "--epochs", 3)
    assert len(content(out)) == 2 + 3 * 3
    assert whole.items() - content(out).items() == {("store.json", whole["store.json"])}


def kill_until_done(setting, tmp_path, kills):
    """Kill the command at renames and syncs, and at random moments, until it has ended; the number of kills."""
    rng, out, done, options = (
        random.Random(tmp_path.name),
        tmp_path / "s",
        0,
        ["--chunk", "2", "--epochs", str(kills // 3)],
    )
    load_logit_teacher("timm/test_vit", weights=setting.weights)  # imported before the forks
    while True:
        given = words(setting, out, *options)
        if done % 4 == 3:
            pid = child(lambda: command(given), tmp_path / "log")  # noqa: B023
            time.sleep(rng.uniform(0.1, 0.6))
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        else:
            at = rng.randrange(2, 9) if done else 0
            code = fork(lambda: counted(given, tmp_path / "note.json", at), tmp_path / "log")  # noqa: B023
        if code != -signal.SIGKILL:
            assert code == 0, (tmp_path / "log").read_text("utf-8")
            break
        done += 1
    whole = content(cache(setting, tmp_path / "one", *options))
    assert content(out) == whole, "nothing lost, nothing doubled, nothing left behind"
    return done


def test_kills_lose_nothing(setting, tmp_path):
    assert kill_until_done(setting, tmp_path, 3) >= 3


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(setting, tmp_path):
    """In as many stores as it takes: a fast machine writes much of one between two kills."""
    done, stores = 0, 0
    while done < 100:
        (tmp_path / str(stores)).mkdir()
        done += kill_until_done(setting, tmp_path / str(stores), 60)
        stores += 1
        assert stores <= 50


def test_a_plan_writes_nothing(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(caching, "TIMED", 0.0)
    cache(setting, tmp_path / "s", "--plan")
    said = capsys.readouterr().out
    assert not (tmp_path / "s").exists()
    assert "11 photos x 2 epochs, the 3 most probable of 7 classes of timm/test_vit" in said
    assert "16 bytes a view" in said
    assert "ImageNet-22k (14,197,122 photos, 90 epochs)" in said
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 0, 100))
    for more in ((), ("--plan",)):
        cache(setting, tmp_path / "s", *more, code=2)
        assert "is too small" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_the_arithmetic_is_that_of_the_paper():
    """TinyViT's README: 481 GB for ImageNet-22k, K 100; 16 GB for ImageNet-1k, K 10 (in GiB both)."""
    for photos, epochs, topk, gib in ((*SparseLogits.compare[1:], 100, 480.8), (1_281_167, 300, 10, 15.75)):
        assert photos * epochs * (4 + 4 * topk) / 2**30 == pytest.approx(gib, rel=2e-3)


def test_check_finds_other_targets(setting, tmp_path, capsys):
    out = cache(setting, tmp_path / "s")
    other = setting._replace(weights=write_teacher(tmp_path / "other.safetensors", 1))
    cache(other, out, "--check", code=2)
    assert "targets of another teacher" in capsys.readouterr().err
    elsewhere = setting._replace(photos=tmp_path / "photos")
    shutil.copytree(setting.photos, elsewhere.photos)
    cache(elsewhere, out, "--check")
    Image.new("RGB", (60, 60), "red").save(elsewhere.photos / "a/0.png")
    cache(elsewhere, out, "--check", code=1)
    assert "is not what timm/test_vit gives now" in capsys.readouterr().err
    (elsewhere.photos / "a/0.png").unlink()
    cache(elsewhere, out, "--check", code=2)
    assert "a/0.png is not in --data" in capsys.readouterr().err
    store = TargetStore.open(out)
    chunk = store.layout.at(1, 0)
    arrays = {name: value.copy() for name, value in store.read(chunk).items()}
    arrays["values"][2, 0] += 0.05
    store.place.write(chunk.name, store.layout.encode(chunk, arrays))  # with a checksum that fits
    cache(setting, out, "--check", code=1)
    assert "largest |dp| 0.05" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"kind": "features"}, {"kind": "relations"}, {"topk": None}, {"teacher": None}])
def test_a_store_of_another_kind_is_not_checked(change, setting, tmp_path, capsys):
    out = cache(setting, tmp_path / "s")
    header = json.loads((out / "store.json").read_text()) | change
    (out / "store.json").write_text(json.dumps({name: value for name, value in header.items() if value is not None}))
    assert main(["cache", "--out", str(out), "--check", "--data", str(setting.photos)]) == 2
    assert "cannot be replayed" in capsys.readouterr().err


def test_a_damaged_photo_has_no_targets(setting, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(setting.photos, photos)
    (photos / "b/1.png").write_bytes(b"no picture")
    here = setting._replace(photos=photos)
    out = cache(here, tmp_path / "s")
    assert "warning: b/1.png cannot be read: it has no targets" in capsys.readouterr().out
    store = TargetStore.open(out)
    assert store["b/0.png", 1]["seed"] == TargetStore.open(cache(setting, tmp_path / "t"))["b/0.png", 1]["seed"]
    with pytest.raises(Exception, match="could not be read when the store was made"):
        store["b/1.png", 0]
    cache(here, out, "--check")
    cache(here, tmp_path / "mixed", "--mixup", 0.5, code=2)
    assert "cannot be mixed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--topk", 8], "has 7 classes"),
        (["--topk", 0], "at least 1"),
        (["--chunk", 1], "at least 2"),
        (["--epochs", 0], "at least 1"),
        (["--workers", -1], "at least 0"),
        (["--seed", -1], "from 0"),
        (["--mixup", 1, "--batch-size", 3], "neighbours"),
        (["--part", "0/2"], "I from 1 to N"),
        (["--part", "3/2"], "I from 1 to N"),
        (["--rand-augment", "m9-x3"], "'x3'"),
        (["--plan", "--check"], "one of them"),
        (["--data", "missing"], "no folder"),
        (["--teacher", "timm/tset_vit"], "did you mean"),
        (["--teacher", "timm/test_resnet"], "does not fit"),
        (["--out", "nonsense://x"], "Protocol not known"),
    ],
)
def test_a_wrong_option_is_said_before_work(more, why, setting, tmp_path, capsys):
    cache(setting, tmp_path / "s", *more, code=2)
    assert why in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_teachers_that_cannot_teach_logits(setting, tmp_path, capsys):
    given = [
        "cache",
        "--data",
        str(setting.photos),
        "--out",
        str(tmp_path / "s"),
        "--plan",
        "--device",
        "cpu",
        "--teacher",
    ]
    assert main([*given, "timm/vit_tiny_patch16_224.no_such_tag"]) == 2
    assert main([*given, "timm/convnextv2_atto.fcmae"]) == 2
    assert "has no classifier" in capsys.readouterr().err
    many = setting._replace(weights=write_teacher(tmp_path / "many.safetensors", 0, 65_537))
    cache(many, tmp_path / "s", code=2)
    assert "class ids up to 65,535" in capsys.readouterr().err
    headless = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file({key: value.contiguous() for key, value in headless.items()}, tmp_path / "headless.safetensors")
    cache(setting._replace(weights=tmp_path / "headless.safetensors"), tmp_path / "s", code=2)
    assert "no head.weight" in capsys.readouterr().err


def test_a_teacher_that_overflows_is_told(setting, tmp_path, capsys):
    state = timm.create_model("test_vit", num_classes=CLASSES).state_dict()
    state["head.weight"] *= 1e38
    save_file({key: value.contiguous() * 10 for key, value in state.items()}, tmp_path / "t.safetensors")
    cache(setting._replace(weights=tmp_path / "t.safetensors"), tmp_path / "s", code=1)
    assert "gives NaN or infinities" in capsys.readouterr().err
    assert not (tmp_path / "s/chunks").exists()


def test_a_summary(setting, tmp_path, capsys):
    out = cache(setting, tmp_path / "s", "--part", "1/6")
    assert main(["cache", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "records: 4 of 22" in said
    assert "5 chunks missing" in said
    assert "timm/test_vit" in said
    for more in (["--plan"], []):
        cache(setting, out, "--seed", 5, "--amp", "bf16", *more, code=2)
        assert "differs in seed (0, not 5), precision (fp32, not bf16)" in capsys.readouterr().err


def test_parts_of_a_slurm_array(monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert _part(None) is None
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert _part(None) == (3, 4)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    assert _part(None) == (2, 4)
    assert _part("1/9") == (0, 9)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    with pytest.raises(ConfigError, match="7/4"):
        _part(None)
