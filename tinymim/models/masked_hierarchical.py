"""Masked autoencoders of hierarchical backbones: Hiera's (arXiv 2306.00989) and SimMIM (arXiv 2111.09886) of Swin.

Written after the papers and https://github.com/facebookresearch/hiera (Apache-2.0), https://github.com/microsoft/SimMIM
(MIT) and, for the small models, https://github.com/wangsr126/mae-lite (Apache-2.0). Both draw an order of the mask
units, the first V of which are visible, and return what a distillation compares beside the loss.

Legend: B = batch, U = mask units, V = visible ones, m = tokens of a unit, N = U * m, D = encoder width, E = decoder
width, P = pixels of a token * 3, H, W = rows and columns.
"""

import math
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.errors import ConfigError
from tinymim.models import hiera, swin
from tinymim.models.checkpoints import check_values
from tinymim.models.draws import draw_orders
from tinymim.models.position import resize_position
from tinymim.models.vit import Block, _init_weights
from tinymim.models.weight_files import open_weights, walk, weights_file

Attention = tuple[Tensor, ...]  # Q and K, each (B * windows, heads, tokens, channels), and a bias of the scores, if any


def units(size: Sequence[int], side: int) -> tuple[int, int]:
    """Rows and columns of the mask units of an image.

    Raises:
        ConfigError: it is not a whole number of units, or a single one, which would leave nothing to mask or to see.
    """
    if any(each % side for each in size) or math.prod(size) <= side * side:
        near = max(round(size[0] / side), 2) * side
        raise ConfigError(
            f"{size[0]} x {size[1]} pixels cannot be masked by units of {side}",
            "a photo is masked in whole units, and at least two are needed: one to see, one to predict",
            f"use a multiple of {side} pixels, e.g. --img-size {near}",
        )
    return size[0] // side, size[1] // side


