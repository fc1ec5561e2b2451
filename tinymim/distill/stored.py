"""What training reads from a target store, whatever its kind: the seed of each view, and the arrays of its record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tinymim.errors import ConfigError, DataError
from tinymim.store.layout import encode_keys, sorted_keys
from tinymim.store.targets import NoTargets, TargetStore

READERS = {"logits": "tinyvit_5m_from_store", "relations": "tinymim_tiny_small_data"}  # kind -> a recipe


class StoredTeacher(NamedTuple):
    """Who gave the targets of a store."""

    name: str
    sha256: str | None
    trained_depth: int | None = None


class StoredTargets:
    """A store of one kind, for :class:`tinymim.data.replayed.ReplayedPhotos`.

    Args:
        store: The store.

    Raises:
        DataError: a store of other targets, or of unknown views.
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # of the header
    remedy: ClassVar[str]

    def __init__(self, store: TargetStore) -> None:
        header = store.header
        missing = [name for name in (*self.needs, "augmentation") if not header.get(name)]
        if header["kind"] != self.kind or missing:
            reader = READERS.get(header["kind"]) if header["kind"] != self.kind else None
            raise DataError(
                f"{store.place.url} holds no {self.kind} of known views",
                f"its targets are {header['kind']!r}" + (f", without {', '.join(missing)}" if missing else ""),
                f"give what {self.remedy} wrote" + (f", or --recipe {reader}, which reads it" if reader else ""),
            )
        self.store, self.source, self.sha256 = store, str(store.place.url), store.layout.identity
        self.seed = header["seed"]
        self.augmentation: dict[str, Any] = header["augmentation"]
        self.teacher = StoredTeacher(**header.get("teacher", {"name": "unknown", "sha256": None}))

    def refuse_others(self, *triples: tuple[str, Any, Any, str]) -> None:
        """Refuse what a recipe asks for and the store has otherwise.

        Args:
            triples: Name, value wanted (None: any), value of the store, and what to type instead.

        Raises:
            ConfigError: one of them differs.
        """
        for name, wanted, found, fix in triples:
            if wanted is not None and wanted != found:
                raise ConfigError(
                    f"{self.source} was made with {name} {found}",
                    f"the recipe has {wanted}",
                    f"give another --store, or {fix}",
                )

    def check(self, keys: Sequence[str], epochs: int) -> None:
        """Refuse a run whose photos are not in the store.

        Args:
            keys: Of all photos of the run.
            epochs: That it goes through.

        Raises:
            DataError: some are missing; or, where views are mixed, the store has further photos.
        """
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

    def record(self, key: str, epoch: int) -> dict[str, Any] | None:
        """The record of a photo in an epoch of the store; None: it was damaged.

        Raises:
            DataError: a damaged record.
        """
        try:
            return self.store[key, epoch]
        except NoTargets:
            return None


def is_file(name: Any) -> bool:
    """Whether a teacher's name is a file that is there."""
    return bool(name) and Path(str(name)).is_file()
