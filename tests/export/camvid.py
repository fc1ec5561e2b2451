"""Four CamVid photos as a labelled folder, and small random segmentors on them whose masks have all classes."""

import json
import shutil

import numpy as np
import torch
from PIL import Image

from tinymim_export.runtime.engines import Port

CONFIG = """
default_scope = "mmseg"
custom_imports = dict(imports=["tinymim.seg"])
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
                           bgr_to_rgb=True, size=(64, 96), pad_val={pad_val}, test_cfg={pad}),
    backbone=dict(type="TinyMIMBackbone", img_size=(64, 96), embed_dim=24, depth=4, num_heads=2,
                  out_indices=(0, 1, 2, 3), norm_cfg=norm_cfg),
    decode_head=dict(type="FCNHead", in_channels=24, in_index=1, channels=16, num_convs=1, concat_input=False,
                     num_classes={classes}, out_channels={channels}, norm_cfg=norm_cfg, {head}
                     align_corners={align_corners},
                     loss_decode=dict(type="CrossEntropyLoss", use_sigmoid={channels} == 1)),
    test_cfg=dict({test}),
)
steps = [{resize}]
test_pipeline = [dict(type="LoadImageFromFile"), *steps, dict(type="PackSegInputs")]
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False, round_up=False),
    dataset=dict(type="TinyMIMSegDataset", data_root="data", split="val", test_mode=True,
                 pipeline=[dict(type="LoadPhoto"), *steps, dict(type="LoadLabel"), dict(type="PackSegInputs")]))
train_dataloader = test_dataloader = val_dataloader
"""
WHOLE = 'mode="whole"'
SLIDE = 'mode="slide", crop_size=(96, 128), stride=(64, 85)'
HALF = 'dict(type="Resize", scale=(320, 200), keep_ratio=True)'


def write_folder(root, source, count=4, binary=False):
    """``count`` validation photos of CamVid, spread over it; ``binary`` keeps road against the rest."""
    about = json.loads((source / "dataset.json").read_text())
    photos = sorted((source / "images" / "validation").iterdir())
    for part in ("images", "annotations"):
        (root / part / "validation").mkdir(parents=True)
    for photo in photos[:: len(photos) // count][:count]:
        label = source / "annotations" / "validation" / f"{photo.stem}.png"
        shutil.copy(photo, root / "images" / "validation")
        if binary:
            ids = np.asarray(Image.open(label))
            road = np.where(ids == 255, 255, ids == about["classes"].index("Road")).astype(np.uint8)
            Image.fromarray(road).save(root / "annotations" / "validation" / label.name)
        else:
            shutil.copy(label, root / "annotations" / "validation")
    if binary:
        about |= {"classes": ["rest", "Road"], "palette": [[0, 0, 0], [128, 64, 128]]}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def config_text(
    *, test=WHOLE, resize=HALF, classes=11, channels=None, align_corners=False, pad=None, pad_val=0, head=""
):
    """The configuration of a small segmentor with these test settings."""
    return CONFIG.format(
        test=test,
        resize=resize,
        classes=classes,
        channels=channels or classes,
        pad=pad,
        align_corners=align_corners,
        pad_val=pad_val,
        head=head,
    )


def write_segmentor(path, folder, **settings):
    """A segmentor.pth with random weights; every logit is brought to mean 0 and spread 1 on a photo of ``folder``."""
    import tinymim.seg  # noqa: F401

    from mmengine.config import Config  # isort: skip
    from mmengine.model import revert_sync_batchnorm  # isort: skip
    from mmengine.registry import init_default_scope  # isort: skip
    from mmseg.registry import MODELS  # isort: skip

    config, about = Config.fromstring(config_text(**settings), ".py"), json.loads((folder / "dataset.json").read_text())
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_mean") or name == "decode_head.conv_seg.weight":
            value.normal_(0, 0.3)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    with Image.open(next((folder / "images" / "validation").iterdir())) as photo:
        pixels = torch.from_numpy(np.asarray(photo.resize((240, 180)), np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model.decode_head(model.extract_feat(pixels / 58 - 2))
        mean, spread = logits.mean((0, 2, 3)), logits.std((0, 2, 3))
        last = model.decode_head.conv_seg
        last.weight /= spread[:, None, None, None]
        last.bias.copy_((last.bias - mean) / spread)
    meta = {
        "config": config.pretty_text,
        "classes": about["classes"],
        "palette": about["palette"],
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "versions": {},
    }
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return path


class TorchEngine:
    """The PyTorch model behind the interface of ``runtime.Engine``: what is left to differ is the host's arithmetic."""

    def __init__(self, checkpoint, size=(None, None)):
        from tinymim_export.graph.torch_model import load_torch_model

        self.loaded = load_torch_model(checkpoint)
        self.meta = {"part": "segmentor"} | self.loaded.contract
        self.path, self.sha256, self.label, self.output = checkpoint, "0" * 64, "torch", "logits"
        self.size, self.dtype, self.shapes = size, np.dtype(np.float32), []
        self.verified = None
        self.outputs = (Port("logits", "float32", (None, None, *size)),)

    def run(self, images):
        self.shapes.append(images.shape)
        with torch.no_grad():
            return self.loaded.reference(torch.from_numpy(np.ascontiguousarray(images)))[0].numpy()


def write_files(root, folder):
    """whole.pth and slide.pth (one model, tested differently), free.onnx (any size, whole), fixed.onnx (windows).

    Traced without verification, which takes most of an export's time; the fixed file is the free one at one size.
    """
    from tinymim_export.graph.torch_model import load_torch_model
    from tinymim_export.graph.trace import trace
    from tinymim_export.runtime.metadata import save_proto, write_metadata

    whole = write_segmentor(root / "whole.pth", folder, test=WHOLE)
    slide = write_segmentor(root / "slide.pth", folder, test=SLIDE)
    loaded = load_torch_model(whole)
    proto = trace(loaded, (64, 96), dynamic=True).proto
    write_metadata(proto, {"part": "segmentor", "verified": False} | loaded.contract)
    save_proto(proto, root / "free.onnx")
    sides = proto.graph.input[0].type.tensor_type.shape.dim
    sides[2].dim_value, sides[3].dim_value = 96, 128
    write_metadata(proto, {"resize": load_torch_model(slide).contract["resize"]})
    save_proto(proto, root / "fixed.onnx")
    return {"whole": whole, "slide": slide, "free": str(root / "free.onnx"), "fixed": str(root / "fixed.onnx")}
