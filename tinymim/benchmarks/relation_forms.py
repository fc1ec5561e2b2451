"""Compact forms of TinyMIM's targets: bytes of a view, and how far a student's loss and gradient are from the exact.

Every form is encoded and decoded as ``tinymim cache`` and ``tinymim distill`` do it. The photos are views of a store,
in one batch; a student without and one with training is compared. The gradient is that of all of the student's weights.

Legend: B = batch, T = tokens, D = width, H = relation heads.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from typing import Any

from tinymim.cli import run_command
from tinymim.errors import ConfigError
from tinymim.files import write_json, write_text

FORMS = "fp16 int8 int4 32x8 16x8 8x8 32x4 16x4 8x8+24x4 8x8+8x4 4x8+20x4 4x8+12x4+16x2 4x8+12x4+8x2 4x8+8x4+8x2"
ROWS = (8, 16, 32)  # largest probabilities of each row, the other candidate
LIMITS = {"loss": 0.01, "cosine": 0.999}  # the tolerance of the default form


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--data", required=True, metavar="FOLDER", help="photos")
    parser.add_argument("--teacher", default="timm/vit_small_patch14_dinov2", metavar="NAME")
    parser.add_argument("--teacher-weights", metavar="FILE", help="weights of a timm teacher; none: random ones")
    parser.add_argument("--student", metavar="FILE", help="a trained student, measured beside a new one")
    parser.add_argument("--block", type=int, default=10, help="of the teacher")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224], help="side of the views, pixels")
    parser.add_argument("--batch", type=int, default=32, help="photos")
    parser.add_argument("--forms", nargs="+", default=FORMS.split(), metavar="FORM")
    parser.add_argument("--out", default="docs/store_relation_forms", help="result without its ending")


def rows_of(scores_BHTT: Any, kept: int) -> Any:
    """Scores of which each row keeps its largest probabilities (8 bits of the root), the rest spread evenly."""
    p = scores_BHTT.softmax(-1)
    values, indices = p.topk(kept, -1)
    values = ((values.sqrt() * 255).round() / 255) ** 2
    rest = (1 - values.sum(-1, keepdim=True)).clamp_min(1e-6) / (p.shape[-1] - kept)
    return rest.expand_as(p).scatter(-1, indices, values.clamp_min(1e-8)).log()


def gradient(
    student: Any, images: Any, taps: Mapping[str, Any], heads: int, scores: Mapping[str, Any] | None = None
) -> tuple[float, Any]:
    """Loss qk + vv, and the gradient of all weights (float64); with ``scores`` (B, H, T, T) in place of taps."""
    import torch

    from tinymim.distill.relations import relation_kl, relation_logits, relation_losses
    from tinymim.distill.taps import QKV, qkv_at

    student.zero_grad()
    own = qkv_at(student, images, student.depth)
    if scores is None:
        losses = relation_losses(own, {name: taps[name] for name in QKV}, heads)
    else:
        losses = {p: relation_kl(relation_logits(own[p[0]], own[p[1]], heads), scores[p]) for p in scores}
    loss = sum(losses.values(), torch.zeros(()))
    loss.backward()
    return float(loss.detach()), torch.cat(
        [p.grad.double().flatten() for p in student.parameters() if p.grad is not None]
    )


def load(args: argparse.Namespace, size: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The method of a recipe with the teacher, the photos as student and teacher see them, and the students."""
    import torch

    from tinymim.data.photo_files import list_photos
    from tinymim.data.replay import Replay
    from tinymim.distill.method import renormalisation
    from tinymim.engine import load_recipe
    from tinymim.engine.build import build_method
    from tinymim.models import create_model
    from tinymim.models.checkpoints import load_weights
    from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD

    torch.manual_seed(0)
    changes = {"teacher": args.teacher, "teacher_weights": args.teacher_weights, "img_size": size}
    config = load_recipe("tinymim_tiny_small_data", {**changes, "target_block": args.block})
    method, (teacher,) = build_method(config, pretrained=bool(args.teacher_weights))
    photos = list_photos(args.data)
    chosen = random.Random(0).sample(photos, min(args.batch, len(photos)))
    replay = Replay(img_size=size, scale=config.crop_scale)
    pixels = torch.stack([replay.view(photo, seed) for seed, photo in enumerate(chosen)]).float() / 255
    mean, std = (torch.tensor(rows).view(3, 1, 1) for rows in (IMAGENET_MEAN, IMAGENET_STD))
    images = (pixels - mean) / std
    scale, shift = renormalisation((teacher.mean, teacher.std))
    students = {"new": create_model("tinymim_vit_tiny", img_size=size)}
    if args.student:
        students["trained"] = create_model("tinymim_vit_tiny", img_size=size)
        load_weights(students["trained"], args.student)
    return method, images, images * scale + shift, students


