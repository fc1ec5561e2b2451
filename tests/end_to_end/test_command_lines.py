"""Every command line of the documentation and every ``next:`` line that a command prints, run in a tiny form.

A documented line runs as it stands but for three tables: ``WORDS`` (a name of the text -> an artefact of the workshop),
``TINY`` (options that make a verb's work small; they replace the line's own), ``NOT_RUN`` (what needs more than this
machine, and what is checked instead). A new line with an unknown word fails.
"""

import ast
import html
import re
import shlex
import shutil
import tomllib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tinymim
from tests.end_to_end.workshop import (
    ARTEFACTS,
    CACHE,
    DECODER,
    DEPTH,
    HEAD,
    HIERA,
    JOB,
    JOB_OF_TRACKER,
    ROOT,
    STUDENT,
    SWIN,
    TINYVIT,
    UNITS,
    WIDTH,
    Workshop,
)
from tinymim.models import save_student

RECORDS = ("first_segmentor_timed.md", "transferred.md")  # what was typed on a day, in folders that are gone
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in RECORDS]
STARTS = ("tinymim", "tinymim-export", "torchrun", "python", "pip", "pytest", "ruff", "mim")

WORDS = {
    "photos/": "{PHOTOS}",
    "shards/": "{packed}",
    "PHOTOS": "{PHOTOS}",
    "FOLDER": "{LABELLED}",
    "CONFIG.py": "{CONFIG}/own.py",
    "ADE20K": "{LABELLED}",
    "FLAT": "{FLAT}",
    "COCO": "{OBJECTS}",
    "imagenet/train": "{CLASSES}/train",
    "imagenette/train": "{CLASSES}/train",
    "imagenet/val": "{CLASSES}/val",
    "imagenette/val": "{CLASSES}/val",
    "TRAIN": "{CLASSES}/train",
    "VAL": "{CLASSES}/val",
    "photo.jpg": "{LABELLED}/images/validation/scene_00000.jpg",
    "timm/vit_base_patch16_224.mae": "{pretrained}/student.pth",
    "timm/regnety_160.deit_in1k": "{finetuned}/classifier.pth",
    "A": "{pretrained}/student.pth",
    "B=0.5": "{distilled}/student.pth=0.5",
    "runs/t/student.pth": "{distilled}/student.pth",
    "runs/finetune_base/classifier.pth": "{finetuned}/classifier.pth",
    "runs/tv/classifier.pth": "{tinyvit}/classifier.pth",
    "tiny_vit_5m_22k_distill.pth": "{tinyvit}/classifier.pth",
    "runs/seg": "{segmented}",
    "hf-hub:OWNER/NAME": "{carded}",  # such a folder, as it is fetched
    "runs/seg/segmentor.pth": "{segmented}/segmentor.pth",
    "runs/det/detector.pth": "{detected}/detector.pth",
    "train2017": "{OBJECTS}/photos",
    "val2017": "{OBJECTS}/photos",
    "OBJECTS": "{OBJECTS}/photos",
    "OBJECTS.json": "{OBJECTS}/objects.json",
    "instances_train2017.json": "{OBJECTS}/objects.json",
    "instances_val2017.json": "{OBJECTS}/objects.json",
    "seg.onnx": "{exported}/seg.onnx",
    "runs/": "{segmented}",
    "A.onnx": "{exported}/seg.onnx",
    "B.onnx": "{int8}/int8.onnx",
    "RUN_FOLDERS": "{distilled}",
    "FILES": "{segmented}",
    "STUDY": "{STUDY}",
    "pseudo": "{pseudo}",
    "pseudo=0.5": "{pseudo}=0.5",
    "store/": "{stored}",
    "STORE": "{stored}",
    "relations/": "{relations}",
    "logits/": "{published}",
    "best.tune/": "{tuned}/best.tune",
    "STUDENT": "{distilled}/student.pth",
    "SEQUENCES": "{sequences}",
    "sequences": "{sequences}",
    "LASOT": "{sequences}",
    "video.mp4": "{sequences}/scene_0000",
    "runs/track/tracker.pth": "{tracked}/tracker.pth",
    "tracker.onnx": "{tracker}/tracker.onnx",
}
PATTERNS = {
    r"runs/[\w/]+/student\.pth": "{distilled}/student.pth"
}  # chains and headline rows, in the order of their hops
OUTPUT = (
    "--out",
    "--page",
    "--onnx",
    "--work-dir",
    "--json",
    "--markdown",
    "--web",
    "--masks",
    "--to-official",
    "--generate",
)  # their words stay: the folder is new
WINDOWS = "model.test_cfg.crop_size=(64,64) model.test_cfg.stride=(42,42)"
SMALL = "train_dataloader.dataset.pipeline.2.scale=(96,80) val_dataloader.dataset.pipeline.1.scale=(96,80)"
PLAIN = "model.backbone.rel_pos_bias=False model.backbone.init_values=None model.backbone.out_indices=(0,1,2,3)"
LINEAR = " ".join(word for word in HEAD.split() if "_head." not in word)
LINEAR += f" model.backbone.rel_pos_bias=False model.backbone.init_values=None model.backbone.out_indices=[{DEPTH - 1}]"
LINEAR += f" model.decode_head.in_channels={WIDTH} model.decode_head.channels={WIDTH}"
FOUND = " ".join(w for w in LINEAR.split() if not re.search(r"(embed_dim|depth|num_heads|out_indices|channels)=", w))
LEVELS = " ".join(word for word in HEAD.split() if not re.search(r"backbone\.(?!img_size)|in_channels", word))
TINY = {  # verb -> options
    "pretrain": f"{JOB} --cfg-options {STUDENT} decoder.dim=16 decoder.depth=1 decoder.heads=2",
    "distill": f"--teacher {{pretrained}}/student.pth {JOB} --cfg-options {STUDENT} target_block=2",
    "distill dmae": f"--teacher {{pretrained}}/student.pth {JOB} --cfg-options {STUDENT} {DECODER}",
    "distill --chain": f"--chain {{pretrained}}/student.pth:small:tiny {JOB} --cfg-options {STUDENT}",
    "distill store": f"--student tinymim_vit_tiny {JOB} --cfg-options {STUDENT}",
    "cache": f"--teacher {{finetuned}}/classifier.pth {CACHE} --topk 2",
    "cache --check": "--teacher {finetuned}/classifier.pth --workers 0 --device cpu",
    "cache relations": f"--teacher {{pretrained}}/student.pth {CACHE} --form int8 --cfg-options {STUDENT} "
    "target_block=2",
    "cache STORE": "",
    "distill relations": f"--teacher {{pretrained}}/student.pth {JOB} --cfg-options {STUDENT} target_block=2",
    "distill found": JOB,
    "contract": "--from {distilled}/student.pth --params 38k --steps 1 --batch-size 8 --workers 0 --device cpu "
    "--dry-run",
    "contract --segmentor": "--weights {tinyvit}/classifier.pth --steps 1 --batch-size 2 --workers 0 --device cpu "
    "--size 64 64 --macs 5M --dry-run",
    "finetune": f"{JOB} --cfg-options {STUDENT}",
    "segment": f"--cfg-options {HEAD} {WINDOWS} {SMALL} {PLAIN}",
    "segment linear": f"--cfg-options {LINEAR} {WINDOWS} {SMALL}",
    "pretrain hiera": f"{UNITS} --cfg-options {HIERA}",
    "pretrain swin": f"{UNITS} --cfg-options {SWIN}",
    "distill hiera": f"--teacher {{hiera}}/student.pth {UNITS} --cfg-options {HIERA}",
    "distill swin": f"--teacher {{swin}}/student.pth {UNITS} --cfg-options {SWIN}",
    "segment hiera": f"--student {{hiera_student}}/student.pth --cfg-options {LEVELS} {WINDOWS} {SMALL}",
    "segment swin": f"--student {{swin_student}}/student.pth --cfg-options {LEVELS} {WINDOWS} {SMALL}",
    "finetune tinyvit": f"{UNITS} --cfg-options {TINYVIT}",
    "segment tinyvit": f"--student {{tinyvit}}/classifier.pth --cfg-options {LEVELS} {WINDOWS} {SMALL}",
    "segment found": f"--cfg-options {FOUND} {WINDOWS} {SMALL}",
    "segment --test": "",
    "segment config.py": "--max-steps 1",
    "analyse": "--img-size 32 --limit 8",
    "detect": f"{JOB.replace('--img-size 32', '--img-size 64')} --cfg-options {STUDENT} channels=8",
    "detect --test": "--device cpu",
    "bench --compare": "",
    "study": "--data {CLASSES} --dry-run",
    "bench": "--runs 10 --seconds 0.1",
    "eval": "",
    "data": "",
    "eval classifier": "--workers 0 --device cpu",
    "predict": "",
    "label": "",
    "track": JOB_OF_TRACKER,
    "track --test": "",
    "track --generate": "--sequences 2 --frames 4 --size 64 80",
    "track FILE": "",
    "demo": "--out {demo} --resume --minutes 1 --data {LABELLED}",  # made before; the page is written again
    "tinymim-export": "",
    "tinymim-export --tune": "--seconds 0.2 --runtimes onnxruntime --graph pixels --resize-to-file --max-miou-drop 100 "
    "--min-speedup 0.01",
    "tinymim-export --web": "--ort-web {ORT}",
}
NOT_RUN = {  # start of a line -> what is checked in its place
    "pip install": "that the extras and files it names exist",
    "python -m http.server": "that it names a folder: it serves until stopped",
    "ruff": "nothing: it is about this repository",
    "pytest": "nothing: it is this test",
    "python tests/compare_commits.py": "that the file exists",
    "python tools/bench_containers.py": "that the file exists: tests/benchmarks/test_containers.py runs it",
    "python tools/bench_methods.py": "that the file exists: tests/benchmarks/test_method_step.py runs it",
    "python tools/bench_relation_forms.py": "that the file exists: tests/benchmarks/test_relation_forms.py runs it",
    "python tools/bench_distill.py": "that the file exists: tests/benchmarks/test_distill_step.py runs it",
}
NOT_RUN |= dict.fromkeys(
    ("tinymim predict seg.onnx 0", "tinymim predict seg.onnx rtsp:", "tinymim predict seg.onnx udp:"),
    "nothing: tests/export/runtime/test_streams.py serves streams; no camera is here",
)
INSTEAD = {
    "--size 512 512": "--size 64 64",
    "--box 120 80 64 48": "--box 30 30 12 12",
    "--imagenet-a FOLDER --imagenet-r FOLDER --imagenet-c FOLDER": "",
}
MENTIONS = (  # names of commands
    "tinymim analyse",
    "tinymim data",
    "tinymim card",
    "tinymim detect",
    "tinymim track",
    "tinymim data --from",
    "tinymim label",
    "tinymim segment",
    "tinymim segment --test",
    "tinymim segment CONFIG",
    "tinymim eval student.pth",
    "tinymim study",
    "tinymim study FILE.py",
    "tinymim study table08_strategies_small",
)
LAUNCH = re.compile(r"^torchrun .*?-m tinymim ")


