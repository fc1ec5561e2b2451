"""Which photos become validation photos: seeded, every class in both splits as nearly in proportion as it can be."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from tinymim.errors import ConfigError, DataError


def check_share(share: float) -> None:
    """Refuse a share of validation photos that is none.

    Raises:
        ConfigError: not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ConfigError(
            f"--split {share:g}", "it is the share of validation photos, between 0 and 1", "e.g. --split 0.2"
        )


def choose_validation(classes: Sequence[Collection[int]], share: float, seed: int) -> set[int]:
    """Places of the photos that become validation photos.

    Iterative stratification (Sechidis et al., ECML 2011): the photos of the rarest class are dealt out first, each to
    the split that lacks more of that class, then to the one that lacks more photos.

    Args:
        classes: Of each photo, the classes in it.
        share: Of validation photos.
        seed: Of the order in which photos are looked at.

    Returns:
        About ``share * photos`` places, as the classes come first; at least one, and never all.

    Raises:
        DataError: fewer than two photos.
    """
    if len(classes) < 2:
        raise DataError(
            f"{len(classes)} labelled photo(s)", "training and validation need one each, at least", "label more photos"
        )
    left = [int(i) for i in np.random.default_rng(seed).permutation(len(classes))]
    parts = (1 - share, share)
    lacks = [Counter({c: part * n for c, n in Counter(c for each in classes for c in each).items()}) for part in parts]
    photos = [part * len(classes) for part in parts]
    chosen: list[set[int]] = [set(), set()]
    while left:
        counts = Counter(c for i in left for c in classes[i])
        rarest = min(counts, key=lambda c: (counts[c], c), default=None)
        for i in [i for i in left if rarest is None or rarest in classes[i]]:
            to = max((0, 1), key=lambda s: (lacks[s][rarest] if rarest is not None else 0.0, photos[s]))
            chosen[to].add(i)
            photos[to] -= 1
            lacks[to].subtract(classes[i])
        done = chosen[0] | chosen[1]
        left = [i for i in left if i not in done]
    for here, other in ((0, 1), (1, 0)):
        if not chosen[here]:
            chosen[here].add(chosen[other].pop())
    return chosen[1]


def frames_of_videos(names: Sequence[str]) -> int:
    """How many names look like frames of one video: the same words, and a number next to that of another."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d{1,12})\D{0,8}", name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    return sum(1 for found in numbers.values() for n in found if found & {n - 1, n + 1})
