"""The blocks of a frozen ViT with 8-bit products on the CPU (W8A8): about twice the rate of bfloat16 with VNNI.

Weights have one scale per output channel, inputs one scale and zero point per layer, from photos that are shown once.
Each norm's gain and bias absorb the smoothing of its product (SmoothQuant, arXiv 2211.10438, equation 4, alpha 0.5)
and the quantisation itself: what remains is to clamp and to round. Blocks whose taps are read keep their precision.

Measured with DINOv2-S at 224 pixels, target block 10, 32 photos of CamVid, against the float32 teacher: cosines of q
and v are 0.9994 and 0.9986 (bfloat16: 0.9999, 0.9998); the KL divergence of the relations is 0.0023 for Q-K and 0.0006
for V-V (bfloat16: 0.0005, 0.0001).
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import timm.models.vision_transformer
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from tinymim.distill.frozen import product_flop
from tinymim.errors import ConfigError
from tinymim.models import vit

BLOCKS = (timm.models.vision_transformer.Block, vit.Block)


@dataclass
class Seen:
    """Inputs of a layer.

    Attributes:
        largest_K: Largest magnitude of each channel.
        least_K: Least value of each channel.
        most_K: Largest value of each channel.
    """

    largest_K: Tensor
    least_K: Tensor
    most_K: Tensor

    def note(self, x_BTK: Tensor) -> None:
        """Note more inputs."""
        least_K, most_K = x_BTK.flatten(0, -2).aminmax(dim=0)
        self.least_K, self.most_K = torch.minimum(self.least_K, least_K), torch.maximum(self.most_K, most_K)
        self.largest_K = torch.maximum(-self.least_K, self.most_K)

    def affine(self, smooth_K: Tensor | float = 1.0) -> tuple[float, int]:
        """Scale and zero point of 8 bits, for inputs that are divided by ``smooth_K``."""
        low = min(float((self.least_K / smooth_K).min()), 0.0)
        high = max(float((self.most_K / smooth_K).max()), 0.0)
        scale = max(high - low, 1e-6) / 255
        return scale, round(-low / scale)


class Int8Linear(nn.Module):
    """A linear layer (..., K) -> (..., N) whose input is quantised: uint8, or numbers that need only clamp and floor.

    Args:
        layer: The float layer.
        dtype: Type of the result.
        taken: Scale and zero point of the input.
        smooth_K: What the input was divided by.
        gelu: Apply the exact GELU to the result.
        given: Scale and zero point of the result, which is then uint8; None: a result of ``dtype``.
    """

    def __init__(
        self,
        layer: nn.Linear,
        dtype: torch.dtype,
        taken: tuple[float, int],
        smooth_K: Tensor | float = 1.0,
        *,
        gelu: bool = False,
        given: tuple[float, int] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.taken = layer.in_features, layer.out_features, taken
        weight_NK = layer.weight.detach().float() * smooth_K
        self.scale_N = (weight_NK.abs().amax(1) / 127).clamp_min(1e-12)
        self.zero_N = torch.zeros(layer.out_features, dtype=torch.int64)
        rounded_NK = (weight_NK / self.scale_N[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded_NK, None)  # no buffer: nothing but oneDNN reads it
        self.shift_N = None if layer.bias is None else layer.bias.detach().float()
        self.after = "gelu" if gelu else "none"
        self.given = (1.0, 0, dtype) if given is None else (*given, torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8:  # by way of int32: PyTorch converts to uint8 slowly
            x = x.clamp(0, 255).to(torch.int32).to(torch.uint8)
        weight = self.packed, self.scale_N, self.zero_N, self.shift_N
        return torch.ops.onednn.qlinear_pointwise(x, *self.taken, *weight, *self.given, self.after, [], "none")


def quantise_blocks(model: Any, run: Callable[[], Any], read: Collection[int], dtype: torch.dtype) -> None:
    """Give the blocks before the deepest one that is read 8-bit products; in place, for good.

    Args:
        model: A frozen ViT of float32 on the CPU: tinymim's, or timm's ``VisionTransformer``.
        run: Runs it on photos, without gradients and autocast.
        read: The blocks (from 1) that are read.
        dtype: Of autocast in the run, or float32: type of the layers' results.

    Raises:
        ConfigError: this processor or PyTorch has no 8-bit products, or the model no blocks that fit.
    """
    if not can_int8():
        raise ConfigError(
            "teacher_precision=int8",
            "this processor (it needs AVX512-VNNI) or PyTorch has no fast 8-bit products",
            "use teacher_precision=auto",
        )
    blocks = [block for i, block in enumerate(model.blocks, 1) if i < max(read) and i not in read and fits(block)]
    if not blocks:
        raise ConfigError(
            f"teacher_precision=int8 for a {type(model).__name__}",
            f"none of its blocks before block {max(read)} has LayerNorm, one layer for q, k and v and an MLP with GELU",
            "use teacher_precision=auto",
        )
    layers = [layer for block in blocks for layer in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2)]
    seen = {layer: Seen(*(torch.zeros(layer.in_features) for _ in range(3))) for layer in layers}
    hooks = [layer.register_forward_pre_hook(lambda one, args: seen[one].note(args[0])) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for block in blocks:
        mlp, hidden = block.mlp, seen[block.mlp.fc2].affine()
        block.attn.qkv = after_norm(block.norm1, block.attn.qkv, seen, dtype)
        mlp.fc1 = after_norm(block.norm2, mlp.fc1, seen, dtype, gelu=True, given=hidden)
        mlp.fc2, mlp.act = Int8Linear(mlp.fc2, dtype, hidden), nn.Identity()


def fits(block: Any) -> bool:
    """Whether :func:`quantise_blocks` knows a block."""
    return (
        type(block) in BLOCKS
        and type(block.mlp) is Mlp
        and type(block.mlp.act) is nn.GELU
        and block.mlp.act.approximate == "none"
        and type(block.mlp.norm) is nn.Identity
        and all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2))
        and all(type(layer) is nn.Linear for layer in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2))
    )


def after_norm(
    norm: nn.LayerNorm, layer: nn.Linear, seen: dict[nn.Linear, Seen], dtype: torch.dtype, **how: Any
) -> Int8Linear:
    """The 8-bit form of a layer, with the smoothing and quantisation of its input in the norm before it."""
    smooth_K = (seen[layer].largest_K.clamp_min(1e-5) / layer.weight.detach().abs().amax(0).clamp_min(1e-5)).sqrt()
    scale, zero = seen[layer].affine(smooth_K)
    unit_K = torch.ones(layer.in_features)
    gain_K = unit_K if norm.weight is None else norm.weight.detach()
    bias_K = 0 * unit_K if norm.bias is None else norm.bias.detach()
    norm.weight = nn.Parameter(gain_K / (smooth_K * scale), requires_grad=False)
    norm.bias = nn.Parameter(bias_K / (smooth_K * scale) + zero + 0.5, requires_grad=False)  # floor then rounds
    return Int8Linear(layer, dtype, (scale, zero), smooth_K, **how)


@functools.cache
def can_int8() -> bool:
    """Whether this PyTorch and processor multiply 8-bit numbers exactly and in hardware: one product is tried."""
    if not torch.cpu._is_vnni_supported():
        return False
    try:
        layer = nn.utils.skip_init(nn.Linear, 64, 16).requires_grad_(False)  # draws no random numbers
        layer.weight.copy_(torch.linspace(-127, 127, 1024).round().view(16, 64))
        layer.bias.fill_(0.5)
        x = torch.stack([torch.full((64,), 255.0), torch.linspace(0, 255, 64).round()])
        return torch.allclose(Int8Linear(layer, torch.float32, (1.0, 0))(x), layer(x), rtol=0.01)
    except (AttributeError, RuntimeError, NotImplementedError):  # another build
        return False


if hasattr(torch.ops.onednn, "qlinear_pointwise"):
    register_flop_formula(torch.ops.onednn.qlinear_pointwise)(product_flop)
