"""Does the .onnx file match PyTorch? Always checked, at several sizes and batches; a failure fails the export.

Passes (float32) if, for every output, size and batch: largest error <= 1e-4 of the largest reference value,
cosine >= 0.999999, and for segmentors >= 99.9 % of the pixels have the same class. Fixed-size files run at their size
with batches of 1 and 3 and must refuse another size (the table has what it said); dynamic files run at the traced size,
at one that is not square and at one that is not a multiple of the patch. The reference is the model's own forward:
original pooling, nothing replaced. A control shows that the comparison can fail. Segmentors are also compared as a
whole, from a photo's pixels to its mask (``own_test.py``).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinymim.errors import ConfigError, DataError
from tinymim_export.comparison import MAX_ERROR, MIN_EQUAL, ParityResult, Row, figures
from tinymim_export.graph.own_test import own_test
from tinymim_export.runtime.metadata import (
    check_verified,
    first_line,
    graph_sha256,
    load_proto,
    mark,
    not_onnx,
    proto_metadata,
    save_proto,
    write_metadata,
)
from tinymim_export.runtime.photos import load_photos, normalise
from tinymim_export.runtime.sessions import PROVIDERS


def compare(
    proto: Any, loaded: Any, *, file: str, photos: str | Path | None = None, seed: int = 0, extra: Sequence[Row] = ()
) -> ParityResult:
    """Compare an ONNX ModelProto with the PyTorch model it was made from.

    Args:
        proto: The model; its input is ``image``, and its metadata holds the traced size.
        loaded: :class:`tinymim_export.graph.torch_model.TorchModel`.
        file: Name for the report.
        photos: Folder of real photos to also compare on.
        seed: Seed of the random inputs.
        extra: Rows of earlier checks, put first.

    Raises:
        DataError: ONNX Runtime cannot open the model, or the photos cannot be read.
    """
    result = ParityResult(file, list(extra), graph_sha256(proto))
    session, mask = _session(proto, file)
    given = session.get_inputs()[0].shape
    fixed = all(isinstance(side, int) for side in given[2:])
    traced = tuple(given[2:]) if fixed else tuple(proto_metadata(proto)["cost"]["size"])
    sizes = [traced] if fixed else other_sizes(traced, loaded.contract["stride"], loaded.multiple or 1)
    real = load_photos(photos) if photos is not None else []
    random = np.random.default_rng(seed)
    for size in sizes:
        for batch in (1, 3):
            images = random.standard_normal((batch, 3, *size)).astype(np.float32)
            result.rows += _rows(session, loaded, images, "random", mask)
        if size == traced and result.passed:
            result.rows.append(_control(session, loaded, images))
        if real:
            images = np.stack([normalise(photo, size, loaded.contract) for photo in real[:4]])
            result.rows += _rows(session, loaded, images, "photos", mask)
    if fixed:
        result.rows.append(_refusal(session, traced))
    return result


def verify(
    onnx_path: str | Path,
    checkpoint: str | Path,
    config: str | Path | None = None,
    *,
    num_heads: int | None = None,
    photos: str | Path | None = None,
    seed: int = 0,
) -> ParityResult:
    """Verify an existing file against its checkpoint and update its metadata ``verified``.

    Args:
        onnx_path: The FP32 file.
        checkpoint: The checkpoint it was exported from.
        config: MMSegmentation configuration; None: the one stored in ``segmentor.pth``.
        num_heads: Heads per block, for foreign ViT files.
        photos: Folder of real photos to also compare on.
        seed: Seed of the random inputs.

    Raises:
        CheckFailed: its values differ from PyTorch's, or the file was changed since it was verified.
        ConfigError: the file is not a plain FP32 file.
        DataError: the file was not written by tinymim-export.
    """
    from tinymim_export.graph.torch_model import load_torch_model

    proto = load_proto(onnx_path)
    meta = proto_metadata(proto)
    if "part" not in meta or "cost" not in meta:
        raise DataError(
            f"{onnx_path} was not written by tinymim-export", "it has no tinymim.* metadata", "export it again"
        )
    if meta.get("graph") or (meta.get("precision") or {}).get("name", "fp32") != "fp32":
        raise ConfigError(
            f"{onnx_path} is not the plain FP32 file",
            "other precisions and graphs are compared with the FP32 file they were made from, with their own tolerance",
            "give that file: --from FP32.onnx instead of --checkpoint",
        )
    if meta["part"] == "tracker":
        from tinymim_export.graph.tracker import verify_tracker_file

        return verify_tracker_file(onnx_path, checkpoint, seed=seed)
    loaded = load_torch_model(checkpoint, config=config, part=meta["part"], num_heads=num_heads)
    extra = []
    if recorded := meta.get("parity", {}).get("graph_sha256"):
        same = recorded == graph_sha256(proto)
        remark = "" if same else "the file was changed after it was verified"
        extra.append(Row("graph and weights", (), "unchanged since export", passed=same, remark=remark))
    result = compare(proto, loaded, file=Path(onnx_path).name, photos=photos, seed=seed, extra=extra)
    if loaded.part == "segmentor":
        result.rows.append(_same_contract(meta, loaded.contract))
        result.rows.append(own_test(loaded, proto, None if photos is None else load_photos(photos, limit=1)[0]))
    if result.passed and check_verified(onnx_path, meta) is not True:
        mark(proto, result.summary())
        save_proto(proto, onnx_path)
    elif not result.passed and meta.get("verified"):
        write_metadata(proto, {"verified": False})
        save_proto(proto, onnx_path)
    result.require()
    return result


def _same_contract(meta: dict[str, Any], own: dict[str, Any]) -> Row:
    """Whether the file's metadata say of photos what the model's config says."""

    def said(values: dict[str, Any]) -> dict[str, Any]:
        rule = values.get("resize") or {}
        words = ("scale", "keep_ratio", "multiple", "pad", "mode", "crop", "slide_stride", "align_corners")
        found = {name: values.get(name) for name in ("mean", "std", "channel_order")}
        return json.loads(json.dumps(found | {name: rule.get(name) for name in words}))

    have, wanted = said(meta), said(own)
    differing = [f"{name} is {have[name]}, the model's {wanted[name]}" for name in have if have[name] != wanted[name]]
    return Row("metadata", (), "as the model's config", passed=not differing, remark="; ".join(differing))


def other_sizes(traced: tuple[int, int], stride: int, multiple: int = 1) -> list[tuple[int, int]]:
    """The traced size, one that is not square, one that is not a multiple of the stride (both smaller, to save time).

    For models that accept only multiples of some pixels, the last is rounded down to such a size.
    """
    height, width = (max(side // stride, 2) for side in traced)
    oblong = ((height + 1) // 2 * stride, (width * 3 // 4 + 1) * stride)
    if oblong[0] == oblong[1]:
        oblong = (oblong[0] + stride, oblong[1])
    ragged = ((oblong[0] + stride // 2 - 1) // multiple * multiple, (oblong[1] - 3) // multiple * multiple)
    return [traced, oblong, ragged]


def _session(proto: Any, file: str) -> tuple[Any, bool]:
    """A CPU session, and whether the file outputs a mask; then the logits before it become an output, too."""
    mask = [value.name for value in proto.graph.output] == ["mask"]
    if mask:
        shown = type(proto)()
        shown.CopyFrom(proto)
        shown.graph.output.append(next(value for value in proto.graph.value_info if value.name == "logits"))
        proto = shown
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=[PROVIDERS["cpu"].title]), mask
    except Exception as error:  # onnxruntime raises several kinds
        raise not_onnx(file, error) from error


def _rows(session: Any, loaded: Any, images: np.ndarray, source: str, mask: bool) -> list[Row]:
    """Run both models on the same images and compare."""
    import torch

    with torch.inference_mode():
        wanted = [value.numpy() for value in loaded.reference(torch.from_numpy(images))]
        head = getattr(loaded.model, "decode_head", None)
        if mask:
            from tinymim_export.graph.wrappers import decide

            ids = decide(torch.from_numpy(wanted[0]), head).numpy()
    try:
        got = session.run(None, {"image": images})
    except Exception as error:  # a graph that cannot run this size
        return [Row(loaded.outputs[0], images.shape, source, remark=f"onnxruntime failed: {first_line(error)}")]
    rows = []
    if mask:
        row = Row("mask", images.shape, source)
        right = got[0].shape == ids.shape and got[0].dtype == np.uint8
        row.equal_pixels = float((got[0] == ids).mean()) if right else 0.0
        row.remark = "" if right else f"gives {got[0].dtype} {got[0].shape}, not uint8 {ids.shape}"
        row.passed = row.equal_pixels >= MIN_EQUAL
        rows.append(row)
        got = got[1:]
    for name, theirs, ours in zip(loaded.outputs, wanted, got, strict=True):
        rows.append(figures(Row(name, images.shape, source), ours, theirs))
    return rows


def _refusal(session: Any, size: tuple[int, int]) -> Row:
    """A fixed-size file must refuse another size: what onnxruntime said to one, or what it gave."""
    other = (1, 3, size[0] + 16, size[1])
    try:
        got = session.run(None, {"image": np.zeros(other, np.float32)})
        given = "x".join(map(str, got[0].shape))
        return Row("another size", other, "must be refused", remark=f"was accepted and gave {given}")
    except Exception as error:  # onnxruntime's InvalidArgument and its relatives
        return Row("another size", other, "was refused", passed=True, remark=first_line(" ".join(str(error).split())))


def _control(session: Any, loaded: Any, images: np.ndarray) -> Row:
    """Can this comparison fail? The file's values on the mirrored image must not pass for the model's on the image."""
    import torch

    with torch.inference_mode():
        wanted = loaded.reference(torch.from_numpy(images[:1]))[0].numpy()
    got = session.run([loaded.outputs[0]], {"image": np.ascontiguousarray(images[:1, :, :, ::-1])})[0]
    error = float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-12))
    row = Row(loaded.outputs[0], images[:1].shape, "mirrored for the file alone", passed=True)
    said = "refused, as it must be" if error > MAX_ERROR else "NOT told apart: this output does not depend on the image"
    row.remark = f"relative error {error:.1e}: {said}"
    return row
