"""The MMSegmentation plug-in: ``custom_imports = dict(imports=["tinymim.seg"])``. The only room that imports mmseg."""

import warnings

from tinymim.compat import install_mmcv_stand_in

install_mmcv_stand_in()  # before anything below imports mmseg
# MMSegmentation's own warnings, at every model built or run; a user of a published config cannot act on them
warnings.filterwarnings(
    "ignore", module=r"mmseg\.models\..*", message=r"``build_loss``|Default ``avg_non_ignore``|When align_corners=True"
)

from tinymim.seg.backbone import TinyMIMBackbone  # noqa: E402
from tinymim.seg.dataset import LoadLabel, LoadPhoto, ResumableSampler, TinyMIMSegDataset  # noqa: E402
from tinymim.seg.dry_run import SegCost, estimate_segmentor  # noqa: E402
from tinymim.seg.efficientvit_head import EfficientViTHead  # noqa: E402
from tinymim.seg.hooks import RunFolderHook  # noqa: E402
from tinymim.seg.inference import BatchedValLoop  # noqa: E402
from tinymim.seg.label import label_photos  # noqa: E402
from tinymim.seg.loop import ResumableTrainLoop  # noqa: E402
from tinymim.seg.metric import SegMetric, SegResult  # noqa: E402
from tinymim.seg.optim import TinyMIMLayerDecayOptimizerConstructor  # noqa: E402
from tinymim.seg.run import test_segmentor, train_segmentor  # noqa: E402
from tinymim.seg.segmentor import load_segmentor  # noqa: E402

__all__ = [
    "BatchedValLoop",
    "EfficientViTHead",
    "LoadLabel",
    "LoadPhoto",
    "ResumableSampler",
    "ResumableTrainLoop",
    "RunFolderHook",
    "SegCost",
    "SegMetric",
    "SegResult",
    "TinyMIMBackbone",
    "TinyMIMLayerDecayOptimizerConstructor",
    "TinyMIMSegDataset",
    "estimate_segmentor",
    "label_photos",
    "load_segmentor",
    "test_segmentor",
    "train_segmentor",
]