def documented() -> list[tuple[str, str]]:
    """(page, command line) of every code block and every piece of inline code that is one, each once."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        lines = [line for kind, block in fenced if kind == "bash" for line in block.splitlines()]
        for line in [*lines, *(" ".join(code.split()) for code in inline)]:
            for part in re.split(r" && |  +# .*$", line):
                if part.split(" ")[0] in STARTS and " " in part and part not in MENTIONS and "..." not in part:
                    found.setdefault(part.strip(), page.name)
    return [(page, line) for line, page in found.items()]


def kind_of(words: list[str]) -> str:
    """The key of ``TINY``."""
    if words[0] == "tinymim-export":
        return next((f"tinymim-export {word}" for word in ("--tune", "--web") if word in words), words[0])
    verb = words[1]
    if verb in ("distill", "segment") and any("contracted/" in word for word in words):
        return f"{verb} found"
    if verb == "distill" and ("--chain" in words or "tinymim_chain" in words):
        return "distill --chain"
    if verb == "distill" and any("mae_tiny_from" in word and "tinymim" not in word for word in words):
        return "distill dmae"
    if verb in ("cache", "distill") and "tinymim_tiny_small_data" in words and {"cache", "--store"} & {*words}:
        return f"{verb} relations"
    if verb == "distill" and "--store" in words:
        return "distill store"
    if verb == "cache" and not {"--teacher", "--check"} & {*words}:
        return "cache STORE"
    if verb == "segment" and words[2].endswith("/config.py"):
        return "segment config.py"
    option = {
        "cache": "--check",
        "contract": "--segmentor",
        "segment": "--test",
        "detect": "--test",
        "bench": "--compare",
    }.get(verb)
    if option in words:
        return f"{verb} {option}"
    for family in ("hiera", "swin"):
        if verb in ("pretrain", "distill", "segment") and any(f"_{family}_" in f"_{w}_" for w in words if "/" not in w):
            return f"{verb} {family}"
    if verb in ("finetune", "segment") and any("tinyvit_" in word for word in words):
        return f"{verb} tinyvit"
    if verb == "track":
        plain = "track" if words[2].startswith("--") else "track FILE"
        return next((f"track {word}" for word in ("--test", "--generate") if word in words), plain)
    if verb == "segment" and words[2].startswith("linear"):
        own = any(word.startswith("model.backbone.embed_dim=") for word in words)  # its own shape is kept
        return "segment found" if own else "segment linear"
    return "eval classifier" if verb == "eval" and "classifier.pth" in words[2] else verb


def tiny(shop: Workshop, line: str) -> list[str]:
    """A command line as it is run here."""
    for long, short in INSTEAD.items():
        line = line.replace(long, short)
    words = shlex.split(LAUNCH.sub("tinymim ", line), comments=True)
    extra = shlex.split(TINY.get(kind_of(words), ""))
    given = {word for word in extra if word.startswith("--")} - {"--cfg-options"}
    kept: list[str] = []
    option = ""
    for word in words:
        option = word if word.startswith("--") else option
        if option in given:
            continue
        if word != option and (option not in OUTPUT or (option == "--out" and reads_store(words))):
            word = WORDS.get(word) or next((new for old, new in PATTERNS.items() if re.fullmatch(old, word)), word)
            assert not re.fullmatch(r"[A-Z_]{3,}|(runs|data|imagenet)/.*|timm/.*", word), (
                f"{word}: say in WORDS what it is"
            )
        kept.append(word)
    return shop.fill(shlex.join([*kept, *extra]))


def reads_store(words: list[str]) -> bool:
    """Whether the --out of a line is a store that is there."""
    return words[1] == "cache" and ("--check" in words or not {"--teacher", "--recipe", "--from-official"} & {*words})


def instead(line: str) -> bool:
    """Check what stands in ``NOT_RUN``; False: the line is to be run."""
    start = next((start for start in NOT_RUN if line.startswith(start)), None)
    if start is None:
        return False
    if start == "pip install":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", "".join(re.findall(r"\[([\w,]+)\]", line)))) <= set(known)
    for word in shlex.split(line)[1:]:
        if re.fullmatch(r"[\w/]+\.(py|txt)", word):
            assert (ROOT / word).is_file(), word
    return True


DOCUMENTED = documented()


def test_the_documentation_has_command_lines():
    found = [line for _, line in DOCUMENTED]
    assert len(found) > 40
    assert "tinymim-export --from seg.onnx --onnx small.onnx --precision int8 --calibration PHOTOS" in found
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in found)]


@pytest.mark.parametrize("line", [line for _, line in DOCUMENTED if any(line.startswith(s) for s in NOT_RUN)])
def test_lines_about_installing_name_what_exists(line):
    assert instead(line)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for _, line in DOCUMENTED if not any(line.startswith(s) for s in NOT_RUN)])
def test_documented_line(shop, tmp_path, line):
    assert shop.run(tiny(shop, line), tmp_path)


@pytest.mark.slow
def test_the_python_of_the_readme(tmp_path, monkeypatch):
    """As it stands, on files of the size that it names."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    student, teacher = (tinymim.create_model("tinymim_vit_tiny", img_size=224, depth=depth) for depth in (12, 3))
    images = torch.zeros(2, 3, 224, 224)
    for name in ("runs/t/student.pth", "TinyMIM-PT-Tstar.pth"):
        save_student(student, tmp_path / name)
    names = dict(images=images, student_images=images, teacher_images=images, student=student, teacher=teacher)
    exec(block, names)
    assert names["tokens"].shape == (2, 197, 192)
    assert [tuple(m.shape) for m in names["maps"]] == [(2, 192, 14, 14)] * 4
    assert names["losses"].keys() == {"qk", "vv", "loss"}


