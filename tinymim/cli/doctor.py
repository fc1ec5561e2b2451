"""``tinymim doctor``: does this installation reproduce the golden numbers, and what does this machine offer?"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinymim.compat import use_cores
from tinymim.cores import core_limits
from tinymim.errors import CheckFailed
from tinymim.files import environment, write_json

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
SCALARS = 1e-5  # relative, for losses, gradient norms and norms of arrays
ARRAYS = 5e-6  # of the largest value: processors round differently


@dataclass
class Check:
    """One golden number compared with this machine's."""

    name: str
    passed: bool
    detail: str


@dataclass
class DoctorResult:
    """The checks and the description of the machine; prints and writes JSON."""

    checks: list[Check] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every number was reproduced."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        value = asdict(self) | {"passed": self.passed}
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def print(self) -> None:
        """Machine first, then one line per check."""
        for name, value in self.machine.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name + ':':<24}{', '.join(text) if isinstance(text, list) else text}")
        print("golden numbers:")
        for check in self.checks:
            print(f"  -[{'ok' if check.passed else 'x'}] {check.name}: {check.detail}", flush=True)
        for text in self.left_out:
            print(f"  left out: {text}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--json", default=None, metavar="FILE", help="write the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the checks, print, exit with 1 if a number differs."""
    result = doctor()
    result.print()
    if args.json:
        result.to_json(args.json)
    if not result.passed:
        bad = next(check for check in result.checks if not check.passed)
        raise CheckFailed(
            "this installation does not reproduce the golden numbers",
            f"{bad.name}: {bad.detail}",
            "install the versions of constraints.txt (pip install -e . -c constraints.txt); "
            "if that does not help, report this output",
        )
    print("next: tinymim bench FILE.onnx" if result.left_out else "next: tinymim demo")
    return 0


def doctor() -> DoctorResult:
    """Describe the machine and check every golden number. A check that raises an error has failed."""
    result = DoctorResult(machine=machine())
    result.checks += _guarded("ONNX Runtime", onnx_product)
    try:
        import torch  # noqa: F401
    except ImportError:  # a box for deployment: nothing here trains or exports
        result.left_out.append("losses, backbones and export, which need torch: it is not installed here")
        return result
    for name, replay in (
        ("token-relation losses", relations),
        ("segmentation backbone", lambda: backbone("seg_backbone_base")),
        ("segmentation backbone of TinyMIM*-T", lambda: backbone("seg_backbone_star_t")),
        ("ONNX export", onnx_export),
    ):
        result.checks += _guarded(name, replay)
    return result


def _guarded(name: str, replay: Callable[[], Iterator[Check]]) -> list[Check]:
    try:
        return list(replay())
    except Exception as error:  # finding broken packages is the purpose of this command
        return [Check(name, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")]


def machine() -> dict[str, Any]:
    """Versions, processor features, torch's threads and devices, the runtimes and their providers."""
    import onnxruntime

    from tinymim_export.runtime.engines.base import RUNTIMES, availability
    from tinymim_export.runtime.resize import import_opencv

    about = environment()
    limits = ", ".join(f"{name} {value:g}" for name, value in core_limits().items())
    flags: set[str] = set()
    if os.path.isfile("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text("utf-8-sig").splitlines()
        flags = set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())
    features = {name: "yes" if name in flags else "no" for name in FEATURES} if flags else "unknown on this system"
    try:
        import torch

        use_cores()
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        about_torch = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, GPU: {gpu}"
    except ImportError:
        about_torch = "not installed"
    return {
        "platform": about["platform"],
        "processor": about["cpu"],
        "cores": f"{about['cores']} used of {os.cpu_count()} (limits: {limits})",
        "features": features,
        "torch": about_torch,
        "onnxruntime providers": onnxruntime.get_available_providers(),
        "photos are resized by": f"OpenCV {opencv.__version__}" if (opencv := import_opencv()) else "numpy",
        "runtimes": {name: text for engine in RUNTIMES.values() for name, text in availability(engine).items()},
        "versions": about["versions"],
    }


def _fill(model: Any, prefix: str) -> None:
    """Fill every tensor with the values of its published name; positions computed by the model are kept."""
    import torch

    from tinymim.cli._golden_numbers import tensor

    learned = prefix == "backbone/"  # the segmentation backbones learn their positions
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked") or (name == "pos_embed" and not learned):
            continue
        published = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        state[name] = torch.from_numpy(tensor(prefix + published, tuple(value.shape)))
    model.load_state_dict(state, strict=False)
    model.eval()


def _near(name: str, got: float, wanted: float, tolerance: float = SCALARS) -> Check:
    error = abs(got - wanted) / abs(wanted)
    return Check(name, error <= tolerance, f"{got:.8g}, reference {wanted:.8g} (relative error {error:.1e})")


def relations(device: str = "cpu", autocast: Any = None, tolerance: float = SCALARS) -> Iterator[Check]:
    """Check the relation losses and the gradients of the student; ``autocast``: a torch type, None for float32."""
    import numpy as np
    import torch

    from tinymim.cli._golden_numbers import GOLDEN
    from tinymim.distill import TinyMIM
    from tinymim.models.backbone import from_config

    golden = GOLDEN["relations"]
    teacher, student = from_config(golden["teacher"]), from_config(golden["student"])
    _fill(teacher, "teacher/")
    _fill(student, "student/")
    draw = np.random.RandomState(golden["input_seed"])
    view = draw.standard_normal((2, 3, 64, 64))
    other = view + 0.1 * draw.standard_normal(view.shape)
    method = TinyMIM(student.to(device), teacher.to(device), target_block=golden["target_block"])
    method.eval()
    with torch.autocast(device, autocast, enabled=autocast is not None):
        losses = method.losses(*(torch.from_numpy(x.astype("float32")).to(device) for x in (other, view)))
    for name, wanted in golden["losses"].items():
        yield _near(f"relation loss {name}", float(losses[name].detach()), wanted, tolerance)
    losses["loss"].backward()
    parameters = dict(student.named_parameters())
    for name, wanted in golden["gradient_norms"].items():
        grad = parameters[name].grad
        yield _near(f"gradient of {name}", float("nan") if grad is None else float(grad.norm()), wanted, tolerance)


def backbone(
    name: str, device: str = "cpu", autocast: Any = None, tolerance: tuple[float, float] = (SCALARS, ARRAYS)
) -> Iterator[Check]:
    """Check the four levels of a segmentation backbone; tolerances of norms and of values."""
    import numpy as np
    import torch

    from tinymim.cli._golden_numbers import GOLDEN
    from tinymim.seg import TinyMIMBackbone

    golden = GOLDEN[name]
    model = TinyMIMBackbone(**golden["config"], norm_cfg=dict(type="BN"))
    _fill(model, "backbone/")
    size = golden["config"]["img_size"]
    images = np.random.RandomState(golden["input_seed"]).standard_normal((1, 3, size, size)).astype("float32")
    with torch.inference_mode(), torch.autocast(device, autocast, enabled=autocast is not None):
        levels = [level.float().cpu() for level in model.to(device)(torch.from_numpy(images).to(device))]
    for i, (level, wanted) in enumerate(zip(levels, golden["levels"], strict=True)):
        yield _near(f"{name} level {i}, norm", float(level.double().norm()), wanted["norm"], tolerance[0])
        off = np.abs(level.numpy().ravel()[wanted["at"]] - np.array(wanted["values"])).max() / wanted["largest"]
        same = list(level.shape) == wanted["shape"]
        yield Check(
            f"{name} level {i}, values", bool(same and off <= tolerance[1]), f"error {off:.1e} of the largest value"
        )


def onnx_product() -> Iterator[Check]:
    """Compare ONNX Runtime's product of two matrices with numpy's."""
    import numpy as np
    import onnxruntime as ort

    from tinymim_export.bench.graph_parts import Node, Piece
    from tinymim_export.runtime.sessions import PROVIDERS
    from tinymim_export.runtime.wire import wire_field

    a, b = (np.random.RandomState(i).standard_normal((64, 64)).astype("float32") for i in range(2))
    node = wire_field(1, "a") + wire_field(1, "b") + wire_field(2, "c") + wire_field(4, "MatMul")
    opset = wire_field(1, 8) + wire_field(8, wire_field(2, 17))
    model = Piece("product", opset, [Node(node, ["a", "b"], ["c"])], inputs=["a", "b"], outputs=["c"])
    session = ort.InferenceSession(model.model({"a": a, "b": b}), providers=[PROVIDERS["cpu"].title])
    wanted = a.astype("float64") @ b
    off = float(np.abs(session.run(None, {"a": a, "b": b})[0] - wanted).max() / np.abs(wanted).max())
    yield Check("ONNX Runtime, product of two matrices", off <= ARRAYS, f"error {off:.1e} of the largest value")


def onnx_export() -> Iterator[Check]:
    """Export a tiny ViT and compare ONNX Runtime with PyTorch at several sizes."""
    import contextlib
    import io
    import tempfile

    import torch

    from tinymim.cli._golden_numbers import GOLDEN
    from tinymim.models import save_student
    from tinymim.models.backbone import from_config
    from tinymim_export import export

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_student(from_config(GOLDEN["relations"]["student"], img_size=32, depth=2), f"{folder}/student.pth")
        with contextlib.redirect_stdout(io.StringIO()):
            made = export(f"{folder}/student.pth", f"{folder}/student.onnx", part="backbone", dynamic=True)
    figures = made.parity.summary()
    yield Check("ONNX export", made.parity.passed, f"relative error {figures['relative_error']:.1e} at three sizes")
