"""The parts of ``tools/gpu_check.py``, each a function that a process of its own calls; on a CPU as far as one can.

A part returns its figures, raises :class:`CheckFailed` (or anything else) if a check fails, and :class:`NotPossible`
where the machine lacks what it needs.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.errors import CheckFailed
from tinymim.files import write_json

ROOT = Path(__file__).resolve().parents[2]


class NotPossible(Exception):
    """The machine lacks what a part needs."""


@dataclass(frozen=True)
class Machine:
    """Where a part runs.

    Attributes:
        device: "cuda" or "cpu".
        quick: Smallest sizes, for a test.
        out: Folder for files that come back.
    """

    device: str
    quick: bool
    out: Path

    def needs_gpu(self, what: str) -> None:
        """Refuse a CPU."""
        if self.device != "cuda":
            raise NotPossible(f"{what} needs a GPU")


def golden(machine: Machine) -> dict[str, Any]:
    """The golden numbers in float32, float16 and bfloat16; tolerances: relative of scalars, of the largest value."""
    import torch

    from tinymim.cli import doctor

    torch.backends.cudnn.allow_tf32 = False
    figures, failed = {}, []
    for name, autocast, scalars, arrays in (
        ("fp32", None, 5e-5, 5e-5),
        ("fp16", torch.float16, 1e-2, 3e-3),
        ("bf16", torch.bfloat16, 4e-2, 2e-2),
    ):
        checks = [*doctor.relations(machine.device, autocast, scalars)]
        for backbone in ("seg_backbone_base", "seg_backbone_star_t"):
            checks += doctor.backbone(backbone, machine.device, autocast, (scalars, arrays))
        failed += [f"{name}: {check.name}: {check.detail}" for check in checks if not check.passed]
        figures[name] = {"tolerance": [scalars, arrays], **{check.name: check.detail for check in checks}}
    if failed:
        raise CheckFailed("golden numbers", "; ".join(failed), "see the figures")
    return figures


def kernel(machine: Machine) -> dict[str, Any]:
    """The relation losses beside their plain form at three lengths: value and gradient, memory, time."""
    import torch

    from tinymim.distill.relations import relation_kl, relation_losses

    heads = 16
    figures: dict[str, Any] = {}
    for tokens, batch in ((17, 1),) if machine.quick else ((197, 32), (1025, 4), (4097, 1)):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            torch.manual_seed(tokens)
            given = [torch.randn(batch, tokens, 3 * width, device=machine.device).to(dtype) for width in (768, 1024)]

            def sides(of: torch.dtype, given: Any = given) -> tuple[Any, list[dict[str, Any]]]:
                both = [x.to(of).detach().requires_grad_(not i) for i, x in enumerate(given)]
                return both[0], [dict(zip("qkv", x.chunk(3, -1), strict=True)) for x in both]

            def logits(side: dict[str, Any], a: str, b: str) -> Any:
                a_BHTC, b_BHTC = (side[name].unflatten(2, (heads, -1)).transpose(1, 2) for name in (a, b))
                return (a_BHTC * a_BHTC.shape[-1] ** -0.5) @ b_BHTC.transpose(2, 3)

            def plain(of: torch.dtype, sides: Any = sides) -> tuple[Any, Any]:
                leaf, both = sides(of)
                pairs = [[logits(side, a, b) for side in both] for a, b in ("qk", "vv")]
                loss: Any = sum(relation_kl(*pair) for pair in pairs)
                return loss.detach(), torch.autograd.grad(loss, leaf)[0]

            def ours(sides: Any = sides, of: torch.dtype = dtype) -> tuple[Any, Any]:
                leaf, both = sides(of)
                loss: Any = sum(relation_losses(both[0], both[1], heads).values())
                return loss.detach(), torch.autograd.grad(loss, leaf)[0]

            # 4097 tokens in float64 would take longer than all the rest
            wanted = plain(torch.float64 if tokens < 4000 else torch.float32)
            errors = [float((x - y).double().norm() / y.double().norm()) for x, y in zip(ours(), wanted, strict=True)]
            row: dict[str, Any] = {"batch": batch, "tolerance": tolerance, "loss": errors[0], "gradient": errors[1]}
            for name, form in (("ours", ours), ("plain", lambda plain=plain: plain(torch.float32))):
                row |= {f"{name} {key}": value for key, value in timed(form, machine).items()}
            figures[f"{tokens} tokens {str(dtype)[6:]}"] = row
            if not max(errors) < tolerance:
                raise CheckFailed(f"relation losses of {tokens} tokens", f"{row}", "compare the forms on the CPU")
    return figures


def timed(body: Callable[[], object], machine: Machine) -> dict[str, float]:
    """Median milliseconds of a body and, on a GPU, the memory that it takes beyond what is there, MiB."""
    import torch

    wait = torch.cuda.synchronize if machine.device == "cuda" else (lambda: None)
    body()
    before = 0
    if machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(2 if machine.quick else 10):
        wait()
        began = time.perf_counter()
        body()
        wait()
        times.append(1000 * (time.perf_counter() - began))
    memory = {"mib": (torch.cuda.max_memory_allocated() - before) / 2**20} if machine.device == "cuda" else {}
    return {"ms": statistics.median(times), **memory}


def bench_distill(machine: Machine) -> dict[str, Any]:
    """The benchmark of the step: ViT-B from ViT-L at 224 pixels beside the published one."""
    from tinymim.benchmarks import distill_step, distill_tables

    out = machine.out / f"bench_distill_{distill_tables.machine(machine.device)}"
    options = ["--check"] if machine.quick else ["--pair", "B<-L", "--size", "224", "--rounds", "6", "--loss"]
    if distill_step.main([*options, "--device", machine.device, "--out", str(out)]):
        raise CheckFailed("tools/bench_distill.py failed", "its error is in the log", "run it alone")
    rows = distill_tables.read_results(Path(f"{out}.json"))["rows"]
    steps = {f"{row['what']} {step['name']}": step for row in rows for step in row["steps"]}
    if failed := [f"{name}: {step['failed']}" for name, step in steps.items() if step["failed"]]:
        raise CheckFailed("steps that could not be measured", "; ".join(failed), "choose a smaller --batch")
    return {
        name: {key: step.get(key) for key in ("images_per_s", "times_as_fast", "peak_mib", "utilisation")}
        for name, step in steps.items()
    }


def commands(machine: Machine) -> dict[str, Any]:
    """distill, its resumption and finetune through torchrun, one process."""
    from tinymim.benchmarks.distill_step import draw_photos
    from tinymim.models import create_model, save_student

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = draw_photos(folder, "96x80", 16)
        for split in ("train", "val"):
            for group in range(2):
                (folder / split / f"class{group}").mkdir(parents=True)
                for path in sorted(photos.iterdir())[group::2]:
                    (folder / split / f"class{group}" / path.name).hardlink_to(path)
        teacher = create_model("tinymim_vit_tiny", img_size=64, depth=3)
        save_student(teacher, folder / "teacher.pth")
        common = ["--device", machine.device, "--batch-size", "8", "--workers", "1"]
        distil = [
            *("distill", "--teacher", str(folder / "teacher.pth"), "--data", str(photos), "--out", str(folder / "run")),
            *("--student", "tinymim_vit_tiny", "--img-size", "64", "--max-steps", "6", "--save-every", "3", *common),
            *("--cfg-options", "student_args.depth=3", "student_args.embed_dim=48", "watch_every=0"),
        ]
        tune = [
            *("finetune", "--student", str(folder / "run" / "student.pth"), "--data", str(folder / "train")),
            *("--val-data", str(folder / "val"), "--out", str(folder / "tuned"), "--img-size", "64"),
            *("--max-steps", "3", *common),
        ]
        for title, argv in (("distill", distil), ("resumed", [*distil, "--resume"]), ("finetune", tune)):
            if title == "resumed":  # the newest state is that of step 3: steps 4 to 6 are run again
                (newest,) = folder.glob("run/checkpoints/*6.pth")
                before = read_losses(folder / "run")
                newest.unlink()
            launched([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"], argv)
            if title == "resumed":
                after = read_losses(folder / "run")  # bit for bit on a CPU; a GPU sums in any order
                off = max(abs(x - y) / y for x, y in zip(after, before, strict=True))
                if off > (1e-3 if machine.device == "cuda" else 0):
                    raise CheckFailed("a resumed run differs", f"{after} after {before}", "compare on the CPU")
            figures[title] = "ok"
        figures["loss of the last steps"] = read_losses(folder / "run")[-1]
    return figures


def read_losses(folder: Path) -> list[float]:
    """The losses of a run, step by step."""
    lines = (folder / "metrics.jsonl").read_text("utf-8-sig").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def launched(launcher: list[str], argv: list[str]) -> None:
    """Run ``tinymim`` behind a launcher.

    Raises:
        CheckFailed: it failed; its last lines.
    """
    done = subprocess.run([*launcher, "tinymim", *argv], capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        first = next((i for i, line in enumerate(lines) if "rror" in line), -8)  # torchrun's own report comes after it
        text = " / ".join(lines[first:][:8])
        raise CheckFailed(f"tinymim {argv[0]} ended with {done.returncode}", text, "run it alone")


@contextmanager
def group_of_one(machine: Machine) -> Iterator[str]:
    """A process group of this process: NCCL, gloo on a CPU; its name."""
    import torch.distributed as dist

    backend = "nccl" if machine.device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group(backend, init_method=f"file://{name}/join", rank=0, world_size=1)
        try:
            yield backend
        finally:
            dist.destroy_process_group()


def distillation(machine: Machine) -> tuple[Any, dict[str, Any]]:
    """The model of ``tinymim distill``, ViT-T from ViT-S in float32, always the same; and a batch of random pixels."""
    from tinymim.benchmarks.contenders import MeasuredJob, Setup
    from tinymim.benchmarks.distill_step import draw_photos

    with tempfile.TemporaryDirectory() as name:
        photos = draw_photos(Path(name), "64x48", 4)
        setup = Setup("T", "S", 32 if machine.quick else 224, 4, "fp32", machine.device, str(photos), drop_path=0.0)
        job = MeasuredJob(setup, Path(name) / "run")
        job.plan()
        job.build()
        return job.model, job.model.example(job.config, 4, machine.device)


def nccl(machine: Machine) -> dict[str, Any]:
    """A process group of one (NCCL; gloo on a CPU): sums, and DDP's gradients of the real model against plain ones."""
    import torch
    import torch.distributed as dist

    model, batch = distillation(machine)
    model(**batch)["loss"].backward()
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    plain = {key: p.grad.clone() for key, p in named if p.grad is not None}
    with group_of_one(machine) as backend:
        ones = torch.ones(4, device=machine.device)
        dist.all_reduce(ones)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        model.zero_grad()
        wrapped(**batch)["loss"].backward()
        worst = max(float((p.grad - plain[key]).abs().max()) for key, p in named if p.grad is not None)
    if worst > 1e-4 or float(ones.sum()) != 4:
        raise CheckFailed(f"{backend} in a world of one", f"gradients differ by {worst}", "run it alone")
    return {"backend": backend, "largest difference of a gradient": worst}


