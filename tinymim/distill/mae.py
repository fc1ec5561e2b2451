"""Masked pre-training as a method: the student is the encoder of a masked autoencoder (arXiv 2111.06377)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from tinymim.distill.checks import check_masked_student, check_student
from tinymim.distill.method import Method, register_method
from tinymim.distill.recipe_keys import LARGE, Choice, Key, Number, Table
from tinymim.models.mae import MAE

SIZE = Number(least=1, most=LARGE, whole=True)
MASKING: dict[str, Key] = {
    "mask_ratio": Number(0.75, most=1, above=True, below=True),  # share of the patches that are masked
    "norm_pix": Choice(True, (True, False)),  # normalise each target patch
    "decoder": Table(dict(dim=512, depth=8, heads=16), keys=dict.fromkeys(("dim", "depth", "heads"), SIZE)),
}


def decoder_arguments(recipe: Any) -> dict[str, Any]:
    """Keywords of :class:`~tinymim.models.mae.MAE` for the decoder of a recipe."""
    d = recipe.decoder
    return dict(decoder_dim=d["dim"], decoder_depth=d["depth"], decoder_heads=d["heads"], norm_pix=recipe.norm_pix)


@register_method("mae", verb="pretrain", title="pre-train")
class MaskedPretraining(Method):
    """Predict the pixels of masked patches from the visible ones.

    Args:
        mae: The autoencoder; its ``encoder`` is the student.
    """

    keys: ClassVar[Mapping[str, Key]] = MASKING

    def __init__(self, mae: MAE) -> None:
        super().__init__()
        self.mae = mae
        self.student = mae.encoder

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> "MaskedPretraining":
        check_student(student)
        check_masked_student(student)
        return cls(MAE(student, mask_ratio=recipe.mask_ratio, **decoder_arguments(recipe)))

    def losses(self, *views: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), normalised -> ``pixel`` and ``loss``, the same scalar."""
        return self.mae.losses(*views)

    @property
    def learned(self) -> nn.Module:
        """Encoder and decoder."""
        return self.mae
