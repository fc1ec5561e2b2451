"""A teacher's sparse probabilities that ``tinymim cache`` wrote, and the seeds of the views that they belong to.

Legend: K = classes whose probabilities are kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinymim.distill.stored import StoredTargets, is_file
from tinymim.errors import DataError
from tinymim.models.logit_teacher import load_logit_teacher
from tinymim.store.targets import TargetStore


class StoredLogits(StoredTargets):
    """Sparse logits of a store, for :class:`tinymim.data.replayed.ReplayedPhotos`.

    Args:
        store: The store.

    Raises:
        DataError: a store of other targets.
    """

    kind, needs, remedy = "logits", ("topk", "classes"), "tinymim cache --topk K"

    def __init__(self, store: TargetStore) -> None:
        super().__init__(store)
        header = store.header
        self.topk, self.classes, self.class_names = header["topk"], header["classes"], header.get("class_names", [])
        if self.class_names and len(self.class_names) != self.classes:
            raise DataError(
                f"{self.source} holds no logits of known classes",
                f"it names {len(self.class_names)} of {self.classes} classes",
                f"give what {self.remedy} wrote",
            )

    def check_recipe(self, recipe: Any) -> None:
        """Refuse a recipe that names another teacher, K or number of classes; a file is compared by its tensors.

        Raises:
            ConfigError: it does.
        """
        teacher, sha256, _ = self.teacher
        if is_file(recipe.teacher):
            same = load_logit_teacher(recipe.teacher).sha256 == sha256
            teacher = recipe.teacher if same else f"{teacher} (sha256 {str(sha256)[:12]})"
        self.refuse_others(
            ("the teacher", recipe.teacher, teacher, "leave --teacher out"),
            ("topk", recipe.topk, self.topk, f"--cfg-options topk={self.topk}"),
            ("classes", recipe.classes, self.classes, f"--cfg-options classes={self.classes}"),
        )

    def check(self, keys: Sequence[str], epochs: int) -> None:
        """Refuse a run whose photos or epochs are not in the store; see :meth:`StoredTargets.check`.

        Raises:
            DataError: some are missing.
        """
        own = self.store.layout.epochs
        if epochs > own:
            raise DataError(
                f"{self.source} holds {own} epoch(s), the run goes through {epochs}",
                "every epoch has views of its own",
                f"use --epochs {own}, or write more: tinymim cache --epochs {epochs} with the options of the store",
            )
        super().check(keys, epochs)

    def example(self) -> dict[str, Tensor]:
        """Targets as of a photo, for measuring memory and time."""
        return {"values": torch.full((self.topk,), 1 / self.topk), "indices": torch.arange(self.topk)}

    def __call__(self, key: str, epoch: int) -> tuple[int, dict[str, Tensor]] | None:
        """Seed of a view, and ``values`` (K,) and ``indices`` (K,); None: the photo was damaged.

        Raises:
            DataError: a damaged record.
        """
        record = self.record(key, epoch)
        if record is None:
            return None
        values, indices = record["values"].astype(np.float32), record["indices"].astype(np.int64)
        if not ((values >= 0) & (values <= 1)).all() or indices.min() < 0 or indices.max() >= self.classes:
            raise DataError(
                f"the targets of {key} in {self.source} are no probabilities of {self.classes} classes",
                f"values from {values.min():g} to {values.max():g}, classes from {indices.min()} to {indices.max()}",
                "write the store anew",
            )
        return int(record["seed"]), {"values": torch.from_numpy(values), "indices": torch.from_numpy(indices)}
