"""The model card of a run: Markdown under the hub's YAML, of what is recorded and measured only. No torch.

Front matter and ``model-index`` are written by huggingface_hub, which reads them back; what nothing says is absent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinymim import records
from tinymim.errors import DataError
from tinymim.schema import read_json
from tinymim_export.report.lineage import Detected, File, Lineage
from tinymim_export.report.page import hide_paths
from tinymim_export.tables import markdown, markdown_table

TASKS = {  # role -> the hub's task, its name
    "student": ("image-feature-extraction", "Image features"),
    "teacher": ("image-feature-extraction", "Image features"),
    "classifier": ("image-classification", "Image classification"),
    "segmentor": ("image-segmentation", "Semantic segmentation"),
    "detector": ("object-detection", "Object detection"),
    "tracker": (None, "Object tracking"),
}
SETTINGS = (
    "epochs",
    "batch_size",
    "img_size",
    "base_lr",
    "lr",
    "weight_decay",
    "method",
    "seed",
    "train_cfg.max_iters",
)


@dataclass
class Metric:
    """A measured number for ``model-index``, as a fraction: "mean_iou" 0.41 of 101 photos of a data set."""

    kind: str
    name: str
    value: float
    data: str
    photos: int | None = None


@dataclass
class Card:
    """What a card says.

    Attributes:
        name: Of the model.
        file: The checkpoint that was published.
        lineage: All that is known of it and of its .onnx files.
        meta: Its description.
        sha256: Of model.safetensors.
        timm: timm's architecture, where timm loads the folder; None: it does not.
        onnx: Its .onnx files.
        licence: Word of the hub; None: not known.
        datasets: Names on the hub.
        segment: The command that gives a student its head.
        left_out: .onnx files of other checkpoints.
    """

    name: str
    file: File
    lineage: Lineage
    meta: Mapping[str, Any]
    sha256: str
    timm: str | None = None
    onnx: Sequence[File] = ()
    licence: str | None = None
    datasets: Sequence[str] = ()
    segment: str | None = None
    left_out: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """README.md."""
        sections = [
            ("", self._lead()),
            ("Use", self._use()),
            ("Scores", self._scores()),
            ("Files", self._files()),
            ("Latency", self._times()),
            ("How it was made", self._made()),
            ("Notes", "\n".join(f"- {markdown(hide_paths(note))}" for note in (*self.file.notes, *self.lineage.notes))),
        ]
        parts = [(f"## {title}\n\n" if title else "") + body.strip() for title, body in sections if body]
        return "\n\n".join([f"---\n{self._front_matter()}\n---", *parts]) + "\n"

    def metrics(self) -> list[Metric]:
        """The checkpoint's own scores, and those of its files where they have no other."""
        found = [
            Metric("mean_iou", "mIoU", score.miou, score.folder or self._trained_on(), score.images)
            for sha in (self.file.sha256, *(file.sha256 for file in self.onnx))
            for score in self.lineage.scores
            if score.sha256 == sha
        ]
        best = {metric.data: metric for metric in reversed(found)}  # one a data set: the checkpoint's before a file's
        return [*reversed(best.values()), *self._run_metrics()]

    def _run_metrics(self) -> list[Metric]:
        """Scores that a lineage keeps as sentences: of classifiers and detectors."""
        result = Path(self.file.path or ".").with_name("result.json")
        if not result.is_file():
            return []
        if self.file.role == "classifier":
            scores = read_json(result, records.TopScore)
            data = ((self._inputs().get("val_data") or {}).get("folder")) or "held-out photos"
            photos = (self._inputs().get("val_data") or {}).get("files")
            named = (("top1", "Top-1 accuracy"), ("top5", "Top-5 accuracy"))
            return [
                Metric("accuracy", name, scores[key], data, photos)  # type: ignore[literal-required]
                for key, name in named
                if scores.get(key) is not None
            ]
        if self.file.role == "detector" and (found := read_json(result, Detected).get("scores")):
            data = (self._inputs().get("val_data") or {}).get("folder") or "held-out photos"
            named = (("box_ap", "Box AP"), ("mask_ap", "Mask AP"))
            return [Metric("mean_average_precision", name, found[key], data, found["photos"]) for key, name in named]
        return []

    def _trained_on(self) -> str:
        """The folder that a segmentor's own held-out photos are in."""
        return (self._inputs().get("data") or {}).get("folder") or "held-out photos"

    def _inputs(self) -> dict[str, Any]:
        folder = Path(self.file.path or ".").parent
        return records.read_env(folder).get("inputs", {})

    def _front_matter(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        task, title = TASKS[self.file.role]
        results = [
            EvalResult(
                task_type=task or "object-tracking",
                task_name=title,
                dataset_type=metric.data,
                dataset_name=metric.data,
                metric_type=metric.kind,
                metric_name=metric.name,
                metric_value=round(100 * metric.value, 2),
            )
            for metric in self.metrics()
        ]
        tags = ["tinymim", self.file.role, *(["timm"] if self.timm else []), *(["onnx"] if self.onnx else [])]
        return ModelCardData(
            license=self.licence or "unknown",
            library_name="timm" if self.timm else "tinymim",
            pipeline_tag=task,
            tags=tags,
            datasets=[*self.datasets] or None,
            model_name=self.name,
            eval_results=results or None,
        ).to_yaml()

    def _lead(self) -> str:
        classes, made = self.meta.get("classes"), [f"# {markdown(self.name)}", "", ""]
        config = self.meta.get("backbone") or self.meta.get("config")
        shape = ", ".join(f"{k} {v}" for k, v in config.items() if v is not None) if isinstance(config, dict) else ""
        rows = [
            ("role", self.file.role),
            ("architecture", shape),
            ("parameters", f"{self.file.parameters:,}" if self.file.parameters else ""),
            ("classes", f"{len(classes)}: {', '.join(map(str, classes[:40]))}" if classes else ""),
            ("mean, std of RGB", f"{self.meta['mean']}, {self.meta['std']}" if self.meta.get("mean") else ""),
            ("licence", self.licence or "not stated"),
        ]
        return "\n".join(made) + markdown_table([["", ""], *([a, b] for a, b in rows if b)])

    def _use(self) -> str:
        lines, own = [], f"hf-hub:OWNER/{self.name}"
        if self.timm:
            lines += [
                "```python",
                "import timm",
                f'model = timm.create_model("hf-hub:OWNER/{self.name}", pretrained=True)',
            ]
            lines += ["```", ""]
        commands = {
            "student": [self.segment or f"tinymim segment CONFIG --data-root FOLDER --student {own}"],
            "teacher": [f"tinymim distill --teacher {own} --data PHOTOS"],
            "classifier": [f"tinymim eval {own} --data FOLDER"],
            "segmentor": [f"tinymim segment --test {own} --data-root FOLDER"],
            "tracker": [f"tinymim track --test {own} --data SEQUENCES"],
            "detector": [f"tinymim detect --test {own} --data PHOTOS --annotations FILE.json"],
        }[self.file.role]
        commands += [f"tinymim predict {file.name} PHOTO --out mask.png" for file in self.onnx[:1] if file.palette]
        return "\n".join(
            [*lines, "```bash", *commands, "```", "", "`OWNER` is whose repository this is; a folder, too, works."]
        )

    def _scores(self) -> str:
        rows = [[m.name, f"{100 * m.value:.2f} %", m.data, str(m.photos or "")] for m in self._run_metrics()]
        for file in (self.file, *self.onnx):
            for score in self.lineage.scores:
                if score.sha256 == file.sha256:
                    between = score.interval and f" ({100 * score.interval[0]:.2f} to {100 * score.interval[1]:.2f})"
                    value = f"{100 * score.miou:.2f} %{between or ''}"
                    name = f"mIoU of {self._called(file)}, {score.engine}"
                    rows.append([name, value, score.folder or self._trained_on(), str(score.images or "")])
        note = "\nIn brackets: 95 % interval, drawn over the photos." if any("(" in row[1] for row in rows) else ""
        return markdown_table([["score", "value", "data", "photos"], *rows]) + note if rows else ""

    def _called(self, file: File) -> str:
        return "model.safetensors" if file is self.file else file.name

    def _files(self) -> str:
        rows = [["model.safetensors", "fp32", f"{self.file.mib:.1f}" if self.file.mib else "", "", self.sha256]]
        verified = {True: "yes", False: "no", None: "not recorded"}
        rows += [[f.name, f.kind, f"{f.mib:.1f}" if f.mib else "", verified[f.verified], f.sha256] for f in self.onnx]
        text = markdown_table([["file", "precision", "MiB", "verified", "sha256"], *rows])
        return f"{text}\nThe tensors are those of the file with sha256 {self.file.sha256}."

    def _times(self) -> str:
        rows = [
            [file.name, time.engine, f"{time.p50_ms:.1f}", f"{time.p90_ms:.1f}" if time.p90_ms else "", time.place]
            for file in self.onnx
            for time in self.lineage.times
            if time.sha256 == file.sha256
        ]
        return markdown_table([["file", "runtime", "median ms", "p90 ms", "machine"], *rows]) if rows else ""

    def _made(self) -> str:
        file, inputs, lines = self.file, self._inputs(), []
        for key, what in (("teacher", "teacher"), ("student", "started from"), ("init_from", "started from")):
            given = inputs.get(key) or []
            for item in given if isinstance(given, list) else [given]:
                sha = f", sha256 {item['sha256']}" if item.get("sha256") else ""
                lines.append(f"{what}: {item.get('file') or 'not named'}{sha}")
        for key, what in (("data", "photos"), ("val_data", "held-out photos"), ("pseudo", "pseudo-labelled photos")):
            if about := inputs.get(key):
                lines.append(f"{what}: {about['files']:,} files of {about['folder']}")
        lines += [f"recipe: {self.meta['recipe']}"] if self.meta.get("recipe") else []
        lines += (
            [f"steps: {self.meta['step']:,} of {self.meta['steps']:,}"] if {"step", "steps"} <= self.meta.keys() else []
        )
        lines += [f"{key}: {file.settings[key]}" for key in SETTINGS if file.settings.get(key) not in (None, "None")]
        if env := file.environment:
            machine = ", ".join(str(env[key]) for key in ("cpu", "gpu") if env.get(key))
            lines += [f"machine: {machine}, {env['cores']} cores"] if machine and env.get("cores") else []
            versions = env.get("versions") or {}
            words = [f"{name} {versions[name]}" for name in ("tinymim", "torch", "timm") if name in versions]
            lines += [f"versions: {', '.join(words)}"] if words else []
        text = "\n".join(f"- {markdown(line)}" for line in lines)
        return text + (f"\n\n```bash\n{file.command}\n```" if file.command else "")


def belonging(lineage: Lineage, sha256: str) -> tuple[list[File], list[str]]:
    """.onnx files that were made of a checkpoint, and names of those that were made of another or do not say.

    Raises:
        DataError: two files share a name.
    """
    files = [file for file in lineage.files if file.role == "onnx" and file.path]
    own = [file for file in files if lineage.checkpoint(file) == sha256]
    names = [Path(file.path or "").name for file in own]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two files are called {twice[0]}", "a card's folder has one level", "rename one of them")
    return own, [file.name for file in files if file not in own]
