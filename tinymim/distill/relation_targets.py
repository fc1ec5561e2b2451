"""What ``tinymim cache --recipe`` keeps of the teacher of a TinyMIM recipe.

Legend: B = batch, S = side of a view, T = tokens, D = width, R = records of a check.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinymim.distill.compact import Entry, arrays_of, entries_of, plan_entries
from tinymim.distill.relations import relation_logits, relation_smooth_l1
from tinymim.distill.sources import LiveTeacher
from tinymim.distill.targets import QKV
from tinymim.distill.tiled_relations import relation_loss
from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim.models.teachers import Teacher, load_teacher, state_sha256
from tinymim.models.tokens import patch_grid
from tinymim.store.layout import Array

IMAGENET_1K = ("ImageNet-1k", 1_281_167, 300)  # photos and epochs of the paper


class RelationTargets:
    """A live teacher and what is kept of it, for :class:`tinymim.store.job.Job`.

    Args:
        teacher: The teacher.
        source: The same, aligned with the student's grid.
        entries: What is kept.
        header: ``relations`` of the store's header.
    """

    kind = "relations"
    compare = IMAGENET_1K

    def __init__(self, teacher: Teacher, source: Any, entries: Sequence[Entry], header: Mapping[str, Any]) -> None:
        self.teacher, self.source, self.entries, self.header = teacher, source, [*entries], header
        self.name, self.sha256 = teacher.name, str(teacher.sha256)
        self.grid: tuple[int, int] = tuple(header["grid"])
        self.arrays: Sequence[Array] = arrays_of(entries)
        self.about: Mapping[str, Any] = {"relations": dict(header)}
        self.words = f"{', '.join(header['targets'])} of {self.name} in {header['heads']} heads, {header['form']}"
        self.wanted: dict[int, tuple[str, ...]] = {}
        for entry in entries:
            self.wanted[entry.block] = (*self.wanted.get(entry.block, ()), *entry.taps)
        self.mean, self.std = (torch.tensor(rows).view(3, 1, 1) for rows in (teacher.mean, teacher.std))

    def to(self, place: str, dtype: torch.dtype) -> None:
        """Go to a device and compute in a type."""
        self.source.model.to(place)
        self.mean, self.std = self.mean.to(place), self.std.to(place)
        self.source.prepare(dtype)

    def read(self, views_B3SS: Tensor) -> dict[int, dict[str, Tensor]]:
        """What the teacher says of uint8 views: block -> tap -> (B, T, D).

        Raises:
            CheckFailed: NaN or infinities.
        """
        taps = self.source.read((views_B3SS.float() / 255 - self.mean) / self.std, self.wanted, self.grid)
        if not all(bool(x.isfinite().all()) for of in taps.values() for x in of.values()):
            fix = "leave --amp out, or check the file of its weights"
            raise CheckFailed(f"{self.name} gives NaN or infinities", "its q, k and v are not finite", fix)
        return dict(taps)

    def record(self, views_B3SS: Tensor) -> dict[str, Tensor]:
        """Arrays of a batch of uint8 views: name -> (B, ...).

        Raises:
            CheckFailed: NaN or infinities, of the teacher or of what is kept in half precision.
        """
        return self._encode(self.read(views_B3SS))

    def _encode(self, taps: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        kept = {name: value for entry in self.entries for name, value in entry.encode(taps[entry.block]).items()}
        if not all(bool(value.isfinite().all()) for value in kept.values()):
            raise CheckFailed(
                f"{self.name} gives numbers beyond half precision",
                f"the form {self.header['form']} keeps numbers up to 65,504",
                "choose another block or other --targets",
            )
        return kept

    def differences(self, views_B3SS: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How far the stored targets, and those that would be stored now, are from what the teacher says: (B,) each.

        Of relations nats (without softmax the smooth L1 distance of scores), of features the relative distance.
        """
        taps = self.read(views_B3SS)
        out = {}
        for name, arrays in (("stored", stored), ("now", self._encode(taps))):
            each = [self._distance(entry, taps[entry.block], entry.decode(arrays)) for entry in self.entries]
            out[name] = torch.stack(each).amax(0)
        return out

    def _distance(self, entry: Entry, live: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        """(B,) between an entry and what it stands for."""
        heads, first, last = entry.heads, entry.taps[0], entry.taps[-1]
        if not {*entry.taps} <= {*QKV}:
            x, y = live[first][:, : entry.tokens].float(), kept[first]
            return (x - y).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        if not self.header["softmax"]:
            scores = [relation_logits(of[first], of[last], heads) for of in (kept, live)]
            return torch.stack([relation_smooth_l1(s, t) for s, t in zip(*scores, strict=True)])
        pairs = zip(kept[first], kept[last], live[first].float(), live[last].float(), strict=True)
        return torch.stack([relation_loss((a[None], b[None]), (c[None], d[None]), heads) for a, b, c, d in pairs])

    def check_header(self, header: Mapping[str, Any], source: str) -> None:
        """Refuse the store of other targets (the teacher was compared).

        Raises:
            DataError: it is.
        """
        if header.get("relations") != self.header:
            raise DataError(
                f"{source} is of other targets",
                f"it holds {header['kind']}, {str(header.get('relations', {}).get('targets'))[:80]}",
                "give the store's own teacher",
            )

    def verdict(self, found: Mapping[str, Tensor], **limits: float) -> tuple[dict[str, float], str]:
        """Numbers of a check, ``failed`` among them, and a line of words.

        Args:
            found: See :meth:`differences`, of R records.
            limits: ``max_differing``: how much further away than new targets the stored ones may be, as a share.
        """
        stored, now = (float(found[name].mean()) for name in ("stored", "now"))
        worst = float((found["stored"] - found["now"]).max())
        numbers = {"distance": stored, "expected": now, "worst": worst}
        unit = "nats" if self.header["softmax"] else "of smooth L1"
        words = f"{stored:.2g} {unit} from its relations, {now:.2g} is what {self.header['form']} costs"
        bad = stored > now * (1 + limits["max_differing"]) + 1e-6 or worst > 10 * now + 1e-6
        return numbers | {"failed": float(bad)}, words


def relation_targets(method: Any, img_size: int, form: str) -> RelationTargets:
    """What is kept of a method's teacher, for a student like its own.

    Args:
        method: A :class:`~tinymim.distill.tinymim.TinyMIM` with a live teacher.
        img_size: Side of the views, pixels.
        form: See :mod:`tinymim.distill.compact`.

    Raises:
        ConfigError: another method, several teachers, or a teacher that does not see each view once and whole.
    """
    source = getattr(method, "source", None)
    if not isinstance(source, LiveTeacher) or len(method.teachers) != 1:
        raise ConfigError(
            f"a recipe of the method {method.name}" if source is None else "these targets",
            "relations of one live teacher are stored, which a recipe of the method tinymim reads",
            "e.g. --recipe tinymim_tiny_small_data; several teachers cannot be stored",
        )
    for name, found, ok in (
        ("mask", method.mask, (None, "student")),
        ("teacher_drop_path", bool(source.drops), (False,)),
        ("teacher_precision", "int8" if method.calibrates else "auto", ("auto",)),
    ):
        if found not in ok:
            raise ConfigError(
                f"{name}={found} and a store",
                "it holds what the teacher says of a whole view, once",
                f"leave {name} out" if name != "teacher_precision" else "leave it out; --amp bf16 sets the precision",
            )
    grid = patch_grid(method.student, (img_size, img_size))
    tokens = int(source.class_token) + grid[0] * grid[1]
    given = dict(tokens=tokens, width=source.width, heads=method.relation_heads, centred=method.softmax)
    entries = plan_entries(method.targets, form, **given)
    return RelationTargets(
        method.teachers[0],
        source,
        entries,
        {
            "targets": sorted({f"{'+'.join(t.parts)}@{t.teacher_block}" for t in method.targets}),
            "block": method.target_block,
            "form": form,
            "entries": [dict(block=e.block, taps=[*e.taps], form=e.form, tokens=e.tokens) for e in entries],
            "heads": method.relation_heads,
            "width": source.width,
            "depth": source.depth,
            "class_token": source.class_token,
            "grid": [*grid],
            "align": source.align,
            "softmax": method.softmax,
        },
    )


def stored_targets(
    header: Mapping[str, Any],
    name: str,
    *,
    weights: str | os.PathLike[str] | None,
    img_size: int,
    teacher_heads: int | None = None,
) -> RelationTargets:
    """The teacher of a store again, to look at its views once more.

    Args:
        header: ``relations`` of the store's header.
        name: The teacher.
        weights: Its file, for a timm teacher.
        img_size: Side of the views, pixels.
        teacher_heads: For a file that does not store it.

    Raises:
        TinyMIMError: no such teacher, or one of another shape.
    """
    grid = header["grid"][0] if header["align"] == "image" else None
    teacher = load_teacher(name, img_size=img_size, weights=weights, num_heads=teacher_heads, grid=grid)
    teacher.sha256 = teacher.sha256 or state_sha256(teacher.model)
    source = LiveTeacher(teacher.model, align=header["align"])
    if (source.width, source.depth) != (header["width"], header["depth"]):
        raise DataError(
            "the store holds the targets of another teacher",
            f"{name} is {source.width} wide and {source.depth} deep, that was {header['width']} and {header['depth']}",
            "give the --teacher and --teacher-weights that the store was made with",
        )
    return RelationTargets(teacher, source, entries_of(header), header)
