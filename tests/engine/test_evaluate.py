"""tinymim eval of a classifier: its own classes, ImageNet's official folders, the crop of ImageNet-C, bad input."""

import json

import pytest
import torch
from PIL import Image

from tests.data.official import colour, write_classes, write_corruptions
from tinymim.cli import main
from tinymim.data.imagenet import CORRUPTIONS, wnids
from tinymim.engine import evaluate_classifier
from tinymim.engine.finetuning import eval_transform
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import ViT
from tinymim.models.classifier import Classifier, load_classifier, save_classifier


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A classifier of ImageNet's 1000 classes and small folders of the official layouts."""
    root = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    network = Classifier(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), 1000)
    torch.nn.init.normal_(network.head.weight)
    save_classifier(network, root / "c.pth", wnids("imagenet"))
    write_classes(root / "val", wnids("imagenet")[:12])
    write_classes(root / "a", wnids("imagenet-a")[:6])
    write_classes(root / "r", wnids("imagenet-r")[:5])
    write_corruptions(root / "c", [name for names in CORRUPTIONS.values() for name in names], wnids("imagenet")[:2])
    return root


def test_official_sets(official, tmp_path, capsys):
    file = str(official / "c.pth")
    argv = [
        "eval",
        file,
        "--data",
        str(official / "val"),
        "--imagenet-a",
        str(official / "a"),
        "--imagenet-r",
        str(official / "r"),
        "--imagenet-c",
        str(official / "c"),
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    files = ["--json", str(tmp_path / "s.json"), "--markdown", str(tmp_path / "s.md")]
    assert main([*argv, *files]) == 0
    said = capsys.readouterr().out
    assert "ImageNet-A" in said
    assert "mCE" in said
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["scores"]["imagenet"]["photos"] == 12
    assert saved["file"]["sha256"]
    model, view = load_classifier(file)[0], eval_transform(32)
    for kind in ("a", "r"):  # by hand: the largest among the 200
        columns, right = torch.tensor([wnids("imagenet").index(name) for name in wnids(f"imagenet-{kind}")]), []
        for path in sorted((official / kind).glob("*/*")):
            with torch.no_grad():
                best = columns[model(view(Image.open(path).convert("RGB"))[None])[0, columns].argmax()]
            right.append(wnids("imagenet")[best] == path.parent.name)
        assert saved["scores"][f"imagenet-{kind}"]["top1"] == pytest.approx(sum(right) / len(right))
        assert saved["scores"][f"imagenet-{kind}"]["photos"] == len(right)
    assert "gaussian_noise" in (tmp_path / "s.md").read_text()
    assert main(argv) == 0
    assert f"--imagenet-c {official / 'c'} --workers 0 --device cpu --json scores.json" in capsys.readouterr().out


def test_views(official, monkeypatch):
    """The usual margin for ImageNet, none for the photos of ImageNet-C, which are as large as the crop."""
    from tinymim.engine import evaluate as scores

    seen = {}

    def spy(predict, transform, **options):
        seen[bool(options.get("c"))] = transform(Image.new("RGB", (256, 256), (9, 9, 9))).shape, transform
        return {}

    monkeypatch.setattr(scores, "evaluate_folders", spy)
    evaluate_classifier(official / "c.pth", data="x", imagenet_c="y", img_size=224, device="cpu")
    assert {key: shape for key, (shape, _) in seen.items()} == {False: (3, 224, 224), True: (3, 224, 224)}
    photo = Image.new("RGB", (224, 224))
    photo.putpixel((0, 0), (255, 255, 255))
    assert (seen[True][1](photo)[:, 0, 0] > 2).all()  # the corner is still there
    assert (seen[False][1](photo)[:, 0, 0] < 0).all()


def test_own_classes(tmp_path, capsys):
    names = ["cat", "dog"]
    network = Classifier(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), 2)
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([1.0, 0.0]))  # always the first class
        network.head.weight.zero_()
    save_classifier(network, tmp_path / "c.pth", names)
    for i, name in enumerate(names):
        (tmp_path / "val" / name).mkdir(parents=True)
        for k in range(3 if i else 1):
            Image.new("RGB", (40, 40), colour(i)).save(tmp_path / f"val/{name}/{k}.png")
    result = evaluate_classifier(tmp_path / "c.pth", data=tmp_path / "val", workers=0, device="cpu")
    assert result.scores["imagenet"]["top1"] == 0.25
    with pytest.raises(ConfigError, match="cannot be scored on imagenet-a"):
        evaluate_classifier(tmp_path / "c.pth", imagenet_a=tmp_path / "val", workers=0, device="cpu")
    assert main(["eval", str(tmp_path / "c.pth"), "--device", "cpu"]) == 2
    assert "no photos to score on" in capsys.readouterr().err
    state = {k.removeprefix("backbone."): v for k, v in network.state_dict().items()}
    torch.save({"model": state}, tmp_path / "foreign.pth")
    with pytest.raises(ConfigError, match=r"the 2 classes of .* are unknown"):
        evaluate_classifier(tmp_path / "foreign.pth", data=tmp_path / "val", num_heads=2, device="cpu")
    with pytest.raises(CheckpointError, match="head count of"):
        evaluate_classifier(tmp_path / "foreign.pth", data=tmp_path / "val", device="cpu")
    assert main(["eval", "seg.onnx"]) == 2
    assert "--data is missing" in capsys.readouterr().err
