"""The plain Vision Transformer of MAE and TinyMIM, for any image size, with timm's key names.

Legend: B = batch, N = patches (row-major), P = prefix tokens (class, distillation), T = P + N, D = width,
H = heads, C = head width.
"""

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinymim.errors import ConfigError
from tinymim.models.attention import attention
from tinymim.models.backbone import PLAIN, QKV, TAPS, Stage, pick_taps, register_backbone
from tinymim.models.draws import DropPath
from tinymim.models.position import (
    num_extra_rows,
    relative_index,
    resize_position,
    resize_relative_table,
    sincos_position,
)
from tinymim.models.tokens import keep_patches

TABLE = "relative_position_bias_table"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, zero-padded at the bottom and right to whole patches: (B, 3, H, W) -> (B, N, D)."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens (B, N, D) and the grid (rows, columns)."""
        height, width = images.shape[-2:]
        p = self.patch_size
        grid = ((height + p - 1) // p, (width + p - 1) // p)  # not -(-h // p): ONNX would round towards zero
        pad_h, pad_w = grid[0] * self.patch_size - height, grid[1] * self.patch_size - width
        if not (isinstance(pad_h, int) and isinstance(pad_w, int) and pad_h == pad_w == 0):  # symbolic under export
            images = F.pad(images, (0, pad_w, 0, pad_h))
        return self.proj(images).flatten(2).transpose(1, 2), grid


class Attention(nn.Module):
    """Fused multi-head self-attention with an optional relative-position bias table."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int] | None, num_prefix: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid = grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table: nn.Parameter | None = None
        if grid is not None:
            rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + num_extra_rows(num_prefix)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))

    def bias(self, grid: tuple[int, int], index_TT: Tensor | None) -> Tensor | None:
        """Additive attention bias (1, H, T, T) for this grid, or None."""
        if self.relative_position_bias_table is None or index_TT is None or self.grid is None:
            return None
        table_RH = resize_relative_table(self.relative_position_bias_table, self.grid, grid)
        return table_RH[index_TT].permute(2, 0, 1).unsqueeze(0)

    def forward(self, x_BTD: Tensor, grid: tuple[int, int], index_TT: Tensor | None) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v, grid, index_TT)

    def some_of_qkv(self, x_BTD: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Some of q, k and v, each (B, T, D), without computing the others."""
        weight, bias = (dict(zip(QKV, rows.chunk(3), strict=True)) for rows in (self.qkv.weight, self.qkv.bias))
        return {name: F.linear(x_BTD, weight[name], bias[name]) for name in names}

    def attend(
        self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, grid: tuple[int, int], index_TT: Tensor | None
    ) -> Tensor:
        """Attention and output projection: q, k, v, each (B, H, T, C) -> (B, T, D)."""
        B, H, T, C = q_BHTC.shape
        bias = self.bias(grid, index_TT)
        x_BHTC = attention(q_BHTC, k_BHTC, v_BHTC, None if bias is None else bias.to(q_BHTC.dtype))
        # clone, not view: torch's ONNX exporter cannot view the transposed output of masked attention
        x_BTD = x_BHTC.permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format).reshape(B, T, H * C)
        return self.proj(x_BTD)


