"""``tinymim card`` and ``hf-hub:``: the folder is read by timm and by every reader of ours; downloads are replaced."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch

from tinymim import hub
from tinymim.cli import main
from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import describe_file, sha256_file
from tinymim.models import ViT, create_model, model_from_checkpoint, save_student
from tinymim.models.classifier import Classifier, load_classifier, save_classifier
from tinymim.models.teachers import load_teacher
from tinymim.models.weight_files import weights_file
from tinymim.track.network import Tracker
from tinymim.track.stored import load_tracker, save_tracker

SIZE = dict(img_size=32, embed_dim=24, depth=2, num_heads=2)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def say(*words) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*map(str, words)])
    return code, out.getvalue()


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> Path:
    """The card of a student, and the run beside it."""
    run = tmp_path_factory.mktemp("it's a run") / "distilled"
    torch.manual_seed(0)
    save_student(ViT(**SIZE), run / "student.pth", {"recipe": "mine", "steps": 4, "step": 4, "teacher_sha256": "ab"})
    inputs = {"teacher": [{"file": "big|<b>.pth", "sha256": "ab"}], "data": None}
    inputs["data"] = {"folder": "my photos", "files": 7, "list_sha256": "cd"}
    (run / "env.json").write_text(json.dumps({"versions": {"torch": "2"}, "inputs": inputs}), "utf-8")
    code, said = say("card", run, "--license", "mit")
    assert code == 0
    assert "timm.create_model(" in said
    return run.with_name("distilled-card")


@pytest.fixture
def downloads(card, tmp_path, monkeypatch):
    """huggingface_hub's download, which lays the card into a cache; what was asked for."""
    asked, folder = [], tmp_path / "hub" / "models--me--tiny" / "snapshots" / COMMIT
    shutil.copytree(card, folder)

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        if repository != "me/tiny":
            raise OSError("no such repository")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "go_offline_if_unreachable", lambda: None)
    hub.fetch.cache_clear()
    yield asked
    hub.fetch.cache_clear()


