"""Whether a store still holds what its teacher says: a sample of its records is replayed.

Legend: R = records, K = classes that are kept, C = classes.
"""

import math
import os

import numpy as np
import torch
from torch import Tensor

from tinymim.errors import CheckFailed, DataError
from tinymim.progress import Progress, say
from tinymim.store.job import UNREADABLE, Item, Job, Seeds
from tinymim.store.targets import TargetStore, missing_chunks


def check_targets(
    out: str | os.PathLike[str], job: Job, *, sample: int = 256, max_dp: float = 0.01, max_differing: float = 0.05
) -> dict[str, float]:
    """Replay a sample of records through the teacher and compare.

    Args:
        out: The store.
        job: The photos and the teacher that the store was made of.
        sample: Records, spread over the chunks that are written.
        max_dp: Largest difference of a stored probability.
        max_differing: Largest mean share of stored classes that are not among the K most probable now (as sets).

    Returns:
        ``records``, ``max_dp``, ``mean_dp``, ``differing``.

    Raises:
        DataError: another teacher, photos that the store does not have, a damaged chunk.
        CheckFailed: beyond a threshold.
    """
    store = TargetStore.open(out, partial=True)
    teacher = store.header.get("teacher", {"name": "", "sha256": None})
    if teacher["sha256"] not in (None, job.teacher.sha256):
        raise DataError(
            f"{out} holds the targets of another teacher",
            f"{teacher['name']} with sha256 {str(teacher['sha256'])[:12]}..., not {job.teacher.name} with "
            f"{job.teacher.sha256[:12]}...",
            "give the --teacher and --teacher-weights that the store was made with",
        )
    if job.topk != store.header.get("topk") or job.teacher.classes != store.header.get("classes"):
        raise DataError(
            f"{out} is of other classes", f"K is {store.header.get('topk')}", "give the store's own teacher"
        )
    absent = {*missing_chunks(store.place, store.layout)}
    layout = store.layout
    numbers = ((epoch, number) for epoch in range(layout.epochs) for number in range(layout.chunks))
    chunks = [chunk for chunk in (layout.at(*each) for each in numbers) if chunk not in absent]
    if not chunks:
        raise DataError(f"{out} holds no chunk yet", "nothing can be checked", "run tinymim cache first")
    rng = np.random.default_rng(0)
    few = [chunks[i] for i in sorted(rng.permutation(len(chunks))[: max(1, min(16, sample // 2))])]
    items: list[Item] = []
    stored: dict[str, list[np.ndarray]] = {"seed": [], "values": [], "indices": []}
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
                items.append((chunk.epoch, position_of[key]))
                for name, rows in stored.items():
                    rows.append(arrays[name][row])
    seeds = Seeds(0, {item: int(seed) for item, seed in zip(items, stored["seed"], strict=True)})
    batches = iter([items[at : at + job.batch_size] for at in range(0, len(items), job.batch_size)])
    progress, now = Progress("check", len(items)), list[Tensor]()
    for probabilities_BC in job.probabilities(batches, seeds):
        now.append(probabilities_BC)
        progress.update(sum(map(len, now)), images=len(probabilities_BC))
    progress.close()
    probabilities_RC = torch.cat(now)
    indices_RK = torch.from_numpy(np.stack(stored["indices"]).astype(np.int64))
    values_RK = torch.from_numpy(np.stack(stored["values"]).astype(np.float32))
    if int(indices_RK.max()) >= probabilities_RC.shape[1]:
        raise DataError(
            f"{out} names the class {int(indices_RK.max())}",
            f"the teacher has {probabilities_RC.shape[1]}",
            "write it anew",
        )
    dp_RK = (probabilities_RC.gather(1, indices_RK) - values_RK).abs()
    top_RK = probabilities_RC.topk(job.topk).indices
    kept_R = (indices_RK[:, :, None] == top_RK[:, None, :]).any(2).float().mean(1)
    found = {
        "records": float(len(items)),
        "max_dp": float(dp_RK.max()),
        "mean_dp": float(dp_RK.mean()),
        "differing": float(1 - kept_R.mean()),
    }
    words = (
        f"largest |dp| {found['max_dp']:.2g}, mean {found['mean_dp']:.2g}, differing classes {found['differing']:.2%}"
    )
    say(f"check:   {len(items)} of {len(store):,} records through {job.teacher.name}: {words}")
    if found["max_dp"] > max_dp or found["differing"] > max_differing:
        raise CheckFailed(
            f"{out} is not what {job.teacher.name} gives now",
            f"{words}; at most {max_dp:g} and {max_differing:.0%} are allowed",
            "check that photos, Pillow and --amp are those of the header (store.json), or write the store anew",
        )
    return found