def fsdp(machine: Machine) -> dict[str, Any]:
    """FSDP2 in a group of one: steps beside plain ones, a loss that is not finite, stored moments; on a GPU float16."""
    import torch
    from mmengine.optim import AmpOptimWrapper, OptimWrapper

    from tinymim.engine.model import NonFiniteLoss, parameter_groups
    from tinymim.engine.parallel import shard, shard_moments, whole

    def prepared(model: Any, bare: Any, kind: Any = OptimWrapper, **more: Any) -> tuple[Any, Callable[[], float]]:
        optimizer = torch.optim.AdamW(parameter_groups(bare, 0.05), lr=1e-4, fused=True)
        bare.guard(optimizer)
        wrapper = kind(optimizer=optimizer, **more)
        wrapper.initialize_count_status(model, 0, 100)

        def step() -> float:
            loss = model.train_step(batch, wrapper)["loss"]
            bare.check_finite()
            return float(loss)

        return optimizer, step

    model, batch = distillation(machine)
    with group_of_one(machine):
        _, step = prepared(model, model)
        plain = [step() for _ in range(3)]
        bare, _ = distillation(machine)
        model = shard(bare, batch, machine.device)
        optimizer, step = prepared(model, bare)
        losses = [step() for _ in range(3)]
        worst = max(abs(one - other) / other for one, other in zip(losses, plain, strict=True))
        if not worst < 1e-3:
            raise CheckFailed("losses under FSDP2", f"{losses}, without {plain}", "compare on the CPU")
        before, mean = whole(bare.learned.state_dict()), bare.mean.clone()
        bare.mean.fill_(float("nan"))
        try:
            step()
        except NonFiniteLoss:
            bare.mean.copy_(mean)
        else:
            raise CheckFailed("a loss that is not finite under FSDP2", "nothing refused it", "run it alone")
        after = whole(bare.learned.state_dict())
        if wrong := [name for name in before if not torch.equal(before[name], after[name])]:
            raise CheckFailed("a loss that is not finite reached the weights", ", ".join(wrong[:5]), "run it alone")
        optimizer.load_state_dict(shard_moments(whole(optimizer.state_dict()), optimizer))
        figures = {"losses differ by": worst, "loss of a step with stored moments": step()}
        if machine.device == "cuda":
            _, half = prepared(model, bare, AmpOptimWrapper, dtype="float16")
            figures["loss in float16"] = [half() for _ in range(3)][-1]
    return figures


