"""A one-stream tracker on a plain student: train, score, follow. What a file needs to run (no PyTorch) loads alone."""

from typing import TYPE_CHECKING

from tinymim.lazy import lazy

if TYPE_CHECKING:
    from tinymim.track.evaluate import TrackScores, evaluate_tracker
    from tinymim.track.following import FirstBox, OneStream, TemplateMatcher, follow
    from tinymim.track.generate import generate_sequences
    from tinymim.track.job import TrackJob, TrackResult, train_tracker
    from tinymim.track.network import Tracker
    from tinymim.track.sequences import Sequence, read_sequences
    from tinymim.track.stored import TorchNetwork, load_tracker, save_tracker

_PLACES = {
    **dict.fromkeys(("TrackScores", "evaluate_tracker"), "evaluate"),
    **dict.fromkeys(("FirstBox", "OneStream", "TemplateMatcher", "follow"), "following"),
    "generate_sequences": "generate",
    **dict.fromkeys(("TrackJob", "TrackResult", "train_tracker"), "job"),
    "Tracker": "network",
    **dict.fromkeys(("Sequence", "read_sequences"), "sequences"),
    **dict.fromkeys(("TorchNetwork", "load_tracker", "save_tracker"), "stored"),
}
__all__ = [
    "FirstBox",
    "OneStream",
    "Sequence",
    "TemplateMatcher",
    "TorchNetwork",
    "TrackJob",
    "TrackResult",
    "TrackScores",
    "Tracker",
    "evaluate_tracker",
    "follow",
    "generate_sequences",
    "load_tracker",
    "read_sequences",
    "save_tracker",
    "train_tracker",
]
__getattr__ = lazy(__name__, _PLACES)
