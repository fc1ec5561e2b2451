"""A frozen network, prepared once: weights in the precision of its runs and, on the CPU, in oneDNN's own layout.

The same products as before: autocast would cast the same weights to the same type at every call, and GELU is applied to
a product before instead of after it is rounded. Measured on two cores of an AMD EPYC with AVX512-BF16: a product of a
ViT-S or ViT-B takes 0.81 to 0.9 of its time, with GELU 0.83, in bfloat16.
"""

import functools
import math
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


class PackedLinear(nn.Linear):
    """A linear layer of a frozen network on the CPU: (..., in) -> (..., out).

    Args:
        layer: The layer; its weights are shared if they have the type already.
        dtype: Type of the product; float32 accumulates.
        gelu: Apply the exact GELU to the result.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, *, gelu: bool = False) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)  # BEiT's blocks read it
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)  # no buffer: nothing but oneDNN reads it
        self.after = "gelu" if gelu else "none"

    def forward(self, input: Tensor) -> Tensor:
        x = input.to(self.weight.dtype).contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.after, [], "none")


def prepare_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a network's products and pack them where that is possible; in place, for good.

    Afterwards it runs under autocast of this type only (float32: none), in evaluation mode without gradients.

    Args:
        model: On its device; parameters need no gradients.
        dtype: Of autocast, or float32.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    pack = device == "cpu" and can_pack(dtype)
    for parent in model.modules():
        fused = pack and type(parent) is Mlp and type(parent.act) is nn.GELU and parent.act.approximate == "none"
        for name, child in parent.named_children():
            if type(child) is nn.Linear and pack:
                setattr(parent, name, PackedLinear(child, dtype, gelu=fused and name == "fc1"))
            elif type(child) in (nn.Linear, nn.Conv2d):  # not their subclasses, which may do more with the weights
                child.to(dtype)
        if fused:
            parent.act = nn.Identity()


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and processor have oneDNN's packed products of a type: one is tried."""
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        layer = nn.utils.skip_init(nn.Linear, 32, 16, dtype=dtype).requires_grad_(False)  # draws no random numbers
        layer.weight.copy_(torch.linspace(-1, 1, 512).view(16, 32))
        layer.bias.fill_(0.5)
        x = torch.linspace(-1, 1, 64, dtype=dtype).view(2, 32)
        return torch.allclose(PackedLinear(layer, dtype)(x), layer(x), rtol=0.02, atol=0.02)
    except (AttributeError, RuntimeError, NotImplementedError):  # another build or processor
        return False


def product_flop(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two operations for each multiplication of a linear layer, as PyTorch counts; x and out_shape are shapes."""
    return 2 * math.prod(x) * out_shape[-1]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(product_flop)
