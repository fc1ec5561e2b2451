"""The MMSegmentation plug-in: ``custom_imports = dict(imports=["tinymim.seg"])``. The only room that imports mmseg."""

from tinymim.compat import install_mmcv_stand_in

install_mmcv_stand_in()  # before anything below imports mmseg

from tinymim.seg.backbone import TinyMIMBackbone  # noqa: E402
from tinymim.seg.optim import TinyMIMLayerDecayOptimizerConstructor  # noqa: E402

__all__ = ["TinyMIMBackbone", "TinyMIMLayerDecayOptimizerConstructor"]
