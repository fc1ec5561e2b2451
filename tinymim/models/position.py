"""Position embeddings and relative-position bias: made, resized and indexed by one set of functions.

Legend: G = grid (gh rows, gw columns), N = gh * gw patches, P = prefix tokens (class, distillation), T = P + N,
D = width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_position(grid: tuple[int, int], dim: int, num_prefix: int = 1) -> Tensor:
    """Fixed 2-D sine-cosine positions (MAE): channels are [sin xw, cos xw, sin yw, cos yw], prefix rows zero.

    Args:
        grid: Patch rows and columns.
        dim: Width, a multiple of 4.
        num_prefix: Zero rows before the patches.

    Returns:
        Tensor (1, num_prefix + N, dim), patches row-major.
    """
    gh, gw = grid
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y_GG, x_GG = torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij")
    x_ND = x_GG.reshape(-1, 1) * omega
    y_ND = y_GG.reshape(-1, 1) * omega
    pos_ND = torch.cat([x_ND.sin(), x_ND.cos(), y_ND.sin(), y_ND.cos()], dim=1)
    pos_TD = torch.cat([pos_ND.new_zeros(num_prefix, dim), pos_ND])
    return pos_TD.float().unsqueeze(0)


def _resize_map(map_1CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, align_corners=False, no antialias: the same rule at load and at run time."""
    dtype = map_1CHW.dtype
    return F.interpolate(map_1CHW.float(), size=size, mode="bicubic", align_corners=False).to(dtype)


def same_grid(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two grids are equal and known as numbers (symbolic sizes during export are never 'the same')."""
    return all(isinstance(size, int) for size in (*a, *b)) and tuple(a) == tuple(b)


def resize_position(pos_1TD: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix: int) -> Tensor:
    """Resize a position embedding (1, P + old N, D) to (1, P + new N, D); prefix rows are kept."""
    if same_grid(old, new):
        return pos_1TD
    prefix, pos_1ND = pos_1TD[:, :num_prefix], pos_1TD[:, num_prefix:]
    map_1DHW = pos_1ND.reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    map_1DHW = _resize_map(map_1DHW, new)
    return torch.cat([prefix, map_1DHW.flatten(2).transpose(1, 2)], dim=1)


def resize_relative_table(table_RH: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a relative-position table ((2h-1)(2w-1) + extra, heads) to another grid; the extra rows are kept."""
    if same_grid(old, new):
        return table_RH
    h, w = 2 * old[0] - 1, 2 * old[1] - 1
    body, extra = table_RH[: h * w], table_RH[h * w :]
    map_1HHW = body.reshape(h, w, -1).permute(2, 0, 1).unsqueeze(0)
    map_1HHW = _resize_map(map_1HHW, (2 * new[0] - 1, 2 * new[1] - 1))
    return torch.cat([map_1HHW[0].flatten(1).transpose(0, 1), extra])


def num_extra_rows(num_prefix: int) -> int:
    """Extra rows of a relative-position table: 3 for a class token, 6 with a distillation token as well."""
    return 3 * num_prefix


def relative_index(grid: tuple[int, int], num_prefix: int, device: torch.device | None = None) -> Tensor:
    """Row of the relative-position table for every (query, key) pair; token order class, distillation, patches.

    With R rows: class -> token R-3, token -> class R-2, class-class R-1; a distillation token adds
    distillation -> token R-6, token -> distillation R-5, distillation-distillation R-4 (class rules win).
    Source: BEiT, and TinyMIM's TinyMIM*-T segmentation backbone.

    Returns:
        int64 (T, T).
    """
    gh, gw = grid
    y_GG, x_GG = torch.meshgrid(torch.arange(gh, device=device), torch.arange(gw, device=device), indexing="ij")
    y_N, x_N = y_GG.reshape(-1), x_GG.reshape(-1)
    dy_NN = y_N[:, None] - y_N[None, :] + gh - 1
    dx_NN = x_N[:, None] - x_N[None, :] + gw - 1
    index = dy_NN * (2 * gw - 1) + dx_NN
    rows = (2 * gh - 1) * (2 * gw - 1) + num_extra_rows(num_prefix)
    for token in range(num_prefix, 0, -1):  # the distillation token first, the class token outermost
        first = rows - 3 * token
        top = torch.cat([torch.ones_like(index[:1, :1]) * (first + 2), torch.ones_like(index[:1]) * first], dim=1)
        side = torch.ones_like(index[:, :1]) * (first + 1)
        index = torch.cat([top, torch.cat([side, index], dim=1)])
    return index