def segmentation(machine: Machine) -> dict[str, Any]:
    """``tinymim segment --amp`` on drawn scenes, with validation."""
    from tinymim.cli import main as tinymim
    from tinymim.demo.scenes import write_scenes

    steps = 2 if machine.quick else 20
    with tempfile.TemporaryDirectory() as name:
        scenes = write_scenes(Path(name) / "scenes", train=8, val=2, size=(160, 128))
        argv = [
            *("segment", "upernet_tinymim_demo", "--data-root", str(scenes), "--work-dir", f"{name}/run", "--amp"),
            *("--device", machine.device, "--cfg-options", f"train_cfg.max_iters={steps}"),
            *(f"train_cfg.val_interval={steps}", "train_dataloader.num_workers=0", "val_dataloader.num_workers=0"),
        ]
        if tinymim(argv):
            raise CheckFailed("tinymim segment --amp failed", "its error is in the log", "run it alone")
        return {"steps": steps}


def sync_bn(machine: Machine) -> dict[str, Any]:
    """One step of our segmentor with SyncBN, in float16 under autocast, in an NCCL world of one."""
    machine.needs_gpu("SyncBN")
    import torch
    import torch.distributed as dist

    import tinymim.seg  # noqa: F401  (must come before mmseg)

    from mmengine.registry import init_default_scope  # isort: skip
    from mmseg.registry import MODELS  # isort: skip

    from tinymim.seg.config import find_config, plain_batch_norm

    cfg = find_config("upernet_tinymim_demo")
    plain_batch_norm(cfg)
    init_default_scope("mmseg")
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("nccl", init_method=f"file://{name}/join", rank=0, world_size=1)
        try:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(MODELS.build(cfg.model)).cuda().train()
            with torch.autocast("cuda", torch.float16):
                logits = model._forward(torch.randn(2, 3, 128, 128, device="cuda")).float()
            loss = torch.nn.functional.cross_entropy(logits, torch.zeros_like(logits[:, 0]).long())
            loss.backward()
            layers = sum(isinstance(each, torch.nn.SyncBatchNorm) for each in model.modules())
        finally:
            dist.destroy_process_group()
    if not layers or not torch.isfinite(loss):
        raise CheckFailed("SyncBN", f"{layers} layers, loss {float(loss)}", "run it alone")
    return {"layers": layers, "loss": float(loss)}


