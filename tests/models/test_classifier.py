"""Classifiers on hierarchical backbones: timm's numbers and names, the authors' files, rows of other classes."""

import re
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import nn

import tinymim
from tinymim.engine.classify import ClassifyModel
from tinymim.engine.finetuning import read_rows
from tinymim.engine.model import saved_bytes_per_image
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import ViT, read_checkpoint, save_student
from tinymim.models.classifier import Classifier, load_classifier, save_classifier, start_from_classes
from tinymim.models.hierarchical import name_of

TINY = "tiny_vit_5m_224"
SMALL = {
    TINY: dict(embed_dims=(16, 32, 64, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)),
    "hiera_tiny_224": dict(embed_dim=16, stages=(1, 2, 1, 1)),
    "swin_tiny_patch4_window7_224": dict(embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)),
}
OTHERS = ("hiera_tiny_224", "swin_tiny_patch4_window7_224", "tiny_vit_21m_384", "hiera_small_abswin_256")


def moved(model):
    """Random values in every tensor, batch norm's running ones too."""
    torch.manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand_like(value))
    return model


AUTHORS = {  # start of timm's names -> their names of tensors, the authors'
    "hiera": (("head.fc.", "head.projection."), ("head.norm.", "norm.")),
    "swin": (("head.fc.", "head."),),
    "tiny_vit": (
        ("head.fc.", "head."),
        ("head.norm.", "norm_head."),
        (".conv.weight", ".c.weight"),
        ("patch_embed.conv1.", "patch_embed.seq.0."),
        ("patch_embed.conv2.", "patch_embed.seq.2."),
        ("stages.", "layers."),
    ),
}


def authors_names(name, state):
    """The tensors of a timm model under the names of the authors' files."""
    pairs, out = next(pairs for start, pairs in AUTHORS.items() if name.startswith(start)), {}
    for key, value in state.items():
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        if ".downsample." in key:  # at the end of the stage before
            key = re.sub(r"layers\.(\d)", lambda m: f"layers.{int(m[1]) - 1}", key)
        out[key] = value
    return out


@pytest.mark.parametrize("name", SMALL)
def test_logits_names_and_layers_are_timms(name, tmp_path):
    torch.manual_seed(0)
    theirs = moved(timm.create_model(name, num_classes=7, **SMALL[name]).eval())
    ours = Classifier(tinymim.create_model(name, **SMALL[name]), 7).eval()
    save_classifier(ours, tmp_path / "c.pth", "abcdefg")
    stored = torch.load(tmp_path / "c.pth", weights_only=True)
    assert set(stored["model"]) == set(theirs.state_dict())
    torch.save({**stored, "model": theirs.state_dict()}, tmp_path / "c.pth")
    again, file = load_classifier(tmp_path / "c.pth")
    assert (again.num_classes, file.meta["classes"]) == (7, [*"abcdefg"])
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(again(images), theirs(images), rtol=1e-4, atol=1e-5)
        assert again(images[..., :70, :50]).shape == (2, 7)
    groups = ours.layer_groups(0.8, 0.05)
    blocks = ours.backbone.depth
    assert {round(g["lr_scale"], 6) for g in groups} == {round(0.8**k, 6) for k in range(blocks + 2)}
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in ours.parameters())
    last = {id(p) for g in groups if g["lr_scale"] == 1 for p in g["params"]}
    assert {id(p) for key, p in ours.named_parameters() if not key.startswith("backbone.")} <= last
    tables = {id(p) for key, p in ours.named_parameters() if key.endswith("attention_biases")}
    assert tables <= {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}


