"""Labelled folders for MMSegmentation, and the order in which training sees their photos.

Every training sample is a function of (seed, position in the run): the random generators are re-seeded for each sample.
So a resumed run starts at the right position without reading earlier samples, with any number of workers.
"""

import random
from collections.abc import Iterator, Sequence
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
        label = results.pop("layout").read_label(path)
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
    """

    layout: Layout

    def __init__(
        self,
        data_root: str,
        split: str,
        pipeline: Sequence[Any] = (),
        ignore_label: int | Sequence[int] | None = None,
        reduce_zero_label: bool | None = None,
        test_mode: bool = False,
        **rest: Any,
    ) -> None:
        self.layout = read_layout(data_root, ignore_label=ignore_label, reduce_zero_label=reduce_zero_label)
        self.pairs = self.layout.need(split)
        super().__init__(
            data_root=None,
            pipeline=list(pipeline),
            test_mode=test_mode,
            metainfo=dict(classes=list(self.layout.classes), palette=[list(c) for c in self.layout.palette]),
            **rest,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """The paths of each pair."""
        return [dict(img_path=str(photo), seg_map_path=str(label)) for photo, label in self.pairs]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The input of the first transform of the pipeline."""
        info = super().get_data_info(idx)
        return {**info, "seg_fields": [], "reduce_zero_label": False, "label_map": None, "layout": self.layout}

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


@DATA_SAMPLERS.register_module()
class ResumableSampler(Sampler[tuple[int, int]]):
    """Endless shuffled passes over a dataset, as (index, seed of the sample); can start anywhere.

    Position p of the run is photo ``shuffle(seed, p // n)[p % n]``. Process r of w takes positions r, r + w, ...

    Args:
        dataset: The dataset of n photos.
        seed: Seed of the run.
        shuffle: New order in each pass; False keeps the order of the folder.
    """

    def __init__(self, dataset: Any, seed: int | None = None, shuffle: bool = True) -> None:
        self.size, self.seed, self.shuffle, self.first = len(dataset), int(seed or 0), shuffle, 0
        self.rank, self.world = get_dist_info()

    def skip(self, samples: int) -> None:
        """Start after ``samples`` samples of this process."""
        self.first = samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, turn, order = self.first * self.world + self.rank, -1, np.arange(self.size)
        while True:
            if self.shuffle and position // self.size != turn:
                turn = position // self.size
                order = np.random.default_rng([self.seed, turn]).permutation(self.size)
            yield int(order[position % self.size]), mix_seed(self.seed, 1, position)
            position += self.world

    def __len__(self) -> int:
        return self.size


def mix_seed(*numbers: int) -> int:
    """Combine several numbers into one 32-bit seed."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])
