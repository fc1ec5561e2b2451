"""Score a classifier on ImageNet-1k, -A, -R and -C, or on held-out photos of its own classes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data import create_transform
from torch import Tensor

from tinymim.compat import use_device
from tinymim.data.robust import evaluate_folders
from tinymim.engine.finetuning import eval_transform
from tinymim.errors import ConfigError
from tinymim.files import describe_file, environment, write_json, write_text
from tinymim.models.classifier import load_classifier

NAMES = {"imagenet": "photos", "imagenet-a": "ImageNet-A", "imagenet-r": "ImageNet-R", "imagenet-c": "ImageNet-C"}


@dataclass
class ClassifierScores:
    """Shares of correct predictions; for ImageNet-C, errors, with mCE normalised by AlexNet's.

    Attributes:
        file: Name and sha256 of the classifier.
        size: Side of the photos, pixels.
        scores: As :func:`tinymim.data.robust.evaluate_folders` returns them.
        machine: Versions and processor.
    """

    file: dict[str, str]
    size: int
    scores: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=environment)

    def rows(self) -> list[tuple[str, str, int]]:
        """(set, score in percent, photos)."""
        out = []
        for kind, found in self.scores.items():
            if kind == "imagenet-c":
                whole = (
                    "corruptions are missing"
                    if found["mce"] is None
                    else (f"mCE {100 * found['mce']:.2f} (mean error {100 * found['error']:.2f})")
                )
                out.append((NAMES[kind], whole, found["photos"]))
            else:
                text = f"top-1 {100 * found['top1']:.2f}, top-5 {100 * found['top5']:.2f}"
                out.append((NAMES[kind], text, found["photos"]))
        return out

    def print(self) -> None:
        """Print one line per set."""
        for name, text, photos in self.rows():
            print(f"{name.ljust(11)} {text} %  ({photos} photos)")

    def to_json(self, path: str | Path) -> None:
        """Write file, size, scores and machine as JSON."""
        write_json(
            path,
            {
                "kind": "tinymim.accuracy",
                "file": self.file,
                "size": self.size,
                "scores": self.scores,
                "machine": self.machine,
            },
        )

    def to_markdown(self, path: str | Path) -> None:
        """Write the table, and one of the corruptions."""
        lines = ["| set | score, % | photos |", "|---|---|---|"]
        lines += [f"| {name} | {text} | {photos} |" for name, text, photos in self.rows()]
        corruptions = self.scores.get("imagenet-c", {}).get("corruptions", {})
        if corruptions:
            lines += ["", "| corruption | error, % | CE, % |", "|---|---|---|"]
            for name, found in corruptions.items():
                ce = "" if found.get("ce") is None else f"{100 * found['ce']:.1f}"
                lines.append(f"| {name} | {100 * found['error']:.1f} | {ce} |")
        lines += ["", f"{self.file['file']}, sha256 {self.file['sha256']}, {self.size} pixels"]
        write_text(path, "\n".join(lines) + "\n")


def evaluate_classifier(
    checkpoint: str | Path,
    *,
    data: str | Path | None = None,
    imagenet_a: str | Path | None = None,
    imagenet_r: str | Path | None = None,
    imagenet_c: str | Path | None = None,
    img_size: int | None = None,
    squash: bool | None = None,
    num_heads: int | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    limit: int | None = None,
) -> ClassifierScores:
    """Score a classifier; photos at 256/224 of its size, central crop, bicubic (ImageNet-C: the crop alone).

    Args:
        checkpoint: ``classifier.pth`` of a run, or a published fine-tuned file.
        data: Folder with one sub-folder per class: ImageNet's validation photos, or the classifier's own classes.
        imagenet_a: Official folder.
        imagenet_r: Official folder.
        imagenet_c: Official folder, with or without the groups of its archives.
        img_size: Side, pixels; None: the size it was fine-tuned at.
        squash: Resize whole photos to a square instead of cropping them; None: as it was fine-tuned.
        num_heads: Heads per block, for a file that does not store it.
        batch_size: Photos per pass.
        workers: Data-loading processes.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        limit: Most photos of each set (of each severity).

    Raises:
        TinyMIMError: no classifier, a folder with another layout, or other classes.
    """
    if not any((data, imagenet_a, imagenet_r, imagenet_c)):
        raise ConfigError(
            "no photos to score on",
            "no folder was given",
            "add --data FOLDER (one sub-folder per class), --imagenet-a, -r or -c",
        )
    for option, value, least in (("img-size", img_size, 16), ("workers", workers, 0), ("batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigError(f"--{option} {value}", f"at least {least} is needed", f"use --{option} {least} or more")
    place = use_device(device)
    model, found = load_classifier(checkpoint, num_heads=num_heads)
    model.to(place)
    classes = found.meta.get("classes")
    if classes is None and model.num_classes != 1000:
        raise ConfigError(
            f"the {model.num_classes} classes of {checkpoint} are unknown",
            "the file does not name them",
            "fine-tune it with tinymim finetune, which writes them into the file",
        )
    size = img_size or int(model.backbone.img_size[0])
    squash = bool(found.meta.get("eval_squash")) if squash is None else squash

    def predict(images_B3HW: Tensor) -> Tensor:
        return model(images_B3HW.to(place))

    shared: dict[str, Any] = dict(classes=classes, batch_size=batch_size, workers=workers, limit=limit)
    scores: dict[str, Any] = {}
    if imagenet_c is None or any((data, imagenet_a, imagenet_r)):
        scores = evaluate_folders(
            predict, imagenet=data, a=imagenet_a, r=imagenet_r, transform=eval_transform(size, squash=squash), **shared
        )
    if imagenet_c is not None:
        crop = create_transform(size, is_training=False, interpolation="bicubic", crop_pct=1.0)
        scores |= evaluate_folders(predict, c=imagenet_c, transform=crop, **shared)
    return ClassifierScores(describe_file(found.path), size, scores)
