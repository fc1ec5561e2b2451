"""What the real commands write, in tiny form: each made once a session, in a folder whose name needs quotes.

``WRITERS`` is the table: a name, and under it the command line that makes it. ``{name}`` there is another artefact,
made first; ``{PHOTOS}``, ``{LABELLED}`` and ``{CLASSES}`` are drawn. What a command prints is kept, for its next lines.
"""

import contextlib
import fcntl
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tests.det.scenes import write_coco
from tinymim.cli import main as tinymim
from tinymim.demo.scenes import write_scenes
from tinymim_export.cli import main as tinymim_export
from tinymim_export.web.build import ORT_FILES

ROOT = Path(__file__).resolve().parents[2]
DEPTH, WIDTH = 4, 24
STUDENT = f"student_args.depth={DEPTH} student_args.embed_dim={WIDTH} student_args.num_heads=2"
DECODER = "decoder.dim=16 decoder.depth=1 decoder.heads=2"
JOB = "--img-size 32 --batch-size 8 --epochs 1 --max-steps 2 --workers 0 --device cpu"
UNITS = JOB.replace("--img-size 32", "--img-size 64")  # masked by units of 32 pixels
HIERA = "student_args.embed_dim=16 student_args.stages=[1,1,1,1] decoder.dim=24"
TINYVIT = "student_args.embed_dims=[16,32,64,64] student_args.depths=[1,1,1,1] student_args.num_heads=[1,2,2,4]"
SWIN = "student_args.embed_dim=12 student_args.depths=[1,1,2,1] student_args.num_heads=[1,2,2,4]"
CACHE = "--img-size 32 --epochs 2 --batch-size 8 --workers 0 --device cpu"
JOB_OF_TRACKER = (
    "--img-size 64 --template-size 32 --batch-size 4 --max-steps 2 --workers 0 --device cpu "
    "--cfg-options channels=8 samples=8"
)
HEAD = (  # of upernet_tinymim_demo
    "train_cfg.max_iters=2 train_cfg.val_interval=2 default_hooks.checkpoint.interval=1 "
    "train_dataloader.batch_size=2 train_dataloader.num_workers=0 val_dataloader.num_workers=0 "
    "train_dataloader.dataset.pipeline.3.crop_size=(64,64) model.data_preprocessor.size=(64,64) "
    f"model.backbone.img_size=(64,64) model.backbone.depth={DEPTH} model.backbone.embed_dim={WIDTH} "
    f"model.backbone.num_heads=2 model.decode_head.in_channels=[{WIDTH},{WIDTH},{WIDTH},{WIDTH}] "
    f"model.decode_head.channels=16 model.auxiliary_head.in_channels={WIDTH} model.auxiliary_head.channels=16"
)
STUDY = f"""
title = "Rates"
student = dict(depth={DEPTH}, embed_dim={WIDTH}, num_heads=2)
small = dict(data="{{photos}}", seed="{{seed}}", img_size=32, batch_size=8, epochs=1, max_steps=2)
small |= dict(workers=0, device="cpu")
stages = dict(
    distill=dict(verb="distill", teacher="TEACHER", cfg_options=dict(student_args=student), **small),
    finetune=dict(verb="finetune", student="{{distill.student}}", val_data="{{val_photos}}",
                  cfg_options=dict(student_args=student), **small),
)
del student, small
cells = [dict(name="low", set={{"distill.lr": 1e-4}})]
seeds = [0]
score = "finetune.top1"
"""

