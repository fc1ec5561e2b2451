"""TinyMIM (arXiv 2301.01296): a student learns a frozen teacher's token relations, or any other target of its study.

Legend: B = batch, T = tokens, N = patches, V = visible patches, D = width.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tinymim.distill.checks import check_options, check_student, check_teacher
from tinymim.distill.freeze import freeze_unreached
from tinymim.distill.mae import MASKING, decoder_arguments
from tinymim.distill.method import Method, register_method
from tinymim.distill.recipe_keys import Choice, Key, Kind, Number
from tinymim.distill.several import SeveralTeachers
from tinymim.distill.sources import LiveTeacher, TargetSource
from tinymim.distill.stored_relations import StoredRelations
from tinymim.distill.taps import read
from tinymim.distill.targets import Relation, Target, parse_target, read_from
from tinymim.distill.teachers import TEACHER_KEYS, each_teacher, load_for_recipe
from tinymim.errors import ConfigError
from tinymim.models.draws import draw_orders
from tinymim.models.mae import MAE
from tinymim.models.tokens import has_class_token, keep_patches, pair_tokens, patch_grid


@register_method("tinymim", verb="distill", title="distil")
class TinyMIM(Method):
    """Distillation as TinyMIM studies it; the defaults are its best setting: relations Q-K + V-V, KL.

    The teacher is frozen, in evaluation mode, and stops inside its deepest target block. The student is run up to its
    deepest target block; the parts after it are never computed and, like the fixed positions, need no gradient.

    Args:
        student: A backbone that returns its own taps (:class:`~tinymim.models.backbone.TapByTap`), like our ViT.
        teacher: Our ViT, one of timm's (:data:`tinymim.distill.taps.TAPPABLE`), or any
            :class:`~tinymim.distill.sources.TargetSource`.
        targets: Words of :mod:`tinymim.distill.targets`, several for several pairs of blocks at once.
        target_block: Default teacher block of words that name none, from 1; None: 18 of 24, else the last.
        relation_heads: Groups the channels of both sides are split into; None: the teacher's heads.
        softmax: False compares scaled scores (:func:`tinymim.distill.relations.relation_smooth_l1`).
        class_token: Whether relations and features include the class token; None: if both sides have one.
        mask: Who sees only the visible patches: None, "student", "teacher" or "both". The paper does not say which side
            its masked rows (table 12) mask. Here a masked side encodes the visible patches only, the other one all of
            them, and tokens that both sides have are compared.
        mask_ratio: Share of the patches that are masked.
        reconstruct: Add MAE's loss on the masked pixels; keywords of :class:`tinymim.models.mae.MAE` for its decoder,
            and its ``weight``. Needs a masked student.
        teacher_drop_path: Constant stochastic-depth rate of the teacher's blocks (table 13); 0: none.
        teacher_precision: "auto": the run's; "int8": 8-bit products (:mod:`tinymim.distill.int8_frozen`).
        align: For patch grids that differ, see :class:`~tinymim.distill.sources.LiveTeacher`.

    Raises:
        ConfigError: unknown model class or word, different patch sizes without ``align``, no such block, or heads that
            do not divide both widths.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        **TEACHER_KEYS,
        "store": Kind(example="FOLDER"),  # what tinymim cache --recipe wrote: the teacher is not built
        # several at once: dicts of teacher and weight; teacher_weights .. align override the recipe's
        "teachers": Kind([], types=(list, tuple), items=dict, words="a list of dicts", example="[]"),
        "chain": Kind(""),  # e.g. mae_large:base:small:tiny; hop by hop, every student is the next teacher
        # for a chain: a dict of overrides for each student
        "hops": Kind([], types=(list, tuple), items=dict, words="a list of dicts", example="[]"),
        "softmax": Choice(True, (True, False)),  # for relations; False: smooth L1 of the scaled scores
        "class_token": Choice(None, (None, True, False)),  # in relations and features; None: if both sides have one
        "mask": Key(None),  # who sees only the visible patches: None | "student" | "teacher" | "both"
        "reconstruct": Number(0.0),  # weight of MAE's loss, added to the others; needs a masked student
        "teacher_drop_path": Number(0.0, most=1, below=True),  # the same in every block
        "teacher_precision": Choice("auto", ("auto", "int8")),  # auto: as the student; int8: 8-bit products, on the CPU
        **MASKING,
    }

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        targets: str | Sequence[str] = ("qk+vv",),
        target_block: int | None = None,
        relation_heads: int | None = None,
        softmax: bool = True,
        class_token: bool | None = None,
        mask: str | None = None,
        mask_ratio: float = 0.75,
        reconstruct: dict[str, Any] | None = None,
        teacher_drop_path: float = 0.0,
        teacher_precision: str = "auto",
        align: str | None = None,
    ) -> None:
        super().__init__()
        check_student(student)
        live = not isinstance(teacher, TargetSource)
        if live:
            check_teacher(teacher)
        self.source: Any = LiveTeacher(teacher, align=align, drop_path=teacher_drop_path) if live else teacher
        depths, words = (self.source.depth, student.depth), [targets] if isinstance(targets, str) else targets
        self.targets = [parse_target(word, *depths, target_block) for word in words]
        if not self.targets:
            raise ConfigError("no targets", "nothing would be learned", "e.g. targets=('qk+vv',)")
        self.target_block = self.targets[0].teacher_block
        self.softmax, self.mask, self.mask_ratio, self.align = softmax, mask, mask_ratio, align
        self.calibrates = live and teacher_precision == "int8"
        self.relation_heads = relation_heads or self.source.heads
        check_options(self, student, teacher if live else None, class_token, reconstruct)
        both = has_class_token(student) and self.source.class_token
        self.class_token = both if class_token is None else class_token
        self.per_photo = self.source.per_photo
        self.student = student
        self.teacher = teacher if live else None
        widths = student.embed_dim, self.source.width
        self.maps = nn.ModuleDict(
            {f"{i}_{part}": layer for i, t in enumerate(self.targets) for part, layer in t.make_maps(*widths).items()}
        )
        options = dict(reconstruct or {})
        self.reconstruct_weight = float(options.pop("weight", 1.0))
        self.mae = MAE(student, mask_ratio=mask_ratio, **options) if reconstruct is not None else None
        freeze_unreached(student, self.student_taps(), pixels=self.mae is not None)

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> Method:
        """One method for each teacher of the recipe; several are combined (:class:`SeveralTeachers`)."""
        entries = each_teacher(recipe)
        methods = [cls._with_teacher(recipe, entry, student, pretrained, not i) for i, entry in enumerate(entries)]
        weights = [entry.get("weight", 1.0) for entry in entries]
        return methods[0] if len(methods) == 1 else SeveralTeachers(methods, weights)

    @classmethod
    def _with_teacher(
        cls, recipe: Any, entry: dict[str, Any], student: Any, pretrained: bool, first: bool
    ) -> "TinyMIM":
        stored = StoredRelations.open(recipe, entry, student) if recipe.store else None
        reading = stored.reading(entry) if stored else load_for_recipe(recipe, entry, student, pretrained=pretrained)
        decoder = dict(decoder_arguments(recipe), weight=recipe.reconstruct)
        method = cls(
            student,
            stored or reading.teacher.model,
            targets=entry["targets"],
            target_block=reading.block,
            relation_heads=entry["relation_heads"] or reading.heads,
            softmax=recipe.softmax,
            class_token=recipe.class_token,
            mask=recipe.mask,
            mask_ratio=recipe.mask_ratio,
            reconstruct=decoder if recipe.reconstruct and first else None,
            teacher_drop_path=recipe.teacher_drop_path,
            teacher_precision=recipe.teacher_precision,
            align=entry["align"],
        )
        method.teachers = [reading.teacher]
        if stored:
            stored.attach(method, recipe)
        reading.check(method.targets)
        reading.describe(method, heads_from_recipe=bool(entry["relation_heads"]))
        return method

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to resume, the student's tensors once."""
        if not self.maps and self.mae is None:
            return self.student
        return nn.ModuleDict({"network": self.mae or self.student, "maps": self.maps})

    def prepare(self, dtype: torch.dtype) -> None:
        if isinstance(self.source, LiveTeacher):
            self.source.prepare(dtype)

    def calibrate(self, dtype: torch.dtype, *views: Tensor) -> None:
        grid = patch_grid(self.student, (views[0].shape[2], views[0].shape[3]))
        self.source.calibrate(views[-1], read_from(self.targets, "teacher"), grid, dtype)

    def train(self, mode: bool = True) -> "TinyMIM":
        """Training mode for the student; the teacher stays in evaluation mode, except for its drop path."""
        super().train(mode)
        if isinstance(self.source, LiveTeacher):
            self.source.train(mode)
        return self

    def losses(self, *views: Tensor, extra: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            views: The student's images (B, 3, H, W), normalised; and the same crops, normalised for the teacher
                (not needed if the source reads no pixels).
            extra: The stacked tensors of :attr:`per_photo`.

        Returns:
            A scalar for each relation or feature (``qk``, ``vv``; with several pairs of blocks ``qk@18:12``), ``pixel``
            with ``reconstruct``, and their weighted sum ``loss``.
        """
        order_BN = self.order(views[0])
        learned = read(self.student, views[0], self.student_taps(), self.visible(order_BN, "student"))
        return self.compare(views[0], views[-1], learned, order_BN, extra)

    def compare(
        self,
        student_images: Tensor,
        teacher_images: Tensor,
        learned: dict[int, dict[str, Tensor]],
        order_BN: Tensor | None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """:meth:`losses` from taps of the student that were already read at :meth:`student_taps`."""
        losses: dict[str, Tensor] = {}
        total: Tensor | None = None
        pairs = self.compared(student_images, teacher_images, learned, self.targets, order_BN, extra)
        for i, (target, s, t) in enumerate(pairs):
            maps = {part: self.maps[f"{i}_{part}"] for part in target.parts if f"{i}_{part}" in self.maps}
            for name, loss in target.losses(s, t, maps, heads=self.relation_heads, softmax=self.softmax).items():
                losses[self.loss_name(target, name)] = loss
                total = target.weight * loss if total is None else total + target.weight * loss
        assert total is not None
        if self.mae is not None and order_BN is not None:
            tokens = self.student.norm(learned[self.student.depth]["output"])
            losses["pixel"] = self.mae.pixel_loss(student_images, tokens, order_BN)
            total = total + self.reconstruct_weight * losses["pixel"]
        return {**losses, "loss": total}

    def compared(
        self,
        student_images: Tensor,
        teacher_images: Tensor,
        learned: dict[int, dict[str, Tensor]],
        targets: Sequence[Target],
        order_BN: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[Target, dict[str, Tensor], dict[str, Tensor]]]:
        """Each target with the tokens of student and teacher that are compared: those that both sides have, paired."""
        grid = patch_grid(self.student, (student_images.shape[2], student_images.shape[3]))
        keep = self.visible(order_BN, "teacher")
        taught = self.source.read(teacher_images, read_from(targets, "teacher"), grid, keep_BV=keep, extra=extra)
        prefix = int(has_class_token(self.student)), int(self.source.class_token)
        for target in targets:
            own = learned[target.student_block]
            s = {name: pair_tokens(own[name], self.student, bool(prefix[0])) for name in target.taps}
            t = {name: taught[target.teacher_block][name] for name in target.taps}
            if target.patches:
                s = self._shared_tokens(s, "student", prefix[0], order_BN)
                t = self._shared_tokens(t, "teacher", prefix[1], order_BN)
            yield target, s, t

    def _shared_tokens(
        self, taps: dict[str, Tensor], side: str, prefix: int, order_BN: Tensor | None
    ) -> dict[str, Tensor]:
        """Drop a class token that is not compared, and patches that are masked on the other side."""
        if prefix and not self.class_token:
            taps = {name: x_BTD[:, 1:] for name, x_BTD in taps.items()}
        keep_BV = self.visible(order_BN)
        if keep_BV is None or self.mask in (side, "both"):
            return taps
        return {name: keep_patches(x_BTD, keep_BV, int(self.class_token)) for name, x_BTD in taps.items()}

    def order(self, student_images: Tensor) -> Tensor | None:
        """A permutation of the patches of each image (B, N), the first V are visible; None without a mask."""
        if self.mask is None:
            return None
        rows, columns = patch_grid(self.student, (student_images.shape[2], student_images.shape[3]))
        return draw_orders(len(student_images), rows * columns, student_images.device)

    def visible(self, order_BN: Tensor | None, side: str | None = None) -> Tensor | None:
        """Indices (B, V) of the visible patches, for ``side`` only if it is masked; None: all patches."""
        if order_BN is None or (side is not None and self.mask not in (side, "both")):
            return None
        return order_BN[:, : max(int(order_BN.shape[1] * (1 - self.mask_ratio)), 1)]

    def student_taps(self) -> dict[int, tuple[str, ...]]:
        """The taps that the losses read from the student: block -> taps."""
        wanted = read_from(self.targets, "student")
        if self.mae is not None:
            wanted[self.student.depth] = (*wanted.get(self.student.depth, ()), "output")
        return wanted

    def loss_name(self, target: Target, name: str) -> str:
        """Name of a loss; it includes the blocks if the same part is compared at several."""
        if sum(name in other.parts for other in self.targets) == 1:
            return name
        return f"{name}@{target.teacher_block}:{target.student_block}"

    def relation_pairs(self, views: Sequence[Tensor]) -> Iterator[tuple[str, Any, Tensor]]:
        if self.stored is None:  # the photos that are looked at have no stored targets
            yield "", self, views[-1]

    def learned_relations(self) -> tuple[int, int] | None:
        """The student's deepest block whose relations were learned, and their heads; used when it is a teacher."""
        blocks = [target.student_block for target in self.targets if isinstance(target, Relation)]
        return (max(blocks), self.relation_heads) if blocks else None
