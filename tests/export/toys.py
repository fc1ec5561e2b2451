"""A runtime and a precision that are no part of the package, as another project would add them."""

import time
from collections import Counter

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tinymim_export.precision import Built, Precision, Tolerance, register_precision
from tinymim_export.runtime.engines import Engine, Port, Provider, random_input, register_runtime
from tinymim_export.runtime.metadata import load_proto, proto_metadata


@register_runtime
class ReferenceEngine(Engine):
    """onnx's own evaluator: numpy, slow, on the CPU."""

    runtime, title = "reference", "the ONNX reference"
    providers = (Provider("numpy", "ReferenceEvaluator", target="reference", precisions=("int8",)),)
    compute_types = ("strict",)
    packages = ("onnx",)

    def __init__(self, path, provider, compute_type, threads):
        super().__init__(path, provider, compute_type, threads)
        proto = load_proto(path)
        self.nodes = Counter(node.op_type for node in proto.graph.node)
        self.evaluator = ReferenceEvaluator(proto)
        inputs, outputs = (
            [
                Port(
                    value.name,
                    onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                    tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
                )
                for value in values
            ]
            for values in (proto.graph.input, proto.graph.output)
        )
        self.describe(inputs, outputs, proto_metadata(proto))

    @classmethod
    def require(cls, provider, compute_type):
        """numpy is everywhere."""

    def _run(self, images_N3HW):
        return self.evaluator.run([self.output], {self.input: images_N3HW})[0]

    def timer(self, shape, seed=0):
        image = random_input(shape, self.dtype, seed)

        def once():
            began = time.perf_counter()
            self.run(image)
            return 1000 * (time.perf_counter() - began)

        return once

    def placement(self):
        return {self.place.title: self.nodes}

    def operator_times(self, shape, runs):
        return Counter({"the whole graph": self.timer(shape)()})

    def unfused_pairs(self):
        return None


@register_precision
class Bf16Weights(Precision):
    """Weights rounded to bfloat16's eight bits and kept in float32."""

    name, title = "bf16-weights", "BF16 weights"
    about = "weights rounded to bfloat16"
    tolerance = Tolerance(0.999, 0.9)
    targets = ("onnxruntime cpu",)

    def build(self, source, made, excluded, method):
        rounded = 0
        for tensor in made.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name.startswith("w"):
                bits = onnx.numpy_helper.to_array(tensor).view(np.uint32) + np.uint32(0x8000)
                value = (bits & np.uint32(0xFFFF0000)).view(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
                rounded += 1
        return Built(notes=[f"{rounded} weights were rounded to bfloat16"])
