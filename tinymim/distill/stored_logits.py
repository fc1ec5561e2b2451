"""A teacher's sparse probabilities that ``tinymim cache`` wrote, and the seeds of the views that they belong to.

Legend: K = classes whose probabilities are kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinymim.errors import ConfigError, DataError
from tinymim.store.layout import encode_keys, sorted_keys
from tinymim.store.targets import NoTargets, TargetStore


class StoredTeacher(NamedTuple):
    """Who gave the targets of a store."""

    name: str
    sha256: str | None


class StoredLogits:
    """Sparse logits of a store, for :class:`tinymim.data.replayed.ReplayedPhotos`.

    Args:
        store: The store.

    Raises:
        DataError: a store of other targets.
    """

    def __init__(self, store: TargetStore) -> None:
        header = store.header
        missing = [name for name in ("topk", "classes", "augmentation") if not header.get(name)]
        names = header.get("class_names", [])
        missing += ["the names of its classes"] if names and len(names) != header.get("classes") else []
        if header["kind"] != "logits" or missing:
            raise DataError(
                f"{store.place.url} holds no logits of known views",
                f"its targets are {header['kind']!r}" + (f", without {', '.join(missing)}" if missing else ""),
                "give what tinymim cache --topk K wrote",
            )
        self.store, self.source, self.sha256 = store, str(store.place.url), store.layout.identity
        self.seed, self.topk, self.classes = header["seed"], header["topk"], header["classes"]
        self.class_names = names
        self.augmentation: dict[str, Any] = header["augmentation"]
        self.teacher = StoredTeacher(**header.get("teacher", {"name": "unknown", "sha256": None}))

    def check_recipe(self, recipe: Any) -> None:
        """Refuse a recipe that names another teacher, K or number of classes.

        Raises:
            ConfigError: it does.
        """
        for name, wanted, found, fix in (
            ("the teacher", recipe.teacher, self.teacher.name, "leave --teacher out"),
            ("topk", recipe.topk, self.topk, f"--cfg-options topk={self.topk}"),
            ("classes", recipe.classes, self.classes, f"--cfg-options classes={self.classes}"),
        ):
            if wanted is not None and wanted != found:
                raise ConfigError(
                    f"{self.source} was made with {name} {found}",
                    f"the recipe has {wanted}",
                    f"give another --store, or {fix}",
                )

    def check(self, keys: Sequence[str], epochs: int) -> None:
        """Refuse a run whose photos or epochs are not in the store.

        Args:
            keys: Of all photos of the run.
            epochs: That it goes through.

        Raises:
            DataError: some are missing; or, where views are mixed, the store has further photos.
        """
        own = self.store.layout.epochs
        if epochs > own:
            raise DataError(
                f"{self.source} holds {own} epoch(s), the run goes through {epochs}",
                "every epoch has views of its own",
                f"use --epochs {own}, or write more: tinymim cache --epochs {epochs} with the options of the store",
            )
        if encode_keys(sorted_keys(keys))[1] == self.store.header["keys_sha256"]:
            return
        missing = [key for key in keys if key not in self.store]
        if missing or self.augmentation.get("mixup") or self.augmentation.get("cutmix"):
            what = f"{len(missing)} of {len(keys)} photos, e.g. {missing[0]}, are not" if missing else "not all are"
            raise DataError(
                f"the photos are others than those of {self.source}",
                f"{what} in it, which has {len(self.store.keys)}, the first is {self.store.keys[0]}"
                if missing
                else f"it mixes its {len(self.store.keys)} photos in pairs, and --data has {len(keys)} of them",
                "give the --data that the store was made of, or cache these photos: tinymim cache --data FOLDER",
            )

    def __call__(self, key: str, epoch: int) -> tuple[int, dict[str, Tensor]] | None:
        """Seed of a view, and ``values`` (K,) and ``indices`` (K,); None: the photo was damaged.

        Raises:
            DataError: a damaged record.
        """
        try:
            record = self.store[key, epoch]
        except NoTargets:
            return None
        values, indices = record["values"].astype(np.float32), record["indices"].astype(np.int64)
        if not ((values >= 0) & (values <= 1)).all() or indices.min() < 0 or indices.max() >= self.classes:
            raise DataError(
                f"the targets of {key} in {self.source} are no probabilities of {self.classes} classes",
                f"values from {values.min():g} to {values.max():g}, classes from {indices.min()} to {indices.max()}",
                "write the store anew",
            )
        return int(record["seed"]), {"values": torch.from_numpy(values), "indices": torch.from_numpy(indices)}
