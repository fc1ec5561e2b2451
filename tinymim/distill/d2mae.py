"""D2-MAE (arXiv 2404.12210): D-MAE with reconstruction and attention decoupled.

Legend: B = batch, T = tokens, D = width.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from tinymim.distill.dmae import DMAE
from tinymim.distill.method import register_method
from tinymim.distill.recipe_keys import Key, Number
from tinymim.errors import ConfigError


class QueryKeyBlock(nn.Module):
    """A block cut off after its queries and keys: tokens after a norm (B, T, D) -> Q and K, each (B, T, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qk = nn.Linear(dim, 2 * dim)
        nn.init.xavier_uniform_(self.qk.weight)
        nn.init.zeros_(self.qk.bias)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        q_BTD, k_BTD = self.qk(x_BTD).chunk(2, dim=-1)
        return q_BTD, k_BTD


@register_method("d2mae", verb="distill", title="distil")
class D2MAE(DMAE):
    """D-MAE, decoupled: pixels are decoded from an earlier block, attention is compared at one more block.

    Reconstruction trains blocks 1 to ``decode_block`` only, attention all of them. The further block, number depth + 1,
    is a norm and the projections to queries and keys, and is dropped afterwards. Its norm is the encoder's final norm:
    so that one is trained on the tokens it will see, and the encoder is usable as it is. (In the published code the
    further block has its own norm, and the final norm is trained on block 8 only.)

    Args:
        student: See :class:`DMAE`.
        teacher: See :class:`DMAE`.
        decode_block: Block that pixels are decoded from; None: 8 of 12, at two thirds of the depth.
        options: Others of :class:`DMAE`; ``student_blocks`` may name depth + 1, the default.

    Attributes:
        extra: The further block.
    """

    keys: ClassVar[Mapping[str, Key]] = {**DMAE.keys, "decode_block": Number(None, least=1, whole=True)}

    def __init__(self, student: Any, teacher: Any, *, decode_block: int | None = None, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        depth = int(student.depth)
        self._decode_block = decode_block or max(round(depth * 2 / 3), 1)
        if self._decode_block > depth:
            raise ConfigError(f"decode_block={decode_block}", f"the student has {depth} blocks", f"choose 1 to {depth}")

    def add_blocks(self, student: Any) -> int:
        self.extra = QueryKeyBlock(student.embed_dim)
        return int(student.depth) + 1

    @property
    def decode_block(self) -> int:
        return self._decode_block

    def _queries_and_keys(self, block: int, learned: Mapping[int, Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        if block <= self.student.depth:
            return super()._queries_and_keys(block, learned)
        assert self.extra is not None
        return self.extra(self.student.norm(learned[self.student.depth]["output"]))
