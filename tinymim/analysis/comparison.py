"""``tinymim analyse``: what the blocks of a model hold, and how they resemble those of another one."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinymim.analysis.attention_maps import attention_stats, check_maps
from tinymim.analysis.sides import Counter, Side, batches_of, choose_photos, open_model, plain, read_crops
from tinymim.analysis.similarity import cka, effective_rank, is_hierarchical
from tinymim.errors import ConfigError
from tinymim.files import environment, write_json
from tinymim.models.tokens import patch_size


@dataclass
class Analysis:
    """The numbers of one model, or of two.

    Attributes:
        models: For each, by "A" and "B": ``from``, ``sha256``, ``blocks``, ``width`` (of a hierarchical model the
            stages and their widths), ``heads``, ``patch``, ``size`` (pixels of its photos); ``distance`` (pixels of
            A's photos) and ``entropy`` (nats), lists of heads by block, None where attention cannot be read;
            ``rank``: effective rank by block.
        cka: "A" and, for two models, "B" and "A B": rows are blocks of the first, columns of the second; None where all
            photos give the same features.
        photos: Pattern, number and hash of the photos.
        batches: Photos of each mini-batch.
        environment: Machine and versions.
    """

    models: dict[str, dict[str, Any]]
    cka: dict[str, list[list[float | None]]]
    photos: dict[str, Any]
    batches: list[int]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "tinymim.analysis", **asdict(self)}

    def to_json(self, path: str | Path) -> None:
        """Write them."""
        write_json(Path(path), json.loads(json.dumps(self.to_dict())))

    def print(self) -> None:
        """One line for each model, one for both."""
        for name, model in self.models.items():
            words = [f"{name}: {model['from']}, effective rank {model['rank'][-1]:.0f} after the last block"]
            if model["distance"]:
                distance, entropy = (sum(row) / len(row) for row in (model["distance"][-1], model["entropy"][-1]))
                words.append(f"attention there {distance:.0f} pixels far, entropy {entropy:.2f} nats")
            print(", ".join(words))
        if both := self.cka.get("A B"):
            last = [row[-1] for row in both]
            best = max((value, block) for block, value in enumerate(last, 1) if value is not None)
            end = "none" if last[-1] is None else f"{last[-1]:.2f}"
            print(f"similarity (CKA) to B's last block: A's last {end}, most {best[0]:.2f} at A's block {best[1]}")


def analyse(
    model_a: str,
    model_b: str | None = None,
    *,
    photos: str | Path,
    weights: tuple[str | None, ...] = (),
    heads: tuple[int | None, ...] = (),
    img_size: int = 224,
    limit: int = 200,
    batch_size: int = 32,
) -> Analysis:
    """CKA of blocks, attention distance and entropy of heads, effective rank, of one model or of two.

    Two plain models see the same grid of patches: B's photos are resized to it, whatever its patch size.

    Args:
        model_a: ``timm/NAME``, a checkpoint file, or a name of :func:`tinymim.create_model` (random weights).
        model_b: A second one.
        photos: A folder, a quoted pattern, or shards.
        weights: Files of weights for ``timm/NAME``, in order; None: downloaded.
        heads: Heads per block, for files that do not store them.
        img_size: Side of A's photos, pixels.
        limit: Use this many of the photos, evenly spread.
        batch_size: Photos of a mini-batch of CKA.

    Raises:
        ConfigError: a number too small, or models that cannot be read.
        CheckpointError: a file that cannot be read.
        DataError: fewer than 4 photos can be read.
    """
    for option, value, least in (("limit", limit, 4), ("img-size", img_size, 16), ("batch-size", batch_size, 4)):
        if value < least:
            raise ConfigError(f"--{option} {value}", "too few to measure", f"--{option} {least} or more")
    weights, heads = (*weights, None, None), (*heads, None, None)
    sides = {"A": open_model(model_a, img_size, weights[0], heads[0])}
    if model_b is not None:
        a = sides["A"].model
        grid = None if is_hierarchical(a) else img_size // patch_size(a)
        sides["B"] = open_model(model_b, img_size, weights[1], heads[1], grid)
    files, record = choose_photos(str(photos), limit)
    pixels, _ = read_crops(files, img_size, "photos")
    batches = batches_of(pixels, batch_size)
    passes = sum(3 if can_read_attention(side.model) else 2 for side in sides.values()) + (len(sides) > 1)
    counted = Counter(passes * len(pixels))
    models = {name: _measure(side, batches, counted, img_size) for name, side in sides.items()}
    similar = {name: plain(cka(s.model, s.model, counted(batches, s.view))) for name, s in sides.items()}
    if len(sides) > 1:
        one, other = sides.values()
        both = counted(batches, lambda part: (one.view(part), other.view(part)))
        similar["A B"] = plain(cka(one.model, other.model, both))
    counted.line.close("done")
    return Analysis(models, similar, record, [len(batch) for batch in batches], environment())


def can_read_attention(model: Any) -> bool:
    """Whether attention maps can be computed (:func:`tinymim.analysis.attention_maps.check_maps`)."""
    try:
        check_maps(model)
    except ConfigError:
        return False
    return True


def _measure(side: Side, batches: Any, counted: Counter, img_size: int) -> dict[str, Any]:
    """The numbers of one model."""
    found: dict[str, Any] = {**side.facts(), "size": side.side, "distance": None, "entropy": None}
    if can_read_attention(side.model):
        stats = attention_stats(side.model, counted(batches, side.view))
        found["distance"] = plain(stats["distance"] * (img_size / side.side))
        found["entropy"] = plain(stats["entropy"])
    return {**found, "rank": plain(effective_rank(side.model, counted(batches, side.view)))}
