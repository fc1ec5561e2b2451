"""A checkpoint as an ExecuTorch program: torch.export, lowered to XNNPACK where it can, the rest portable operators.

The program carries the contract of the .onnx file as a second method that gives a text
(:mod:`tinymim_export.runtime.engines.executorch` reads it).
"""

import copy
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tinymim.errors import TinyMIMError
from tinymim_export.graph.cost import pieces
from tinymim_export.graph.torch_model import load_torch_model
from tinymim_export.graph.trace import wrap
from tinymim_export.graph.wrappers import SwapChannels, make_exportable
from tinymim_export.runtime.metadata import first_line


class _Outputs(nn.Module):
    """The named outputs of a graph, as a tuple."""

    def __init__(self, graph: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.names = graph, names  # "graph" is a name of torch.fx

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        seen = self.inner(image)
        return tuple(seen[name] for name in self.names)


def lower(
    checkpoint: str | Path,
    size: tuple[int, int],
    *,
    outputs: tuple[str, ...],
    contract: dict[str, str],
    method: str,
    config: str | Path | None = None,
    part: str | None = None,
    num_heads: int | None = None,
) -> bytes:
    """The .pte of a checkpoint, for one image at a time of one size.

    Args:
        checkpoint: As in :func:`tinymim_export.graph.convert.export`.
        size: Height and width, pixels.
        outputs: Names of the outputs of the .onnx file of it.
        contract: ``metadata_props`` of that file, carried along.
        method: Name of the method that gives the contract and the names of the outputs as JSON.
        config: As there.
        part: As there.
        num_heads: As there.

    Raises:
        CheckpointError, ConfigError: as there.
        TinyMIMError: ExecuTorch has no lowering of a layer.
    """
    loaded = load_torch_model(checkpoint, config=config, part=part, num_heads=num_heads)
    model = copy.deepcopy(loaded.model)
    make_exportable(model)
    graph = wrap(model, loaded, "mask" if "mask" in outputs else "logits", pieces(loaded, size).unread)
    module = _Outputs(SwapChannels(graph) if loaded.bgr else graph, outputs).eval()
    about = json.dumps({"outputs": outputs, "contract": contract})
    level = logging.root.level
    try:
        logging.root.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            program = torch.export.export(module, (torch.zeros(1, 3, *size),))
            lowered = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], constant_methods={method: about}
            )
            return bytes(lowered.to_executorch().buffer)
    except Exception as error:  # torch.export and ExecuTorch raise several kinds
        raise TinyMIMError(
            "ExecuTorch cannot lower this model",
            f"{type(error).__name__}: {first_line(error, 300)}",
            "use the .onnx file: tinymim-export --checkpoint FILE --onnx FILE.onnx",
        ) from error
    finally:
        logging.root.setLevel(level)
