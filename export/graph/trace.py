"""Trace a PyTorch model as one ONNX graph that is right at every size it accepts.

Replaces what torch's exporter silently gets wrong for dynamic sizes: adaptive pooling and MMSegmentation's Upsample
(their exports contain the traced size as a constant), floor division of negative sizes (ONNX rounds towards zero), and
traces of a single image.
"""

import copy
import logging
import operator
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.errors import ConfigError, TinyMIMError
from tinymim_export.graph.cost import Pieces, pieces
from tinymim_export.graph.torch_model import TorchModel
from tinymim_export.graph.wrappers import (
    ClassifierGraph,
    FeatureGraph,
    PyramidGraph,
    SegmentorGraph,
    SwapChannels,
    make_exportable,
)
from tinymim_export.runtime.metadata import first_line, strip

OPSET = 20  # the newest that ONNX Runtime's static INT8 quantisation supports (21 and later break it)
MAX_BYTES = 2_000_000_000  # one protobuf file


@dataclass
class Traced:
    """An exported graph and the names of the tensors between its parts."""

    proto: Any
    outputs: tuple[str, ...]
    boundaries: dict[str, list[str]]  # part -> names of its output tensors, in order
    pieces: Pieces


def trace(
    loaded: TorchModel,
    size: tuple[int, int],
    *,
    dynamic: bool = False,
    output: str = "logits",
    opset: int = OPSET,
) -> Traced:
    """Export a copy of the model; the original is not changed.

    Args:
        loaded: The model to export.
        size: Height and width (pixels) to trace at; fixed in the file unless ``dynamic``.
        dynamic: Leave height and width dynamic, too (the batch always is).
        output: "logits" or "mask" (segmentors).
        opset: ONNX operator set.

    Raises:
        ConfigError: more classes than a uint8 mask can hold.
        TinyMIMError: PyTorch cannot export the model, or the file would exceed 2 GB.
    """
    model = copy.deepcopy(loaded.model)
    make_exportable(model)
    found = pieces(loaded, size)
    wrapped = wrap(model, loaded, output, found.unread)
    if loaded.bgr:
        wrapped = SwapChannels(wrapped)
    sizes = {0: "batch", 2: "height", 3: "width"} if dynamic else {0: "batch"}
    example = torch.zeros(2, 3, *size)  # two images: torch would make a batch of one constant
    with torch.no_grad():
        seen = wrapped(example[:1])
    proto = to_onnx(wrapped, {"image": example}, {"image": sizes}, list(seen), opset)
    strides = {name: round(size[0] / value.shape[2]) for name, value in seen.items() if value.ndim == 4}
    outputs, boundaries = _finish(proto, loaded, output, list(seen), strides)
    return Traced(proto, outputs, boundaries, found)


def to_onnx(
    module: nn.Module, inputs: dict[str, Tensor], free: dict[str, dict[int, str]], outputs: list[str], opset: int
) -> Any:
    """Export a module as one ModelProto.

    Args:
        module: The graph; it returns a dict.
        inputs: Name (also the argument's) -> example.
        free: Name -> axis -> name of the sizes that are free.
        outputs: Names of the outputs.
        opset: ONNX operator set.

    Raises:
        TinyMIMError: PyTorch cannot export it, or the file would exceed 2 GB.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=[*inputs],
                output_names=outputs,
                dynamic_shapes=free,
                custom_translation_table={operator.floordiv: _floor_divide},
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps every kind of failure
        raise TinyMIMError(
            "PyTorch could not export this model",
            f"{type(error).__name__}: {first_line(error, 300)}",
            "try another --size, or leave --dynamic out; custom layers may need an ONNX translation",
        ) from error
    assert program is not None
    proto = program.model_proto
    if proto.ByteSize() > MAX_BYTES:
        raise TinyMIMError("the model is larger than 2 GB", "one ONNX file cannot hold more", "export a smaller model")
    return proto


def wrap(model: Any, loaded: TorchModel, output: str, unread: list[str]) -> nn.Module:
    """The graph of a model: image -> named tensors.

    Args:
        model: A copy of the loaded one, made exportable.
        loaded: What it is.
        output: "logits" or "mask" (segmentors).
        unread: See :class:`tinymim_export.graph.cost.Pieces`.

    Raises:
        ConfigError: another output, or more classes than a uint8 mask can hold.
    """
    if loaded.part == "segmentor":
        if output not in ("logits", "mask"):
            raise ConfigError(
                f"output={output!r} is unknown", "a segmentor outputs logits or a mask", "use 'logits' or 'mask'"
            )
        if output == "mask" and model.decode_head.num_classes > 256:
            raise ConfigError(
                f"a mask cannot hold {model.decode_head.num_classes} classes",
                "mask files are uint8: at most 256 classes",
                "use --output logits and take the argmax yourself",
            )
        return SegmentorGraph(model, output, unread)
    if loaded.part == "classifier":
        return ClassifierGraph(model)
    if loaded.outputs == ("features",):
        return FeatureGraph(model)
    return PyramidGraph(model)


def _finish(
    proto: Any, loaded: TorchModel, output: str, names: list[str], strides: dict[str, int]
) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Keep the real outputs, turn the others into named inner tensors, remove debugging data."""
    taps, levels = ([n for n in names if n.startswith(word)] for word in ("tap", "level"))
    stages = {
        "classifier": [n for n in names if n == "class_logits"],
        "backbone": taps or levels or [n for n in names if n == "features"],
        "pyramid": levels if taps else [],
        "head": [n for n in names if n == "scores"],
        "upsampling": [n for n in names if n in ("logits", "mask")][-1:],
    }
    outputs = (output,) if loaded.part == "segmentor" else loaded.outputs
    graph = proto.graph
    by_name = {value.name: value for value in graph.output}
    actual = [value.name for value in graph.output]  # equals ``names`` unless one tensor is two outputs
    rename = dict(zip(names, actual, strict=True))
    del graph.value_info[:]
    del graph.output[:]
    for name in names:
        value = by_name[rename[name]]
        _name_axes(value, name, strides.get(name, 1))
        (graph.output if name in outputs else graph.value_info).append(value)
    strip(proto)
    boundaries = {part: [rename[name] for name in tensors] for part, tensors in stages.items() if tensors}
    return outputs, boundaries


def _name_axes(value: Any, name: str, stride: int) -> None:
    """Give dynamic axes readable names instead of the exporter's expressions."""
    dims = value.type.tensor_type.shape.dim
    for axis, dim in enumerate(dims):
        if dim.HasField("dim_value") or dim.dim_param in ("batch", "height", "width"):
            continue
        side = {len(dims) - 2: "height", len(dims) - 1: "width"}.get(axis)
        dim.dim_param = f"{side}_{stride}" if side and stride > 1 else f"{name}_{axis}"


def _floor_divide(a: Any, b: Any) -> Any:
    """Python's ``//`` for integers; ONNX's Div rounds -3 / 2 to -1, so a ceil written -(-h // 16) would be wrong."""
    from onnxscript import opset20 as op

    return op.Div(op.Sub(a, op.Mod(a, b)), b)


class _quiet:
    """Hide the exporter's warnings and log lines, but not its errors."""

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
