"""Static INT8 with attention's products in 8 bits, too: the placement that OpenVINO runs fast.

OpenVINO computes q k^T and p v of every attention as one kernel with the softmax between them, and does both products
in INT8 where q, k, v (signed) and the softmax (unsigned) are quantised: at 1025 tokens, where attention takes almost
half of the time of an ``int8`` file, 1.3 to 1.4 times as fast as in bfloat16. The range of the softmax is read off its
histogram like any other: levels for the largest share would round most shares of 1025 tokens to nothing.

The residual stream, normalisations and the softmax itself stay in float. ONNX Runtime has no kernel for such products
and would round and compute in float: there, ``int8`` is the faster file. Measured and left out: transposed
convolutions, feature pyramids' resizes and additions (no faster).
"""

from tinymim_export.precision.base import register_precision
from tinymim_export.precision.int8 import Int8
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import Target, attention_products


@register_precision
class Int8Wide(Int8):
    """Q/DQ pairs also around attention's products."""

    name, title = "int8-wide", "wide static INT8"
    about = "static INT8 of attention's products, too; for OpenVINO"
    targets = ("openvino cpu",)
    without = ("attention",)

    def layers(self, graph: Graph) -> list[Target]:
        return [*super().layers(graph), *attention_products(graph)]
