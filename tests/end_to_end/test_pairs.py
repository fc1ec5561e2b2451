"""What one command writes, another reads: a test a pair, on files that the real commands wrote.

``TABLE`` holds the readers: a command, and under it the files it reads (``+ options``) ``=>`` a pattern of what it
prints. A file that a command writes and nobody reads fails ``test_every_file_has_a_reader``.
"""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tests.demo.test_report import check_self_contained
from tests.end_to_end.workshop import ARTEFACTS, HEAD, JOB, STUDENT, Workshop

TABLE = r"""
tinymim report {file} --out page.html
    pretrained                                    => pretrained/student\.pth +teacher
    distilled                                     => student\.pth +teacher(.|\n)*distilled/student\.pth +student
    several                                       => (student\.pth +teacher(.|\n)*){2}several/student\.pth +student
    chain                                         => 1_small/student\.pth +teacher(.|\n)*2_tiny/student\.pth +student
    finetuned                                     => finetuned/classifier\.pth +classifier
    segmented                                     => segmented/segmentor\.pth +segmentor .*PyTorch +\d
    study                                         => run/student\.pth +student(.|\n)*run/classifier\.pth +classifier
    demo                                          => student/student(.|\n)*segmentor/segmentor(.|\n)*segmentor\.onnx
    tuned                                         => fp32_pixels\.onnx +fp32 pixels .*onnxruntime cpu +\d
    page                                          => model\.onnx
    pretrained/student.pth                        => pretrained/student\.pth
    pretrained/checkpoints/step_00000001.pth      => step_00000001
    finetuned/classifier.pth                      => finetuned/classifier\.pth +classifier
    finetuned/result.json                         => finetuned/classifier\.pth +classifier
    segmented/segmentor.pth                       => segmented/segmentor\.pth +segmentor
    segmented/checkpoints/iter_1.pth              => iter_1
    segmented/result.json                         => segmented/segmentor\.pth +segmentor .*PyTorch +\d
    exported/seg.onnx                             => seg\.onnx +fp32
    exported/export.json                          => report:
    backbone/backbone.onnx                        => backbone\.onnx +fp32
    int8/int8.onnx                                => int8\.onnx +int8
    int8/int8.json                                => report:
    sensitivity/sensitivity.json                  => report:
    tuned/best.onnx                               => best\.onnx
    tuned/best.tune/tune.json                     => fp32.*onnxruntime cpu
    tuned/best.tune/scores/fp32_onnxruntime_cpu.json    => fp32_onnxruntime_cpu
    tuned/tune.json                               => in tune\.json
    demo/demo.json                                => in demo\.json
    measured/bench.json                           => in bench\.json
    scored/eval.json                              => in eval\.json
    tested/test.json                              => in test\.json.*PyTorch +\d
    classified/scores.json                        => classifier\.pth +classifier
    joined/lineage.json                           => distilled/student(.|\n)*segmented/segmentor
    tracked/tracker.pth                           => tracked/tracker\.pth +tracker
    tracker/tracker.onnx                          => tracker\.onnx +fp32
    detected/detector.pth                         => detected/detector\.pth +detector
    detected/result.json                          => detected/detector\.pth +detector
    exported/seg.onnx + {int8}/int8.onnx                => seg\.onnx
    pretrained + {distilled}                            => teacher
    distilled + {several}                               => student
    joined/lineage.json + {exported}                    => student
tinymim track --test {file} --data {sequences}
    tracked/tracker.pth                           => tracker\.pth .PyTorch.: success AUC
    tracker/tracker.onnx                          => tracker\.onnx: success AUC
tinymim detect --test {file} --data {OBJECTS}/photos --annotations {OBJECTS}/objects.json --device cpu
    detected/detector.pth                         => boxes: AP
tinymim analyse {file} --photos {PHOTOS} --img-size 32 --limit 8 --out made.html
    pretrained/student.pth                        => effective rank
    distilled/checkpoints/step_00000001.pth + --heads 2 => effective rank
tinymim distill --teacher {file} --data {PHOTOS} --out made JOB --cfg-options STUDENT
    pretrained/student.pth                        => student: made/student\.pth
    pretrained/checkpoints/step_00000001.pth + --teacher-heads 2 => student: made/student\.pth
    several/student.pth                           => student: made/student\.pth
    chain/2_tiny/student.pth                      => student: made/student\.pth
    finetuned/classifier.pth                      => student: made/student\.pth
    segmented/segmentor.pth                       => student: made/student\.pth
    distilled/student.pth + --init-from {distilled}/student.pth => student: made/student\.pth
tinymim distill --data {file} --teacher {pretrained}/student.pth --out made JOB --cfg-options STUDENT
    packed                                        => student: made/student\.pth
    packed/photos-00000.tar                       => student: made/student\.pth
tinymim-export --from {exported}/seg.onnx --onnx made.onnx --precision int8 --calibration {file}
    packed                                        => verified
tinymim finetune --student {file} --data {CLASSES}/train --out made JOB --cfg-options STUDENT
    pretrained/student.pth                        => made/classifier\.pth
    distilled/checkpoints/step_00000001.pth + --num-heads 2 => made/classifier\.pth
    chain/1_small/student.pth                     => made/classifier\.pth
    finetuned/classifier.pth                      => made/classifier\.pth
    segmented/segmentor.pth                       => made/classifier\.pth
tinymim finetune --teacher {file} --data {CLASSES}/train --out made JOB --cfg-options STUDENT
    finetuned/classifier.pth                      => made/classifier\.pth
tinymim segment upernet_tinymim_demo --data-root {LABELLED} --student {file} --work-dir made --cfg-options HEAD
    pretrained/student.pth                        => segmentor: made/segmentor\.pth
    several/student.pth                           => segmentor: made/segmentor\.pth
    distilled/checkpoints/step_00000001.pth       => segmentor: made/segmentor\.pth
    finetuned/classifier.pth                      => segmentor: made/segmentor\.pth
    segmented/segmentor.pth                       => segmentor: made/segmentor\.pth
tinymim segment upernet_tinymim_demo --data-root {file} --work-dir made --cfg-options HEAD
    demo/data                                     => segmentor: made/segmentor\.pth
tinymim segment upernet_tinymim_demo --data-root {LABELLED} --pseudo {file} --work-dir made --cfg-options HEAD
    pseudo                                        => and 64 pseudo-labelled photos of .*/pseudo, 64 of them
tinymim segment {file} --data-root {LABELLED} --work-dir made
    segmented/config.py                           => segmentor: made/segmentor\.pth
tinymim segment --test {file}
    segmented/segmentor.pth                       => mIoU
    segmented/checkpoints/iter_1.pth              => mIoU
tinymim segment --test {segmented}/config.py {file}
    segmented/checkpoints/iter_1.pth              => mIoU
tinymim-export --checkpoint {file} --onnx made.onnx
    segmented/segmentor.pth                       => made\.onnx: segmentor .*verified
    distilled/student.pth                         => made\.onnx: backbone .*verified
    finetuned/classifier.pth                      => made\.onnx: backbone .*verified
    segmented/checkpoints/iter_1.pth              => made\.onnx: segmentor .*verified
tinymim-export --verify-only {file}
    exported/seg.onnx + --checkpoint {segmented}/segmentor.pth => verified
    int8/int8.onnx + --from {exported}/seg.onnx         => verified
tinymim-export --from {file} --onnx made.onnx
    exported/seg.onnx + --precision int8-dynamic        => verified
    exported/seg.onnx + --precision int8-weights        => verified
    exported/seg.onnx + --precision fp16                => verified
    exported/seg.onnx + --graph attention pixels        => verified
    exported/seg.onnx + --precision int8 --data {LABELLED} --calibration {PHOTOS} --max-miou-drop 100 => verified
tinymim-export --from {file} --web made --ort-web {ORT}
    int8/int8.onnx                                => int8
tinymim bench {file} --runs 10
    exported/seg.onnx + --split                         => head
    backbone/backbone.onnx                        => p50
    int8/int8.onnx                                => p50
    tuned/best.onnx                               => p50
    exported/seg.onnx + --runtime openvino --precision bf16 => openvino cpu bf16
tinymim bench --compare {file} {remeasured}/bench.json
    measured/bench.json                           => times as fast
tinymim eval {file} --data {LABELLED}
    exported/seg.onnx                             => mIoU
    int8/int8.onnx                                => mIoU
    tuned/best.onnx + --resize-to-file                  => mIoU
    page/model.onnx                               => mIoU
tinymim eval {file} --data {CLASSES}/val --workers 0 --device cpu
    finetuned/classifier.pth                      => top-1
tinymim predict {file} {LABELLED}/images/validation --out masks
    exported/seg.onnx                             => masks
    int8/int8.onnx                                => masks
    tuned/best.onnx + --resize-to-file                  => masks
tinymim label {PHOTOS} --out made --with {file}
    segmented/segmentor.pth                       => labelled: made: 64 photos, 100.0 %
    segmented/checkpoints/iter_1.pth              => labelled: made: 64 photos, 100.0 %
    exported/seg.onnx + --min-confidence 0.01           => labelled: made: 64 photos
    int8/int8.onnx                                => labelled: made: 64 photos
tinymim label {file} --out made --with {exported}/seg.onnx
    packed                                        => labelled: made: 64 photos
tinymim eval {exported}/seg.onnx --split train --data {file}
    pseudo                                        => mIoU
tinymim study {STUDY} --data {CLASSES} --out {file}
    study                                         => 1 of 1 done; 0 stages
    study + --table                                     => table\.md
"""
TABLE = TABLE.replace("JOB", JOB).replace("STUDENT", STUDENT).replace("HEAD", HEAD)


