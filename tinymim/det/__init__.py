"""Object detection and instance masks: torchvision's Mask R-CNN on our backbones, on data in COCO's format."""

from tinymim.lazy import lazy

_PLACES = {
    "Detector": "detector",
    "SimplePyramid": "pyramid",
    "detect": "job",
    "evaluate_detector": "evaluate",
    "load_detector": "stored",
    "read_coco": "coco",
    "save_detector": "stored",
}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
