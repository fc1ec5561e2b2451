"""ExecuTorch's program: NAME.pte, lowered from the checkpoint to XNNPACK, with the .onnx file's contract inside."""

import json
from pathlib import Path

from tinymim.errors import ConfigError
from tinymim_export.formats.base import Format, Start, register_format
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.engines.executorch import METHOD, ExecuTorchEngine
from tinymim_export.runtime.metadata import PREFIX


@register_format
class ExecuTorchFormat(Format):
    """A .pte of float32 for phones and boards: one image at a time, at the size of the .onnx file."""

    name, title, suffix = "executorch", "an ExecuTorch program", ".pte"
    precisions, runtime = ("fp32",), "executorch"

    def write(self, onnx: Path, out: Path, precision: str, start: Start | None) -> list[Path]:
        ExecuTorchEngine.require("cpu", None)
        if start is None:
            raise ConfigError(
                "--format executorch cannot start at an .onnx file",
                "ExecuTorch lowers PyTorch modules",
                f"tinymim-export --checkpoint segmentor.pth --format executorch --out {out.name}",
            )
        if precision != "fp32":
            raise ConfigError(
                f"--format executorch and --precision {precision}",
                "the PyTorch module is float32",
                "leave --precision out, or take an .onnx or OpenVINO file",
            )
        from tinymim_export.graph.lower import lower

        source = open_engine(onnx)
        _, _, height, width = source.some_shape()
        meta = source.meta.items()
        kept = {PREFIX + key: json.dumps(value) for key, value in meta if key not in ("verified", "parity")}
        names = tuple(port.name for port in source.outputs)
        out.write_bytes(
            lower(
                start.checkpoint,
                (height, width),
                outputs=names,
                contract=kept,
                method=METHOD,
                config=start.config,
                part=start.part,
                num_heads=start.num_heads,
            )
        )
        return [out]
