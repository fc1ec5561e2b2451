"""Segmentation measured: a training step and a prediction, as MMSegmentation makes them and as ours are made.

Everything runs in turns in one process on random pixels and blocks of labels; medians. Peak memory: one step in a
process of its own.
"""

import argparse
import functools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tinymim.cli import run_command
from tinymim.files import environment, write_json, write_text

CONTENDERS = {  # name -> (losses in strips, bfloat16)
    "MMSegmentation": (False, False),
    "ours": (True, False),
    "MMSegmentation, bf16": (False, True),
    "ours, bf16 (--amp)": (True, True),
}
KINDS = {  # part of an operator's name -> kind; the first that fits
    "upsample": "up-sampling",
    "convolution": "convolutions",
    "softmax": "softmax",
    "nll_loss": "softmax",
    "topk": "top-k (accuracy)",
    "attention": "attention",
    "mm": "matrix products",
    "linear": "matrix products",
    "optimizer": "optimizer",
}
PHOTOS = {  # name -> (as the network sees it, its own size), height x width
    "512x683": ((512, 683), (512, 683)),
    "512x683 -> 1080x1440": ((512, 683), (1080, 1440)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--config", default="upernet_tinymim_t_light", help="a config of mmseg_configs, or a file")
    parser.add_argument("--batch", type=int, default=2, help="crops a training step")
    parser.add_argument("--size", type=int, default=512, help="pixels of a crop and of a window")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender")
    parser.add_argument("--photos", type=int, default=4, help="photos that ours predicts together")
    parser.add_argument("--parts", nargs="+", choices=("train", "predict", "memory"), default=["train", "predict"])
    parser.add_argument("--data-root", metavar="FOLDER", help="labelled folder: also time its training samples")
    parser.add_argument("--profile", action="store_true", help="time by kind of operation, of one step each")
    parser.add_argument("--device", help="cpu or cuda; default a GPU if there is one")
    parser.add_argument("--out", metavar="NAME", help="NAME.json, NAME.md; default docs/bench_seg_MACHINE")
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)  # one step in this process: its memory


def build(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The config at the wanted size, its model on the device, the device's kind."""
    import torch
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    from tinymim.compat import use_device
    from tinymim.seg.config import building, find_config, plain_batch_norm

    kind = use_device(args.device)
    cfg = find_config(args.config)
    plain_batch_norm(cfg)
    size = (args.size, args.size)
    cfg.model.data_preprocessor.size = cfg.model.backbone.img_size = size
    stride = (round(args.size * 2 / 3),) * 2
    cfg.model.test_cfg = dict(mode="slide", crop_size=size, stride=stride)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    with building("model"):
        return cfg, MODELS.build(cfg.model).to(kind), kind


class Step:
    """A training step of one contender; all of them train one model.

    Args:
        cfg: The config.
        model: Its model.
        kind: "cpu" or "cuda".
        batch: Crops a step.
        tiled: Losses in strips.
        half: bfloat16 products.
    """

    def __init__(self, cfg: Any, model: Any, kind: str, batch: int, *, tiled: bool, half: bool) -> None:
        import torch
        from mmengine.optim import build_optim_wrapper
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        from tinymim.seg.loss import tile_losses

        for head in model.children():
            vars(head).pop("loss_by_feat", None)
        if tiled:
            tile_losses(model)
        self.patched = {head: vars(head).get("loss_by_feat") for head in model.children()}
        self.model, self.kind, self.half = model.train(), kind, half
        self.optimizer = build_optim_wrapper(model, {**cfg.optim_wrapper, "type": "OptimWrapper"})
        height, width = cfg.model.data_preprocessor.size
        torch.manual_seed(0)
        labels = torch.randint(0, model.num_classes, (batch, 1, math.ceil(height / 32), math.ceil(width / 32)))
        labels = labels.repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :height, :width]
        photos = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
        self.data = {"inputs": list(photos), "data_samples": samples}

    def __call__(self) -> float:
        """Take the step; return its loss."""
        import torch

        for head, own in self.patched.items():
            vars(head).pop("loss_by_feat", None)
            if own is not None:
                head.loss_by_feat = own
        data = self.model.data_preprocessor(self.data, True)
        with torch.autocast(self.kind, torch.bfloat16) if self.half else nullcontext():
            losses = self.model.loss(data["inputs"], data["data_samples"])
        loss, _ = self.model.parse_losses(losses)
        self.optimizer.update_params(loss)
        return float(loss.detach())


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int, wait: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of every call, (rounds,) for each contender, after one call each that is not counted."""
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            wait()
            began = time.perf_counter()
            call()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def waiting(kind: str) -> Callable[[], Any]:
    """What waits until the device has done its work."""
    import torch

    return torch.cuda.synchronize if kind == "cuda" else lambda: None


def by_kind(call: Callable[[], Any]) -> dict[str, float]:
    """Share of the time of each kind of operation in one call."""
    from torch.profiler import profile

    with profile() as profiled:
        call()
    found: dict[str, float] = {}
    for event in profiled.key_averages():
        name = event.key.lower()
        kind = next((each for part, each in KINDS.items() if part in name), "other")
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total + getattr(event, "self_device_time_total", 0.0)
    total = sum(found.values())
    return {kind: spent / total for kind, spent in sorted(found.items(), key=lambda pair: -pair[1])}


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Time the training steps."""
    cfg, model, kind = build(args)
    make = functools.partial(Step, cfg, model, kind, args.batch)
    steps: dict[str, Callable[[], Any]] = {
        name: make(tiled=tiled, half=half) for name, (tiled, half) in CONTENDERS.items()
    }
    seconds = in_turns(steps, args.rounds, waiting(kind))
    found: dict[str, Any] = {
        name: {"seconds": taken, "images_per_s": args.batch / statistics.median(taken)}
        for name, taken in seconds.items()
    }
    if args.profile:
        for name, step in steps.items():
            found[name]["by_kind"] = by_kind(step)
    return found


def predictions(args: argparse.Namespace) -> dict[str, Any]:
    """Time predictions and their scoring; count the pixels that differ."""
    import torch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from tinymim.confusion import confusion_matrix
    from tinymim.seg.inference import predict
    from tinymim.seg.metric import SegMetric

    _, model, kind = build(args)
    model.eval()
    found = {}
    for name, (seen, own) in PHOTOS.items():
        label = torch.randint(0, model.num_classes, (1, *own))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for _ in range(args.photos)]
        for sample in samples:
            sample.set_metainfo(dict(ori_shape=own, img_shape=seen))
        photos = [torch.randint(0, 256, (3, *seen), dtype=torch.uint8) for _ in samples]
        masks: dict[str, list[Any]] = {}

        def theirs(photos: Any = photos, samples: Any = samples, masks: Any = masks) -> None:
            masks["MMSegmentation"] = []
            for photo, sample in zip(photos, samples, strict=True):
                (done,) = model.test_step({"inputs": [photo], "data_samples": [sample.clone()]})
                label, mask = done.gt_sem_seg.data.cpu().numpy(), done.pred_sem_seg.data.cpu().numpy()
                confusion_matrix(label, mask, model.num_classes, 255)
                masks["MMSegmentation"].append(done.pred_sem_seg.data)

        def ours(photos: Any = photos, samples: Any = samples, masks: Any = masks) -> None:
            done = predict(model, {"inputs": photos, "data_samples": [sample.clone() for sample in samples]})
            SegMetric().process({}, [sample.to_dict() for sample in done])
            masks["ours"] = [sample.pred_sem_seg.data for sample in done]

        with torch.inference_mode():
            seconds = in_turns({"MMSegmentation": theirs, "ours": ours}, args.rounds, waiting(kind))
        pairs = zip(masks["MMSegmentation"], masks["ours"], strict=True)
        other = sum(int((a != b).sum()) for a, b in pairs)
        found[name] = {
            each: {"seconds": taken, "ms_per_photo": 1000 * statistics.median(taken) / args.photos}
            for each, taken in seconds.items()
        } | {"other_pixels": other, "pixels": args.photos * own[0] * own[1]}
    return found


