"""A three-layer segmentor of colours and photos it segments well: real files that are made in milliseconds."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tinymim_export.runtime.metadata import graph_sha256, mark, save_proto, write_metadata

CLASSES = ["red", "green", "blue"]
HEIGHT, WIDTH, HIDDEN = 64, 96, 32
META = {
    "part": "segmentor",
    "classes": CLASSES,
    "palette": [[200, 40, 40], [40, 200, 40], [40, 40, 200]],
    "mean": [120.0, 118.0, 116.0],
    "std": [60.0, 60.0, 60.0],
    "channel_order": "RGB",
    "stride": 4,
    "resize": {"mode": "whole", "scale": None, "keep_ratio": False},
    "verified": True,
}


def segmentor_proto(*, free=False, noise=0.02, seed=0):
    """Convolution of 4 x 4 patches, two of 1 x 1, up-sampling; ``noise`` on the weights makes worse ones."""
    random = np.random.default_rng(seed)

    def tensor(name, value):
        return numpy_helper.from_array(np.asarray(value, np.float32), name)

    patch = random.normal(0, noise, (HIDDEN, 3, 4, 4))
    middle = random.normal(0, noise, (HIDDEN, HIDDEN, 1, 1))
    last = random.normal(0, noise, (3, HIDDEN, 1, 1))
    for i in range(3):
        patch[i, i] += 1 / 16
        middle[i, i] += 1
        last[i, i] += 1
    weights = [
        tensor("w1", patch),
        tensor("w2", middle),
        tensor("w3", last),
        tensor("b1", np.full(HIDDEN, 0.5)),
        tensor("scales", [1, 1, 4, 4]),
    ]
    nodes = [
        helper.make_node(
            "Conv", ["image", "w1", "b1"], ["c1"], name="patch_embed", kernel_shape=[4, 4], strides=[4, 4]
        ),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="middle"),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Conv", ["r2", "w3"], ["c3"], name="classify"),
        helper.make_node("Resize", ["c3", "", "scales"], ["logits"], name="up", mode="linear"),
    ]
    sides = ["height", "width"] if free else [HEIGHT, WIDTH]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, *sides])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, *sides])
    graph = helper.make_graph(nodes, "tiny", [image], [logits], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto)
    parts = {
        "backbone": {"params": 2560, "macs": 10, "tensors": ["r2"]},
        "head": {"params": 96, "macs": 5, "tensors": ["c3"]},
        "upsampling": {"params": 0, "macs": 1, "tensors": ["logits"]},
    }
    cost = {"size": [HEIGHT, WIDTH], "params": 2656, "macs": 16, "parts": parts}
    write_metadata(proto, META | {"cost": cost})
    mark(proto, {"graph_sha256": graph_sha256(proto)})
    return proto


def write_segmentor(path, **options):
    """The same as a file."""
    save_proto(segmentor_proto(**options), path)
    return path


def write_labelled(root, training=8, validation=6, seed=0):
    """Photos of coloured rectangles under noise, with their labels, in ADE20K layout."""
    random = np.random.default_rng(seed)
    for split, count in (("training", training), ("validation", validation)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            ids = np.full((HEIGHT, WIDTH), i % 3, np.uint8)
            for _ in range(6):
                y, x = random.integers(0, HEIGHT - 12), random.integers(0, WIDTH - 12)
                ids[y : y + random.integers(8, 40), x : x + random.integers(8, 40)] = random.integers(0, 3)
            pixels = np.asarray(META["palette"])[ids] + random.normal(0, 40, (HEIGHT, WIDTH, 3))
            photo = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            photo.save(root / "images" / split / f"{i:03d}.png")
            Image.fromarray(ids).save(root / "annotations" / split / f"{i:03d}.png")
    about = {"classes": CLASSES, "palette": META["palette"], "ignore": [], "zero_is_ignored": False}
    (root / "dataset.json").write_text(json.dumps(about))
    return root