class Block(nn.Module):
    """Pre-norm transformer block with optional layer scale and drop path."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        grid: tuple[int, int] | None,
        num_prefix: int,
        init_values: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, grid, num_prefix)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x_BTD: Tensor, grid: tuple[int, int], index_TT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.drop_path(self.ls1(self.attn(self.norm1(x_BTD), grid, index_TT)))
        return x_BTD + self.drop_path(self.ls2(self.mlp(self.norm2(x_BTD))))

    def steps(self, x_BTD: Tensor, grid: tuple[int, int], index_TT: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """:meth:`forward` tap by tap: yields (name of :data:`TAPS`, tensor (B, T, D)) in order of computation."""
        yield "input", x_BTD
        q, k, v = self.attn.qkv(self.norm1(x_BTD)).chunk(3, dim=-1)
        yield from zip(QKV, (q, k, v), strict=True)
        q_BHTC, k_BHTC, v_BHTC = (x.unflatten(2, (self.attn.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        attn_BTD = self.ls1(self.attn.attend(q_BHTC, k_BHTC, v_BHTC, grid, index_TT))
        yield "attn_pre", attn_BTD
        x_BTD = x_BTD + self.drop_path(attn_BTD)
        yield "attn_post", x_BTD
        ffn_BTD = self.ls2(self.mlp(self.norm2(x_BTD)))
        yield "ffn_pre", ffn_BTD
        yield "output", x_BTD + self.drop_path(ffn_BTD)


@register_backbone(PLAIN)
class ViT(nn.Module):
    """Plain ViT: any height and width, taps, optional relative-position bias, layer scale and distillation token.

    Args:
        img_size: Size (pixels) at which the position embedding is stored; other sizes are interpolated at run time.
        patch_size: Patch side in pixels.
        embed_dim: Width D, a multiple of 4 and of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Hidden width of the MLP divided by D.
        rel_pos_bias: Add a zero-initialised relative-position bias table to each block (BEiT).
        init_values: Initial value of the layer scale; None for no layer scale.
        drop_path_rate: Largest stochastic-depth rate of a linear ramp from 0, or one rate per block.
        dist_token: Add a distillation token after the class token (DeiT, TinyMIM*-T).
        last_dim: LayerNorm -> Linear -> GELU to this width after the last block, in place of the final norm
            (TinyMIM*-T: 1280).

    Raises:
        ConfigError: widths, heads or sizes that do not fit together.
    """

    must_match: tuple[str, ...] = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        rel_pos_bias: bool = False,
        init_values: float | None = None,
        drop_path_rate: float | Sequence[float] = 0.0,
        dist_token: bool = False,
        last_dim: int | None = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        if embed_dim % num_heads or embed_dim % 4:
            raise ConfigError(
                f"embed_dim={embed_dim} does not fit num_heads={num_heads}",
                "the width must be a multiple of 4 and of the number of heads",
                "change num_heads or embed_dim, e.g. 192 with 3, 384 with 6, 768 with 12",
            )
        self.config: dict[str, Any] = {key: arguments[key] for key in ARGUMENTS} | {"img_size": size}
        self.img_size, self.patch_size, self.embed_dim, self.depth, self.num_heads = (
            size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
        )
        self.grid_size = (-(-size[0] // patch_size), -(-size[1] // patch_size))
        self.num_prefix_tokens = 2 if dist_token else 1
        self.rel_pos_bias = rel_pos_bias
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if dist_token else None
        self.pos_embed = nn.Parameter(sincos_position(self.grid_size, embed_dim, self.num_prefix_tokens))
        rates = (
            [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
            if isinstance(drop_path_rate, int | float)
            else list(drop_path_rate)
        )
        if len(rates) != depth:
            raise ConfigError(
                f"drop_path_rate has {len(rates)} numbers for {depth} blocks",
                "a sequence gives one rate per block",
                "give one number, or one per block",
            )
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                grid=self.grid_size if rel_pos_bias else None,
                num_prefix=self.num_prefix_tokens,
                init_values=init_values,
                drop_path=rate,
            )
            for rate in rates
        )
        self.norm: nn.Module
        self.conv1x1: nn.Module  # the name published TinyMIM*-T files use
        if last_dim is None:
            self.norm, self.conv1x1 = nn.LayerNorm(embed_dim, eps=1e-6), nn.Identity()
        else:
            self.norm = nn.Identity()
            self.conv1x1 = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, last_dim), nn.GELU())
        self.num_features = last_dim or embed_dim
        self.apply(_init_weights)
        patch_weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(patch_weight.data.view(embed_dim, -1))
        for token in (self.cls_token, self.dist_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, 3, H, W), normalised -> tokens with positions (B, T, D) and the patch grid (rows, columns)."""
        x_BND, grid = self.patch_embed(images)
        pos_1TD = resize_position(self.pos_embed, self.grid_size, grid, self.num_prefix_tokens)
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        x_BTD = torch.cat([token.expand(x_BND.shape[0], -1, -1) for token in prefix] + [x_BND], dim=1)
        return x_BTD + pos_1TD, grid

    def bias_index(self, grid: tuple[int, int]) -> Tensor | None:
        """The table index (T, T) that all blocks share, or None without relative-position bias."""
        if not self.rel_pos_bias:
            return None
        return relative_index(grid, self.num_prefix_tokens, self.pos_embed.device)

    def run_block(self, i: int, x_BTD: Tensor, grid: tuple[int, int], index_TT: Tensor | None) -> Tensor:
        """Run block ``i`` (from 0), with gradient checkpointing when it is on."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self.blocks[i], x_BTD, grid, index_TT, use_reentrant=False)
        return self.blocks[i](x_BTD, grid, index_TT)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> tokens (B, P + N, D) after the final norm (or the 1280-wide layer)."""
        x_BTD, grid = self.embed(images)
        index_TT = self.bias_index(grid)
        for i in range(self.depth):
            x_BTD = self.run_block(i, x_BTD, grid, index_TT)
        return self.conv1x1(self.norm(x_BTD))

    def forward(self, images: Tensor) -> Tensor:
        """Same as :meth:`forward_features`."""
        return self.forward_features(images)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen blocks, with timm's meaning.

        Args:
            images: (B, 3, H, W), normalised.
            indices: Blocks from 0 (negative from the end); an int n takes the last n; None takes all.
            return_prefix_tokens: Return (map, prefix tokens) pairs.
            norm: Apply the final norm to every tap.
            stop_early: Do not run blocks after the last tap.
            output_fmt: "NCHW" -> (B, D, ceil(H/patch), ceil(W/patch)); "NLC" -> (B, N, D).
            intermediates_only: Return the list only, not (tokens after the final norm, list).

        Returns:
            List of taps, or the pair. With ``last_dim`` the tap of the last block is ``last_dim`` wide.

        Raises:
            ConfigError: an unknown ``output_fmt``, or a block that the model does not have.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(
                f"output_fmt={output_fmt!r} is unknown", "taps are maps or token sequences", "use 'NCHW' or 'NLC'"
            )
        wanted = pick_taps(self, indices)
        x_BTD, grid = self.embed(images)
        index_TT = self.bias_index(grid)
        taps: dict[int, Any] = {}
        for i in range(max(wanted) + 1 if stop_early and intermediates_only else self.depth):
            x_BTD = self.run_block(i, x_BTD, grid, index_TT)
            if i in wanted:
                tap_BTD = self.norm(x_BTD) if norm else x_BTD
                if i == self.depth - 1:
                    tap_BTD = self.conv1x1(tap_BTD)
                prefix, tap = tap_BTD[:, : self.num_prefix_tokens], tap_BTD[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    tap = tap.transpose(1, 2).unflatten(2, grid).contiguous()
                taps[i] = (tap, prefix) if return_prefix_tokens else tap
        intermediates = [taps[i] for i in sorted(wanted)]
        if intermediates_only:
            return intermediates
        return self.conv1x1(self.norm(x_BTD)), intermediates

    # the backbone contract (tinymim.models.backbone) --------------------------------------------------------------

    @property
    def stage_info(self) -> tuple[Stage, ...]:
        """One stage: every block has the same width and grid."""
        return (Stage(self.embed_dim, self.patch_size, range(self.depth), range(self.depth)),)

    @property
    def maskable(self) -> bool:
        """Whether patches can be dropped: only if positions are added once, not to every pair of tokens."""
        return not self.rel_pos_bias

    def forward_map(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> patch tokens of :meth:`forward` as a map (B, D, ceil(H/patch), ceil(W/patch))."""
        grid = [(side + self.patch_size - 1) // self.patch_size for side in images.shape[-2:]]
        return self(images)[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)

    def run_taps(
        self, images: Tensor, wanted: Mapping[int, Collection[str]], keep_BV: Tensor | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """Run up to the deepest tap; arguments and result as in :func:`tinymim.distill.read`."""
        x_BTD, grid = self.embed(images)
        if keep_BV is not None:
            x_BTD = keep_patches(x_BTD, keep_BV, self.num_prefix_tokens)
        index_TT = self.bias_index(grid)
        out: dict[int, dict[str, Tensor]] = {}
        for number in range(1, max(wanted) + 1):
            if number not in wanted:
                x_BTD = self.run_block(number - 1, x_BTD, grid, index_TT)
                continue
            deepest = max(wanted[number], key=TAPS.index) if number == max(wanted) else TAPS[-1]
            seen: dict[str, Tensor] = {}
            block: Any = self.blocks[number - 1]
            if set(wanted[number]) < set(QKV) and number == max(wanted):
                out[number] = block.attn.some_of_qkv(block.norm1(x_BTD), wanted[number])
                break
            for name, value in block.steps(x_BTD, grid, index_TT):
                seen[name] = value
                if name == deepest:
                    break
            x_BTD = seen.get("output", x_BTD)
            out[number] = {name: seen[name] for name in wanted[number]}
        return out

    def attention_bias(self, index: int, grid: tuple[int, int]) -> Tensor | None:
        """The bias (1, H, T, T) that block ``index`` (from 0) adds to its attention scores, or None."""
        block: Any = self.blocks[index]
        return block.attn.bias(grid, self.bias_index(grid))

    def fixed_parts(self) -> list[Any]:
        """Parts that pre-training never trains: the fixed positions, and the wide last layer of fine-tuning."""
        return [self.pos_embed, self.conv1x1]

    def parts_after(self, index: int, tap: str = "output") -> list[Any]:
        """Modules and parameters that a tap of block ``index`` (from 0) does not depend on."""
        last: Any = self.blocks[index]
        unused: list[Any] = [self.norm, *self.blocks[index + 1 :]]
        if tap == "input":
            unused += [last.norm1, last.attn.qkv]
        if TAPS.index(tap) < TAPS.index("attn_pre"):
            table = last.attn.relative_position_bias_table
            unused += [last.attn.proj, last.ls1, *([] if table is None else [table])]
        if TAPS.index(tap) < TAPS.index("ffn_pre"):
            unused += [last.norm2, last.mlp, last.ls2]
        return unused

    def without_norm(self) -> "ViT":
        """A copy without the final norm that shares all parameters; the original keeps its norm."""
        twin = copy.copy(self)
        twin._modules = {**self._modules, "norm": nn.Identity()}
        return twin

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer decay: 0 for embeddings and tokens, i + 1 for block i, depth + 1 for the rest (MAE)."""
        return dict(
            stem=r"(?:cls_token|dist_token|pos_embed)$|patch_embed(?:\.|$)", blocks=[(r"blocks\.(\d+)(?:\.|$)", None)]
        )

    def no_weight_decay(self) -> set[str]:
        """Tokens, positions and relative-position tables."""
        return {"pos_embed", "cls_token", "dist_token", TABLE}


ARGUMENTS = tuple(key for key in inspect.signature(ViT).parameters if key != "drop_path_rate")  # stored in a file
POSITIONAL = (  # arguments of the published segmentation backbone, in its order
    "img_size",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "rel_pos_bias",
    "init_values",
    "drop_path_rate",
    "out_indices",
    "norm_cfg",
    "dist_token",
    "last_dim",
    "pyramid_dim",
    "init_cfg",
    "mlp_ratio",
    "with_cp",
)
SHAPE = tuple(key for key in ARGUMENTS if key not in ("img_size", "dist_token", "last_dim"))  # shape of the blocks


def _init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, as in MAE and TinyMIM."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