class HieraMAE(nn.Module):
    """Hiera's masked autoencoder; keep ``encoder`` afterwards.

    The visible mask units (32 pixels) pass through the encoder, whose last stage does not pool here; every stage's map
    is projected to the last one's grid and width and added; a transformer decodes a patch of 16 pixels at each token.

    Args:
        encoder: A :class:`~tinymim.models.hierarchical.Hierarchical` of timm's ``hiera_*``.
        decoder_dim: Decoder width E.
        decoder_depth: Decoder blocks.
        decoder_heads: Decoder heads.
        mask_ratio: Share of the mask units that are masked.
        norm_pix: Normalise every target patch to zero mean and unit (unbiased) variance.
        q_pool: Stages that begin by pooling while the encoder is pre-trained; it keeps its own number afterwards.

    Raises:
        ConfigError: another encoder, a size that is no whole number of mask units, or no such number of stages.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.6,
        norm_pix: bool = True,
        q_pool: int = 2,
    ) -> None:
        super().__init__()
        check_family(encoder, "hiera_", "mae_hiera_tiny")
        stages = encoder.stage_info
        if not 0 <= q_pool < len(stages):
            raise ConfigError(
                f"q_pool={q_pool}", f"the encoder has {len(stages)} stages", f"use 0 to {len(stages) - 1}"
            )
        if decoder_dim % decoder_heads:
            raise ConfigError(
                f"a decoder {decoder_dim} wide with {decoder_heads} heads",
                "the heads share the width equally",
                "set decoder.heads to a divisor of decoder.dim",
            )
        self.encoder, self.mask_ratio, self.norm_pix, self.q_pool = encoder, mask_ratio, norm_pix, q_pool
        self.unit = hiera.unit_side(encoder)
        self.grid = units(encoder.img_size, self.unit)  # of the decoder's positions
        strides = [encoder.patch_stride[0] * encoder.q_stride[0] ** min(i, q_pool) for i in range(len(stages))]
        self.stride, self.side = strides[-1], self.unit // strides[-1]  # pixels of a token, tokens of a unit's side
        width, kernels = stages[-1].width, [self.stride // stride for stride in strides[:q_pool]]
        self.multi_scale_fusion_heads = nn.ModuleList(
            nn.Conv2d(stage.width, width, kernel, kernel) for stage, kernel in zip(stages, kernels, strict=False)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid) * self.side**2, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, 4.0, grid=None, num_prefix=0, init_values=None, drop_path=0.0)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.stride**2 * 3)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(_init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.decoder_pos_embed, std=0.02)

    def draw(self, images: Tensor) -> Tensor:
        """A random order of the mask units of each image, (B, U)."""
        return draw_orders(len(images), math.prod(units(images.shape[-2:], self.unit)), images.device)

    def visible(self, order_BU: Tensor) -> Tensor:
        """Row-major indices of the visible units, (B, V)."""
        count = order_BU.shape[1]
        return order_BU[:, : min(max(int(count * (1 - self.mask_ratio)), 1), count - 1)]

    def decode(self, maps: Sequence[Tensor], order_BU: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps of the visible units, and rows and columns of all -> predicted patches (B, N, P), row-major."""
        B, V = maps[-1].shape[:2]
        x = maps[-1]
        for head, fine in zip(self.multi_scale_fusion_heads, maps, strict=False):
            x = x + head(fine.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, (B, V))
        x_BVmE = self.decoder_embed(self.encoder_norm(x)).flatten(2, 3)
        hidden = self.mask_token.to(x_BVmE.dtype).expand(B, (order_BU.shape[1] - V) * x_BVmE.shape[2], -1)
        x_BUmE = torch.cat([x_BVmE, hidden.unflatten(1, (-1, x_BVmE.shape[2]))], dim=1)
        x_BUmE = x_BUmE.gather(1, order_BU.argsort(1)[:, :, None, None].expand(-1, -1, *x_BUmE.shape[2:]))
        x = x_BUmE.unflatten(2, (self.side, self.side)).unflatten(1, grid).transpose(2, 3)  # rows, then columns
        x_BNE = x.flatten(3, 4).flatten(1, 3)
        own, shown = ((rows * self.side, columns * self.side) for rows, columns in (self.grid, grid))
        x_BNE = x_BNE + resize_position(self.decoder_pos_embed, own, shown, 0)
        for block in self.decoder_blocks:
            x_BNE = block(x_BNE, shown)
        return self.decoder_pred(self.decoder_norm(x_BNE))

    def patchify(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, N, P), pixels ordered (channel, row, column)."""
        x = images.unflatten(3, (-1, self.stride)).unflatten(2, (-1, self.stride))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def read(
        self, images: Tensor, order_BU: Tensor, wanted: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Attention]]:
        """Reconstruction error of the masked patches, and queries and keys of some blocks (from 1).

        Args:
            images: (B, 3, height, width), normalised, of whole mask units.
            order_BU: A permutation of the mask units of each image, the first V are visible.
            wanted: The blocks.
        """
        grid, keep_BV = units(images.shape[-2:], self.unit), self.visible(order_BU)
        maps, found = hiera.run_masked(self.encoder, images, keep_BV, self.q_pool, wanted)
        pred_BNP, target_BNP = self.decode(maps, order_BU, grid).float(), self.patchify(images).float()
        if self.norm_pix:
            var, mean = torch.var_mean(target_BNP, dim=-1, keepdim=True)
            target_BNP = (target_BNP - mean) / (var + 1e-6).sqrt()
        masked_BU = (order_BU.argsort(1) >= keep_BV.shape[1]).float()
        masked_BN = _enlarge(masked_BU.unflatten(1, grid), self.side).flatten(1)
        return ((pred_BNP - target_BNP).square().mean(-1) * masked_BN).sum() / masked_BN.sum(), dict(found)

    def losses(self, images: Tensor, order: Tensor | None = None) -> dict[str, Tensor]:
        """``pixel`` and ``loss``, the same scalar; see :meth:`read`; ``order`` None: drawn."""
        loss, _ = self.read(images, self.draw(images) if order is None else order)
        return {"pixel": loss, "loss": loss}


class SimMIM(nn.Module):
    """Swin's masked autoencoder; keep ``encoder`` afterwards.

    Masked cells of the embedding are replaced by a learned token, and the pixels of what the last stage returns, or an
    earlier one, are predicted by one linear layer, in absolute difference. The token is registered at the encoder: it
    is stored with the student, as in the authors' files, because a teacher of masked photos needs it.

    Args:
        encoder: A :class:`~tinymim.models.hierarchical.Hierarchical` of timm's ``swin_*``.
        mask_ratio: Share of the mask units that are masked.
        mask_patch: Side of a mask unit, pixels.
        decode_stage: Stage (from 1) that pixels are decoded from, as the next one receives its map; None: the last.

    Raises:
        ConfigError: another encoder, a size that is no whole number of mask units, or no such stage.
    """

    def __init__(
        self, encoder: Any, *, mask_ratio: float = 0.6, mask_patch: int = 32, decode_stage: int | None = None
    ) -> None:
        super().__init__()
        check_family(encoder, "swin_", "simmim_swin_tiny")
        stages = encoder.stage_info
        if mask_patch % stages[-1].stride:
            raise ConfigError(
                f"mask_patch={mask_patch}",
                f"every stage must see whole mask units, and a cell of the last one has {stages[-1].stride} pixels",
                f"use a multiple of {stages[-1].stride}",
            )
        last = len(stages)
        if decode_stage is not None and not 1 <= decode_stage <= last:
            raise ConfigError(f"decode_stage={decode_stage}", f"the student has {last} stages", f"choose 1 to {last}")
        units(encoder.img_size, mask_patch)
        self.encoder, self.mask_ratio, self.unit = encoder, mask_ratio, mask_patch
        self.entered = min(decode_stage or last, last - 1)  # the stage (from 0) whose input, or output, is decoded
        self.at_end = (decode_stage or last) == last
        width, stride = stages[self.entered].width, stages[self.entered].stride
        encoder.register_parameter("mask_token", nn.Parameter(torch.empty(1, 1, stages[0].width)))
        nn.init.trunc_normal_(encoder.mask_token, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Sequential(nn.Conv2d(width, stride**2 * 3, 1), nn.PixelShuffle(stride))

    def draw(self, images: Tensor) -> Tensor:
        """A random order of the mask units of each image, (B, U)."""
        return draw_orders(len(images), math.prod(units(images.shape[-2:], self.unit)), images.device)

    def masked(self, order_BU: Tensor, grid: tuple[int, int]) -> Tensor:
        """True where a unit is masked, (B, rows, columns)."""
        count = order_BU.shape[1] - math.ceil(order_BU.shape[1] * self.mask_ratio)
        return (order_BU.argsort(1) >= max(count, 1)).unflatten(1, grid)

    def read(
        self, images: Tensor, order_BU: Tensor, wanted: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Attention], Tensor]:
        """Reconstruction error of the masked pixels, and what :func:`read_swin` returns.

        Args:
            images: (B, 3, height, width), normalised, of whole mask units.
            order_BU: A permutation of the mask units of each image, the first V are visible.
            wanted: Blocks (from 1) whose queries and keys are returned.
        """
        masked = self.masked(order_BU, units(images.shape[-2:], self.unit))
        seen: dict[int, Tensor] = {}
        found, last_BHWD = read_swin(self.encoder, images, wanted, masked, entered=seen)
        x_BHWD = last_BHWD if self.at_end else seen[self.entered]
        pred = self.decoder(self.norm(x_BHWD).permute(0, 3, 1, 2)).float()
        pixels = _enlarge(masked, self.unit)[:, None].float()
        error = ((pred - images.float()).abs() * pixels).sum() / (3 * pixels.sum())
        return error, found, last_BHWD

    def losses(self, images: Tensor, order: Tensor | None = None) -> dict[str, Tensor]:
        """``pixel`` and ``loss``, the same scalar; see :meth:`read`; ``order`` None: drawn."""
        loss = self.read(images, self.draw(images) if order is None else order)[0]
        return {"pixel": loss, "loss": loss}


def read_swin(
    encoder: Any,
    images: Tensor,
    wanted: Collection[int],
    masked: Tensor | None,
    *,
    entered: dict[int, Tensor] | None = None,
    whole: bool = True,
) -> tuple[dict[int, Attention], Tensor]:
    """Run a Swin on photos some of whose units are replaced by its mask token.

    Args:
        encoder: A :class:`~tinymim.models.hierarchical.Hierarchical` with ``mask_token`` if anything is masked.
        images: (B, 3, height, width), normalised.
        wanted: Blocks (from 1) whose queries, keys and biases are returned.
        masked: True where a unit is masked, (B, rows, columns); None: the whole photo is seen.
        entered: Filled with stage (from 0) -> the map (B, H, W, D) that its blocks receive.
        whole: Also run what follows the deepest of the blocks.

    Returns:
        Block -> Q, K and the bias of the scores; and the last map (B, H, W, D).
    """
    x_BHWD = swin.embed(encoder, images)
    if masked is not None:
        here = _enlarge(masked, x_BHWD.shape[1] // masked.shape[1])[..., None]
        x_BHWD = torch.where(here, encoder.mask_token.to(x_BHWD.dtype), x_BHWD)
    found: dict[int, Attention] = {}
    number = 0
    for i, stage in enumerate(encoder.layers):
        x_BHWD = swin.merge_patches(stage, x_BHWD)
        if entered is not None:
            entered[i] = x_BHWD
        for block in stage.blocks:
            number += 1
            if number in wanted:
                found[number] = swin.queries_and_keys(block, x_BHWD)
            if not whole and number == max(wanted):
                return found, x_BHWD
            x_BHWD = hiera.recompute(stage, swin.run_block, block, x_BHWD)
    return found, x_BHWD


def stored_mask_token(file: str | os.PathLike[str], encoder: Any) -> Tensor | None:
    """SimMIM's mask token (1, 1, D) in the file of an encoder; None: it has none of this width.

    Raises:
        CheckpointError: a damaged file, or a token that is not finite.
    """
    path = weights_file(file)
    content, _ = open_weights(path)
    wanted = (1, 1, encoder.stage_info[0].width)
    for _, key, value in walk(content):
        if key.endswith("mask_token") and tuple(value.shape) == wanted:
            check_values(key, value, str(path))
            return value.float()
    return None


def check_family(model: Any, prefix: str, recipe: str, side: str = "student") -> None:
    """Refuse a model that is not one of timm's of this prefix.

    Raises:
        ConfigError: it is not.
    """
    name = getattr(model, "config", {}).get("name", type(model).__name__)
    if not name.startswith(prefix):
        raise ConfigError(
            f"the {side} is a {name}",
            f"it is masked and read as only timm's {prefix}* can be; --recipe {recipe} is for such models",
            f"use a {prefix}* model as {side} (tinymim list models), or another recipe (tinymim list recipes)",
        )


def _enlarge(x_BHW: Tensor, factor: int) -> Tensor:
    """Repeat every row and column."""
    return x_BHW.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