def save_as_the_authors(name, model, path):
    """The authors' layout: a pickled configuration of yacs (a dictionary with attributes) beside the weights."""
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    whole = config.CfgNode(MODEL=config.CfgNode(NAME="TinyViT-5M-1k", DROP_PATH_RATE=0.0))
    vars(whole)["__immutable__"] = True
    weights, moments = authors_names(name, model.state_dict()), {"state": {0: {"exp_avg": torch.ones(3)}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", yacs)
        patch.setitem(sys.modules, "yacs.config", config)
        torch.save({"model": weights, "optimizer": moments, "config": whole, "epoch": 299}, path)


def check_authors_file(name, path):
    theirs = moved(timm.create_model(name, num_classes=5).eval())
    save_as_the_authors(name, theirs, path)
    assert "yacs" not in sys.modules
    ours, _ = load_classifier(path)
    assert ours.backbone.config["name"] == name
    size = timm.get_pretrained_cfg(name).input_size[-1]
    assert ours.backbone.img_size == (size, size)
    own = {key.removeprefix("backbone."): value for key, value in ours.state_dict().items()}
    assert all(torch.equal(value, own[key]) for key, value in theirs.state_dict().items() if "tracked" not in key)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-4)


def test_the_authors_tinyvit_loads_head_included_and_nothing_of_it_is_run(tmp_path, capsys):
    check_authors_file(TINY, tmp_path / "tiny_vit_5m_1k.pth")
    assert f"{TINY}, 5 classes" in capsys.readouterr().out
    hiera = tinymim.create_model("hiera_tiny_224", **SMALL["hiera_tiny_224"])
    with pytest.raises(CheckpointError, match="does not fit hiera_tiny_224"):
        tinymim.load_weights(hiera, tmp_path / "tiny_vit_5m_1k.pth", say=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_files_of_authors_load_head_included(name, tmp_path):
    check_authors_file(name, tmp_path / "theirs.pth")


@pytest.mark.slow
def test_every_model_is_known_by_its_tensors():
    for name in timm.list_models(["tiny_vit_*", "swin_*", "hiera_*"]):
        with torch.device("meta"):
            assert name_of(timm.create_model(name).state_dict()) == name
    assert name_of(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2).state_dict()) is None


def test_tables_are_resized_to_other_windows(tmp_path):
    """As the authors do it, whatever the names of file and model; other widths are refused."""
    small = moved(tinymim.create_model(TINY, **SMALL[TINY]))
    save_student(small, tmp_path / "student.pth")
    larger = tinymim.create_model("tiny_vit_21m_512", img_size=512, **SMALL[TINY], window_sizes=(8, 8, 16, 7))
    report = tinymim.load_weights(larger, tmp_path / "student.pth", say=False)
    tables = [key for key in small.state_dict() if key.endswith("attention_biases")]
    assert report.resized == tables[:-1]
    for key, old, new in zip(tables, (7, 14, 14, 7), (8, 16, 16, 7), strict=True):
        before, after = small.state_dict()[key], larger.state_dict()[key]
        wanted = F.interpolate(before.view(1, -1, old, old), size=(new, new), mode="bicubic").view(-1, new * new)
        torch.testing.assert_close(after, wanted if old != new else before)
    with pytest.raises(CheckpointError, match=r"does not fit tiny_vit_5m_224"):
        tinymim.load_weights(tinymim.create_model(TINY), tmp_path / "student.pth", say=False)


def test_rows_of_22k_become_those_of_1k(tmp_path):
    """By WordNet's ids, as in the authors' list (row 359 is the first class); a class without a row has their mean."""
    names, wanted = ImageNetInfo("imagenet-22k").label_names(), ImageNetInfo("imagenet-1k").label_names()
    old = Classifier(tinymim.create_model(TINY, **SMALL[TINY]), len(names))
    nn.init.normal_(old.last_layer.weight)
    nn.init.normal_(old.head.norm.weight)
    state = {key.removeprefix("backbone."): value for key, value in old.state_dict().items()}
    torch.save(state, tmp_path / "22k.pth")
    new = Classifier(tinymim.create_model(TINY, **SMALL[TINY]), 1000)
    said = start_from_classes(new, read_checkpoint(tmp_path / "22k.pth"), wanted)
    assert said.startswith("999 of 1000 classes start from their rows in ")
    rows = [names.index(name) for name in wanted if name in names]
    assert rows[:3] == [359, 368, 460]
    weight, from_22k = new.last_layer.weight, old.last_layer.weight
    assert torch.equal(weight[0], from_22k[359])
    torch.testing.assert_close(weight[wanted.index("n04399382")], from_22k[rows].mean(0))
    assert torch.equal(new.head.norm.weight, old.head.norm.weight)
    (tmp_path / "rows.txt").write_text("\n".join(map(str, (0, -1, 5))))
    few = Classifier(tinymim.create_model(TINY, **SMALL[TINY]), 3)
    start_from_classes(few, read_checkpoint(tmp_path / "22k.pth"), "abc", read_rows(str(tmp_path / "rows.txt"), 3))
    torch.testing.assert_close(few.last_layer.weight[1], from_22k[[0, 5]].mean(0))


def test_classes_of_a_plain_vit_start_from_a_file_too(tmp_path):
    old = Classifier(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), 3)
    nn.init.normal_(old.head.weight)
    save_classifier(old, tmp_path / "c.pth", ["cat", "dog", "owl"])
    shape = dict(img_size=32, embed_dim=24, depth=1, num_heads=2)
    for network in (Classifier(ViT(**shape), 2), Classifier(ViT(**shape, dist_token=True), 2)):
        start_from_classes(network, read_checkpoint(tmp_path / "c.pth"), ["owl", "cat"])
        assert torch.equal(network.head.weight, old.head.weight[[2, 0]])
    assert torch.equal(network.head_dist.weight, network.head.weight)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("0\n1", "2 numbers"),
        ("0\n1\n-2", "numbers from -2"),
        ("0\n1\nx", "invalid literal"),
        ("0\n1\n3", "row 3 of a file of 3 classes"),
        ("-1\n-1\n-1", "none of the 3 classes"),
        (None, "No such file"),
    ],
)
def test_rows_that_cannot_be_are_refused(content, words, tmp_path):
    network = Classifier(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), 3)
    save_classifier(network, tmp_path / "c.pth", "abc")
    if content is not None:
        (tmp_path / "rows.txt").write_text(content)

    def start():
        rows = read_rows(str(tmp_path / "rows.txt"), 3)
        start_from_classes(network, read_checkpoint(tmp_path / "c.pth"), "abc", rows)

    with pytest.raises((ConfigError, CheckpointError), match=words):
        start()


