"""``tinymim contract --segmentor``: a whole segmentor is made smaller."""

import argparse
import hashlib
import logging
import shlex
import tempfile
from pathlib import Path
from typing import Any

OTHERS = (  # options of backbones and classifiers
    ("start", "--from"),
    ("num_heads", "--num-heads"),
    ("img_size", "--img-size"),
    ("recipe", "--recipe"),
    ("data", "--data"),
    ("val_data", "--val-data"),
    ("probe_data", "--probe-data"),
    ("teacher", "--teacher"),
    ("teacher_weights", "--teacher-weights"),
    ("targets", "--targets"),
    ("store", "--store"),
)


def check(args: argparse.Namespace) -> None:
    """Refuse options that a segmentor's search has not, and its own without one.

    Raises:
        ConfigError: such an option.
    """
    from tinymim.errors import ConfigError

    if args.segmentor is None:
        for name, option in (("data_root", "--data-root"), ("size", "--size"), ("amp", "--amp")):
            if getattr(args, name):
                raise ConfigError(f"{option} without --segmentor", "it is for segmentors", "add --segmentor CONFIG")
        return
    for name, option in OTHERS:
        if getattr(args, name) is not None:
            raise ConfigError(
                f"{option} with --segmentor",
                "a segmentor is scored by a short training on the labels of --data-root",
                f"leave {option} out" + (", or name the file: --segmentor FILE" if name == "start" else ""),
            )
    if Path(args.segmentor).suffix == ".pth" and args.weights is not None:
        raise ConfigError("--weights with a segmentor's file", "it has its own weights", "leave --weights out")


def open_segmentor(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The segmentor to shrink, in evaluation mode; its whole config; and what names it in the search's settings."""
    import torch

    from tinymim.contract.segmentor import check as check_config
    from tinymim.data.folders import read_layout
    from tinymim.files import describe_file
    from tinymim.literals import read_literals
    from tinymim.models.weight_files import open_described
    from tinymim.progress import say
    from tinymim.seg import load_segmentor
    from tinymim.seg.config import build_model as build
    from tinymim.seg.config import config_text, find_config, heads, plain_batch_norm
    from tinymim.seg.shape import take_shape

    if Path(args.segmentor).suffix == ".pth":
        model, cfg = load_segmentor(args.segmentor)
        text = open_described(args.segmentor)[1].get("config")
        if isinstance(text, str):
            cfg = type(cfg)(read_literals(text, args.segmentor))  # with what trains it
        check_config(cfg)
        return model, cfg, describe_file(args.segmentor)
    cfg = find_config(args.segmentor)
    check_config(cfg)
    plain_batch_norm(cfg)
    take_shape(cfg, args.weights, None)
    digest = hashlib.sha256(config_text(cfg).encode()).hexdigest()
    named = {"config": digest, "weights": args.weights and describe_file(args.weights)}
    layout = None if args.data_root is None else read_layout(args.data_root)
    if layout is not None:
        for head in heads(cfg):
            head.num_classes = len(layout.classes)
    if args.weights is None:
        say(f"note: {args.segmentor} has random weights (--weights FILE loads a backbone's): nothing is inherited")
    else:
        cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(args.weights))
    torch.manual_seed(args.seed)
    model = build(cfg)
    logging.disable(logging.INFO)  # MMEngine tells of every tensor
    try:
        model.init_weights()
    finally:
        logging.disable(logging.NOTSET)
    model.cfg = cfg
    model.dataset_meta = {
        "classes": layout and [*layout.classes],
        "palette": layout and [[*colour] for colour in layout.palette],
    }
    return model.eval(), cfg, named


def counter(start: Any, size: tuple[int, int]) -> Any:
    """(segmentor without values, its config) -> parameters and multiply-adds of the file that it becomes."""
    from tinymim_export.graph.cost import pieces, totals
    from tinymim_export.graph.torch_model import TorchModel

    def traced(model: Any, cfg: Any) -> tuple[int, int]:
        loaded = TorchModel(model, "segmentor", ("logits",), lambda x: (x,), size, {}, cfg=cfg)
        parts = pieces(loaded, size).parts.values()
        return sum(part.params for part in parts), sum(part.macs for part in parts)

    exact = traced(start, start.cfg) == totals(start, size)  # every level is read
    return (lambda model, cfg: totals(model, size)) if exact else traced


def prepare(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """What is shrunk, how it is scored, and the settings of the search."""
    from tinymim.contract.segment_score import SegmentScore
    from tinymim.contract.segmentor import Segmentors
    from tinymim_export.graph.torch_model import load_torch_model

    model, cfg, source = open_segmentor(args)
    kind = Segmentors(model, cfg)
    if args.size is None:
        with tempfile.TemporaryDirectory() as folder:
            kind.save(model, Path(folder) / "start.pth")
            args.size = load_torch_model(Path(folder) / "start.pth").size
    args.size = tuple(args.size)
    kind.count_with(counter(kind.start, args.size))
    settings = {name: getattr(args, name) for name in ("data_root", "batch_size", "lr", "device")}
    options = {**(args.cfg_options or {}), "randomness.seed": args.seed}
    if args.workers is not None:
        options |= {f"{split}_dataloader.num_workers": args.workers for split in ("train", "val")}
    score = SegmentScore(args.steps, {**settings, "amp": args.amp}, options)
    return kind, score, {"start": source, "score": score.described(), "size": list(args.size)}


def write(args: argparse.Namespace, kind: Any, result: Any) -> list[tuple[str, str]]:
    """Write ``config.py``, which trains what was found; (what it does, what to type now)."""
    from tinymim.files import write_text
    from tinymim.seg.config import config_text

    cfg = kind.config_of(result.chosen[-1]["config"])
    cfg.model.init_cfg = dict(type="Pretrained", checkpoint=str(result.student.resolve()))
    cfg.custom_imports = dict(imports=["tinymim.seg"])
    head = f'"""The segmentor that tinymim contract found: {args.segmentor}, smaller; its weights go on."""\n\n'
    write_text(result.out / "config.py", head + config_text(cfg))
    out, root = shlex.quote(str(result.out)), shlex.quote(str(args.data_root))
    height, width = args.size
    return [
        ("Train it", f"tinymim segment {out}/config.py --data-root {root} --work-dir {out}/trained"),
        (
            "Export it",
            f"tinymim-export --onnx {out}/segmentor.onnx --checkpoint {out}/segmentor.pth --size {height} {width}",
        ),
    ]
