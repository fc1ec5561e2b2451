"""Labelled folders for MMSegmentation, and the order in which training sees their photos.

Every training sample is a function of (seed, position in the run): the random generators are re-seeded for each sample.
So a resumed run starts at the right position without reading earlier samples, with any number of workers.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dist import get_dist_info
from mmseg.datasets.basesegdataset import BaseSegDataset
from mmseg.registry import DATA_SAMPLERS, DATASETS, TRANSFORMS
from torch.utils.data import Sampler

from tinymim.data.folders import Layout, read_layout
from tinymim.data.label_files import wrong_size
from tinymim.data.photo_files import tell
from tinymim.data.pixels import UnreadablePhoto, open_photo
from tinymim.errors import DataError


@TRANSFORMS.register_module()
class LoadPhoto(BaseTransform):
    """Read ``img_path`` as uint8 (H, W, 3), BGR as MMSegmentation expects, upright.

    With Pillow, as OpenCV silently fills the missing part of a truncated JPEG with grey.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        rgb = np.asarray(open_photo(results["img_path"]))
        results["img"] = np.ascontiguousarray(rgb[..., ::-1])
        results["img_shape"] = results["ori_shape"] = rgb.shape[:2]
        return results


@TRANSFORMS.register_module()
class LoadLabel(BaseTransform):
    """Read ``seg_map_path`` as uint8 (H, W) of training ids with 255 for ignored pixels, by the dataset's layout."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["seg_map_path"]
        label, order = results.pop("layout").read_label(path), results.pop("order")
        if order is not None:
            label = order[label]
        if label.shape != tuple(results["ori_shape"]):
            raise wrong_size(path, label.shape[::-1], results["ori_shape"][::-1])
        results["gt_seg_map"] = label
        results["seg_fields"].append("gt_seg_map")
        return results


@DATASETS.register_module()
class TinyMIMSegDataset(BaseSegDataset):
    """Photos and labels of a folder in ADE20K layout (``tinymim.data.folders``).

    Args:
        data_root: The folder.
        split: "train" or "val".
        pipeline: MMSegmentation transforms, starting with ``LoadPhoto``.
        ignore_label: Id or ids to ignore besides 255, for folders without ``dataset.json``.
        reduce_zero_label: Whether id 0 is "no class", for folders without ``dataset.json``.
        test_mode: MMEngine's switch for validation.
        pseudo: ``dict(data_root, weight)``: training photos of another folder that are added to these, and how often
            one of them is drawn compared with one of these.

    Attributes:
        layout: The folder.
        pairs: Its photos and labels.
        pseudo: The other folder, or None.
        labelled: How many of the photos, the first ones, are of the folder itself.
        weight: Of the others.
    """

    layout: Layout
    pseudo: Layout | None
    order: np.ndarray | None

    def __init__(
        self,
        data_root: str,
        split: str,
        pipeline: Sequence[Any] = (),
        ignore_label: int | Sequence[int] | None = None,
        reduce_zero_label: bool | None = None,
        test_mode: bool = False,
        pseudo: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        self.layout = read_layout(data_root, ignore_label=ignore_label, reduce_zero_label=reduce_zero_label)
        self.pairs = self.layout.need(split)
        self.labelled = len(self.pairs)
        self.pseudo, self.order, self.weight = None, None, 1.0
        if pseudo is not None:
            self.pseudo, self.order = read_pseudo(pseudo["data_root"], self.layout)
            self.weight = pseudo["weight"]
        super().__init__(
            data_root=None,
            pipeline=list(pipeline),
            test_mode=test_mode,
            metainfo=dict(classes=list(self.layout.classes), palette=[list(c) for c in self.layout.palette]),
            **rest,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """The paths of each pair."""
        every = [*self.pairs, *(self.pseudo.train if self.pseudo else ())]
        return [dict(img_path=str(photo), seg_map_path=str(label)) for photo, label in every]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The input of the first transform of the pipeline."""
        info = super().get_data_info(idx) | {"seg_fields": [], "reduce_zero_label": False, "label_map": None}
        if self.pseudo is not None and idx >= self.labelled:
            return info | {"layout": self.pseudo, "order": self.order}
        return info | {"layout": self.layout, "order": None}

    def __getitem__(self, idx: int | tuple[int, int]) -> Any:
        """A sample; the key ``(index, seed)`` also seeds its random numbers. Training skips damaged photos.

        The paths of skipped photos are in the sample's ``skipped``.

        Raises:
            DataError: no photo can be read, or, in validation, this one cannot.
        """
        if isinstance(idx, tuple):
            idx, seed = idx
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        if self.test_mode:
            return self.prepare_data(idx)
        skipped: list[str] = []
        for i in range(len(self)):
            at = (idx + i) % len(self)
            try:
                sample = self.prepare_data(at)
            except UnreadablePhoto:
                skipped.append(self.get_data_info(at)["img_path"])
                continue
            if skipped:
                sample["data_samples"].set_metainfo(dict(skipped=skipped))
            return sample
        raise DataError(
            f"none of the {len(self)} training photos can be read",
            f"the first is {skipped[0]}",
            "copy the dataset again",
        )