def peak(args: argparse.Namespace) -> int:
    """Take one step and print the peak memory in MiB: of the GPU, or of this process (on Linux)."""
    import torch

    cfg, model, kind = build(args)
    tiled, half = CONTENDERS[args.peak]
    step = Step(cfg, model, kind, args.batch, tiled=tiled, half=half)
    step()
    if kind == "cuda":
        print(torch.cuda.max_memory_allocated() // 2**20)
    else:
        lines = Path("/proc/self/status").read_text("utf-8-sig").splitlines()
        print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")))
    return 0


def memory(args: argparse.Namespace) -> dict[str, int]:
    """Peak memory of a training step of each contender, MiB."""
    found = {}
    for name in CONTENDERS:
        words = ["--config", args.config, "--batch", args.batch, "--size", args.size, "--peak", name]
        words += ["--device", args.device] if args.device else []
        command = [sys.executable, "-m", "tinymim.benchmarks.seg_step", *map(str, words)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = int(said.rsplit(maxsplit=1)[-1])
    return found


def samples(args: argparse.Namespace) -> float:
    """Milliseconds that one data worker takes for a training sample of a labelled folder."""
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    from tinymim.seg.config import find_config

    init_default_scope("mmseg")
    dataset = DATASETS.build({**find_config(args.config).train_dataloader.dataset, "data_root": args.data_root})
    taken = []
    for i in range(min(len(dataset), 24)):
        began = time.process_time()
        dataset[i, i]
        taken.append(time.process_time() - began)
    return 1000 * statistics.median(taken)


def table(found: dict[str, Any]) -> str:
    """The page."""
    env, about = found["environment"], found["about"]
    lines = ["# Segmentation: a training step and a prediction", "", f"`{about['command']}`, in turns, medians.", ""]
    if train := found.get("train"):
        base, used = train["MMSegmentation"]["images_per_s"], found.get("memory", {})
        lines += [f"Training, {about['batch']} crops of {about['size']} pixels a step:", ""]
        lines += ["| step | images/s | ratio | peak MiB |", "|---|---|---|---|"]
        for name, row in train.items():
            rate = row["images_per_s"]
            lines.append(f"| {name} | {rate:.2f} | {rate / base:.2f} | {used.get(name, 'not measured')} |")
        lines.append("")
        for name, row in train.items():
            if shares := row.get("by_kind"):
                lines.append(f"{name}: " + ", ".join(f"{kind} {100 * part:.0f} %" for kind, part in shares.items()))
                lines.append("")
    if made := found.get("predict"):
        lines += [f"Prediction and scoring, {about['photos']} photos, windows of {about['size']} pixels:", ""]
        lines += ["| photo | MMSegmentation ms | ours ms | ratio | pixels that differ |", "|---|---|---|---|---|"]
        for name, row in made.items():
            theirs, ours = (row[each]["ms_per_photo"] for each in ("MMSegmentation", "ours"))
            differ = f"{row['other_pixels']} of {row['pixels']:,}"
            lines.append(f"| {name} | {theirs:.0f} | {ours:.0f} | {theirs / ours:.2f} | {differ} |")
        lines.append("")
    if "sample_ms" in found:
        lines += [f"A training sample of {about['data_root']} takes a data worker {found['sample_ms']:.0f} ms.", ""]
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in ("tinymim", "torch", "mmsegmentation"))
    return "\n".join([*lines, f"{env['cpu']}, {env['cores']} cores; {versions}."]) + "\n"


def run(args: argparse.Namespace) -> int:
    """Measure, write NAME.json and NAME.md."""
    if args.peak:
        return peak(args)
    from tinymim.benchmarks.distill_tables import machine
    from tinymim.compat import use_device

    about = {name: getattr(args, name) for name in ("config", "batch", "size", "rounds", "photos", "data_root")}
    about["command"] = f"tools/bench_seg.py --config {args.config} --batch {args.batch} --size {args.size}"
    found: dict[str, Any] = {"kind": "tinymim.bench_seg", "environment": environment(), "about": about}
    out = args.out or f"docs/bench_seg_{machine(use_device(args.device))}"
    for name, measure in (("memory", memory), ("train", train), ("predict", predictions)):
        if name in args.parts:
            found[name] = measure(args)
    if args.data_root:
        found["sample_ms"] = samples(args)
    write_json(f"{out}.json", found)
    write_text(f"{out}.md", table(found))
    print(table(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("bench_seg", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