def read_table() -> list[tuple[str, str, str, str]]:
    """(reader, file, command line, pattern)."""
    found, command = [], ""
    for line in filter(None, TABLE.splitlines()):
        if not line.startswith(" "):
            command = line
            continue
        file, said = (part.strip() for part in line.split(" => "))
        file, _, more = file.partition(" + ")
        at = command.index("{file}") + len("{file}") if "report" in command else command.find(" --cfg-options")
        full = command[:at] + f" {more}" + command[at:] if at > 0 else f"{command} {more}"
        name = re.match(r"tinymim\S*( [a-z]+)?( --(teacher|student|test|from|web|compare|verify-only))?", command)
        found.append((f"{name[0].strip()} {more}".strip(), file, full, said))
    return found


PAIRS = read_table()
RESUMED = ("pretrained", "distilled", "several", "chain", "finetuned", "segmented", "tracked", "detected")
WITH_ITS_RUN = {  # read with their folder, by test_resume and report
    "config.py",
    "env.json",
    "metrics.jsonl",
    "last_checkpoint",
    "chain.json",
    "iter_N.pth",
    "step_N.pth",
    "done.json",
    "reads.json",
    ".photos-N.tar.index",
    "seconds.txt",
    "lock",
    "seedN.json",
    "table.json",
}
MASKS = {"scene_N.png"}  # test_masks_are_labels
AS_FOLDERS = {
    "page",
    "log",
    "scores",
    "data",
    "predictions",
    "pseudo",
    "stored",
    "part of a store",
    "relations",
    "published",
    "from published",
    "carded",
    "contracted",
    "shrunk",
    "converted",
    "split",
}  # the page by a browser, a store by distill and cache, what is for the hub by hf-hub:, ...
FOR_PEOPLE = {".html", ".md", ".svg", ".log", ".txt", ".jpg"}
LAST = {  # results for other programs; report refuses them by their kind
    "compare.json": "tinymim.compare of bench, tinymim.difference of report",
    "analysis.json": "tinymim.analysis",
    "predict.json": "tinymim.predict",
    "track.json": "tinymim.track_scores",
    "boxes.json": "tinymim.track",
    "doctor.json": "the machine",
    "contract.json": "of the page, like its scripts",
}