def test_a_file_without_these_classes_or_without_a_classifier(tmp_path):
    network = Classifier(tinymim.create_model(TINY, **SMALL[TINY]), 2)
    save_student(network.backbone, tmp_path / "student.pth")
    save_classifier(network, tmp_path / "c.pth", ["cat", "dog"])
    for name, words in (("student.pth", "holds no classifier"), ("c.pth", "none of the 2 classes")):
        with pytest.raises(CheckpointError, match=words):
            start_from_classes(network, read_checkpoint(tmp_path / name), ["car", "bus"])
    with pytest.raises(CheckpointError, match="holds no classifier"):
        load_classifier(tmp_path / "student.pth")


def statistics(model):
    return [value.clone() for key, value in model.named_buffers() if "running" in key]


def test_batch_norm_is_frozen_on_demand_and_left_alone_by_dry_passes():
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    for frozen in (False, True):
        network = moved(Classifier(tinymim.create_model(TINY, img_size=64, **SMALL[TINY]), 3))
        model, before = ClassifyModel(network, frozen_bn=frozen), statistics(network)
        assert saved_bytes_per_image(model, {"image": images, "label": labels}) > 1
        assert all(map(torch.equal, statistics(network), before))
        model.eval().train()(images, labels)["loss"].backward()
        assert all(map(torch.equal, statistics(network), before)) == frozen
        norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
        assert all(norm.weight.grad.abs().sum() > 0 for norm in norms)


@pytest.mark.parametrize("change", ["load in eval", "half", "double", "optimizer step"])
def test_attention_biases_are_never_stale(change):
    """timm keeps the gathered table in evaluation mode; here the new weights count at once."""
    model = Classifier(tinymim.create_model(TINY, img_size=64, **SMALL[TINY]), 3).train().eval()
    other, images = (
        moved(Classifier(tinymim.create_model(TINY, img_size=64, **SMALL[TINY]), 3)),
        torch.randn(1, 3, 64, 64),
    )
    with torch.no_grad():
        before = model(images)
        if change == "optimizer step":
            for own, new in zip(model.parameters(), other.parameters(), strict=True):
                own.copy_(new)
            model.load_state_dict({k: v for k, v in other.state_dict().items() if "running" in k}, strict=False)
        else:
            model.load_state_dict(other.state_dict())
        if change in ("half", "double"):
            images = getattr(images, change)()
            model, other = getattr(model, change)(), getattr(other, change)()
        after, fresh = model(images), other.eval()(images)
    assert torch.equal(after, fresh)
    assert not torch.allclose(after.float(), before, atol=1e-3)
