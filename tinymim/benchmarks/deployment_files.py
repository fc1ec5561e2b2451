"""The files of the deployment benchmark: plain exports, MMSegmentation's own backbone, and ours in each precision."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.errors import ConfigError
from tinymim.files import atomic_path

CALIBRATION = 64  # number of calibration photos, from the training split


@dataclass
class Candidate:
    """A file on a runtime."""

    name: str
    file: Path
    runtime: str = "onnxruntime"
    compute_type: str | None = None  # OpenVINO's arithmetic

    @property
    def key(self) -> str:
        """File name and runtime."""
        return f"{self.file.stem} {self.runtime} {self.compute_type or ''}".strip()


def plain_export(model: Any, file: Path, size: tuple[int, int], contract: dict[str, Any]) -> None:
    """``torch.onnx.export`` with its defaults, batch 1, plus our metadata so that the file can be scored."""
    import torch

    from tinymim_export.runtime.metadata import load_proto, write_metadata

    class Whole(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            about = dict(img_shape=image.shape[-2:], pad_shape=image.shape[-2:], ori_shape=image.shape[-2:])
            return model.encode_decode(image, [about])

    with atomic_path(file) as part:
        torch.onnx.export(
            Whole().eval(),
            (torch.zeros(1, 3, *size),),
            str(part),
            input_names=["image"],
            output_names=["logits"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        proto = load_proto(part)
        write_metadata(proto, contract | {"part": "segmentor", "verified": False})
        part.write_bytes(proto.SerializeToString())


def stock_segmentor(model: Any, cfg: Any) -> Any:
    """The same weights in MMSegmentation's VisionTransformer with its Feature2Pyramid neck.

    Raises:
        ConfigError: the weights do not fit it.
    """
    import torch
    from mmseg.registry import MODELS

    about = cfg.model.copy()
    ours = model.backbone
    patches = ours.pos_embed.shape[1] - 1
    side = int(patches**0.5)
    about.backbone = dict(
        type="VisionTransformer",
        img_size=(16 * side, 16 * side),
        embed_dims=ours.embed_dim,
        num_layers=ours.depth,
        num_heads=ours.num_heads,
        out_indices=tuple(ours.out_indices),
        patch_bias=True,
        norm_cfg=dict(type="LN", eps=1e-6),
    )
    about.neck = dict(type="Feature2Pyramid", embed_dim=ours.embed_dim, norm_cfg=dict(type="BN"))
    stock = MODELS.build(about).eval()
    names = {
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.qkv.weight": "attn.attn.in_proj_weight",
        "attn.qkv.bias": "attn.attn.in_proj_bias",
        "attn.proj": "attn.attn.out_proj",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
        "blocks.": "layers.",
        "patch_embed.proj": "patch_embed.projection",
        "backbone.fpn1.": "neck.upsample_4x.",
        "backbone.fpn2.": "neck.upsample_2x.",
    }
    state = {}
    for name, value in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    missing, unexpected = stock.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ConfigError(
            "these weights do not fit MMSegmentation's VisionTransformer",
            f"missing {missing[:3]}, unexpected {unexpected[:3]}",
            "give a segmentor without relative-position bias, layer scale and distillation token",
        )
    image = torch.randn(1, 3, 16 * side, 16 * side)
    with torch.inference_mode():
        off = (stock._forward(image) - model._forward(image)).abs().max().item()
    print(f"stock MMSegmentation backbone holds the same weights: largest difference of the scores {off:.1e}")
    return stock


def openvino_compute_types() -> list[str]:
    """OpenVINO's compute types that this processor supports."""
    from tinymim_export.runtime.engines import OpenVINOEngine

    found = []
    for compute_type in OpenVINOEngine.compute_types:
        try:
            OpenVINOEngine.require("cpu", compute_type)
            found.append(compute_type)
        except ConfigError as error:
            print(f"left out: openvino {compute_type}: {error.what}", flush=True)
    return found


def make_files(args: argparse.Namespace) -> list[Candidate]:
    """Write the missing files; return the candidates: plain exports, ours, then the others."""
    from tinymim.seg import load_segmentor
    from tinymim_export import export
    from tinymim_export.graph.torch_model import load_torch_model
    from tinymim_export.precision import PRECISIONS
    from tinymim_export.precision.quantize import quantize
    from tinymim_export.precision.variants import apply_variants
    from tinymim_export.runtime.metadata import load_proto, save_proto

    out, calibration = args.out, args.data_root / "images" / "training"
    loaded = load_torch_model(args.checkpoint)
    plain, stock, fp32 = out / "plain.onnx", out / "stock.onnx", out / "fp32.onnx"
    if not plain.is_file() or not stock.is_file():
        model, cfg = load_segmentor(args.checkpoint)
        plain_export(model, plain, loaded.size, loaded.contract)
        plain_export(stock_segmentor(model, cfg), stock, loaded.size, loaded.contract)
    if not fp32.is_file():
        export(args.checkpoint, fp32, size=loaded.size, photos=calibration)
    rows = [
        Candidate("plain torch.onnx.export of our model", plain),
        Candidate("MMSegmentation's VisionTransformer, plain export", stock),
        Candidate("tinymim fp32", fp32),
    ]
    fused = out / "fp32_attention.onnx"
    if not fused.is_file():
        save_proto(apply_variants(load_proto(fp32), ["attention"]), fused)
    rows.append(Candidate("tinymim fp32, fused attention", fused))
    merged = out / "fp32_merged.onnx"
    if not merged.is_file():
        save_proto(apply_variants(load_proto(fp32), ["merged"]), merged)
    for precision in ("int8-dynamic", "int8-weights", "int8", "int8-smooth", "int8-wide"):
        for source, words in ((fp32, ""), (fused, ", fused attention")):
            file = out / f"{precision}{'_attention' if words else ''}.onnx"
            if precision in ("int8-weights", "int8-wide") and words:
                continue
            if precision == "int8-wide":
                source, file = merged, out / "int8-wide_merged.onnx"
            if not file.is_file():
                measured = PRECISIONS[precision].needs_calibration
                options = {"calibration": calibration, "count": CALIBRATION} if measured else {}
                quantize(source, file, precision=precision, **options)
            if precision == "int8-wide":  # for OpenVINO, next
                continue
            rows.append(Candidate(f"tinymim {precision}{words}", file))
    static = [(out / f"{name}.onnx", name) for name in ("int8", "int8-smooth")]
    static.append((out / "int8-wide_merged.onnx", "int8-wide, merged"))
    for file, words in ((fp32, "fp32"), (merged, "fp32, merged"), *static):
        rows += [Candidate(f"tinymim {words}", file, "openvino", word) for word in openvino_compute_types()]
    for file in args.others:
        rows.append(Candidate(file.stem, file))
        rows += [Candidate(file.stem, file, "openvino", word) for word in openvino_compute_types()]
    return rows