def path_of(shop: Workshop, file: str) -> Path:
    """The path of a file or folder of the table, made first."""
    name, _, rest = file.partition("/")
    path = shop[name] / rest
    assert path.exists(), f"{file} is not what {name} writes any more"
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "file", "line", "said"), PAIRS, ids=[f"{p[1]} -> {p[0]}" for p in PAIRS])
def test_pair(shop, tmp_path, reader, file, line, said):
    out = shop.run(shop.fill(line, file=path_of(shop, file)), tmp_path)
    assert re.search(said, out.replace("'", "")), out


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_resume(shop, tmp_path, name):
    """The command that made a run, and --resume, with the newest checkpoint and the product gone: the same tensors."""
    copy = shutil.copytree(shop[name], tmp_path / name)
    products = [p for p in copy.rglob("*.pth") if p.parent.name != "checkpoints"]
    checkpoints = sorted((copy / "checkpoints").glob("*"))
    if len(checkpoints) > 1:
        checkpoints[-1].unlink()
        for product in products:
            product.unlink()
    shop.run([*shop.fill(ARTEFACTS[name], here=copy), "--resume"], tmp_path)
    assert products
    for product in products:
        before = torch.load(shop[name] / product.relative_to(copy), weights_only=True)
        after = torch.load(product, weights_only=True)
        key = "state_dict" if name == "segmented" else "model"
        assert all(torch.equal(value, after[key][at]) for at, value in before[key].items()), product.name


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["scored/masks", "predicted/masks/validation"])
def test_masks_are_labels(shop, tmp_path, masks):
    """Written masks, used as the labels of their photos: the same file is right everywhere."""
    for split in ("training", "validation"):
        shutil.copytree(shop["LABELLED"] / "images" / "validation", tmp_path / "images" / split)
        (tmp_path / "annotations" / split).mkdir(parents=True)
        for mask in path_of(shop, masks).glob("*.png"):
            shutil.copy(mask, tmp_path / "annotations" / split)
    shutil.copy(shop["LABELLED"] / "dataset.json", tmp_path)
    out = shop.run(shop.fill("tinymim eval {exported}/seg.onnx --data {data}", data=tmp_path), tmp_path)
    assert "mIoU 100.00 %" in out


