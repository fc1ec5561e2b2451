"""mmseg_configs: the published settings, every learning rate, and that every file builds a model that runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import LinearLR, PolyLR
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import tinymim.seg  # noqa: F401
from tinymim.errors import ConfigError
from tinymim.literals import read_literals
from tinymim.seg.config import config_text, find_config, heads, merge_options, plain_batch_norm

FOLDER = Path(__file__).parents[2] / "mmseg_configs"
NAMES = sorted(p.stem for p in FOLDER.glob("[!_]*.py"))
ADE = [n for n in NAMES if n.startswith("upernet_tinymim") and "camvid" not in n and "demo" not in n]
OTHERS = ("segformer_b0_camvid", "pidnet_s_camvid", "deeplabv3plus_r18_camvid", "efficientvit_b1_camvid")
OURS = [n for n in NAMES if n not in OTHERS]


def test_every_promised_file_is_there():
    sizes = [f"upernet_tinymim_{size}{light}" for size in "tsb" for light in ("", "_light")]
    heads = [f"{head}_tinymim_t{data}" for head in ("fpn", "linear", "segformer") for data in ("", "_camvid")]
    camvid = [f"upernet_tinymim_t_{kind}" for kind in ("light_camvid", "64_camvid", "64_camvid_512")]
    models = ("hiera_tiny", "swin_tiny", "tinyvit_5m", "tinyvit_11m", "tinyvit_21m", "tinyvit_5m_light")
    levels = [f"upernet_{model}{data}" for model in models for data in ("", "_camvid")]
    camvid += ["linear_dinov2_s_camvid", "linear_tinymim_t_small_data", "fpn_mae_lite_t"]
    assert {*sizes, *heads, *camvid, *levels, *OTHERS, "upernet_tinymim_star_t", "upernet_tinymim_demo"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_what_the_tools_ask_for(name):
    """The data sets, the loops and the run folder are the same whatever the model."""
    cfg = find_config(name)
    assert {cfg[f"{loader}_dataloader"].dataset.type for loader in ("train", "val", "test")} == {"TinyMIMSegDataset"}
    assert cfg.train_cfg.type == "ResumableTrainLoop"
    assert cfg.default_hooks.checkpoint.type == "RunFolderHook"
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters + 1
    assert all(head.num_classes == cfg.model.decode_head.num_classes for head in heads(cfg))


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("camvid")])
def test_camvid_configs_share_data_and_steps(name):
    reference, cfg = find_config("upernet_tinymim_t_light_camvid"), find_config(name)
    steps = [step for step in cfg.train_dataloader.dataset.pipeline if step.type != "GenerateEdge"]
    assert steps == reference.train_dataloader.dataset.pipeline
    assert cfg.val_dataloader == reference.val_dataloader
    assert cfg.train_cfg == reference.train_cfg
    assert cfg.model.data_preprocessor.size == (240, 320)
    assert cfg.model.test_cfg.mode == "whole"
    assert cfg.model.decode_head.num_classes == 11


def test_any_head_can_be_made_narrower():
    cfg = find_config("upernet_tinymim_t")
    merge_options(cfg, {"model.decode_head.channels": 64, "model.auxiliary_head.channels": 64})
    light = find_config("upernet_tinymim_t_64_camvid").model
    assert (cfg.model.decode_head.channels, cfg.model.auxiliary_head.channels) == (64, 64)
    assert (light.decode_head.channels, light.auxiliary_head.channels) == (64, 64)


@pytest.mark.parametrize("base", [1e-4, 1e-4 * 0.75**13])
def test_every_rate_is_the_published_one(base):
    """rate(i) = base * (1 - i / 160000), times 1 - (1 - i / 1500) (1 - 1e-6) for i < 1500."""
    cfg = find_config(FOLDER / "upernet_tinymim_b.py")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    kinds = {"LinearLR": LinearLR, "PolyLR": PolyLR}
    schedulers = [kinds[s.pop("type")](optimizer, **s) for s in cfg.to_dict()["param_scheduler"]]
    rates = np.empty(160000)
    for i in range(160000):
        rates[i] = optimizer.param_groups[0]["lr"]
        for scheduler in schedulers:
            scheduler.step()
    i = np.arange(160000)
    warm = np.where(i < 1500, 1 - (1 - i / 1500) * (1 - 1e-6), 1.0)
    np.testing.assert_allclose(rates, base * (1 - i / 160000) * warm, rtol=1e-9)


@pytest.mark.parametrize("name", ADE)
def test_published_settings(name):
    cfg = find_config(name)
    optimizer, backbone, head = cfg.optim_wrapper.optimizer, cfg.model.backbone, cfg.model.decode_head
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-4, 0.05)
    assert optimizer.betas == (0.9, 0.999)
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay == (0.75 if "_b" in name.removeprefix("upernet_") else 0.80)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160000, 16000)
    assert cfg.train_dataloader.batch_size == 16
    assert cfg.model.test_cfg == dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
    assert (backbone.img_size, backbone.drop_path_rate) == ((512, 512), 0.1)
    assert tuple(backbone.out_indices) == (3, 5, 7, 11)
    published = name in ("upernet_tinymim_b", "upernet_tinymim_b_light", "upernet_tinymim_star_t")
    assert (backbone.rel_pos_bias, backbone.init_values) == ((True, 1.0) if published else (False, None))
    width = {"t": 192, "s": 384, "b": 768}[name.removeprefix("upernet_tinymim_").removeprefix("star_")[0]]
    assert backbone.get("embed_dim", 192) == width
    assert head.channels == (width if name.endswith("light") else 768)
    assert (cfg.model.auxiliary_head.in_index, cfg.model.auxiliary_head.loss_decode.loss_weight) == (2, 0.4)
    heads = 12 if "star" in name else {192: 3, 384: 6, 768: 12}[width]
    assert backbone.num_heads == heads


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.endswith(("11m", "21m")) else n for n in NAMES]
)
def test_configs_import_nothing_and_build_a_model_that_runs(name):
    texts = [FOLDER / f"{name}.py", *(FOLDER / "_base_").glob("*.py")]
    assert not any(line.startswith(("import ", "from ")) for path in texts for line in path.read_text().splitlines())
    cfg = find_config(name)
    plain_batch_norm(cfg)
    assert "SyncBN" not in cfg.pretty_text
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 72, 40), mode="tensor")
    sides = {"linear_dinov2": 14, "linear": 16, "pidnet": 8, "efficientvit": 8}
    side = next((side for start, side in sides.items() if name.startswith(start)), 4)
    assert logits.shape == (1, cfg.model.decode_head.num_classes, -(-72 // side), -(-40 // side))
    if name in OURS:
        assert model.backbone.config.get("dist_token", False) == ("star" in name)
        assert [*model.backbone.out_channels] == [level.shape[1] for level in model.backbone(torch.zeros(1, 3, 32, 32))]


@pytest.mark.parametrize(
    "name", [n for n in OURS if n.startswith(("upernet_hiera", "upernet_swin", "upernet_tinyvit"))]
)
def test_hierarchical_models_share_the_plain_models_settings(name):
    """Only the backbone and the widths behind it differ."""
    data = "_light_camvid" if name.endswith("camvid") else ""
    data = {"upernet_tinyvit_5m_light": "", "upernet_tinyvit_5m_light_camvid": "_64_camvid"}.get(name, data)
    reference, cfg = find_config(f"upernet_tinymim_t{data}").to_dict(), find_config(name).to_dict()
    for each in (reference, cfg):
        each["model"].pop("backbone")
        for head in ("decode_head", "auxiliary_head"):
            each["model"][head].pop("in_channels")
            if name == "upernet_tinyvit_5m_light":
                each["model"][head].pop("channels")
    assert cfg == reference


def test_max_iters_takes_the_schedule_with_it(capsys):
    cfg = find_config("upernet_tinymim_t")
    merge_options(cfg, {"train_cfg.max_iters": 400})
    assert [s.end for s in cfg.param_scheduler] == [41, 401]
    assert "PolyLR ends after 400 steps" in capsys.readouterr().out
    merge_options(cfg, {"train_cfg.max_iters": 500, "param_scheduler.1.end": 1000})
    assert [s.end for s in cfg.param_scheduler] == [41, 1000]


def test_config_text_reads_back():
    cfg = find_config("upernet_tinymim_star_t")
    assert read_literals(config_text(cfg), "") == cfg.to_dict()


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match="upernet_tinymim_b"):
        find_config("upernet_tinymim_xl")
    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(ConfigError, match=r"broken\.py, line 1: SyntaxError: '\(' was never closed"):
        find_config(tmp_path / "broken.py")
    with pytest.raises(ConfigError, match="cfg-options"):
        merge_options(Config(dict(a=[1])), {"a.x": 3})