WRITERS = """
pretrained
    tinymim pretrain --data {PHOTOS} --out {here} JOB --save-every 1 --cfg-options STUDENT DECODER
distilled
    tinymim distill --data {PHOTOS} --teacher {pretrained}/student.pth --out {here} JOB --save-every 1 --cfg-options
        STUDENT
dmae
    tinymim distill --recipe d2mae_tiny_from_mae_base --data {PHOTOS} --teacher {pretrained}/student.pth --out {here}
        JOB --cfg-options STUDENT DECODER
hiera
    tinymim pretrain --recipe mae_hiera_tiny --data {PHOTOS} --out {here} UNITS --cfg-options HIERA
hiera_student
    tinymim distill --recipe hiera_tiny_from_hiera_base --data {PHOTOS} --teacher {hiera}/student.pth --out {here}
        UNITS --cfg-options HIERA
swin
    tinymim pretrain --recipe simmim_swin_tiny --data {PHOTOS} --out {here} UNITS --cfg-options SWIN
swin_student
    tinymim distill --recipe d2simmim_swin_tiny_from_swin_small --data {PHOTOS} --teacher {swin}/student.pth --out
        {here} UNITS --cfg-options SWIN
several
    tinymim distill --data {PHOTOS} --teacher {pretrained}/student.pth {distilled}/student.pth=0.5 --out {here} JOB
        --cfg-options STUDENT
chain
    tinymim distill --chain {pretrained}/student.pth:small:tiny --data {PHOTOS} --out {here} JOB --cfg-options
        STUDENT
finetuned
    tinymim finetune --student {distilled}/student.pth --data {CLASSES}/train --val-data {CLASSES}/val --out {here}
        JOB --cfg-options STUDENT
stored
    tinymim cache --teacher {finetuned}/classifier.pth --data {PHOTOS} --out {here} CACHE
planned
    tinymim cache --teacher {finetuned}/classifier.pth --data {PHOTOS} --out {here} CACHE --plan
part of a store
    tinymim cache --teacher {finetuned}/classifier.pth --data {PHOTOS} --out {here} CACHE --chunk 16 --part 1/2
store checked
    tinymim cache --check --teacher {finetuned}/classifier.pth --data {PHOTOS} --workers 0 --device cpu --out {stored}
store told
    tinymim cache --out {stored}
published
    tinymim cache --out {stored} --to-official {here}
from published
    tinymim cache --from-official {published} --out {here}
from store
    tinymim distill --recipe tinyvit_5m_from_store --store {stored} --data {PHOTOS} --student tinymim_vit_tiny --out
        {here} JOB --cfg-options STUDENT
relations
    tinymim cache --recipe tinymim_tiny_small_data --teacher {pretrained}/student.pth --data {PHOTOS} --out {here} CACHE
        --form int8 --cfg-options STUDENT target_block=2
from relations
    tinymim distill --recipe tinymim_tiny_small_data --store {relations} --teacher {pretrained}/student.pth --data
        {PHOTOS} --out {here} JOB --cfg-options STUDENT target_block=2
tinyvit
    tinymim finetune --recipe tinyvit_5m_1k --data {CLASSES}/train --val-data {CLASSES}/val --out {here} UNITS
        --cfg-options TINYVIT
contracted
    tinymim contract --from {distilled}/student.pth --params 38k --teacher {pretrained}/student.pth --data {PHOTOS}
        --steps 1 --shrink 0.1 --batch-size 8 --workers 0 --device cpu --out {here} --cfg-options target_block=2
segmented
    tinymim segment upernet_tinymim_demo --data-root {LABELLED} --student {distilled}/student.pth --work-dir {here}
        --cfg-options HEAD
shrunk
    tinymim contract --segmentor {segmented}/segmentor.pth --data-root {LABELLED} --size 64 64 --macs 4.5M --steps 1
        --batch-size 2 --workers 0 --device cpu --out {here}
study
    tinymim study {STUDY} --data {CLASSES} --out {here}
exported
    tinymim-export --checkpoint {segmented}/segmentor.pth --onnx {here}/seg.onnx --dynamic --json {here}/export.json
        --markdown {here}/export.md
backbone
    tinymim-export --checkpoint {distilled}/student.pth --onnx {here}/backbone.onnx --part backbone
int8
    tinymim-export --from {exported}/seg.onnx --onnx {here}/int8.onnx --precision int8 --calibration {PHOTOS} --json
        {here}/int8.json
sensitivity
    tinymim-export --from {exported}/seg.onnx --sensitivity --data {LABELLED} --json {here}/sensitivity.json
tuned
    tinymim-export --checkpoint {segmented}/segmentor.pth --onnx {here}/best.onnx --tune --data {LABELLED}
        --calibration {PHOTOS} --seconds 0.2 --max-miou-drop 100 --min-speedup 0.01 --runtimes onnxruntime --graph
        pixels --resize-to-file --json {here}/tune.json
measured
    tinymim bench {exported}/seg.onnx {int8}/int8.onnx --runs 10 --json {here}/bench.json --markdown {here}/bench.md
remeasured
    tinymim bench {exported}/seg.onnx {int8}/int8.onnx --runs 10 --json {here}/bench.json
timed
    tinymim bench {backbone}/backbone.onnx --runs 10 --json {here}/bench.json
compared
    tinymim bench --compare {measured}/bench.json {remeasured}/bench.json --json {here}/compare.json
scored
    tinymim eval {exported}/seg.onnx --data {LABELLED} --json {here}/eval.json --masks {here}/masks
tested
    tinymim segment --test {segmented}/segmentor.pth --data-root {LABELLED} --json {here}/test.json
classified
    tinymim eval {finetuned}/classifier.pth --data {CLASSES}/val --workers 0 --device cpu --json {here}/scores.json
predicted
    tinymim predict {exported}/seg.onnx {LABELLED}/images --out {here}/masks --json {here}/predict.json
pseudo
    tinymim label {PHOTOS} --with {segmented}/segmentor.pth --out {here} --device cpu
page
    tinymim-export --from {exported}/seg.onnx --web {here} --ort-web {ORT}
joined
    tinymim report {distilled} {segmented} {exported} {scored} --out {here}/report.html
without files
    tinymim report {segmented} --out {here}/report.html
without segmentor
    tinymim report {distilled} --out {here}/report.html
converted
    tinymim-export --from {exported}/seg.onnx --format openvino --out {here}/seg.xml --photos {LABELLED}/images
carded
    tinymim card {segmented} {exported} --out {here} --license apache-2.0
side by side
    tinymim report {exported}/seg.onnx {int8}/int8.onnx --out {here}/compare.html
demo
    tinymim demo --minutes 1 --data {LABELLED} --out {here}
analysed
    tinymim analyse {distilled}/student.pth {pretrained}/student.pth --photos {PHOTOS} --img-size 32 --limit 8 --out
        {here}/analysis.html --json {here}/analysis.json
detected
    tinymim detect --data {OBJECTS}/photos --annotations {OBJECTS}/objects.json --img-size 64 --batch-size 2
        --max-steps 1 --workers 0 --device cpu --out {here} --cfg-options STUDENT channels=8
packed
    tinymim data --pack {PHOTOS} --out {here}
looked at
    tinymim data {LABELLED} --page {here}/data.html
split
    tinymim data {FLAT} --split 0.2 --out {here}
sequences
    tinymim track --generate {here} --sequences 2 --frames 6 --size 64 80
tracked
    tinymim track --data {sequences} --student {distilled}/student.pth --out {here} JOB_OF_TRACKER --save-every 1
tracker
    tinymim-export --checkpoint {tracked}/tracker.pth --onnx {here}/tracker.onnx
tracks scored
    tinymim track --test {tracker}/tracker.onnx --data {sequences} --baseline --json {here}/track.json
tracking reported
    tinymim report {tracked} {tracker} --out {here}/report.html
tracker reported
    tinymim report {tracked} --out {here}/report.html
detection reported
    tinymim report {detected} --out {here}/report.html
followed
    tinymim track {tracker}/tracker.onnx {sequences}/scene_0000 --box 30 30 12 12 --out {here}
examined
    tinymim doctor --json {here}/doctor.json
"""