@pytest.mark.slow
def test_the_demo_on_given_photos(shop):
    """Any ADE20K layout: all stages, and pages that load nothing and do not tell where they were made."""
    record = json.loads((shop["demo"] / "demo.json").read_text())
    assert len(record["stages"]["data"]["classes"]) == 12
    assert all(record["checks"].values())
    for folder in ("teacher", "student", "segmentor"):
        check_self_contained(shop["demo"] / folder / "report.html")


@pytest.mark.slow
def test_every_file_has_a_reader(shop):
    """The matrix of files and readers, printed; a new artefact without a pair fails."""

    def kind(path: Path) -> str:
        return "*.onnx" if path.suffix == ".onnx" else re.sub(r"\d{2,}|(?<=[_d])\d(?=\.)", "N", path.name)

    readers: dict[str, set[str]] = defaultdict(set)
    for reader, file, *_ in PAIRS:
        readers[kind(Path(file))].add(reader)
    print("\n".join(f"{name}: {', '.join(sorted(found))}" for name, found in sorted(readers.items())))
    known = readers.keys() | WITH_ITS_RUN | MASKS | LAST.keys()
    unread = [
        path
        for name in ARTEFACTS
        for path in shop[name].rglob("*")
        if path.is_file() and path.suffix not in FOR_PEOPLE and kind(path) not in known
        if not set(path.relative_to(shop.root).parts) & AS_FOLDERS
    ]
    assert not unread


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("tinymim eval {segmented}/segmentor.pth --data {LABELLED}", "tinymim segment --test"),
        ("tinymim eval {backbone}/backbone.onnx --data {LABELLED}", "it gives features, not classes"),
        ("tinymim segment --test {distilled}/student.pth", "give the segmentor.pth"),
        ("tinymim segment --test {exported}/seg.onnx", "tinymim eval"),
        ("tinymim segment --test {segmented}/segmentor.pth upernet_tinymim_demo", "the checkpoint comes last"),
        ("tinymim predict {segmented}/segmentor.pth {PHOTOS} --out masks", "tinymim-export --checkpoint"),
        ("tinymim bench {segmented}/segmentor.pth", "tinymim-export --checkpoint"),
        ("tinymim bench --compare {scored}/eval.json {measured}/bench.json", "it says tinymim.eval"),
        ("tinymim-export --from {segmented}/segmentor.pth --onnx x.onnx --precision fp16", "not a usable .onnx file"),
        ("tinymim-export --checkpoint {exported}/seg.onnx --onnx x.onnx", "start there with --from"),
        ("tinymim report {compared}/compare.json --out x.html", "tinymim.compare"),
        ("tinymim demo --resume --out {distilled}", "no demo to resume"),
    ],
)
def test_the_wrong_door_says_which_is_right(shop, tmp_path, line, told):
    out = shop.run(shop.fill(line), tmp_path, code=2)
    assert told in out
    assert not list(tmp_path.iterdir())
