"""Segmentors are contracted whole: backbone and head; counts are those of the exported file, weights are inherited."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.cli import main as tinymim
from tinymim.contract.segmentor import WIDTH, Segmentors
from tinymim.errors import ConfigError
from tinymim.models import model_from_checkpoint
from tinymim.seg import load_segmentor
from tinymim.seg.config import build_model as build
from tinymim.seg.config import find_config, plain_batch_norm

SIZE = (64, 96)
BACKBONE = dict(img_size=(32, 32), embed_dim=24, depth=6, num_heads=3, out_indices=(1, 2, 4, 5))
TINYVIT = dict(img_size=(64, 64), embed_dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
MODELS = {
    "upernet": ("upernet_tinymim_t_light_camvid", BACKBONE, 32),
    "linear": ("linear_tinymim_t_camvid", {**BACKBONE, "out_indices": (5,)}, None),
    "fpn": ("fpn_tinymim_t_camvid", BACKBONE, 32),
    "segformer": ("segformer_tinymim_t_camvid", BACKBONE, 32),
    "tinyvit": ("upernet_tinyvit_5m_light_camvid", TINYVIT, 32),
}

PLAIN = [name for name in MODELS if name != "tinyvit"]


def made(name):
    """A small segmentor with drawn weights, as what is contracted."""
    torch.manual_seed(0)
    config, backbone, channels = MODELS[name]
    cfg = find_config(config)
    plain_batch_norm(cfg)
    cfg.model.backbone.update(backbone)
    widths = [*TINYVIT["embed_dims"]] if name == "tinyvit" else [24] * 4
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        if head:
            pyramid = cfg.model.backbone.get("pyramid_dim")
            many = isinstance(head.in_channels, list)
            head.in_channels = ([pyramid] * 4 if pyramid else widths) if many else widths[head.get("in_index", -1)]
            head.channels = channels or head.in_channels
    model = build(cfg).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.2 + 0.05)
    model.cfg, model.dataset_meta = (
        cfg,
        {"classes": [str(i) for i in range(11)], "palette": [[i, 0, 0] for i in range(11)]},
    )
    return Segmentors(model, cfg)


def scores(model):
    images = torch.linspace(-1, 1, 3 * SIZE[0] * SIZE[1]).view(1, 3, *SIZE)
    with torch.no_grad():
        return model.encode_decode(images, [dict(ori_shape=SIZE, img_shape=SIZE, pad_shape=SIZE)])


@pytest.mark.parametrize("name", [*PLAIN, pytest.param("tinyvit", marks=pytest.mark.slow)])
def test_weights_are_inherited_and_every_factor_runs(name):
    kind = made(name)
    whole = scores(kind.start)
    assert torch.equal(scores(kind.inherit(kind.config, kind.start, kind.config)), whole)
    found = {factor.name: factor.shrink(kind.config) for factor in kind.factors(kind.config)}
    assert ("H" in found) == (kind.config[WIDTH] is not None)
    for config in filter(None, [*found.values(), kind.smallest(kind.config)]):
        child = kind.inherit(config, kind.start, kind.config)
        assert scores(child).shape == whole.shape
        assert len({*child.backbone.out_indices}) == len(kind.taps)
        if kind.plain:
            assert child.backbone.out_indices[-1] == config["depth"] - 1


def test_channels_of_the_head_that_add_nothing_are_dropped_first():
    """Half of the head's channels are written and read nowhere: without them the outputs stay."""
    kind = made("upernet")
    weak = torch.arange(1, 32, 2)
    with torch.no_grad():
        for name, value in kind.start.decode_head.state_dict().items():
            if value.ndim == 4 and value.shape[0] == 32:
                value[weak] = 0.0
            if name.endswith(("bn.weight", "bn.bias")):
                value[weak] = 0.0
            if value.ndim == 4 and name != "conv_seg.weight":
                lead = 24 if name == "bottleneck.conv.weight" else 0  # the level itself, then what was pooled of it
                groups = (value.shape[1] - lead) // 32
                for i in range(groups):
                    value[:, lead + 32 * i + weak] = 0.0
        kind.start.decode_head.conv_seg.weight[:, weak] = 0.0
    child = kind.inherit({**kind.config, WIDTH: 16}, kind.start, kind.config)
    assert torch.allclose(scores(child), scores(kind.start), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["upernet", "linear", "tinyvit"])
