"""Where the targets of a distillation come from: a teacher that runs beside the student, or any other source.

Every source returns taps in the same form: the class token if the source has one, then the patches, on the student's
grid; registers and distillation tokens are dropped.

Legend: B = batch, T = tokens, N = patches, V = visible patches, D = width.
"""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymim.distill.frozen import prepare_frozen
from tinymim.distill.int8_frozen import quantise_blocks
from tinymim.distill.method import PerPhoto
from tinymim.distill.taps import read
from tinymim.errors import ConfigError
from tinymim.models.draws import DropPath
from tinymim.models.tokens import has_class_token, num_heads, pair_tokens, patch_grid, patch_size, resample

Wanted = Mapping[int, Collection[str]]  # block (from 1) -> taps


@runtime_checkable
class TargetSource(Protocol):
    """The interface of a source of targets.

    Attributes:
        width: D.
        depth: Number of blocks.
        heads: Heads per block: the default number of relation heads.
        class_token: Whether the first token is a class token.
        per_photo: Called by the data workers for each photo, e.g. to read stored targets; None for a live teacher.
    """

    width: int
    depth: int
    heads: int
    class_token: bool
    per_photo: PerPhoto | None

    def read(
        self,
        images: Tensor,
        wanted: Wanted,
        grid: tuple[int, int],
        *,
        keep_BV: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> dict[int, dict[str, Tensor]]:
        """Targets of a batch, without gradients.

        Args:
            images: (B, 3, H, W), normalised for this source.
            wanted: Block (from 1) -> names of :data:`tinymim.distill.taps.TAPS`.
            grid: The student's patch rows and columns.
            keep_BV: Row-major indices of the patches that the source may see; None: all.
            extra: The stacked tensors of :attr:`per_photo`.

        Returns:
            Block -> tap -> (B, T, D).
        """


class LiveTeacher:
    """A frozen model that runs beside the student and stops inside the deepest block that is read.

    Args:
        model: One of :data:`tinymim.distill.taps.TAPPABLE`; frozen here, and put into evaluation mode.
        align: For patch grids that differ: "image" resizes its photo so that its grid equals the student's, "tokens"
            resamples its tokens (bilinear; its photo is first resized up to whole patches). None: grids are equal.
        drop_path: Constant stochastic-depth rate of its blocks (TinyMIM's table 13) while the student trains.

    Raises:
        ConfigError: a rate outside [0, 1).
    """

    per_photo: PerPhoto | None = None

    def __init__(self, model: Any, *, align: str | None = None, drop_path: float = 0.0) -> None:
        self.model, self.align = model.eval().requires_grad_(False), align
        self.width, self.depth, self.heads = int(model.embed_dim), len(model.blocks), num_heads(model)
        self.class_token = has_class_token(model)
        self.drops = add_drop_path(model, drop_path)
        self.dtype: torch.dtype | None = None

    def prepare(self, dtype: torch.dtype) -> None:
        """On the model's device: :func:`~tinymim.distill.frozen.prepare_frozen`; it then runs in this type."""
        prepare_frozen(self.model, dtype)
        self.dtype = None if dtype == torch.float32 else dtype

    def calibrate(self, images: Tensor, wanted: Wanted, grid: tuple[int, int], dtype: torch.dtype) -> None:
        """Before :meth:`prepare`: :func:`~tinymim.distill.int8_frozen.quantise_blocks` for photos like these.

        Raises:
            ConfigError: see there.
        """

        def run() -> None:
            self.train(False)
            for few in images.split(8):
                self.read(few, wanted, grid)

        quantise_blocks(self.model, run, wanted, dtype)

    def train(self, mode: bool) -> None:
        """Evaluation mode, except for drop path while the student trains."""
        self.model.eval()
        for drop in self.drops:
            drop.train(mode)

    def read(
        self,
        images: Tensor,
        wanted: Wanted,
        grid: tuple[int, int],
        *,
        keep_BV: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> dict[int, dict[str, Tensor]]:
        """See :meth:`TargetSource.read`."""
        precision = nullcontext() if self.dtype is None else torch.autocast(images.device.type, dtype=self.dtype)
        with torch.no_grad(), precision:
            found = read(self.model, self.resize(images, grid), wanted, keep_BV)
            return {
                block: {name: self._to_common_form(x_BTD, grid) for name, x_BTD in taps.items()}
                for block, taps in found.items()
            }

    def _to_common_form(self, x_BTD: Tensor, grid: tuple[int, int]) -> Tensor:
        x_BTD = pair_tokens(x_BTD, self.model, self.class_token)
        return resample(x_BTD, int(self.class_token), grid) if self.align == "tokens" else x_BTD

    def resize(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Resize the photos with ``align``: "image" to the student's grid, "tokens" up to whole patches."""
        if self.align is None:
            return images
        shown = images.shape[2:]
        wanted = grid if self.align == "image" else patch_grid(self.model, (shown[0], shown[1]))
        size = [side * patch_size(self.model) for side in wanted]
        if self.align == "tokens" and size == [*shown]:
            return images
        return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def add_drop_path(model: Any, rate: float) -> list[nn.Module]:
    """Add stochastic depth to a frozen model; returns the modules to switch on while the student trains.

    Raises:
        ConfigError: a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"teacher_drop_path={rate}", "it must be from 0 to below 1", "e.g. 0.1")
    drops: list[nn.Module] = []
    for block in model.blocks if rate else ():
        for name in ("drop_path", "drop_path1", "drop_path2"):  # ours has one, timm's have two
            if hasattr(block, name):
                setattr(block, name, DropPath(rate))
                drops.append(getattr(block, name))
    return drops
