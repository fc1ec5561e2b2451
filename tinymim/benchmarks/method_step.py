"""A step of every method on ViT-T in turns: MAE, D-MAE with and without its map of heads, D2-MAE, TinyMIM and fast
distillation beside the teacher and from a store.

Each is the command's own job in a process of its own; teachers have random weights, one batch is used again and again.
Times are medians of turns, ratios are to MAE's step in the same rounds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.cli import run_command
from tinymim.errors import ConfigError
from tinymim.files import write_json, write_text

SMALL_DATA = "tinymim_tiny_small_data"
FAST: dict[str, Any] = {"student": "tinymim_vit_tiny", "student_args": {"num_heads": 12}}
LARGE: dict[str, Any] = {"teacher": "timm/vit_large_patch16_224.mae", "target_block": 18, "align": None}
VIEWS, TOPK, CLASSES = 512, 100, 1000  # of the store that is made: a step uses up one view of each photo
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> recipe and what it changes; all: 12 heads, as MAE-Lite
    "MAE": ("mae_lite_tiny", {}),
    "D-MAE": ("dmae_tiny_from_mae_base", {}),
    "D-MAE, heads as they are": ("dmae_tiny_from_mae_base", {"head_map": False}),
    "D2-MAE": ("d2mae_tiny_from_mae_base", {}),
    "TinyMIM, relations": ("tinymim_tiny_from_mae_base", {"student_args": {"num_heads": 12}, "color_jitter": None}),
    "TinyMIM, DINOv2 ViT-S": (SMALL_DATA, {}),
    "TinyMIM, DINOv2 ViT-S, from a store": (SMALL_DATA, {"store": True}),
    "TinyMIM, ViT-L": (SMALL_DATA, LARGE),
    "TinyMIM, ViT-L, from a store": (SMALL_DATA, {**LARGE, "store": True}),
    "fast distillation": ("tinyvit_5m_from_store", {**FAST, "teacher": "timm/vit_base_patch16_224"}),
    "fast distillation, from a store": ("tinyvit_5m_from_store", FAST),
}


@dataclass(frozen=True)
class MethodSetup:
    """One method.

    Attributes:
        recipe: Its recipe.
        changes: Recipe keys.
        size: Side of the crops, pixels.
        batch: Images per step, in one pass.
        precision: Of the products.
        device: "cpu" or "cuda".
        photos: Folder of photos.
    """

    recipe: str
    changes: dict[str, Any]
    size: int
    batch: int
    precision: str
    device: str
    photos: str
    profiled: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--size", type=int, default=224, help="side of the crops, pixels")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--rounds", type=int, default=8, help="turns of each")
    parser.add_argument("--seconds", type=float, default=1.0, help="what a turn takes at least")
    parser.add_argument("--device", help="cpu or cuda; default a GPU if there is one")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME")
    parser.add_argument("--out", help="result without its ending; default docs/bench_methods_MACHINE")


def step(setup: MethodSetup, pipe: Any) -> None:
    """Body of a process: the steps of a method."""
    from tinymim.benchmarks.contenders import InTurns, turns_on
    from tinymim.engine.pretraining import DistillJob, PretrainJob
    from tinymim.engine.settings import DistillSettings, PretrainSettings

    masked_only = setup.recipe.startswith("mae_")
    settings: Any = PretrainSettings if masked_only else DistillSettings
    kind: Any = type("Measured", (InTurns, PretrainJob if masked_only else DistillJob), {})
    with tempfile.TemporaryDirectory() as folder:
        logits = setup.recipe.endswith("from_store") and "teacher" not in setup.changes
        own = dict(setup.changes)
        stored = own.pop("store", False) or logits
        if logits:
            write_store(Path(folder) / "store", setup.photos, setup.size)
        elif stored:
            write_relations(Path(folder) / "store", setup, own)
        changes = {"precision": setup.precision, "micro_batch": setup.batch, "watch_every": 0, **own}
        job = kind(
            setup.recipe,
            settings(
                data=setup.photos,
                out=Path(folder) / "run",
                img_size=setup.size,
                batch_size=setup.batch,
                epochs=VIEWS if logits else 1e6,
                **({"store": Path(folder) / "store"} if stored else {}),
                save_every=10**9,
                workers=0,
                device=setup.device,
                cfg_options=changes,
            ),
        )
        job.batch, job.turns = setup.batch, turns_on(setup, pipe)  # type: ignore[arg-type]
        job.run()


def write_store(out: Path, photos: str, size: int) -> None:
    """A store of random targets for the photos of a folder, with TinyViT's views."""
    import numpy as np

    from tinymim.data.photo_files import list_photos, photo_names
    from tinymim.data.replay import Replay
    from tinymim.distill.fast_distill import DEFAULTS
    from tinymim.store.layout import logits_arrays
    from tinymim.store.writer import TargetWriter

    keys = photo_names(photos, list_photos(photos)).values()
    about = {"topk": TOPK, "classes": CLASSES, "augmentation": Replay(img_size=size, **DEFAULTS).settings}
    with TargetWriter(out, keys, arrays=logits_arrays(TOPK), epochs=VIEWS, about=about) as writer:
        shape = (len(keys), TOPK)
        indices = np.broadcast_to(np.arange(TOPK, dtype=np.uint16), shape)
        record: dict[str, np.ndarray] = {"seed": np.arange(len(keys), dtype=np.int32), "indices": indices}
        for chunk in writer.work():
            writer.write(chunk, record | {"values": np.full(shape, 1 / (2 * TOPK), np.float16)})


