"""The page's JavaScript arithmetic, run by node, equals Python's number for number."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import tinymim_export.web
from tests.export.web.browser import need
from tinymim_export.runtime import resize
from tinymim_export.runtime.photos import to_input
from tinymim_export.runtime.predictor import window_places

PAGE = Path(tinymim_export.web.__file__).parent / "page"
SCRIPT = """
import * as page from "%s/segment.mjs";
import { readFileSync } from "node:fs";
const answers = JSON.parse(readFileSync(0)).map(([name, args]) => {
  const plain = args.map((a) => (a?.u8 ? Uint8Array.from(a.u8) : a?.f32 ? Float32Array.from(a.f32) : a));
  const made = page[name](...plain);
  return ArrayBuffer.isView(made) ? [...made] : made;
});
console.log(JSON.stringify(answers));
"""


def in_node(calls):
    """Results of ``[(function of segment.mjs, arguments)]``; arrays go as {"u8": list} or {"f32": list}."""
    done = subprocess.run(
        [need("node"), "--input-type=module", "-e", SCRIPT % PAGE.as_posix()],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def u8(array):
    return {"u8": array.ravel().tolist()}


def f32(array):
    return {"f32": array.astype(np.float64).ravel().tolist()}


def sizes(random, count):
    """(from, to) sizes: any, the same, doubled, halved, one side kept, one pixel."""
    for i in range(count):
        a = tuple(map(int, random.integers(1, 40, 2)))
        b = tuple(map(int, random.integers(1, 40, 2)))
        both = {
            1: (a, a),
            2: (a, (2 * a[0], 2 * a[1])),
            3: ((2 * b[0], 2 * b[1]), b),
            4: (a, (a[0], b[1])),
            5: (a, (b[0], a[1])),
            6: ((1, 1), b),
            7: (a, (1, 1)),
        }
        yield both.get(i % 10, (a, b))


def test_photos_are_resized_bit_for_bit():
    random = np.random.default_rng(0)
    calls, wanted = [], []
    for have, want in sizes(random, 400):
        photo = random.integers(0, 256, (*have, 3), np.uint8)
        calls.append(["resizePixels", [u8(photo), have, want]])
        wanted.append(resize.resize_bilinear(photo, want).ravel().tolist())
    assert in_node(calls) == wanted


@pytest.mark.parametrize("align_corners", [False, True])
def test_logits_are_resized_and_decided_as_in_python(align_corners):
    random = np.random.default_rng(1)
    calls, wanted = [], []
    for have, want in sizes(random, 200):
        logits = random.standard_normal((int(random.integers(2, 9)), *have)).astype(np.float32)
        calls.append(["decide", [f32(logits), logits.shape, want, {"align_corners": align_corners}]])
        calls.append(["resizeLogits", [f32(logits), logits.shape, want, align_corners]])
        resized = resize.resize_float(logits, want, align_corners)
        wanted += [resized.argmax(0).ravel().tolist(), resized.astype(float).ravel().tolist()]
    assert in_node(calls) == wanted


def test_masks_take_the_nearest_id():
    random = np.random.default_rng(2)
    calls, wanted = [], []
    for have, want in sizes(random, 100):
        mask = random.integers(0, 9, have, np.uint8)
        calls.append(["resizeNearest", [u8(mask), have, want]])
        wanted.append(resize.resize_nearest(mask, want).ravel().tolist())
    assert in_node(calls) == wanted


def test_sizes_by_the_resize_rule():
    photos = [(int(h), int(w)) for h, w in np.random.default_rng(3).integers(1, 3000, (300, 2))]
    for scale in ([2048, 512], [512, 512], [480, 360]):
        calls = [["resizedSize", [{"scale": scale, "keep_ratio": True}, photo]] for photo in photos]
        assert in_node(calls) == [list(resize.rescale_size(photo, scale)) for photo in photos]
    rules = [{"scale": None}, {"scale": [320, 240], "keep_ratio": False}]  # (width, height)
    assert in_node([["resizedSize", [rule, [100, 50]]] for rule in rules]) == [[100, 50], [240, 320]]


def test_windows_are_laid_as_in_python():
    calls, wanted = [], []
    for size in [(40, 70), (24, 24), (10, 90), (300, 241)]:
        for crop, stride in [((24, 24), (16, 16)), ((64, 96), (42, 64)), ((24, 30), (24, 30))]:
            rows, columns = (window_places(*three) for three in zip(size, crop, stride, strict=True))
            calls.append(["slideWindows", [size, crop, stride]])
            wanted.append([[y, x, y2 - y, x2 - x] for y, y2 in rows for x, x2 in columns])
    assert in_node(calls) == wanted


@pytest.mark.parametrize("raw", [False, True])
def test_photos_are_normalised_and_padded_as_in_python(raw):
    photo = np.random.default_rng(4).integers(0, 256, (5, 7, 3), np.uint8)
    contract = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    image = to_input(photo, contract | {"input": {"range": "pixels"}} if raw else contract)
    level = np.rint(np.float32(contract["mean"])) if raw else np.zeros(3)
    wanted = np.tile(level.astype(image.dtype)[:, None, None], (1, 8, 8))
    wanted[:, :5, :7] = image
    page = contract | {"range": "pixels" if raw else "normalised", "pad": {"value": [0, 0, 0]}}
    assert in_node([["toImage", [page, u8(photo), [5, 7], [8, 8]]]]) == [wanted.astype(float).ravel().tolist()]


def test_a_photo_that_does_not_fit_a_fixed_file_is_stretched_and_the_page_says_so():
    whole = {"scale": None, "size": [64, 96], "mode": "whole"}
    slide = whole | {"mode": "slide", "crop": [64, 96], "stride": [42, 64]}
    padded = whole | {"pad": {"size": [64, 96]}}
    free = {"scale": None, "size": [None, None], "mode": "whole", "pad": {"size_divisor": 32}}
    calls = [
        ["plan", [whole, [64, 96]]],
        ["plan", [whole, [65, 96]]],
        ["plan", [slide, [80, 100]]],
        ["plan", [slide, [60, 100]]],
        ["plan", [padded, [60, 90]]],
        ["plan", [free, [60, 90]]],
    ]
    plain, other, windows, small, pad, any_size = in_node(calls)
    assert plain == {"inner": [64, 96], "size": [64, 96], "windows": [[0, 0, 64, 96]], "note": ""}
    assert (other["inner"], other["windows"]) == ([64, 96], [[0, 0, 64, 96]])
    assert "stretched to 96 x 64" in other["note"]
    assert len(windows["windows"]) == 4
    assert not windows["note"]
    assert small["inner"] == [64, 96]
    assert small["note"]
    assert (pad["inner"], pad["size"], pad["note"]) == ([60, 90], [64, 96], "")
    assert (any_size["inner"], any_size["size"]) == ([60, 90], [64, 96])
