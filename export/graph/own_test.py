"""One photo through the model's own ``test_step`` and through the file's whole contract: are the masks the same?

On the model's side everything is MMSegmentation's: the test loader's pipeline, ``data_preprocessor``, ``test_cfg``,
up-sampling, decision. On the file's side it is :class:`Predictor`, which ``tinymim predict`` and ``eval`` run. Both get
the same pixels, and our resizing is OpenCV's bit for bit, so the network sees the same numbers and the masks may differ
only where two logits tie within float arithmetic: 99.9 % of the pixels must be equal, as where logits are compared.
A file that gives masks decides before the resize to the photo's size; there the masks are compared before it.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tinymim.errors import CheckFailed
from tinymim_export.comparison import MIN_EQUAL, Row
from tinymim_export.graph.contract import NO_PIXELS, PACK, fixed_input, step_name, test_steps
from tinymim_export.graph.torch_model import TorchModel
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.metadata import first_line
from tinymim_export.runtime.predictor import Predictor


class OwnTest:
    """A model's own test of one photo, run the way a file can run it.

    Args:
        loaded: The segmentor.
        file: The .onnx file.
        photo: Pillow RGB image; None: a drawn one.
    """

    def __init__(self, loaded: TorchModel, file: Path, photo: Any = None) -> None:
        self.loaded, engine = loaded, open_engine(file)
        self.before_resize = engine.output == "mask"  # and masks cannot be averaged over windows
        self.ours = Predictor(engine=engine, mode="whole" if self.before_resize else loaded.contract["resize"]["mode"])
        size = self._photo_size()
        self.stretch = size is None
        if size is None:  # no photo comes to the file's size by the contract
            self.ours = Predictor(engine=engine, mode="whole", resize_to_file=True)
            size = self._near()
        self.photo = _drawn(*size) if photo is None else self._given(photo, size)

    def _near(self) -> tuple[int, int]:
        """Height and width near the file's, not the same, that PyTorch can run."""
        multiple = self.loaded.multiple or 1
        sides = [fixed or given for fixed, given in zip(self.ours.engine.size, self.loaded.size, strict=True)]
        return (
            max(sides[0] * 7 // 8 // multiple, 1) * multiple,
            max(sides[1] * 9 // 8 // multiple, 1) * multiple,
        )

    def _photo_size(self) -> tuple[int, int] | None:
        """Height and width of a photo that the file takes, another than the file's where possible, with few windows."""
        rule, fixed = self.loaded.contract["resize"], self.ours.engine.size
        if self.ours.mode == "slide":
            height, width = self.ours.crop
            return (height * 7 // 8, width) if rule.get("scale") else (height, width + width // 8)
        if None not in fixed:
            sizes = [self._near(), (fixed[0] * 2, fixed[1] * 2), tuple(fixed)]
            return next((size for size in sizes if self.ours._padded(self.ours._resized(size)) == tuple(fixed)), None)
        if (self.loaded.multiple or 1) > 1 and rule.get("keep_ratio"):  # PyTorch runs no other sides
            return max(rule["scale"][1] // 2, 1), max(rule["scale"][0] // 2, 1)
        return self._near()

    def _given(self, photo: Any, size: tuple[int, int]) -> np.ndarray:
        """A photo of the user's, made small enough for the check where the contract does not resize it."""
        rule = self.loaded.contract["resize"]
        if self.stretch or fixed_input(rule) or (rule.get("scale") and None in self.ours.engine.size):
            return np.asarray(photo)
        if self.ours.mode == "slide" and rule.get("scale"):
            return np.asarray(photo)
        return np.asarray(Image.fromarray(np.asarray(photo)).resize(size[::-1]))

    def row(self) -> Row:
        """The comparison.

        Raises:
            CheckFailed: the model's own test does not run.
        """
        theirs, seen = self._theirs()
        ours = self.ours._network(self.photo) if self.before_resize else self.ours.mask(self.photo)
        row = Row("mask", (1, 3, *self.photo.shape[:2]), "test_step")
        row.equal, row.pixels = int((ours == theirs).sum()) if ours.shape == theirs.shape else 0, int(theirs.size)
        row.equal_pixels = row.equal / row.pixels
        row.passed = row.equal_pixels >= MIN_EQUAL
        row.remark = f"({row.equal} of {row.pixels})"
        if not row.passed:
            row.remark += f"; {self._step_that_differs(seen)}"
        return row

    def _theirs(self) -> tuple[np.ndarray, np.ndarray]:
        """Mask uint8 by the model's own code, and what its network saw, (3, h, w)."""
        from mmcv.transforms import Compose
        from mmengine.registry import init_default_scope

        init_default_scope("mmseg")
        steps = test_steps(self.loaded.cfg) or [dict(type="LoadImageFromFile")]
        steps = [step for step in steps if step_name(step) not in NO_PIXELS]
        if self.stretch:
            height, width = self.ours.engine.size
            steps = [step for step in steps if "Resize" not in step_name(step)]
            steps[1:1] = [dict(type="Resize", scale=(width, height), keep_ratio=False)]
        model: Any = self.loaded.model
        kept, padding = model.test_cfg, getattr(model.data_preprocessor, "test_cfg", None)
        try:
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                path = Path(folder) / "photo.png"
                Image.fromarray(self.photo).save(path)
                bgr = np.ascontiguousarray(self.photo[..., ::-1])
                data = Compose([*copy.deepcopy(steps), PACK])(dict(img_path=str(path), img=bgr))
                batch = dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]])
                if self.before_resize:
                    batch["data_samples"][0].set_metainfo(dict(ori_shape=data["data_samples"].img_shape))
                model.test_cfg = self._test_cfg(kept)
                model.data_preprocessor.test_cfg = None if self.stretch else padding
                seen = model.data_preprocessor(copy.deepcopy(batch), False)["inputs"][0].numpy()
                (sample,) = model.test_step(batch)
        except Exception as error:  # the model's own code may raise anything
            raise CheckFailed(
                "the model's own test_step fails on a photo, so the file cannot be verified",
                f"{type(error).__name__}: {first_line(error)}",
                "correct test_dataloader, data_preprocessor and test_cfg of the config until `tools/test.py` runs",
            ) from error
        finally:
            model.test_cfg, model.data_preprocessor.test_cfg = kept, padding
        return sample.pred_sem_seg.data[0].numpy().astype(np.uint8), seen

    def _test_cfg(self, own: Any) -> Any:
        """The model's ``test_cfg`` as the file can run it: windows of its fixed size, or the whole photo."""
        test = copy.deepcopy(own)
        test["mode"] = self.ours.mode
        if self.ours.mode == "slide":
            test["crop_size"], test["stride"] = self.ours.crop, self.ours.stride
        return test

    def _step_that_differs(self, theirs_3hw: np.ndarray) -> str:
        """Where the two part: the size, the values the network sees, or what is done with its logits."""
        if self.loaded.bgr:
            theirs_3hw = theirs_3hw[::-1]
        ours = self.ours.network_input(self.photo)
        if ours.shape != theirs_3hw.shape:
            sizes = ["x".join(map(str, x.shape[1:])) for x in (theirs_3hw, ours)]
            return f"resizing or padding differs: the model's network sees {sizes[0]}, the file's {sizes[1]}"
        off = np.abs(ours.astype(np.float64) - theirs_3hw).mean((1, 2))
        if off.max() > 1e-2 * max(float(theirs_3hw.std()), 1e-6):
            each = ", ".join(f"{value:.3g}" for value in off)
            return f"loading, channel order or normalisation differs: by {each} in red, green, blue on average"
        return "the network sees the same; windows, up-sampling or decision differ"


def own_test(loaded: TorchModel, proto: Any, photo: Any = None) -> Row:
    """Compare a segmentor's ModelProto with the model's own test of a photo.

    Raises:
        CheckFailed: the model's own test does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        return OwnTest(loaded, path, photo).row()


def _drawn(height: int, width: int) -> np.ndarray:
    """A picture with what photos have: shading, edges at every angle, texture and noise of all sizes; always the same.

    Returns:
        uint8 RGB (height, width, 3).
    """
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(height, width)
    picture = np.stack([90 + 120 * y, 120 + 60 * x - 40 * y, 170 - 110 * y + 30 * x], -1)
    for _ in range(24):
        cy, cx, ry, rx = random.uniform(0, 1, 2).tolist() + random.uniform(0.03, 0.25, 2).tolist()
        turn, colour = random.uniform(0, 3.14), random.uniform(0, 255, 3)
        u = (y - cy) * np.cos(turn) + (x - cx) * np.sin(turn)
        v = (x - cx) * np.cos(turn) - (y - cy) * np.sin(turn)
        inside = (np.abs(u / ry) ** 4 + np.abs(v / rx) ** 4) < 1
        picture[inside] = 0.3 * picture[inside] + 0.7 * (colour + 25 * np.sin(60 * u[inside])[:, None])
    picture += random.normal(0, 6, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)