def write_relations(out: Path, setup: MethodSetup, changes: dict[str, Any]) -> None:
    """A store of the relations of a teacher with random weights, in the default form, one view of each photo."""
    from tinymim.distill.compact import DEFAULT
    from tinymim.distill.relation_targets import relation_targets
    from tinymim.engine import load_recipe
    from tinymim.engine.build import build_method
    from tinymim.store.caching import cache_targets
    from tinymim.store.job import open_job

    config = load_recipe(setup.recipe, {**changes, "img_size": setup.size})
    views = {"img_size": setup.size, "scale": config.crop_scale}
    job = open_job(
        lambda: relation_targets(build_method(config, pretrained=False)[0], setup.size, DEFAULT),
        data=setup.photos,
        augmentation=views,
        batch_size=8,
        workers=0,
        device=setup.device,
    )
    cache_targets(out, job, setup.photos, epochs=1)


def run(args: argparse.Namespace) -> int:
    """Measure, write JSON and Markdown, print the table."""
    from tinymim.benchmarks.distill_step import draw_photos
    from tinymim.benchmarks.distill_tables import machine, stamp
    from tinymim.benchmarks.turns import Contender, measure
    from tinymim.compat import use_device

    if args.size < 32 or args.size % 16:
        raise ConfigError(f"--size {args.size}", "the models have patches of 16 pixels", "e.g. --size 224")
    if min(args.rounds, args.batch) < 1:
        raise ConfigError("--rounds or --batch below 1", "nothing would be measured", "use 1 or more")
    device = use_device(args.device)
    started: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        photos = str(draw_photos(Path(folder), "500x375", args.batch))
        try:
            for name in args.methods:
                recipe, changes = METHODS[name]
                setup = MethodSetup(recipe, changes, args.size, args.batch, args.precision, device, photos)
                started.append(Contender(name, step, setup))
            measure(started, rounds=args.rounds, seconds=args.seconds, warm=1)
        finally:
            for each in started:
                each.close()
    rows = [figures(each, started[0], args.batch) for each in started]
    results = {
        "kind": "tinymim.method_step",
        **{name: getattr(args, name) for name in ("size", "batch", "precision", "rounds")},
        **stamp(device),
        "rows": rows,
    }
    out = Path(args.out or f"docs/bench_methods_{machine(device)}")
    text = markdown(results)
    write_json(out.with_name(f"{out.name}.json"), results)
    write_text(out.with_name(f"{out.name}.md"), text)
    print(text)
    print(f"{out}.json, {out}.md")
    print(f"next: python tools/bench_distill.py --pair 'T<-B' --size {args.size}")
    return 0 if not any(row["failed"] for row in rows) else 1


def figures(contender: Any, first: Any, batch: int) -> dict[str, Any]:
    """Milliseconds per step, images/s, peak memory of the process, and times the first one's step."""
    from tinymim_export.bench.stats import pairwise_ratio

    if contender.failed is not None or not contender.seconds:
        return {"name": contender.name, "failed": contender.failed or "no turn"}
    seconds = statistics.median(contender.seconds)
    row = {"name": contender.name, "failed": None, "ms": 1000 * seconds, "images_per_s": batch / seconds}
    row |= {"peak_mib": contender.peak_mib, "seconds": contender.seconds}
    if first.seconds and first is not contender:
        row["times"] = list(pairwise_ratio(contender.seconds, first.seconds))
    return row


def markdown(results: dict[str, Any]) -> str:
    """The table."""
    from tinymim_export.tables import markdown_table

    lines = [["method", "ms a step", "images/s", "times the first (95 %)", "peak memory, MiB"]]
    for row in results["rows"]:
        if row["failed"]:
            lines.append([row["name"], f"failed: {row['failed']}", "", "", ""])
            continue
        times = row.get("times")
        ratio = "" if times is None else f"{times[0]:.2f} ({times[1]:.2f} to {times[2]:.2f})"
        numbers = [f"{row['ms']:.0f}", f"{row['images_per_s']:.1f}", ratio, f"{row['peak_mib']:.0f}"]
        lines.append([row["name"], *numbers])
    about = (
        f"ViT-T (12 heads but in the rows of {SMALL_DATA}), {results['size']} pixels, batch {results['batch']}, "
        f"{results['precision']}; teacher ViT-B where none is named, logits from a store {4 + 4 * TOPK} bytes a view; "
        f"{results['rounds']} rounds in turns; {results['device']}, {results['threads']} threads, PyTorch "
        f"{results['environment']['versions']['torch']}; commit {results['commit']}.\n"
    )
    return f"# A step of each method\n\n{about}\n{markdown_table(lines)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("bench_methods.py", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
