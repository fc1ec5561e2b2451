"""D-MAE (arXiv 2404.12210): a masked autoencoder that also learns a frozen teacher's attention.

Student and teacher see the same crop and the same visible patches. The attention logits S = Q K^T / sqrt(C), before the
softmax, of a block of each are compared:

    loss = pixel + sum over the pairs of blocks of mean((W S_student - S_teacher)^2)

W maps heads to heads and is dropped afterwards. The published code: https://github.com/wangsr126/mae-lite (Apache-2.0).

Legend: B = batch, N = patches, V = visible patches, T = tokens (class token and V), D = width, H = heads, C = D / H.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tinymim.distill.attention import attention_mse
from tinymim.distill.checks import (
    check_grids,
    check_heads,
    check_masked_student,
    check_states,
    check_student,
    check_teacher,
    pair_blocks,
)
from tinymim.distill.freeze import freeze_unreached
from tinymim.distill.mae import MASKING
from tinymim.distill.method import Method, Normalisation, register_method, renormalisation
from tinymim.distill.recipe_keys import Choice, Key, Kind
from tinymim.distill.sources import LiveTeacher
from tinymim.distill.taps import read
from tinymim.distill.teachers import TEACHER_KEYS, load_recipe_teacher
from tinymim.errors import ConfigError
from tinymim.models.draws import draw_orders
from tinymim.models.mae import MAE
from tinymim.models.tokens import has_class_token, pair_tokens, patch_grid
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD

BLOCKS = Kind(types=(list, tuple), items=int, words="a list of block numbers", example="[12]")


@register_method("dmae", verb="distill", title="distil")
class DMAE(Method):
    """A masked autoencoder whose encoder also learns a teacher's attention logits, and its hidden states if asked for.

    Args:
        student: A plain backbone with a class token as its only prefix token; the encoder of the autoencoder.
        teacher: Our ViT, or one of timm's whose patches can be dropped.
        student_blocks: Blocks of the student whose attention is compared, from 1; None: the last.
        teacher_blocks: Those of the teacher, as many; None: the last.
        hidden: Hidden states that are compared: numbers from 0 (the embedding) to the depth, the same for both models,
            or pairs (student, teacher). State i is the output of block i as what follows reads it, after the first norm
            of block i + 1, the last after the final norm.
        head_map: Map heads by a 1x1 convolution without bias for each pair. False compares logits as they are: both
            models need the same number of heads, and memory is linear in the tokens.
        mask_ratio: Share of the patches that are masked.
        decoder: ``dim``, ``depth`` and ``heads`` of MAE's decoder.
        norm_pix: Normalise every target patch.
        align: "image": the teacher's photo is resized until its patch grid is the student's (other patch sizes).
        normalisation: Mean and standard deviation of the teacher's images; None: ImageNet's.

    Attributes:
        mae: The student's masked autoencoder, decoder inside.
        head_maps: The maps, one for each pair.
        hidden_maps: Linear layers without bias to the teacher's width, one for each hidden state.

    Raises:
        ConfigError: models that cannot be masked or read, unequal grids, no such block, lists of different length, or
            ``head_map=False`` with different numbers of heads.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        **{key: TEACHER_KEYS[key] for key in ("teacher", "teacher_weights", "teacher_heads", "align")},
        "student_blocks": BLOCKS,  # whose attention is compared, from 1; None: the last
        "teacher_blocks": BLOCKS,
        # hidden states that are compared, from 0; numbers, or pairs (student, teacher)
        "hidden": Kind((), types=(list, tuple), words="a list of numbers, or of pairs", example="[12]"),
        "head_map": Choice(True, (True, False)),  # map the student's heads to the teacher's
        **MASKING,
    }

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        student_blocks: Sequence[int] | None = None,
        teacher_blocks: Sequence[int] | None = None,
        hidden: Sequence[int | Sequence[int]] = (),
        head_map: bool = True,
        mask_ratio: float = 0.75,
        decoder: Mapping[str, int] | None = None,
        norm_pix: bool = True,
        align: str | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        super().__init__()
        check_student(student)
        check_teacher(teacher)
        check_masked_student(student)
        check_grids(student, teacher, align)
        self.student, self.teacher, self.mask_ratio = student, teacher, mask_ratio
        self.source = LiveTeacher(teacher, align=align)
        self.extra: nn.Module | None = None  # D2-MAE's block
        self.pairs = pair_blocks(student_blocks, teacher_blocks, (self.add_blocks(student), self.source.depth))
        states = [(state, state) if isinstance(state, int) else tuple(state) for state in hidden]
        check_states(states, (student.depth, self.source.depth))
        self.states: list[tuple[int, int]] = states  # type: ignore[assignment]
        heads = student.num_heads, self.source.heads
        check_heads([heads], head_map)
        self.class_token = has_class_token(teacher)
        d = {"dim": 96, "depth": 1, "heads": 3, **(decoder or {})}
        self.mae = MAE(
            student,
            decoder_dim=d["dim"],
            decoder_depth=d["depth"],
            decoder_heads=d["heads"],
            mask_ratio=mask_ratio,
            norm_pix=norm_pix,
        )
        self.head_maps = nn.ModuleList(nn.Conv2d(*heads, 1, bias=False) for _ in self.pairs if head_map)
        widths = student.embed_dim, self.source.width
        self.hidden_maps = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in self.states)
        self.renormalise: Tensor
        self.register_buffer("renormalise", renormalisation(normalisation), persistent=False)
        freeze_unreached(student, {}, pixels=True)

    def add_blocks(self, student: Any) -> int:
        """Add blocks after the student's own; returns the number of the last block whose attention can be compared."""
        return int(student.depth)

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> "DMAE":
        if not recipe.teacher:
            raise ConfigError("no teacher", "the recipe names none", "add --teacher timm/NAME or --teacher FILE")
        teacher = load_recipe_teacher(recipe, recipe, student, pretrained=pretrained)
        named = set(cls.keys) - {"teacher", "teacher_weights", "teacher_heads"}
        normalisation = teacher.mean, teacher.std
        method = cls(student, teacher.model, normalisation=normalisation, **{key: recipe[key] for key in named})
        trained = teacher.trained_depth
        if trained and any(state > trained for _, state in method.states):
            raise ConfigError(
                f"hidden state {max(state for _, state in method.states)} of {teacher.name} was never trained",
                "the teacher was itself distilled by relations: of its last block, only q, k and v were trained",
                f"compare states up to {trained}",
            )
        method.teachers = [teacher]
        return method

    @property
    def normalisations(self) -> list[Normalisation]:
        """One: the teacher sees the student's view, normalised for it in :meth:`losses`."""
        return [(IMAGENET_MEAN, IMAGENET_STD)]

    @property
    def learned(self) -> nn.Module:
        """The autoencoder, the maps and D2-MAE's block."""
        parts = {"network": self.mae, "head_maps": self.head_maps, "hidden_maps": self.hidden_maps}
        return nn.ModuleDict(parts | ({} if self.extra is None else {"extra": self.extra}))

    def prepare(self, dtype: torch.dtype) -> None:
        """See :meth:`tinymim.distill.sources.LiveTeacher.prepare`."""
        self.source.prepare(dtype)

    def train(self, mode: bool = True) -> "DMAE":
        """Training mode for all but the teacher."""
        super().train(mode)
        self.source.train(mode)
        return self

    def losses(  # type: ignore[override]
        self, images: Tensor, order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            images: (B, 3, H, W), normalised for the student, H and W multiples of its patch.
            order: (B, N), a permutation of the patches of each image; the first V are visible to both models.
                None: drawn.

        Returns:
            ``pixel``: MAE's loss; ``attention``: the mean squared errors of the logits, summed over the pairs; with
            hidden states ``hidden``, likewise; ``loss``: their sum.

        Raises:
            ConfigError: an order of another shape.
        """
        grid = patch_grid(self.student, (images.shape[2], images.shape[3]))
        patches = grid[0] * grid[1]
        if order is None:
            order = draw_orders(len(images), patches, images.device)
        elif order.shape != (len(images), patches):
            raise ConfigError(
                f"an order of the shape {tuple(order.shape)}",
                f"{len(images)} photos have {patches} patches each",
                "give a permutation of the patches of each photo",
            )
        keep_BV = order[:, : max(int(patches * (1 - self.mask_ratio)), 1)]
        learned = read(self.student, images, self._taps(0), keep_BV)
        scale, shift = self.renormalise.to(images.dtype)
        taught = self.source.read(images * scale + shift, self._taps(1), grid, keep_BV=keep_BV)

        attention = [self._attention_loss(i, learned, taught) for i in range(len(self.pairs))]
        hidden = [self._hidden_loss(i, learned, taught) for i in range(len(self.states))]
        losses = {"pixel": self.mae.pixel_loss(images, self._decoded(learned), order), "attention": _sum(attention)}
        losses |= {"hidden": _sum(hidden)} if hidden else {}
        return {**losses, "loss": _sum([*losses.values()])}

    @property
    def decode_block(self) -> int:
        """Block of the student that pixels are decoded from."""
        return int(self.student.depth)

    def _taps(self, side: int) -> dict[int, tuple[str, ...]]:
        """What is read of the student (0) or the teacher (1): block -> taps."""
        depth = self.source.depth if side else self.student.depth
        wanted = [(self.decode_block, "output"), (depth, "output")][: 0 if side else 2]
        wanted += [(pair[side], name) for pair in self.pairs for name in ("q", "k") if pair[side] <= depth]
        for states in self.states:
            wanted.append((states[side] + 1, "input") if states[side] < depth else (depth, "output"))
        taps: dict[int, tuple[str, ...]] = {}
        for block, name in wanted:
            taps[block] = tuple(dict.fromkeys((*taps.get(block, ()), name)))
        return taps

    def _decoded(self, learned: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
        """The tokens that pixels are decoded from (B, T, D)."""
        return self.student.norm(learned[self.decode_block]["output"])

    def _queries_and_keys(self, block: int, learned: Mapping[int, Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Q and K (B, T, D) of a block of the student."""
        return learned[block]["q"], learned[block]["k"]

    def _attention_loss(self, i: int, learned: Mapping[int, Any], taught: Mapping[int, Any]) -> Tensor:
        block, teacher_block = self.pairs[i]
        own = [pair_tokens(x, self.student, self.class_token) for x in self._queries_and_keys(block, learned)]
        head_map = self.head_maps[i] if self.head_maps else None
        q, k = (taught[teacher_block][name] for name in ("q", "k"))
        return attention_mse((own[0], own[1]), (q, k), self.source.heads, head_map)

    def _hidden_loss(self, i: int, learned: Mapping[int, Any], taught: Mapping[int, Any]) -> Tensor:
        own, target = self.states[i]
        x_BTD = pair_tokens(_state(self.student, own, learned), self.student, self.class_token)
        with torch.no_grad():
            t_BTD = _state(self.source.model, target, taught)
        return (self.hidden_maps[i](x_BTD).float() - t_BTD.float()).square().mean()


def _state(model: Any, number: int, taps: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
    """Hidden state ``number`` (from 0) of a model: the output of a block after the norm that follows."""
    if number < len(model.blocks):
        return model.blocks[number].norm1(taps[number + 1]["input"])
    return model.norm(taps[number]["output"])


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return sum(losses[1:], losses[0])
