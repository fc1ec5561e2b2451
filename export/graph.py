"""A PyTorch model as one ONNX graph that is right at every size it accepts.

Legend: N = batch, D = width, C = classes, H, W = pixels, h, w = a feature map's sides.
Three things torch's exporter gets silently wrong for dynamic sizes are replaced here: adaptive pooling (its stock export
bakes the traced size in), floor division of negative sizes (ONNX rounds towards zero), and batches traced with one image.
"""

import copy
import logging
import operator
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymim.errors import ConfigError, TinyMIMError
from tinymim.models import ViT
from tinymim_export.originals import Original

OPSET = 20  # the newest that ONNX Runtime's static INT8 quantisation handles (21 and later break it)
FOLD_LIMIT = 32_000_000  # bytes of relative-position bias that may become constants, all blocks together
MAX_BYTES = 2_000_000_000  # one protobuf file


def pool_matrix(bins: int, length: int, device: torch.device) -> Tensor:
    """Rows average the intervals of torch's adaptive pooling: bin i covers floor(i L / bins) .. ceil((i + 1) L / bins).

    Args:
        bins: Output length.
        length: Input length L; may be symbolic under export.

    Returns:
        float32 (bins, L): 1 / count inside the interval, 0 outside.
    """
    i = torch.arange(bins, device=device)
    start = i * length // bins
    end = ((i + 1) * length + bins - 1) // bins
    at = torch.arange(length, device=device)
    inside = (at >= start[:, None]) & (at < end[:, None])
    return inside.float() / (end - start)[:, None].float()


class MatmulAvgPool2d(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, exact at every input size: (N, D, h, w) -> (N, D, a, b)."""

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        both = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
        self.bins = tuple(both)

    def forward(self, x: Tensor) -> Tensor:
        for axis, bins in zip((-2, -1), self.bins, strict=True):
            if bins is None:  # torch: keep this side
                continue
            weights = pool_matrix(bins, x.shape[axis], x.device).to(x.dtype)
            x = torch.matmul(weights, x) if axis == -2 else torch.matmul(x, weights.transpose(0, 1))
        return x


def replace_pooling(model: nn.Module) -> int:
    """Swap every ``AdaptiveAvgPool2d`` inside ``model`` (in place; no weights are touched); return how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, MatmulAvgPool2d(child.output_size))
                count += 1
    return count


