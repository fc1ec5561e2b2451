"""What a distilled student wins on real photos: the committed comparison, for the demo's page.

``compare_camvid.json`` is written by ``tools/compare_segmentors.py`` (docs/compare_camvid.md is its page); nothing is
measured here.
"""

import statistics
from importlib import resources
from typing import Any

from tinymim.benchmarks.segmentors_table import time_of
from tinymim.schema import parse
from tinymim_export.report.markup import Html
from tinymim_export.report.page import table

TITLES = {  # row of tinymim/benchmarks/camvid_segmentors.py -> what it is, what it knows before its first label
    "dinov2_s": ("DINOv2 ViT-S/14", "142 million photos"),
    "vit_t_relation": ("ViT-T, distilled", "outputs of DINOv2 ViT-S/14 on 7,357 photos"),
    "vit_t_mae": ("ViT-T, after MAE", "the same 7,357 photos"),
    "vit_t_scratch": ("ViT-T, from scratch", "nothing"),
    "segformer_b0": ("SegFormer-B0", "nothing"),
    "efficientvit_b1": ("EfficientViT-B1", "nothing"),
    "pidnet_s": ("PIDNet-S", "nothing"),
    "deeplabv3plus_r18": ("DeepLabV3+ R18", "nothing"),
}


def comparison() -> dict[str, Any]:
    """The committed numbers: row -> seed -> stage, and the timings."""
    text = resources.files("tinymim.demo").joinpath("compare_camvid.json").read_text("utf-8")
    return dict(parse(text, dict[str, Any], "tinymim/demo/compare_camvid.json"))


def evidence_note(results: dict[str, Any]) -> str:
    """What was compared, on which machine."""
    trained = next(stages["train"] for seeds in results["models"].values() for stages in seeds.values())
    machine = (results["measure"] or results)["environment"]
    height, width = trained["crop"]
    return (
        f"Not made by this demo: CamVid, 367 labelled photos, {trained['steps']} steps of {trained['batch_size']} "
        f"crops of {height}x{width} for every row, {machine['cpu']}; mean and standard deviation over the seeds. Every "
        "number is in docs/compare_camvid.md."
    )


def evidence(results: dict[str, Any]) -> Html:
    """The rows of :data:`TITLES` that were measured, best mean first, with the milliseconds of their best files."""
    ms = {row["sha256"]: row for row in (results["measure"] or {"rows": []})["rows"]}
    lines = []
    for name, (title, knows) in TITLES.items():
        seeds = results["models"].get(name, {})
        scores = [100 * stages["train"]["miou"] for stages in seeds.values() if "train" in stages]
        if not scores:
            continue
        average = statistics.fmean(scores)
        spread = f" \N{PLUS-MINUS SIGN} {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        first: dict[str, Any] = next((stages for stages in seeds.values() if "export" in stages), {})
        best = first.get("tune", {}).get("sha256", first.get("export", {}).get("sha256"))
        lines.append((average, [title, f"{average:.1f}{spread}", time_of(ms, best), len(scores), knows]))
    lines.sort(key=lambda line: -line[0])
    return table(("segmentor", "mIoU %", "ms, best file", "seeds", "knows before"), [cells for _, cells in lines])
