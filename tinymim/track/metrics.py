"""Success, precision and normalised precision of one-pass evaluation, as LaSOT's and OSTrack's toolkits count. numpy.

LaSOT, arXiv 1809.07845; OTB, Wu et al. 2015; normalised precision, Mueller et al. 2018. Of a sequence, every curve is a
share of all its frames: one in which the target is absent counts as missed, in success and precision alike, whatever
was predicted there (pytracking's and OSTrack's convention, by which published AUCs are read). Curves are averaged over
sequences, so short and long ones weigh the same.
"""

from dataclasses import dataclass

import numpy as np

from tinymim.track.boxes import centres, overlap

OVERLAPS = np.arange(21) / 20  # a frame succeeds at a threshold if its overlap is larger
PIXELS = np.arange(51.0)  # precision at 20
SHARES = np.arange(51) / 100  # of the target's width and height; normalised precision at 0.2
AT = 20  # index of both


@dataclass
class Curves:
    """Of one sequence, or the mean of several: shares of the frames by threshold.

    Attributes:
        success: (21,), by :data:`OVERLAPS`.
        precision: (51,), by :data:`PIXELS`.
        normalised: (51,), by :data:`SHARES`.
    """

    success: np.ndarray
    precision: np.ndarray
    normalised: np.ndarray

    @property
    def scores(self) -> dict[str, float]:
        """``auc``: mean of the success curve; ``precision`` at 20 pixels; ``normalised_precision`` at 0.2."""
        return {
            "auc": float(self.success.mean()),
            "precision": float(self.precision[AT]),
            "normalised_precision": float(self.normalised[AT]),
        }


def curves(predicted: np.ndarray, truth: np.ndarray, visible: np.ndarray) -> Curves:
    """The curves of a sequence.

    Args:
        predicted: Boxes (N, 4) of all frames, the given one of the first frame included.
        truth: True boxes (N, 4).
        visible: Whether the target is there, (N,).
    """
    found = visible[:, None]
    shift = centres(predicted) - centres(truth)
    sides = np.where(truth[:, 2:] > 0, truth[:, 2:], np.inf)
    pixels, shares = np.hypot(*shift.T)[:, None], np.hypot(*(shift / sides).T)[:, None]
    return Curves(
        ((overlap(predicted, truth)[:, None] > OVERLAPS) & found).mean(0),
        ((pixels <= PIXELS) & found).mean(0),
        ((shares <= SHARES) & found).mean(0),
    )


def mean_curves(each: list[Curves]) -> Curves:
    """The mean over sequences."""
    return Curves(*(np.mean([getattr(c, name) for c in each], axis=0) for name in Curves.__dataclass_fields__))
