"""What one command writes, another reads: a test a pair, on files that the real commands wrote.

``PAIRS`` is the table of readers. A file that a command writes and that is neither read by a pair nor named in ``FOR_PEOPLE``
fails ``test_every_file_is_read``.
"""

import re
from pathlib import Path

import pytest

from tests.end_to_end.workshop import HEAD, JOB, STUDENT, Workshop

REPORT = "tinymim report {file} --out page.html"
TEACH = f"tinymim distill --teacher {{file}} --data {{PHOTOS}} --out made {JOB} --cfg-options {STUDENT}"
TUNE = f"tinymim finetune --student {{file}} --data {{CLASSES}}/train --out made {JOB} --cfg-options {STUDENT}"
LABEL = f"tinymim finetune --teacher {{file}} --data {{CLASSES}}/train --out made {JOB} --cfg-options {STUDENT}"
SEGMENT = f"tinymim segment upernet_tinymim_demo --data-root {{LABELLED}} --student {{file}} --work-dir made --cfg-options {HEAD}"
EXPORT = "tinymim-export --checkpoint {file} --onnx made.onnx"
EVAL = "tinymim eval {file} --data {LABELLED}"
PREDICT = "tinymim predict {file} {LABELLED}/images/validation --out masks"

PAIRS = [  # reader, file, command line, a pattern of what it prints
    *(
        ("report", file, REPORT, said)
        for file, said in (
            ("pretrained", r"pretrained/student\.pth +teacher"),
            ("distilled", r"student\.pth +teacher(.|\n)*distilled/student\.pth +student"),
            ("several", r"(student\.pth +teacher(.|\n)*){2}several/student\.pth +student"),
            ("chain", r"1_small/student\.pth +student(.|\n)*2_tiny/student\.pth +student"),
            ("finetuned", r"finetuned/classifier\.pth +classifier"),
            ("segmented", r"segmented/segmentor\.pth +segmentor .*PyTorch +\d"),
            ("study", r"run/student\.pth +student(.|\n)*run/classifier\.pth +classifier"),
            ("tuned", r"int8_pixels\.onnx +int8 pixels .*onnxruntime cpu +\d"),
            ("demo", r"teacher/student(.|\n)*student/student(.|\n)*segmentor/segmentor(.|\n)*segmentor\.onnx"),
            ("pretrained/student.pth", "pretrained/student.pth"),
            ("pretrained/checkpoints/step_00000001.pth", "step_00000001"),
            ("finetuned/classifier.pth", "classifier"),
            ("finetuned/result.json", "finetuned/classifier"),
            ("segmented/segmentor.pth", "segmentor"),
            ("segmented/checkpoints/iter_1.pth", "iter_1"),
            ("segmented/result.json", r"segmented/segmentor\.pth +segmentor .*PyTorch +\d"),
            ("exported/seg.onnx", r"seg\.onnx +fp32"),
            ("exported/export.json", "report:"),
            ("backbone/backbone.onnx", "backbone"),
            ("int8/int8.onnx", r"int8\.onnx +int8"),
            ("int8/int8.json", "report:"),
            ("sensitivity/sensitivity.json", "report:"),
            ("tuned/best.onnx", r"best\.onnx"),
            ("tuned/best.tune/tune.json", "tune.json"),
            ("tuned/best.tune/scores/fp32_onnxruntime_cpu.json", "fp32_onnxruntime_cpu"),
            ("tuned/tune.json", "tune.json"),
            ("measured/bench.json", r"in bench\.json"),
            ("scored/eval.json", r"in eval\.json"),
            ("tested/test.json", r"test\.json.*PyTorch +\d"),
            ("classified/scores.json", r"classifier\.pth +classifier"),
            ("joined/lineage.json", r"distilled/student(.|\n)*segmented/segmentor"),
            ("page", r"model\.onnx"),
        )
    ),
    *(
        (f"report A {b}", a, f"tinymim report {{file}} {{{b}}} --out page.html", said)
        for a, b, said in (
            ("exported/seg.onnx", "int8", "fp32"),
            ("pretrained", "distilled", "teacher"),
            ("distilled", "several", "student"),
            ("finetuned", "finetuned", "classifier"),
            ("joined/lineage.json", "exported", "student"),
        )
    ),
    *(
        ("distill --teacher", file, TEACH, "student: made/student.pth")
        for file in (
            "pretrained/student.pth",
            "pretrained/checkpoints/step_00000001.pth",
            "distilled/student.pth",
            "several/student.pth",
            "chain/2_tiny/student.pth",
            "finetuned/classifier.pth",
            "segmented/segmentor.pth",
        )
    ),
    ("distill --init-from", "distilled/student.pth", f"{TEACH} --init-from {{file}}", "student: made/student.pth"),
    *(
        ("finetune --student", file, TUNE, "made/classifier.pth")
        for file in (
            "pretrained/student.pth",
            "distilled/checkpoints/step_00000001.pth",
            "chain/1_small/student.pth",
            "finetuned/classifier.pth",
            "segmented/segmentor.pth",
        )
    ),
    ("finetune --teacher", "finetuned/classifier.pth", LABEL, "made/classifier.pth"),
    *(
        ("segment --student", file, SEGMENT, "segmentor: made/segmentor.pth")
        for file in (
            "pretrained/student.pth",
            "several/student.pth",
            "distilled/checkpoints/step_00000001.pth",
            "finetuned/classifier.pth",
            "segmented/segmentor.pth",
        )
    ),
    (
        "segment CONFIG",
        "segmented/config.py",
        "tinymim segment {file} --data-root {LABELLED} --work-dir made",
        "made/seg",
    ),
    ("segment --test", "segmented/segmentor.pth", "tinymim segment --test {file}", "mIoU"),
    (
        "segment --test",
        "segmented/checkpoints/iter_1.pth",
        "tinymim segment --test {segmented}/config.py {file}",
        "mIoU",
    ),
    (
        "distill --recipe",
        "distilled/config.py",
        f"tinymim distill --recipe {{file}} --data {{PHOTOS}} --out made {JOB}",
        "made/s",
    ),
    (
        "finetune --recipe",
        "finetuned/config.py",
        f"tinymim finetune --recipe {{file}} --data {{CLASSES}}/train --out made {JOB}",
        "made/c",
    ),
    (
        "pretrain --recipe",
        "pretrained/config.py",
        f"tinymim pretrain --recipe {{file}} --data {{PHOTOS}} --out made {JOB}",
        "made/s",
    ),
    *(
        ("tinymim-export", file, EXPORT, r"made\.onnx: \w+ .*verified")
        for file in (
            "segmented/segmentor.pth",
            "distilled/student.pth",
            "finetuned/classifier.pth",
            "distilled/checkpoints/step_00000001.pth",
        )
    ),
    ("tinymim-export", "segmented/checkpoints/iter_1.pth", f"{EXPORT} --config {{segmented}}/config.py", "verified"),
    (
        "--verify-only",
        "exported/seg.onnx",
        "tinymim-export --verify-only {file} --checkpoint {segmented}/segmentor.pth",
        "verified",
    ),
    ("--verify-only", "int8/int8.onnx", "tinymim-export --verify-only {file} --from {exported}/seg.onnx", "verified"),
    *(
        ("--from", "exported/seg.onnx", f"tinymim-export --from {{file}} --onnx made.onnx {how}", "verified")
        for how in (
            "--precision int8-dynamic",
            "--precision int8-weights",
            "--precision fp16",
            "--graph attention pixels",
            "--precision int8 --data {LABELLED} --calibration {PHOTOS} --max-miou-drop 100",
        )
    ),
    *(
        ("bench", file, f"tinymim bench {{file}} --runs 10{how}", "p50")
        for file, how in (
            ("exported/seg.onnx", " --split"),
            ("backbone/backbone.onnx", ""),
            ("int8/int8.onnx", ""),
            ("tuned/best.onnx", ""),
            ("exported/seg.onnx", " --runtime openvino --precision bf16"),
        )
    ),
    ("bench --compare", "measured/bench.json", "tinymim bench --compare {file} {remeasured}/bench.json", "p50"),
    *(
        ("eval", file, EVAL + how, "mIoU")
        for file, how in (
            ("exported/seg.onnx", ""),
            ("int8/int8.onnx", ""),
            ("tuned/best.onnx", " --resize-to-file"),
            ("page/model.onnx", ""),
        )
    ),
    ("eval", "finetuned/classifier.pth", "tinymim eval {file} --data {CLASSES}/val --workers 0 --device cpu", "top-1"),
    *(
        ("predict", file, PREDICT + how, "masks")
        for file, how in (
            ("exported/seg.onnx", ""),
            ("int8/int8.onnx", ""),
            ("tuned/best.onnx", " --resize-to-file"),
        )
    ),
    (
        "predict --classes",
        "LABELLED/dataset.json",
        PREDICT.replace("{file}", "{exported}/seg.onnx") + " --classes {file}",
        "masks",
    ),
    ("web", "int8/int8.onnx", "tinymim-export --from {file} --web made --ort-web {ORT}", "int8"),
    (
        "segment --data-root",
        "demo/data",
        SEGMENT.replace("{LABELLED}", "{file}").replace("{file} --work", "{distilled}/student.pth --work"),
        "made",
    ),
    ("study", "study", "tinymim study {STUDY} --data {CLASSES} --out {file}", r"1 of 1 done; 0 stages"),
    ("study --table", "study", "tinymim study {STUDY} --data {CLASSES} --out {file} --table", r"table\.md"),
]


def reading(shop: Workshop, file: str) -> Path:
    """The path of a file or folder of the table, made first."""
    name, _, rest = file.partition("/")
    path = shop[name] / rest
    assert path.exists(), f"{file} is not what {name} writes any more"
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "file", "line", "said"), PAIRS, ids=[f"{p[1]} -> {p[0]}" for p in PAIRS])
def test_pair(shop, tmp_path, reader, file, line, said):
    out = shop.run(shop.fill(line, file=reading(shop, file)), tmp_path)
    assert re.search(said, out.replace("'", "")), out