class FeatureGraph(nn.Module):
    """A bare ViT: image -> ``features`` (N, D, ceil(H/patch), ceil(W/patch)), patch tokens after the final norm."""

    names = ("features",)
    stages = {"backbone": ("features",)}

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        patch = self.vit.patch_size
        grid = [(side + patch - 1) // patch for side in image.shape[-2:]]
        return {"features": self.vit(image)[:, self.vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)}


class PyramidGraph(nn.Module):
    """Backbone and pyramid: image -> ``tap0..`` (the ViT's blocks) -> ``level0..`` (strides 4, 8, 16, 32)."""

    def __init__(self, backbone: nn.Module, neck: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck

    def trunk(self, image: Tensor) -> list[Tensor]:
        """What the pyramid starts from."""
        from tinymim.seg import TinyMIMBackbone

        if isinstance(self.backbone, TinyMIMBackbone):
            return self.backbone.forward_intermediates(
                image, indices=self.backbone.out_indices, stop_early=True, intermediates_only=True
            )
        return list(self.backbone(image))

    def pyramid(self, taps: list[Tensor], image: Tensor) -> list[Tensor]:
        """The levels the head reads; the same arithmetic as ``TinyMIMBackbone.forward``, held to it by verification."""
        from tinymim.seg import TinyMIMBackbone

        levels = taps
        if isinstance(self.backbone, TinyMIMBackbone):
            sides, bb = image.shape[-2:], self.backbone
            levels = [fpn(tap) for fpn, tap in zip((bb.fpn1, bb.fpn2, bb.fpn3, bb.fpn4), taps, strict=True)]
            levels = [
                level[..., : (sides[0] + s - 1) // s, : (sides[1] + s - 1) // s]
                for level, s in zip(levels, (4, 8, 16, 32), strict=True)
            ]
        return levels if self.neck is None else list(self.neck(tuple(levels)))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        taps = self.trunk(image)
        levels = self.pyramid(taps, image)
        out = {f"tap{i}": tap for i, tap in enumerate(taps)}
        return out | {f"level{i}": level for i, level in enumerate(levels)}


class SegmentorGraph(nn.Module):
    """The whole segmentor: image -> ``logits`` (N, C, H, W) at input size, or ``mask`` uint8 (N, H, W).

    ``scores`` is what the head gives, a quarter of the input size, before up-sampling.
    """

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.levels = PyramidGraph(model.backbone, model.neck if model.with_neck else None)
        self.head, self.output = model.decode_head, output

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        out = self.levels(image)
        levels = [value for name, value in out.items() if name.startswith("level")]
        out["scores"] = self.head(levels)
        out["logits"] = F.interpolate(
            out["scores"], size=image.shape[-2:], mode="bilinear", align_corners=self.head.align_corners
        )
        if self.output == "mask":
            out["mask"] = decide(out["logits"], self.head)
        return out


def decide(logits_NCHW: Tensor, head: Any) -> Tensor:
    """Class ids uint8 (N, H, W) as MMSegmentation decides: argmax, or the threshold where there is one channel."""
    if logits_NCHW.shape[1] == 1:
        return (logits_NCHW[:, 0].sigmoid() > head.threshold).to(torch.uint8)
    return logits_NCHW.argmax(dim=1).to(torch.uint8)


@dataclass
class Traced:
    """An exported graph and the names of the tensors between its parts."""

    proto: Any
    outputs: tuple[str, ...]
    boundaries: dict[str, list[str]]  # part -> names of the tensors it ends in, in order


def trace(
    original: Original,
    size: tuple[int, int],
    *,
    dynamic: bool = False,
    output: str = "logits",
    opset: int = OPSET,
    fold_limit: int = FOLD_LIMIT,
) -> Traced:
    """Export a copy of the model; the original is not touched.

    Args:
        original: What to export.
        size: Height and width (pixels) to trace at; fixed in the file unless ``dynamic``.
        dynamic: Leave height and width free, too (the batch always is).
        output: "logits" or "mask" (segmentors).
        opset: ONNX operator set.
        fold_limit: Bytes of relative-position bias, all blocks together, that may become constants (fixed sizes).

    Raises:
        ConfigError: more classes than a uint8 mask can hold.
        TinyMIMError: PyTorch cannot export the model, or the file would exceed 2 GB.
    """
    model = copy.deepcopy(original.model)
    replace_pooling(model)
    vit = getattr(model, "backbone", model)
    if not dynamic and isinstance(vit, ViT) and vit.rel_pos_bias:
        grid = (-(-size[0] // vit.patch_size), -(-size[1] // vit.patch_size))
        tokens = grid[0] * grid[1] + vit.num_prefix_tokens
        if 4 * tokens * tokens * vit.num_heads * vit.depth < fold_limit:
            vit.fold_relative_bias(grid)
    wrapped = _wrap(model, original, output)
    sizes = {0: "batch", 2: "height", 3: "width"} if dynamic else {0: "batch"}
    example = torch.zeros(2, 3, *size)  # two images: torch would bake in a batch of one
    with torch.no_grad():
        names = list(wrapped(example[:1]))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                wrapped.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["image"],
                output_names=names,
                dynamic_shapes={"image": sizes},
                custom_translation_table={operator.floordiv: _floor_divide},
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps every kind of failure
        raise TinyMIMError(
            "PyTorch could not export this model",
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
            "try another --size, or without --dynamic; custom layers may need an ONNX translation",
        ) from error
    assert program is not None
    proto = program.model_proto
    if proto.ByteSize() > MAX_BYTES:
        raise TinyMIMError(
            "the model is larger than 2 GB", "one ONNX file cannot hold more", "export a smaller model"
        )
    return _finish(proto, original, names, output)


def _wrap(model: Any, original: Original, output: str) -> nn.Module:
    if original.part == "segmentor":
        if output not in ("logits", "mask"):
            raise ConfigError(f"output={output!r} is unknown", "a segmentor gives logits or a mask", "choose one")
        if output == "mask" and model.decode_head.num_classes > 256:
            raise ConfigError(
                f"a mask cannot hold {model.decode_head.num_classes} classes",
                "mask files are uint8: at most 256 classes",
                "use --output logits and take the argmax yourself",
            )
        return SegmentorGraph(model, output)
    if original.outputs == ("features",):
        return FeatureGraph(model)
    if hasattr(model, "decode_head"):
        return PyramidGraph(model.backbone, model.neck if model.with_neck else None)
    return PyramidGraph(model, None)


def _finish(proto: Any, original: Original, names: list[str], output: str) -> Traced:
    """Keep the real outputs, turn the others into named inner tensors, drop what a shipped file must not hold."""
    stages = {
        "backbone": [n for n in names if n.startswith("tap")] or ["features"],
        "pyramid": [n for n in names if n.startswith("level")],
        "head": [n for n in names if n == "scores"],
        "upsampling": [n for n in names if n in ("logits", "mask")][-1:],
    }
    outputs = (output,) if original.part == "segmentor" else original.outputs
    graph = proto.graph
    by_name = {value.name: value for value in graph.output}
    actual = [value.name for value in graph.output]  # equals ``names`` unless one tensor is two outputs
    rename = dict(zip(names, actual, strict=True))
    del graph.value_info[:]
    del graph.output[:]
    for name in names:
        value = by_name[rename[name]]
        _name_axes(value, name)
        (graph.output if name in outputs else graph.value_info).append(value)
    _strip(proto)
    boundaries = {part: [rename[name] for name in tensors] for part, tensors in stages.items() if tensors}
    return Traced(proto, outputs, boundaries)


def _name_axes(value: Any, name: str) -> None:
    """Readable names for the free axes instead of the exporter's expressions."""
    stride = {"features": "16", "scores": "4", "level0": "4", "level1": "8", "level2": "16", "level3": "32"}.get(name)
    if name.startswith("tap"):
        stride = "16"
    dims = value.type.tensor_type.shape.dim
    for axis, dim in enumerate(dims):
        if dim.HasField("dim_value") or dim.dim_param in ("batch", "height", "width"):
            continue
        side = {len(dims) - 2: "height", len(dims) - 1: "width"}.get(axis)
        dim.dim_param = f"{side}_{stride}" if side and stride else f"{name}_{axis}"


def _strip(proto: Any) -> None:
    """Remove stack traces, source paths and documentation from every node and tensor."""
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for item in (*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
            item.doc_string = ""
            del item.metadata_props[:]
        for node in graph.node:
            graphs += [a.g for a in node.attribute if a.HasField("g")]
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
    proto.doc_string = ""
    del proto.metadata_props[:]


def _floor_divide(a: Any, b: Any) -> Any:
    """Python's ``//`` for integers; ONNX's own Div rounds -3 // 2 to -1, so ceil written as -(-h // 16) would be wrong."""
    from onnxscript import opset20 as op

    return op.Div(op.Sub(a, op.Mod(a, b)), b)


class _quiet:
    """Hold back the exporter's warnings and log lines; its errors come through."""

    def __enter__(self) -> None:
        self.catch = warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter("ignore")
        self.levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
        for name in self.levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *error: Any) -> None:
        self.catch.__exit__(*error)
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
