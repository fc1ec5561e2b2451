"""OpenVINO's intermediate representation: NAME.xml, the graph with its contract, and NAME.bin, the weights."""

import json
from pathlib import Path

from tinymim.errors import ConfigError
from tinymim.files import sha256_file
from tinymim_export.formats.base import Format, Start, register_format
from tinymim_export.runtime.engines.openvino import OpenVINOEngine
from tinymim_export.runtime.metadata import first_line


@register_format
class OpenVINOFormat(Format):
    """IR: float32 or float16 weights of an FP32 file; an INT8 file stays INT8 (QuantizeLinear becomes FakeQuantize)."""

    name, title, suffix = "openvino", "OpenVINO IR", ".xml"
    precisions, runtime = ("fp32", "fp16"), "openvino"

    def write(self, onnx: Path, out: Path, precision: str, start: Start | None) -> list[Path]:
        OpenVINOEngine.require("cpu", None)
        import openvino

        try:
            model = openvino.Core().read_model(str(onnx))
        except RuntimeError as error:
            raise ConfigError(
                f"OpenVINO cannot convert {onnx.name}", first_line(error), "pip install -U openvino, or use the .onnx"
            ) from error
        if precision == "fp16":
            made = {"name": precision, "parent_sha256": sha256_file(onnx)}
            model.set_rt_info(json.dumps(made), ["framework", "tinymim.precision"])
        openvino.save_model(model, str(out), compress_to_fp16=precision == "fp16")
        return [out.with_suffix(".bin"), out]