def test_counts_are_those_of_the_exported_file(name, tmp_path):
    import onnx

    from tinymim.cli._contract_segmentor import counter
    from tinymim_export.graph.convert import export

    kind = made(name)
    kind.count_with(counter(kind.start, SIZE))
    smaller = next(filter(None, (factor.shrink(kind.config) for factor in kind.factors(kind.config))))
    kind.save(kind.inherit(smaller, kind.start, kind.config), tmp_path / "s.pth")
    export(tmp_path / "s.pth", tmp_path / "s.onnx", size=SIZE)
    meta = {prop.key: prop.value for prop in onnx.load(tmp_path / "s.onnx").metadata_props}
    cost = json.loads(next(value for value in meta.values() if '"macs"' in value))
    cost = cost.get("cost", cost)
    assert kind.count(smaller) == (cost["params"], cost["macs"])


@pytest.fixture
def labelled(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "labelled"
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for i in range(2):
            label = np.kron(rng.integers(0, 3, (2, 2)), np.ones((32, 32))).astype(np.uint8)
            photo = (np.stack([label * 80] * 3, -1) + rng.integers(0, 40, (64, 64, 3))).astype(np.uint8)
            Image.fromarray(photo).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(label).save(root / "annotations" / split / f"{i}.png")
    meaning = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [255, 0, 0], [0, 255, 0]]}
    (root / "dataset.json").write_text(json.dumps(meaning), "utf-8")
    return root


@pytest.mark.slow
def test_a_search_ends_with_a_config_that_trains(labelled, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["contract", "--segmentor", "upernet_tinymim_demo", "--data-root", labelled, "--size", "64", "64"]
    words += ["--macs", "80M", "--latency", "1s", "--seconds", "0.1", "--precision", "int8"]
    words += ["--steps", "1", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    assert tinymim([*map(str, words), "--dry-run"]) == 0
    assert "H 64 -> 48" in capsys.readouterr().out
    assert tinymim([*map(str, words), "--shrink", "0.5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "candidates.jsonl").read_text("utf-8").splitlines()]
    chosen = json.loads((out / "result.json").read_text("utf-8"))["chosen"][-1]
    assert chosen["macs"] <= 80e6 < rows[0]["macs"]
    assert all(0 <= row["score"] <= 1 and 0 < row["latency_ms"] < 1000 for row in rows)
    model, cfg = load_segmentor(out / "segmentor.pth")
    assert cfg.model.decode_head.channels == chosen["config"][WIDTH]
    assert model.backbone.config["embed_dim"] == chosen["config"]["embed_dim"]
    assert model_from_checkpoint(out / "segmentor.pth", say=False)[0].config["depth"] == chosen["config"]["depth"]
    page = (out / "report.html").read_text("utf-8")
    assert "mIoU" in page
    assert "H: width of the decode head" in page  # what the letters of the changes mean
    train = next(line.split("next:    tinymim ")[1] for line in said.splitlines() if "tinymim segment" in line)
    more = ["--max-steps", "1", "--device", "cpu", "--lr", "1e-30", "--cfg-options", "train_dataloader.num_workers=0"]
    assert tinymim([*train.split(), *more, "val_dataloader.num_workers=0", "train_dataloader.batch_size=2"]) == 0
    trained = load_segmentor(out / "trained/segmentor.pth")[0]
    for key, value in model.named_parameters():  # it began with the weights that were found, the head's too
        assert torch.allclose(value, trained.get_parameter(key)), key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["--segmentor", "upernet_tinymim_demo", "--macs", "1G"], "the start keeps 1 G", marks=pytest.mark.slow
        ),
        (["--segmentor", "upernet_tinymim_demo", "--from", "x.pth"], "--from with --segmentor"),
        (["--segmentor", "upernet_tinymim_demo", "--store", "s"], "--store with --segmentor"),
        (["--segmentor", "s.pth", "--weights", "x.pth"], "it has its own weights"),
        (["--segmentor", "segformer_b0_camvid", "--macs", "1M"], "cannot be contracted"),
        (["--segmentor", "upernet_hiera_tiny", "--macs", "1M"], "cannot be contracted"),
        (["--from", "x.pth", "--size", "32", "32"], "--size without --segmentor"),
        (["--segmentor", "no_such_config", "--macs", "1M"], "no_such_config"),
    ],
)
def test_refusals(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert tinymim(["contract", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "fix:" in said


def test_several_heads_are_refused():
    cfg = find_config("upernet_tinymim_demo")
    cfg.model.decode_head = [cfg.model.decode_head]
    with pytest.raises(ConfigError, match="several heads"):
        Segmentors(build(find_config("upernet_tinymim_demo")), cfg)