def measure(args: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """The rows of one size."""
    import torch

    from tinymim.distill.compact import plan_entries
    from tinymim.distill.relations import relation_kl, relation_logits

    method, images, views, students = load(args, size)
    heads, grid = method.relation_heads, (size // 16, size // 16)
    block = method.target_block
    taps = method.source.read(views, {block: ("q", "k", "v")}, grid)[block]
    taps = {name: x.float() for name, x in taps.items()}
    tokens, width = taps["q"].shape[1:]
    whole = {name: gradient(student, images, taps, heads) for name, student in students.items()}

    def row(name: str, size_of: int, given: Mapping[str, Any], scores: Mapping[str, Any] | None) -> dict[str, Any]:
        out: dict[str, Any] = {"form": name, "bytes": size_of, "size": size, "tokens": tokens, "width": width}
        kept = scores or {p: relation_logits(given[p[0]], given[p[1]], heads) for p in ("qk", "vv")}
        for pair, logits in kept.items():
            out[f"kl_{pair}"] = float(relation_kl(logits, relation_logits(taps[pair[0]], taps[pair[1]], heads)))
        for who, student in students.items():
            (loss, grad), (loss_0, grad_0) = gradient(student, images, given, heads, scores), whole[who]
            out[who] = {
                "loss": loss / loss_0 - 1,
                "cosine": float(torch.cosine_similarity(grad, grad_0, 0)),
                "gradient": float((grad - grad_0).norm() / grad_0.norm()),
            }
        return out

    found = []
    for form in args.forms:
        if "x" in form and sum(int(part.split("x")[0]) for part in form.split("+")) > width // heads:
            continue
        given = dict(tokens=tokens, width=width, heads=heads, centred=True)
        entries = plan_entries(method.targets, form, **given)
        kept = {name: value for entry in entries for name, value in entry.encode(taps).items()}
        back = {name: value for entry in entries for name, value in entry.decode(kept).items()}
        found.append(row(form, sum(array.bytes for entry in entries for array in entry.arrays()), back, None))
    for kept_of_row in ROWS:
        if kept_of_row < tokens:
            scores = {p: rows_of(relation_logits(taps[p[0]], taps[p[1]], heads), kept_of_row) for p in ("qk", "vv")}
            found.append(row(f"top {kept_of_row} of a row", 4 * heads * tokens * kept_of_row, {}, scores))
    return found


def run(args: argparse.Namespace) -> int:
    """Measure, write JSON and Markdown, print the table."""
    from tinymim.benchmarks.distill_tables import stamp
    from tinymim.files import sha256_file

    if any(size < 32 or size % 16 for size in args.sizes) or args.batch < 2:
        raise ConfigError(
            f"--sizes {args.sizes} --batch {args.batch}", "patches have 16 pixels", "e.g. --sizes 128 224"
        )
    rows = [row for size in args.sizes for row in measure(args, size)]
    files = {"teacher_weights": args.teacher_weights, "student": args.student}
    results = {
        "kind": "tinymim.relation_forms",
        "teacher": args.teacher,
        "block": args.block,
        "batch": args.batch,
        "tolerance": LIMITS,
        "sha256": {name: sha256_file(file) for name, file in files.items() if file},
        **stamp("cpu"),
        "rows": rows,
    }
    text = markdown(results)
    write_json(f"{args.out}.json", results)
    write_text(f"{args.out}.md", text)
    print(text)
    return 0


def holds(row: Mapping[str, Any]) -> bool:
    """Whether a row is within :data:`LIMITS` for every student."""
    found = [value for value in row.values() if isinstance(value, dict)]
    return all(abs(f["loss"]) <= LIMITS["loss"] and f["cosine"] >= LIMITS["cosine"] for f in found)


def markdown(results: Mapping[str, Any]) -> str:
    """The table."""
    from tinymim_export.tables import markdown_table

    who = [name for name, value in results["rows"][0].items() if isinstance(value, dict)]
    head = ["pixels", "form", "bytes a view", "KL of qk, vv (nats)"]
    lines = [[*head, *(f"{name}: loss, cosine, gradient" for name in who), "within"]]
    for row in results["rows"]:
        numbers = [f"{row[name]['loss']:+.2%}, {row[name]['cosine']:.5f}, {row[name]['gradient']:.2%}" for name in who]
        start = [str(row["size"]), row["form"], f"{row['bytes']:,}", f"{row['kl_qk']:.4f}, {row['kl_vv']:.4f}"]
        lines.append([*start, *numbers, "yes" if holds(row) else ""])
    about = (
        f"qk+vv of block {results['block']} of {results['teacher']}, ViT-T students, {results['batch']} photos in one "
        f"batch, float32. loss: relative error of the loss; cosine, gradient: of all weights' gradient, cosine and "
        f"relative distance. within: |loss| <= {LIMITS['loss']:.0%} and cosine >= {LIMITS['cosine']}. "
        f"{results['device']}, PyTorch {results['environment']['versions']['torch']}; commit {results['commit']}.\n"
    )
    return f"# Forms of stored relations\n\n{about}\n{markdown_table(lines)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tools/bench_relation_forms.py``."""
    return run_command("bench_relation_forms.py", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