def deployment(machine: Machine) -> dict[str, Any]:
    """Export, its float16 copy and their parity, and the bench table, all on the CPU's provider."""
    return exported(machine, "cpu")


def cuda_provider(machine: Machine) -> dict[str, Any]:
    """The same files by ONNX Runtime's CUDA provider, which may not fall back to another."""
    machine.needs_gpu("ONNX Runtime's CUDA provider")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise NotPossible("this onnxruntime has no CUDAExecutionProvider: onnxruntime-gpu is not installed")
    return exported(machine, "cuda")


def exported(machine: Machine, provider: str) -> dict[str, Any]:
    """Parity of a float32 and a float16 file, and their times on a provider (bench refuses one that falls back)."""
    import torch

    from tinymim.models import create_model, save_student
    from tinymim_export import bench, export
    from tinymim_export.precision.quantize import quantize

    torch.manual_seed(0)
    size = 64 if machine.quick else 224
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_student(create_model("tinymim_vit_tiny", img_size=size), folder / "student.pth")
        made = export(folder / "student.pth", folder / "fp32.onnx", part="backbone", size=(size, size))
        half = quantize(folder / "fp32.onnx", folder / "fp16.onnx", precision="fp16")
        files = [folder / "fp32.onnx", folder / "fp16.onnx"]
        table = bench(files, provider=provider, seconds=0.2 if machine.quick else 3.0).to_markdown()
    return {"fp32": made.parity.summary(), "fp16": half.parity.summary(), "bench": table}