def read_writers() -> dict[str, str]:
    """Name -> command line."""
    names = re.findall(r"^(\S.*)\n((?: .*\n)+)", WRITERS, re.MULTILINE)
    words = {"JOB": JOB, "STUDENT": STUDENT, "DECODER": DECODER, "HEAD": HEAD}
    words |= {"UNITS": UNITS, "HIERA": HIERA, "SWIN": SWIN, "TINYVIT": TINYVIT}
    words |= {"JOB_OF_TRACKER": JOB_OF_TRACKER, "CACHE": CACHE}
    return {
        name: " ".join(words.get(word, word) for line in command.splitlines() for word in line.split())
        for name, command in names
    }


ARTEFACTS = read_writers()


class Workshop:
    """The artefacts of a session, made when first asked for: ``shop["distilled"]`` is a path.

    Args:
        root: Folder for all of them; several test processes may share it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "it's a shop"
        self.root.mkdir(exist_ok=True)

    def __getitem__(self, name: str) -> Path:
        done = self.root / f"{name}.txt"
        if not done.is_file():
            with self._alone(name):
                if not done.is_file():
                    text = INPUTS[name](self) if name in INPUTS else self._make(name)
                    done.write_text(text or "", "utf-8")
        return self.root / name

    def said(self, name: str) -> str:
        """What the command that made an artefact printed."""
        self[name]
        return (self.root / f"{name}.txt").read_text("utf-8")

    def fill(self, line: str, **more: str | Path) -> list[str]:
        """The words of a command line; ``{name}`` becomes an artefact or one of ``more``."""
        return [
            re.sub(r"\{([^{}]+)\}", lambda m: str(more.get(m[1]) or self[m[1]]), word) for word in shlex.split(line)
        ]

    def run(self, words: list[str], cwd: Path, *, code: int = 0) -> str:
        """Run a command in this process, as if typed in ``cwd``; what it printed. It must end with ``code``."""
        command, *rest = words
        out = io.StringIO()
        main = {"tinymim": tinymim, "tinymim-export": tinymim_export}[command]
        argv = mock.patch("sys.argv", words)  # which a run notes in its config.py
        with contextlib.chdir(cwd), argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                got = main(rest)
            except SystemExit as stop:  # of argparse
                got = stop.code
        assert got == code, f"{shlex.join(words)}\nended with {got}:\n{out.getvalue()[-4000:]}"
        return out.getvalue()

    def _make(self, name: str) -> str:
        here = self.root / name
        words = self.fill(ARTEFACTS[name], here=here)
        if not any(word in words for word in ("--out", "--work-dir", "--web")):
            here.mkdir(exist_ok=True)
        return self.run(words, self.root)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with open(self.root / f".{name}.lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _photos(shop: Workshop) -> None:
    (shop.root / "PHOTOS").symlink_to(shop["LABELLED"] / "images" / "training")


def _labelled(shop: Workshop) -> None:
    write_scenes(shop.root / "LABELLED", train=64, val=3, size=(96, 80), seed=3)


def _classes(shop: Workshop) -> None:
    photos = sorted((shop["LABELLED"] / "images" / "training").iterdir())
    for i, photo in enumerate(photos[:12]):
        folder = shop.root / "CLASSES" / ("val" if i < 4 else "train") / ("odd" if i % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / photo.name).write_bytes(photo.read_bytes())


def _flat(shop: Workshop) -> None:
    (shop.root / "FLAT").mkdir()
    for folder in ("images", "annotations"):
        for path in (shop["LABELLED"] / folder / "training").iterdir():
            (shop.root / "FLAT" / path.name).write_bytes(path.read_bytes())


def _objects(shop: Workshop) -> None:
    write_coco(shop.root / "OBJECTS", 4)


def _ort(shop: Workshop) -> None:
    (shop.root / "ORT").mkdir()
    for name in ORT_FILES:
        (shop.root / "ORT" / name).write_text("/*!\n * ONNX Runtime Web v9.8.7\n */\n")


def _study(shop: Workshop) -> None:
    (shop.root / "STUDY").with_suffix(".py").write_text(
        STUDY.replace("TEACHER", str(shop["pretrained"] / "student.pth"))
    )


def _config(shop: Workshop) -> None:
    """The config that the page for MMSegmentation shows, from scratch."""
    text = re.search(r"```python\n(.*?)```", (ROOT / "docs/start/mmsegmentation.md").read_text("utf-8"), re.DOTALL)
    assert text
    (shop.root / "CONFIG").mkdir()
    own = re.sub(r"init_cfg=dict\(.*?\)\),", "init_cfg=None),", text[1])
    (shop.root / "CONFIG" / "own.py").write_text(own, "utf-8")


INPUTS: dict[str, Callable[[Workshop], str | None]] = {
    "ORT": _ort,
    "PHOTOS": _photos,
    "LABELLED": _labelled,
    "CLASSES": _classes,
    "FLAT": _flat,
    "CONFIG": _config,
    "OBJECTS": _objects,
    "STUDY": _study,
}
