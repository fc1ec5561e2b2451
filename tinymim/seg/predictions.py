"""Pictures of the same validation photos at every validation of a run, for its report."""

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner.base_loop import BaseLoop
from mmseg.registry import HOOKS
from PIL import Image

from tinymim.data.label_files import save_mask
from tinymim.data.pixels import open_photo
from tinymim.files import atomic_path, write_json

FOLDER = "predictions"


@HOOKS.register_module()
class PredictionsHook(Hook):
    """Writes ``predictions/``: of a few photos, evenly spread over the validation photos, the photo and its labels, and
    the prediction at every validation; ``photos.json`` names them, the classes and their colours.

    Args:
        photos: How many.
        width: Pixels that wider pictures are made smaller to.
    """

    def __init__(self, photos: int = 4, width: int = 480) -> None:
        self.photos, self.width = photos, width
        self.chosen: dict[str, int] = {}  # file -> number of the picture

    def before_val_epoch(self, runner: Any) -> None:
        """Choose the photos, once."""
        pairs = getattr(runner.val_dataloader.dataset, "pairs", None)
        if self.chosen or not pairs or not isinstance(runner._train_loop, BaseLoop):
            return
        count = min(self.photos, len(pairs))
        picked = [pairs[i * len(pairs) // count][0] for i in range(count)]
        self.chosen = {str(photo): number for number, photo in enumerate(picked)}
        if is_main_process():
            info = runner.val_dataloader.dataset.metainfo
            write_json(
                Path(runner.work_dir) / FOLDER / "photos.json",
                {
                    "photos": [photo.name for photo in picked],
                    "classes": list(info["classes"]),
                    "palette": [list(map(int, colour)) for colour in info["palette"]],
                },
            )

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keep the pictures of a batch's chosen photos."""
        for sample in outputs or () if self.chosen else ():
            number = self.chosen.get(str(sample.metainfo.get("img_path")))
            if number is None:
                continue
            folder, palette = Path(runner.work_dir) / FOLDER, runner.val_dataloader.dataset.metainfo["palette"]
            self._save(sample.pred_sem_seg, folder / f"{number:02d}_{runner.iter:08d}.png", palette)
            labels, photo = folder / f"{number:02d}_labels.png", folder / f"{number:02d}_photo.jpg"
            if not photo.is_file():
                self._save(sample.gt_sem_seg, labels, palette)
                image = open_photo(sample.metainfo["img_path"])
                with atomic_path(photo) as part:
                    image.resize(self._size(*image.size)).save(part, "JPEG", quality=88)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Size of a picture, (width, height)."""
        factor = min(self.width / width, 1.0)
        return round(width * factor), max(round(height * factor), 1)

    def _save(self, ids: Any, path: Path, palette: Any) -> None:
        mask_HW = ids.data[0].cpu().numpy().astype(np.uint8)
        small = Image.fromarray(mask_HW).resize(self._size(*mask_HW.shape[::-1]), Image.Resampling.NEAREST)
        save_mask(np.asarray(small), path, palette)