def read_pseudo(root: str | Path, layout: Layout) -> tuple[Layout, np.ndarray | None]:
    """A folder of pseudo-labelled training photos, as ``tinymim label`` writes them.

    Args:
        root: The folder.
        layout: The labelled one whose classes count.

    Returns:
        The folder; and uint8 (256,), its training id -> that of ``layout``, or None where they are the same.

    Raises:
        DataError: it is wrong, or has other classes.
    """
    pseudo = read_layout(root)
    pseudo.need("train")
    try:
        order, remark = layout.match(str(root), pseudo.classes)
    except DataError as error:
        fix = "label the photos with a segmentor of the same classes: tinymim label PHOTOS --with FILE --out LAYOUT"
        raise DataError(error.what, error.why, fix) from error
    if remark is not None:
        tell(f"{root}: {remark}")
    return pseudo, order


@DATA_SAMPLERS.register_module()
class ResumableSampler(Sampler[tuple[int, int]]):
    """Endless shuffled passes over a dataset, as (index, seed of the sample); can start anywhere.

    Position p of the run is photo ``shuffle(seed, p // n)[p % n]``. Process r of w takes positions r, r + w, ...

    A dataset with pseudo-labelled photos has passes of all others and ``weight`` times as many of these as there are,
    at least one, which passes take in turns from shuffled rounds of their own: with weight 0.5 every other pass sees
    each of them.

    Args:
        dataset: The dataset of n photos.
        seed: Seed of the run.
        shuffle: New order in each pass; False keeps the order of the folder.
    """

    def __init__(self, dataset: Any, seed: int | None = None, shuffle: bool = True) -> None:
        self.seed, self.shuffle, self.first = int(seed or 0), shuffle, 0
        self.labelled = min(getattr(dataset, "labelled", len(dataset)), len(dataset))
        self.pseudo = len(dataset) - self.labelled
        self.drawn = pseudo_per_pass(self.pseudo, dataset.weight) if self.pseudo else 0
        self.size = self.labelled + self.drawn
        self.rank, self.world = get_dist_info()

    def skip(self, samples: int) -> None:
        """Start after ``samples`` samples of this process."""
        self.first = samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, turn, order = self.first * self.world + self.rank, -1, np.arange(self.size)
        while True:
            if position // self.size != turn:
                turn = position // self.size
                order = self._order(turn)
            yield int(order[position % self.size]), mix_seed(self.seed, 1, position)
            position += self.world

    def _order(self, turn: int) -> np.ndarray:
        """Indices of one pass."""
        photos = np.arange(self.labelled)
        if self.drawn:
            places = turn * self.drawn + np.arange(self.drawn)
            rounds = range(places[0] // self.pseudo, places[-1] // self.pseudo + 1)
            drawn = np.concatenate([self._shuffled(self.pseudo, each, 3) for each in rounds])
            photos = np.append(photos, self.labelled + drawn[places - rounds[0] * self.pseudo])
        return photos[self._shuffled(self.size, turn)]

    def _shuffled(self, count: int, *key: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *key]).permutation(count) if self.shuffle else np.arange(count)

    def __len__(self) -> int:
        return self.size


def pseudo_per_pass(photos: int, weight: float) -> int:
    """How many pseudo-labelled photos a pass draws."""
    return max(round(weight * photos), 1)


def mix_seed(*numbers: int) -> int:
    """Combine several numbers into one 32-bit seed."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])