def test_timm_and_our_readers_load_the_folder(card: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    ours, checkpoint = model_from_checkpoint(card, say=False)
    theirs = timm.create_model(f"local-dir:{card}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs.forward_features(images), ours(images), atol=1e-5, rtol=1e-4)
    assert checkpoint.num_heads == 2
    assert checkpoint.meta["source_sha256"] == sha256_file(card.with_name("distilled") / "student.pth")
    known = json.loads((card / "config.json").read_text("utf-8"))["pretrained_cfg"]
    assert not {"tag", "license", "origin_url"} & known.keys(), "facts of timm's own weights"


def test_the_card_says_what_is_recorded_and_nothing_else(card: Path) -> None:
    read = huggingface_hub.ModelCard.load(card / "README.md")
    data = read.data.to_dict()
    assert data["license"] == "mit"
    assert data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "model-index" not in data, "nothing was scored"
    assert "datasets" not in data
    assert "7 files of my photos" in read.text
    assert "big\\|&lt;b>.pth" in read.text
    assert "Latency" not in read.text
    assert str(card.parent) not in read.text


def test_a_classifiers_scores_are_in_the_model_index(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = Classifier(ViT(**SIZE), 3).eval()
    torch.nn.init.normal_(model.head.weight)
    save_classifier(model, run / "classifier.pth", ["a", "b", "c"])
    (run / "result.json").write_text(json.dumps({"top1": 0.625, "top5": 1.0, "photos": 8}), "utf-8")
    assert say("card", run, "--out", tmp_path / "mine")[0] == 0
    (first, *_) = huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md").data.eval_results
    assert (first.metric_type, first.metric_value, first.task_type) == ("accuracy", 62.5, "image-classification")
    images = torch.randn(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    with torch.inference_mode():
        ours = load_classifier(tmp_path / "mine")[0](images)
        torch.testing.assert_close(ours, model(images))
        torch.testing.assert_close(theirs(images), ours, atol=1e-5, rtol=1e-4)
    assert theirs.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_a_tracker_is_read_back(tmp_path: Path) -> None:
    sizes = dict(template_size=32, search_size=64, template_factor=2.0, search_factor=4.0, channels=8)
    save_tracker(Tracker(ViT(**SIZE), eliminate_in=(), keep=1.0, **sizes), tmp_path / "run" / "tracker.pth")
    code, said = say("card", tmp_path / "run")
    assert code == 0
    assert "timm:    no: it has no tracker of ours" in said
    again, _ = load_tracker(tmp_path / "run-card")
    for key, value in load_tracker(tmp_path / "run" / "tracker.pth")[0].state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_name_of_the_hub_is_a_checkpoint(downloads, card: Path) -> None:
    file = weights_file("hf-hub:me/tiny")
    assert file.parent.name == COMMIT
    assert describe_file(file) == {"file": f"me/tiny@{COMMIT}", "sha256": sha256_file(card / "model.safetensors")}
    teacher = load_teacher("hf-hub:me/tiny", img_size=32)
    assert (teacher.name, teacher.sha256) == (f"me/tiny@{COMMIT}", sha256_file(file))
    assert create_model("tinymim_vit_tiny", checkpoint="hf-hub:me/tiny", **SIZE) is not None
    assert downloads == [("me/tiny", None, ["model.safetensors", "config.json"])], "a process reads one revision"
    assert weights_file("hf-hub:me/tiny@v1.0") == file
    assert downloads[-1][1] == "v1.0"


def test_a_teacher_of_timm_on_the_hub_is_built_by_timm(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}', "utf-8")
    teacher = load_teacher(str(tmp_path), img_size=64)
    assert teacher.model.blocks[0].attn.num_heads == 3, "which the tensors do not tell"
    assert torch.equal(teacher.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    (tmp_path / "config.json").write_text('{"architecture": "no_such_vit"}', "utf-8")
    with pytest.raises(ConfigError, match="no_such_vit"):
        load_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_teacher(str(tmp_path))


def test_what_the_hub_lacks_is_an_error_of_ours(downloads, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)hf-hub:me/other cannot be fetched.*hf download me/other"):
        weights_file("hf-hub:me/other")
    for name in ("hf-hub:tiny", "hf-hub:a/b/c", "hf-hub:", "hf-hub:a/../b"):
        with pytest.raises(ConfigError, match="names no model of the hub"):
            weights_file(name)
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "pickles"))
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        weights_file("hf-hub:me/pickled")


def test_push_is_asked_for_and_private(card: Path, monkeypatch, capsys) -> None:
    said = []
    api = SimpleNamespace(
        create_repo=lambda name, **options: said.append((name, options)),
        upload_folder=lambda **options: said.append(options) or SimpleNamespace(commit_url="https://hub/c"),
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "go_offline_if_unreachable", lambda: None)
    run = card.with_name("distilled")
    assert say("card", run, "--out", card.with_name("pushed"))[0] == 0
    assert not said
    code, text = say("card", run, "--out", card.with_name("pushed"), "--overwrite", "--push", "me/tiny")
    assert (code, said[0]) == (0, ("me/tiny", {"private": True, "exist_ok": True}))
    assert said[1]["folder_path"] == str(card.with_name("pushed"))
    assert "pushed:  https://hub/c" in text

    def offline(**_):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode")

    api.upload_folder = offline
    assert main(["card", str(run), "--out", str(card.with_name("kept")), "--push", "me/tiny"]) == 2
    assert "was not pushed to me/tiny" in capsys.readouterr().err
    assert (card.with_name("kept") / "README.md").is_file()
    assert main(["card", str(run), "--out", str(card.with_name("none")), "--push", "tiny"]) == 2
    assert not card.with_name("none").exists()


def test_a_folder_without_a_model_and_one_that_is_there(card: Path, tmp_path: Path, capsys) -> None:
    assert main(["card", str(card.parent), "--out", str(tmp_path / "x")]) == 2
    assert "did you mean tinymim card " in capsys.readouterr().err
    assert main(["card", str(card.with_name("distilled"))]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert not [*card.parent.glob(".*.part")]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years", "utf-8")
    for out, why in (
        (mine, "is no card"),
        (card.with_name("distilled"), "holds the run"),
        (card.parent, "holds the run"),
    ):
        assert main(["card", str(card.with_name("distilled")), "--out", str(out), "--overwrite"]) == 2
        assert why in capsys.readouterr().err
    assert (mine / "thesis.txt").is_file()