NEXT = re.compile(r"^next: +(.*?)(?:  +[#(].*)?$", re.MULTILINE)
SHOWN = re.compile(r"<pre>((?:tinymim|python)[^<]*)</pre>")  # commands of a page
NOT_SEEN = {  # of the source -> why no command of the workshop prints it
    "tinymim/benchmarks/camvid.py": "hours; its line is checked by name: python tools/study_camvid.py",
    "tinymim/benchmarks/deployment.py": "tests/benchmarks/test_deployment.py",
    "tinymim/benchmarks/gpu_check.py": "for a machine with a GPU: tests/benchmarks/test_gpu_check.py",
    "tinymim/benchmarks/headline.py": "torchrun of ImageNet: docs/headline.md has the same lines",
    "tinymim/benchmarks/method_step.py": "tests/benchmarks/test_method_step.py",
    "tinymim/benchmarks/segmentors.py": "tests/benchmarks/test_segmentors.py",
    "tinymim/benchmarks/transferred.py": "tests/benchmarks/test_transferred.py",
    "tinymim/cli/doctor.py": "the line for a machine without torch: tests/export/bench/test_bench.py",
    "tools/prepare_ade20k.py": "downloads ADE20K: tests/data/test_ade20k_release.py",
}


def shape(line: str) -> str:
    """What kind of line it is: command, options, and suffixes in place of names."""
    words = [w for w in shlex.split(line, comments=True) if not re.fullmatch(r"[\d.]+", w)]
    named = [w if w.startswith("-") or ("/" not in w and "." not in w) else f"*{Path(w).suffix}" for w in words[2:]]
    return " ".join([*words[:2], *dict.fromkeys(named)])


