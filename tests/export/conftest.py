"""Tiny models as files, and what their exports give, made once a session (an export takes seconds)."""

import fcntl
import os
import pickle
import time
from types import SimpleNamespace

import pytest
import torch

from tests.export.camvid import write_files, write_folder
from tinymim.models import ViT, save_student

CLASSES = ["sky", "road", "tree", "car", "person", "wall", "lamp"]
CONFIG = """
default_scope = "mmseg"
custom_imports = dict(imports=["tinymim.seg"])
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[120.0, 110.0, 100.0], std=[60.0, 58.0, 57.0],
                           bgr_to_rgb=True, size=(64, 96)),
    backbone=dict(type="TinyMIMBackbone", img_size=(64, 96), embed_dim=24, depth=4, num_heads=2,
                  out_indices=(0, 1, 2, 3), norm_cfg=norm_cfg),
    decode_head=dict(type="UPerHead", in_channels=[24] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6),
                     channels=16, num_classes=NUM, norm_cfg=norm_cfg, align_corners=False,
                     loss_decode=dict(type="CrossEntropyLoss")),
    auxiliary_head=dict(type="FCNHead", in_channels=24, in_index=2, channels=8, num_convs=1, num_classes=NUM,
                        norm_cfg=norm_cfg, loss_decode=dict(type="CrossEntropyLoss")),
    test_cfg=dict(mode="slide", crop_size=(64, 96), stride=(42, 64)),
)
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=(2048, 512), keep_ratio=True)]
"""


def write_segmentor(path, num_classes=7):
    """A segmentor.pth with random weights and running statistics, as tinymim segment writes it."""
    import tinymim.seg  # noqa: F401

    from mmengine.config import Config  # isort: skip
    from mmengine.registry import init_default_scope  # isort: skip
    from mmseg.registry import MODELS  # isort: skip

    config = Config.fromstring(CONFIG.replace("NUM", str(num_classes)), ".py")
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean") or "position_bias_table" in name or name == "decode_head.conv_seg.weight":
            value.normal_(0, 0.3)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    meta = {
        "config": config.pretty_text,
        "classes": (CLASSES * num_classes)[:num_classes],
        "palette": [[i, 2, 3] for i in range(7)],
        "mean": [120.0, 110.0, 100.0],
        "std": [60.0, 58.0, 57.0],
        "versions": {},
    }
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Checkpoints: student (plain), star (relative bias, distillation token, wide last layer), segmentor, config."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_student(ViT(img_size=64, embed_dim=24, depth=4, num_heads=2), folder / "student.pth")
    star = ViT(
        img_size=48,
        embed_dim=24,
        depth=2,
        num_heads=4,
        rel_pos_bias=True,
        init_values=1.0,
        dist_token=True,
        last_dim=40,
    )
    for block in star.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    save_student(star, folder / "star.pth")
    (folder / "config.py").write_text(CONFIG.replace("NUM", "7"))
    return SimpleNamespace(
        folder=folder,
        student=folder / "student.pth",
        star=folder / "star.pth",
        config=folder / "config.py",
        segmentor=write_segmentor(folder / "segmentor.pth"),
    )


def share_out(folder, makers):
    """Name -> what its maker gives; the workers of pytest-xdist make each once, each what nobody else is making."""
    found = {}
    while missing := makers.keys() - found.keys():
        for name in missing:
            with open(folder / f"{name}.lock", "wb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                kept = folder / f"{name}.pickle"
                if not kept.is_file():
                    kept.write_bytes(pickle.dumps(makers[name](folder / f"{name}.onnx")))
                found[name] = pickle.loads(kept.read_bytes())
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def exported(files, tmp_path_factory):
    """One export of each kind: fixed segmentor with logits, dynamic segmentor with a mask, dynamic backbone."""
    from tinymim_export import export

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    folder.mkdir(exist_ok=True)
    makers = {
        "fixed": lambda path: export(files.segmentor, path),
        "mask": lambda path: export(files.segmentor, path, part="segmentor", dynamic=True, output="mask"),
        "features": lambda path: export(files.star, path, part="backbone", dynamic=True),
    }
    return SimpleNamespace(**share_out(folder, makers))


@pytest.fixture(scope="session")
def camvid(shared, tmp_path_factory):
    """Four real photos with labels of 11 classes, as a labelled folder."""
    return write_folder(tmp_path_factory.mktemp("camvid") / "data", shared / "data" / "camvid")


@pytest.fixture(scope="session")
def camvid_files(camvid, tmp_path_factory):
    """whole.pth, slide.pth, free.onnx and fixed.onnx of one small segmentor on them; see tests/export/camvid.py."""
    return write_files(tmp_path_factory.mktemp("segmentor"), camvid)