def tests(machine: Machine) -> dict[str, Any]:
    """The repository's tests that skip without a GPU (marked ``gpu`` by tests/conftest.py)."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if GPU_TEST in path.read_text("utf-8")]
    if not files:
        return {"said": "no test needs a GPU"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = done.stdout.strip().splitlines()[-1:]
    if done.returncode:
        raise CheckFailed("tests that need a GPU", done.stdout[-1500:], f"python -m pytest -m gpu {' '.join(files)}")
    return {"said": said}


GPU_TEST = 'reason="needs a GPU"'  # of their skipif

PARTS: dict[str, tuple[Callable[[Machine], dict[str, Any]], int]] = {  # in order; seconds each may take
    "golden": (golden, 60),
    "kernel": (kernel, 90),
    "bench_distill": (bench_distill, 180),
    "commands": (commands, 120),
    "nccl": (nccl, 60),
    "fsdp": (fsdp, 60),
    "segmentation": (segmentation, 60),
    "sync_bn": (sync_bn, 60),
    "deployment": (deployment, 90),
    "cuda_provider": (cuda_provider, 60),
    "tests": (tests, 90),
}


def run_part(name: str, machine: Machine, result: Path) -> None:
    """Body of a part's process: its verdict and figures as JSON."""
    try:
        value = {"verdict": "ok", "figures": PARTS[name][0](machine)}
    except NotPossible as error:
        value = {"verdict": "not possible", "why": str(error)}
    except Exception as error:
        traceback.print_exc()
        value = {"verdict": "failed", "why": f"{type(error).__name__}: {error}"[:2000]}
    write_json(result, value)


if __name__ == "__main__":
    _, part, device, quick, out, target = sys.argv
    run_part(part, Machine(device, quick == "1", Path(out)), Path(target))
