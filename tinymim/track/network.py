"""OSTrack's network on a plain student: template and search patches in one stream, candidate elimination, centre head.

Written from the paper: Ye et al., "Joint Feature Learning and Relation Modeling for Tracking: A One-Stream Framework",
ECCV 2022, arXiv 2203.11991. Where its text leaves a number open it is that of the authors' code (MIT licence).

Legend: B = batch, Z = template patches, S = search patches (all, or those kept so far), T = Z + S, D = width,
H = heads, C = head width, G = rows and columns of the search grid (S = G * G at first).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.errors import ConfigError
from tinymim.models.backbone import TapByTap
from tinymim.models.position import resize_position
from tinymim.models.tokens import keep_patches

RARE = -math.log((1 - 0.01) / 0.01)  # bias of the score map: few cells are a centre (focal loss, arXiv 1708.02002)


def default_elimination(depth: int) -> tuple[int, ...]:
    """Blocks, from 1, in which candidates are eliminated: 4, 7, 10 of 12 (the paper's), as far into other depths."""
    return tuple(sorted({depth * quarter // 4 + 1 for quarter in (1, 2, 3)}))


class Tracker(nn.Module):
    """Template and search crop -> maps of where the target's centre is, and of its size.

    The prefix tokens of the backbone are left out, as published. Template and search crop have positions of their own:
    the backbone's, interpolated to their grids, then trained apart.

    Args:
        backbone: A plain vision transformer of ours whose patches can be dropped; its weights are shared.
        template_size: Side of the template, pixels.
        search_size: Side of the search crop, pixels.
        template_factor: Side of the template's square divided by the root of the target's area.
        search_factor: The same of the search crop.
        eliminate_in: Blocks, from 1, after whose attention only part of the search patches goes on; None:
            :func:`default_elimination`; empty: all patches go through all blocks.
        keep: Share of the search patches that each of these blocks keeps; 1: all of them.
        channels: Channels of the first layer of the centre head.

    Attributes:
        config: These arguments, without the backbone, as plain values.
        keep_now: Share that is kept now; training lowers it to ``keep`` by and by.

    Raises:
        ConfigError: the backbone is not plain, or sizes or blocks that do not fit it.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        template_size: int = 128,
        search_size: int = 256,
        template_factor: float = 2.0,
        search_factor: float = 4.0,
        eliminate_in: Sequence[int] | None = None,
        keep: float = 0.7,
        channels: int = 256,
    ) -> None:
        super().__init__()
        require_plain(backbone)
        blocks = default_elimination(backbone.depth) if eliminate_in is None else tuple(eliminate_in)
        _check(backbone, template_size, search_size, blocks, keep, channels)
        self.config: dict[str, Any] = dict(
            template_size=template_size,
            search_size=search_size,
            template_factor=template_factor,
            search_factor=search_factor,
            eliminate_in=list(blocks),
            keep=keep,
            channels=channels,
        )
        self.backbone, self.eliminate_in, self.keep_now = backbone, frozenset(blocks), float(keep)
        self.grids = [size // backbone.patch_size for size in (template_size, search_size)]
        prefix = backbone.num_prefix_tokens
        positions = [
            resize_position(backbone.pos_embed.detach(), backbone.grid_size, (grid, grid), prefix)[:, prefix:]
            for grid in self.grids
        ]
        self.template_pos, self.search_pos = (nn.Parameter(pos.clone()) for pos in positions)
        for unused in (backbone.pos_embed, backbone.cls_token, backbone.dist_token):
            if unused is not None:
                unused.requires_grad_(False)
        self.head = CentreHead(backbone.num_features, channels)

    def forward(self, template: Tensor, search: Tensor) -> dict[str, Tensor]:
        """The maps.

        Args:
            template: (B, 3, template_size, template_size), normalised.
            search: (B, 3, search_size, search_size), normalised.

        Returns:
            ``score`` (B, 1, G, G): whether the target's centre is in the cell, 0 to 1; ``offset`` (B, 2, G, G): x and y
            of the centre from the cell's upper left corner, in cells; ``size`` (B, 2, G, G): width and height, as
            fractions of the search crop.
        """
        return self.head(self.features(template, search))

    def features(self, template: Tensor, search: Tensor) -> Tensor:
        """The same crops -> search features (B, D, G, G) after the final norm; zero where patches were eliminated."""
        net, grid = self.backbone, self.grids[1]
        z_BZD = net.patch_embed(template)[0] + self.template_pos
        x_BTD = torch.cat([z_BZD, net.patch_embed(search)[0] + self.search_pos], dim=1)
        Z, place_BS = z_BZD.shape[1], None
        for i in range(net.depth):
            if i + 1 in self.eliminate_in and self.keep_now < 1:
                x_BTD, place_BS = self._eliminate(net.blocks[i], x_BTD, place_BS, Z)
            else:
                x_BTD = net.run_block(i, x_BTD, (grid, grid), None)
        x_BSD = net.conv1x1(net.norm(x_BTD))[:, Z:]
        if place_BS is not None:
            empty = x_BSD.new_zeros(x_BSD.shape[0], grid * grid, x_BSD.shape[2])
            x_BSD = empty.scatter(1, place_BS.unsqueeze(-1).expand(-1, -1, x_BSD.shape[2]), x_BSD)
        return x_BSD.transpose(1, 2).unflatten(2, (grid, grid))

    def _eliminate(self, block: Any, x_BTD: Tensor, place_BS: Tensor | None, Z: int) -> tuple[Tensor, Tensor]:
        """A block that keeps, after its attention, the search patches that the template's centre attends to most.

        Args:
            block: The block.
            x_BTD: Its input.
            place_BS: Cells of the search patches that are left; None: all, in order.
            Z: Template patches.

        Returns:
            The output, and the new cells.
        """
        grid, seen = self.grids[0], dict[str, Tensor]()
        for name, value in block.steps(x_BTD, (grid, grid), None):
            seen[name] = value
            if name == "attn_post":
                break
        heads, centre = block.attn.num_heads, (grid + 1) * ((grid - 1) // 2)  # one patch, as in the authors' code
        q_BHC = seen["q"][:, centre].unflatten(-1, (heads, -1)).float()
        k_BTHC = seen["k"].unflatten(-1, (heads, -1)).float()
        scores_BHT = torch.einsum("bhc,bthc->bht", q_BHC, k_BTHC) * q_BHC.shape[-1] ** -0.5
        share_BS = scores_BHT.softmax(-1).mean(1)[:, Z:]
        count = math.ceil(self.keep_now * (x_BTD.shape[1] - Z))
        kept_BS = share_BS.topk(count, dim=1).indices
        x_BTD = keep_patches(seen["attn_post"], kept_BS, Z)
        place_BS = kept_BS if place_BS is None else place_BS.gather(1, kept_BS)
        return x_BTD + block.drop_path(block.ls2(block.mlp(block.norm2(x_BTD)))), place_BS


class CentreHead(nn.Module):
    """Three stacks of four 3x3 convolutions and a 1x1 one: score, offset and size of every cell.

    Normalised by groups of channels, not over the batch as published: so the numbers of a run do not follow from how a
    batch is split into passes and processes, and a file gives what the trained network gives.

    Args:
        width: Channels of its input.
        channels: Of the first layer, a multiple of 8; each further one has half of them.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.score, self.offset, self.size = (_stack(width, channels, out) for out in (1, 2, 2))
        for stack, bias in ((self.score, RARE), (self.offset, 0.5), (self.size, RARE / 4)):
            last: Any = stack[-1]
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, bias)

    def forward(self, x_BDGG: Tensor) -> dict[str, Tensor]:
        """See :meth:`Tracker.forward`."""
        return {
            "score": self.score(x_BDGG).float().sigmoid(),
            "offset": self.offset(x_BDGG).float(),
            "size": self.size(x_BDGG).float().sigmoid(),
        }


def _stack(width: int, channels: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for step in range(4):
        wide = channels >> step
        norm = nn.GroupNorm(math.gcd(8, wide), wide)
        layers += [nn.Conv2d(width, wide, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)]
        width = wide
    return nn.Sequential(*layers, nn.Conv2d(width, out, 1))


def hann_window(grid: int) -> Tensor:
    """(1, 1, G, G): Hann's window over the cells' centres, 1 in the middle: a target seldom jumps."""
    one = torch.sin(math.pi * (torch.arange(grid, dtype=torch.float64) + 1) / (grid + 1)) ** 2
    return torch.outer(one, one).float()[None, None]


def read_box(maps: dict[str, Tensor], window: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The box at the largest score.

    Args:
        maps: Of :meth:`Tracker.forward`.
        window: (1, 1, G, G), multiplied with the scores first, or None.

    Returns:
        Centre x, y, width and height as fractions of the search crop (B, 4), and that score (B,).
    """
    score_BN = (maps["score"] if window is None else maps["score"] * window).flatten(1)
    grid = maps["score"].shape[-1]
    at_B1 = score_BN.argmax(1, keepdim=True)
    offset, size = (maps[name].flatten(2).gather(2, at_B1.unsqueeze(1).expand(-1, 2, -1))[..., 0] for name in NAMES)
    cell = torch.cat([at_B1 % grid, torch.div(at_B1, grid, rounding_mode="floor")], dim=1)
    return torch.cat([(cell + offset) / grid, size], dim=1), score_BN.gather(1, at_B1)[:, 0]


NAMES = ("offset", "size")


def require_plain(backbone: Any) -> None:
    """Refuse a backbone that no template and search crop can go through as one sequence of patches.

    Raises:
        ConfigError: it is hierarchical, or has positions between pairs of patches.
    """
    name = backbone.config.get("name", type(backbone).__name__)
    if len(backbone.stage_info) != 1 or not isinstance(backbone, TapByTap):
        raise ConfigError(
            f"no tracker can be built on {name}",
            "it is hierarchical: a one-stream tracker needs one sequence of patches of both crops",
            "give a plain student, e.g. one distilled as tinymim_vit_tiny",
        )
    if not backbone.maskable:
        raise ConfigError(
            f"no tracker can be built on {name}",
            "its relative-position bias is one of a single grid, and two crops share the attention here",
            "give a student without it (rel_pos_bias=False)",
        )


def _check(backbone: Any, template: int, search: int, blocks: Sequence[int], keep: float, channels: int) -> None:
    patch = backbone.patch_size
    if template < patch or search < patch or template % patch or search % patch:
        near = [max(round(side / patch), 1) * patch for side in (template, search)]
        raise ConfigError(
            f"template {template} and search crop {search} do not fit patches of {patch} pixels",
            "both are cut into whole patches",
            f"use --template-size {near[0]} --img-size {near[1]}",
        )
    if not all(1 <= block <= backbone.depth for block in blocks):
        raise ConfigError(
            f"eliminate_in={list(blocks)}",
            f"the backbone has {backbone.depth} blocks, counted from 1",
            "choose among them, or [] to eliminate nothing",
        )
    if not 0 < keep <= 1:
        raise ConfigError(f"keep={keep}", "it is a share above 0, up to 1", "e.g. --cfg-options keep=0.7")
    if channels < 8 or channels % 8:
        raise ConfigError(f"channels={channels}", "the head halves them three times", "use a multiple of 8")
