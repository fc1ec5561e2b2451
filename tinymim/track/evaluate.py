"""One-pass evaluation: every sequence from its first true box to its end, without a second try. numpy and Pillow."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.pixels import open_photo
from tinymim.files import describe_files, environment, write_json
from tinymim.progress import Progress
from tinymim.track.following import Follower, spelled_fps
from tinymim.track.metrics import Curves, curves, mean_curves
from tinymim.track.sequences import Sequence, read_sequences


@dataclass
class TrackScores:
    """Scores of one follower on a set of sequences; ``auc``, ``precision`` and ``normalised_precision`` are shares.

    Attributes:
        tracker: What followed.
        sequences: Name, frames and scores of each.
        curves: Mean curves: success (21 thresholds of overlap), precision (0 to 50 pixels), normalised (0 to 0.5).
        fps: Frames per second of crops and network, without reading frames.
    """

    tracker: str
    data: dict[str, Any]
    auc: float
    precision: float
    normalised_precision: float
    fps: float
    frames: int
    sequences: list[dict[str, Any]]
    curves: dict[str, list[float]]
    environment: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "tinymim.track_scores"} | vars(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to ``path`` if given."""
        if path is not None:
            write_json(path, self.to_dict())
        return json.dumps(self.to_dict(), indent=1)

    def print(self) -> None:
        """The scores in a line, and the speed."""
        print(
            f"{self.tracker}: success AUC {100 * self.auc:.1f} %, precision at 20 pixels {100 * self.precision:.1f} %, "
            f"normalised precision {100 * self.normalised_precision:.1f} % "
            f"({len(self.sequences)} sequences, {self.frames} frames)\n  {spelled_fps(self.fps)}",
            flush=True,
        )


def evaluate_tracker(follower: Follower, data: str | Path | Iterable[Sequence]) -> TrackScores:
    """Follow the target of every sequence and score the boxes (:mod:`tinymim.track.metrics`).

    Args:
        follower: E.g. ``OneStream(TorchNetwork("tracker.pth"))``.
        data: A folder that :func:`~tinymim.track.sequences.read_sequences` reads, or sequences.

    Raises:
        DataError: see :func:`~tinymim.track.sequences.read_sequences`; a frame cannot be read.
    """
    sequences = read_sequences(data) if isinstance(data, str | Path) else [*data]
    total, spent, done = sum(map(len, sequences)), 0.0, 0
    line, rows, each = Progress(f"test {follower.name}", total), list[dict[str, Any]](), list[Curves]()
    for sequence in sequences:
        boxes = np.zeros((len(sequence), 4))
        for i, path in enumerate(sequence.frames):
            frame, began = open_photo(path), time.perf_counter()
            if i == 0:
                follower.start(frame, sequence.truth[0])
                boxes[0] = sequence.truth[0]
            else:
                boxes[i], _ = follower.step(frame)
            spent += time.perf_counter() - began
            done += 1
            line.update(done, images=1)
        each.append(curves(boxes, sequence.truth, sequence.visible))
        rows.append({"name": sequence.name, "frames": len(sequence), **each[-1].scores})
    line.close()
    mean = mean_curves(each)
    files = [path for sequence in sequences for path in sequence.frames]
    return TrackScores(
        follower.name,
        describe_files(data, files) if isinstance(data, str | Path) else {"files": len(files)},
        **mean.scores,
        fps=total / max(spent, 1e-9),
        frames=total,
        sequences=rows,
        curves={name: getattr(mean, name).round(6).tolist() for name in Curves.__dataclass_fields__},
        environment=environment(),
    )
