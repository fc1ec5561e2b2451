"""TinyMIM's targets from a store: the source that reads what ``tinymim cache --recipe`` wrote.

Legend: B = batch, V = visible patches.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinymim.distill.compact import arrays_of, entries_of
from tinymim.distill.sources import Wanted
from tinymim.distill.stored import StoredTargets, is_file
from tinymim.distill.targets import Target, parse_target
from tinymim.distill.teachers import Reading
from tinymim.errors import ConfigError, DataError
from tinymim.files import sha256_file
from tinymim.models.tokens import patch_grid
from tinymim.models.weight_files import weights_file
from tinymim.progress import say
from tinymim.store.targets import TargetStore


class StoredRelations(StoredTargets):
    """The :class:`~tinymim.distill.sources.TargetSource` that reads a store, and its seeds for the data workers.

    Args:
        store: The store.

    Raises:
        DataError: a store of other targets.
    """

    kind, needs, remedy = "relations", ("relations",), "tinymim cache --recipe tinymim_tiny_small_data"
    per_photo = None

    def __init__(self, store: TargetStore) -> None:
        super().__init__(store)
        self.header = store.header["relations"]
        self.width, self.depth, self.heads = self.header["width"], self.header["depth"], self.header["heads"]
        self.class_token, self.align = self.header["class_token"], self.header["align"]
        self.entries = entries_of(self.header)
        if arrays_of(self.entries) != store.layout.arrays:
            raise DataError(
                f"{self.source} does not hold what its header says",
                f"its arrays are {', '.join(array.name for array in store.layout.arrays)[:120]}",
                "write it anew",
            )

    @classmethod
    def open(cls, recipe: Any, entry: Mapping[str, Any], student: Any) -> "StoredRelations":
        """The store of a recipe.

        Args:
            recipe: The recipe.
            entry: The keys of its teacher, see :func:`tinymim.distill.teachers.each_teacher`.
            student: The student.

        Raises:
            ConfigError: several teachers, or a recipe of other targets.
            DataError: no such store.
        """
        if recipe.teachers or recipe.chain:
            what = "a chain" if recipe.chain else "several teachers"
            raise ConfigError(
                f"--store and {what}", "a store holds the targets of one teacher", "leave one of them out"
            )
        stored = cls(TargetStore.open(recipe.store))
        stored.check_recipe(recipe, entry, student)
        return stored

    def reading(self, entry: Mapping[str, Any]) -> Reading:
        """The block and heads that the recipe reads."""
        return Reading(self.teacher, entry["target_block"] or self.header["block"], None)  # type: ignore[arg-type]

    def attach(self, method: Any, recipe: Any) -> None:
        """Let a method train from the store.

        Raises:
            ConfigError: it compares what is not in the store.
        """
        self.check_targets(method.targets)
        method.stored, method.recoloured = self, True
        method.augmentation = {**self.augmentation, "scale": [float(share) for share in recipe.crop_scale]}

    def check_recipe(self, recipe: Any, entry: Mapping[str, Any], student: Any) -> None:
        """Refuse a recipe of another teacher, alignment, grid or comparison.

        Raises:
            ConfigError: it is.
        """
        weights, name, found = entry["teacher_weights"], entry["teacher"], self.teacher.name
        if is_file(name):  # known by its content
            same = sha256_file(name) == self.teacher.sha256
            found = name if same else f"{found} (sha256 {str(self.teacher.sha256)[:12]})"
        own, sha256 = (
            str(self.teacher.sha256)[:12],
            None if weights is None else sha256_file(weights_file(weights))[:12],
        )
        grid = [*patch_grid(student, (recipe.img_size, recipe.img_size))]
        masked = None if recipe.mask in (None, "student") else recipe.mask
        self.refuse_others(
            ("the teacher", name, found, f"--teacher {self.teacher.name}"),
            ("weights of the sha256", sha256, own, "leave --teacher-weights out"),
            ("img_size", recipe.img_size, self.augmentation["img_size"], f"--img-size {self.augmentation['img_size']}"),
            ("patches", grid, self.header["grid"], "a student of the same patch size"),
            ("align", entry["align"] or "none", self.align or "none", f"--cfg-options align={self.align}"),
            ("relation_heads", entry["relation_heads"], self.heads, f"--cfg-options relation_heads={self.heads}"),
            ("softmax", recipe.softmax, self.header["softmax"], f"--cfg-options softmax={self.header['softmax']}"),
            ("mask", masked, None, "--cfg-options mask=student"),
            ("teacher_drop_path", recipe.teacher_drop_path or None, 0, "--cfg-options teacher_drop_path=0"),
        )

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Refuse targets that are not in the store.

        Raises:
            ConfigError: some are not.
        """
        kept = [parse_target(word, self.depth, 1) for word in self.header["targets"]]
        there, asked = ({(t.kind, part, t.teacher_block) for t in of for part in t.parts} for of in (kept, targets))
        missing = {f"{part}@{block}" for _, part, block in asked - there}
        if missing:
            raise ConfigError(
                f"{self.source} does not hold {', '.join(sorted(missing))}",
                f"it was made for {', '.join(self.header['targets'])}",
                f"use --targets {' '.join(self.header['targets'])}, or cache the others: tinymim cache --targets WORD",
            )

    def check(self, keys: Sequence[str], epochs: int) -> None:
        """Refuse photos that are not in the store; its epochs are gone through again where the run has more."""
        super().check(keys, epochs)
        own = self.store.layout.epochs
        if epochs > own:
            say(
                f"note: {self.source} holds {own} view(s) of each photo, the run goes through {epochs} epochs: it sees "
                f"each {-(-epochs // own)} times, with the student's colours anew"
            )

    def __call__(self, key: str, epoch: int) -> tuple[int, dict[str, Tensor]] | None:
        """Seed of a view, and its arrays; None: the photo was damaged.

        Raises:
            DataError: a damaged record.
        """
        record = self.record(key, epoch % self.store.layout.epochs)
        if record is None:
            return None
        return int(record.pop("seed")), {name: torch.from_numpy(value) for name, value in record.items()}

    def example(self) -> dict[str, Tensor]:
        """Arrays as of a photo, for measuring memory and time."""
        arrays = [array for entry in self.entries for array in entry.arrays()]
        return {array.name: torch.from_numpy(np.zeros(array.shape, array.dtype)) for array in arrays}

    def read(
        self,
        images: Tensor,
        wanted: Wanted,
        grid: tuple[int, int],
        *,
        keep_BV: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> dict[int, dict[str, Tensor]]:
        """See :class:`~tinymim.distill.sources.TargetSource`; ``images`` are not looked at."""
        assert extra is not None
        out: dict[int, dict[str, Tensor]] = {block: {} for block in wanted}
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for entry in self.entries:
                if {*entry.taps} & {*wanted.get(entry.block, ())}:
                    out[entry.block] |= entry.decode(extra)
        return out


def options_of(header: Mapping[str, Any], recipe: Any) -> str:
    """The options that let a recipe train from a store."""
    relations, views = header["relations"], header["augmentation"]
    targets = [word.removesuffix(f"@{relations['block']}") for word in relations["targets"]]
    options = {
        "target_block": (relations["block"], recipe.target_block),
        "align": (relations["align"], recipe.align),
        "crop_scale": (views["scale"], [*recipe.crop_scale]),
        "softmax": (relations["softmax"], recipe.softmax),
    }
    changed = [f"{key}={str(own).replace(' ', '')}" for key, (own, other) in options.items() if own != other]
    name = header["teacher"]["name"]
    return (
        (f" --teacher {shlex.quote(name)}" if name != recipe.teacher else "")
        + (f" --targets {' '.join(targets)}" if targets != [*recipe.targets] else "")
        + (f" --img-size {views['img_size']}" if views["img_size"] != recipe.img_size else "")
        + (f" --cfg-options {' '.join(changed)}" if changed else "")
    )
