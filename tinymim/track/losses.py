"""The losses of a tracker: penalty-reduced focal loss of the centre, GIoU and L1 of the box (OSTrack, section 3.3).

Legend: B = batch, G = rows and columns of the search grid. Boxes are centre x, y, width, height as fractions.
"""

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from tinymim.track.network import read_box

WEIGHTS = {"centre": 1.0, "giou": 2.0, "l1": 5.0}


def centre_map(box_B4: Tensor, grid: int) -> Tensor:
    """Targets of the scores (B, G, G): 1 in the cell of the box's centre, a Gaussian around it.

    Its standard deviation is an eighth of the root of the box's area: half a cell for the box of a search crop of
    factor 4 and 16 cells, which is what the published radius comes to there.
    """
    cells = torch.arange(grid, device=box_B4.device)
    at = (box_B4[:, :2] * grid).floor().clamp(0, grid - 1)
    sigma = (box_B4[:, 2:].prod(1).sqrt() * grid / 8).clamp(min=0.25)
    dx, dy = (cells - at[:, :1]) / sigma[:, None], (cells - at[:, 1:]) / sigma[:, None]
    return torch.exp(-(dy[:, :, None] ** 2 + dx[:, None, :] ** 2) / 2)


def focal_loss(score_BGG: Tensor, target_BGG: Tensor) -> Tensor:
    """Per image, summed over cells: focal loss with fewer penalties near the centre (CornerNet, arXiv 1808.01244)."""
    score = score_BGG.clamp(1e-4, 1 - 1e-4)
    hit = (1 - score) ** 2 * score.log()
    miss = (1 - target_BGG) ** 4 * score**2 * (1 - score).log()
    return -torch.where(target_BGG == 1, hit, miss).sum((1, 2)).mean()


def track_losses(maps: dict[str, Tensor], box_B4: Tensor) -> dict[str, Tensor]:
    """Named losses of the maps of :meth:`~tinymim.track.network.Tracker.forward` against true boxes.

    The box is read at the largest score, as it will be when the tracker is used (and in the paper).

    Returns:
        ``centre``, ``giou``, ``l1``, their weighted sum ``loss``, and ``iou``: mean overlap of the boxes.
    """
    found_B4, _ = read_box(maps)
    ours, true = _corners(found_B4), _corners(box_B4)
    losses = {
        "centre": focal_loss(maps["score"][:, 0], centre_map(box_B4, maps["score"].shape[-1])),
        "giou": generalized_box_iou_loss(ours, true, reduction="mean"),
        "l1": (ours - true).abs().mean(),
    }
    with torch.no_grad():
        sides = (torch.minimum(ours[:, 2:], true[:, 2:]) - torch.maximum(ours[:, :2], true[:, :2])).clamp(min=0)
        both = sides.prod(1)
        iou = (both / (found_B4[:, 2:].prod(1) + box_B4[:, 2:].prod(1) - both)).mean()
    total = sum(weight * losses[name] for name, weight in WEIGHTS.items())
    return {**losses, "iou": iou, "loss": torch.as_tensor(total)}


def _corners(box_B4: Tensor) -> Tensor:
    return torch.cat([box_B4[:, :2] - box_B4[:, 2:] / 2, box_B4[:, :2] + box_B4[:, 2:] / 2], dim=1)