def sources() -> dict[str, list[str]]:
    """File -> patterns of the ``next:`` lines in it."""
    found: dict[str, list[str]] = {}
    for path in sorted(p for room in ("tinymim", "export", "tools") for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                text = "".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".*" for p in parts)
                if re.match(r"(?s)(.*\n)?next:", text):
                    found.setdefault(str(path.relative_to(ROOT)), []).append(text)
    return found


def printed(shop: Workshop, folder: Path) -> Iterator[tuple[str, str]]:
    """(what is shown, command line) of what the artefacts' commands printed and of their pages."""
    for name in ARTEFACTS:
        yield from ((m[0], m[1]) for m in NEXT.finditer(shop.said(name)))
    for page in sorted(folder.rglob("*.html")):
        found = [html.unescape(text) for text in SHOWN.findall(page.read_text(encoding="utf-8"))]
        here = (
            f" {shlex.quote(str(page.parent))}/"  # a page of another folder: "to be typed in the folder of this report"
        )
        lines = [line.replace(" ./", here) for line in found if "..." not in line]  # "...": what made a file, paths cut
        yield from (("", line) for line in lines)


@pytest.mark.slow
def test_next_lines(shop, tmp_path):
    """Those of every artefact and its pages, run; then those which these print, until no new kind of line comes."""
    for name in ARTEFACTS:
        shop[name]
    copy = shutil.copytree(shop.root, tmp_path / shop.root.name, symlinks=True)
    todo, shown, seen = deque(printed(shop, copy)), [], set()
    while todo:
        told, line = todo.popleft()
        shown.append(told)
        line, *more = line.split("; ")
        todo += [("", other) for other in more]
        if shape(line) in seen:
            continue
        seen.add(shape(line))
        if instead(line):
            continue
        line = shlex.join(w.replace(str(shop.root), str(copy)) for w in shlex.split(line, comments=True))
        words, option = tiny(shop, line), ""
        for i, word in enumerate(words):
            option = word if word.startswith("--") else option
            path = copy / word
            continues = "--resume" in words or (words[1] == "cache" and option == "--out")
            if option in OUTPUT and path.exists() and word != option and not continues:  # of another line
                words[i] = str(path.with_stem(f"{path.stem}-{len(seen)}"))
            elif option not in OUTPUT and path.suffix == ".onnx" and not path.exists():  # of the line before it
                words[i] = str(shop["exported"] / "seg.onnx")
        said = shop.run(words, copy)
        todo += [(m[0], m[1]) for m in NEXT.finditer(said)]
        assert len(seen) < 80, sorted(seen)
    print("\n".join(sorted(seen)))
    unseen = {
        file: [text for text in patterns if not any(re.match(text, told) for told in shown)]
        for file, patterns in sources().items()
        if file not in NOT_SEEN
    }
    assert not {file: patterns for file, patterns in unseen.items() if patterns}
