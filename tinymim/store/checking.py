"""Whether a store still holds what its teacher says: a sample of its records is replayed."""

import math
import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tinymim.errors import CheckFailed, DataError
from tinymim.progress import Progress, say
from tinymim.store.job import UNREADABLE, Item, Job
from tinymim.store.targets import TargetStore, missing_chunks


def check_targets(out: str | os.PathLike[str], job: Job, *, sample: int = 256, **limits: float) -> dict[str, float]:
    """Replay a sample of records through the teacher and compare.

    Args:
        out: The store.
        job: The photos and the teacher that the store was made of.
        sample: Records, spread over the chunks that are written.
        limits: ``max_dp``: largest difference of a stored probability; ``max_differing``: largest mean share of stored
            classes that are not among the K most probable now; of relations, see
            :meth:`tinymim.distill.relation_targets.RelationTargets.verdict`.

    Returns:
        ``records``, and the numbers of the kind of targets.

    Raises:
        DataError: another teacher, photos that the store does not have, a damaged chunk.
        CheckFailed: beyond a threshold.
    """
    store, asked = TargetStore.open(out, partial=True), job.asked
    teacher = store.header.get("teacher", {"name": "", "sha256": None})
    if teacher["sha256"] not in (None, asked.sha256):
        raise DataError(
            f"{out} holds the targets of another teacher",
            f"{teacher['name']} with sha256 {str(teacher['sha256'])[:12]}..., not {asked.name} with "
            f"{asked.sha256[:12]}...",
            "give the --teacher and --teacher-weights that the store was made with",
        )
    asked.check_header(store.header, str(out))
    absent = {*missing_chunks(store.place, store.layout)}
    layout = store.layout
    numbers = ((epoch, number) for epoch in range(layout.epochs) for number in range(layout.chunks))
    chunks = [chunk for chunk in (layout.at(*each) for each in numbers) if chunk not in absent]
    if not chunks:
        raise DataError(f"{out} holds no chunk yet", "nothing can be checked", "run tinymim cache first")
    rng = np.random.default_rng(0)
    few = [chunks[i] for i in sorted(rng.permutation(len(chunks))[: max(1, min(16, sample // 2))])]
    stored: dict[Item, dict[str, np.ndarray]] = {}
    position_of = {key: at for at, key in enumerate(job.keys)}
    for chunk in few:
        arrays, photos = store.read(chunk), layout.photos_of(chunk)
        whole = len(photos) // 2 if store.header["pairs"] else math.ceil(len(photos) / 2)  # who is mixed has a partner
        pairs = rng.permutation(whole)[: math.ceil(sample / len(few) / 2)]
        for row in sorted(row for pair in pairs for row in (2 * pair, 2 * pair + 1) if row < len(photos)):
            key = store.keys[int(photos[row])]
            if key not in position_of:
                raise DataError(
                    f"{key} is not in --data",
                    f"the store holds its targets; --data has {len(job.keys):,} other photos",
                    "give the --data that the store was made of",
                )
            if arrays["seed"][row] != UNREADABLE:
                stored[chunk.epoch, position_of[key]] = {name: value[row] for name, value in arrays.items()}
    items = [*stored]
    batches = iter([items[at : at + job.batch_size] for at in range(0, len(items), job.batch_size)])
    progress, now = Progress("check", len(items)), list[Mapping[str, Tensor]]()
    seen = 0
    for found in job.differences(batches, stored):
        now.append(found)
        own = len(next(iter(found.values())))
        seen += own
        progress.update(seen, images=own)
    progress.close()
    numbers_of, words = asked.verdict({name: torch.cat([each[name] for each in now]) for name in now[0]}, **limits)
    say(f"check:   {len(items)} of {len(store):,} records through {asked.name}: {words}")
    if numbers_of.pop("failed"):
        raise CheckFailed(
            f"{out} is not what {asked.name} gives now",
            words,
            "check that photos, Pillow and --amp are those of the header (store.json), or write the store anew",
        )
    return {"records": float(len(items)), **numbers_of}
