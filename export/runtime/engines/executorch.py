"""ExecuTorch on the CPU: programs (.pte) of ``tinymim-export --format executorch``. Its wheel needs torch."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tinymim.errors import ConfigError, DataError
from tinymim.schema import parse
from tinymim_export.runtime.engines.base import Engine, Port, random_input, register_runtime
from tinymim_export.runtime.metadata import decode, first_line
from tinymim_export.runtime.providers import Provider

if TYPE_CHECKING:
    import numpy as np

METHOD = "tinymim"  # of a program: gives About as JSON
DTYPES = {0: "uint8", 4: "int64", 6: "float32"}  # of ExecuTorch's ScalarType
NOTHING = '{"outputs": [], "contract": {}}'  # of programs of others
FIX = "write it again: tinymim-export --checkpoint FILE --format executorch --out FILE.pte"


class About(TypedDict):
    """What a program says of itself."""

    outputs: list[str]
    contract: dict[str, str]  # as metadata_props of an .onnx file


@register_runtime
class ExecuTorchEngine(Engine):
    """A program for one image at a time of one size; XNNPACK and the portable operators run it."""

    runtime, title = "executorch", "ExecuTorch"
    providers = (Provider("cpu", "ExecuTorch XNNPACK", target="executorch"),)
    packages = ("executorch",)
    takes_onnx = False

    def __init__(self, path: Path, provider: str, compute_type: str | None, threads: int) -> None:
        super().__init__(path, provider, compute_type, threads)
        if path.suffix != ".pte":
            raise ConfigError(f"{path.name} is no ExecuTorch program", "--runtime executorch runs .pte files", FIX)
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        _unsafe_reset_threadpool(threads)
        try:
            self.program = Runtime.get().load_program(path)
            self.method = self.program.load_method("forward")
            (about,) = (
                self.program.load_method(METHOD).execute([]) if METHOD in self.program.method_names else (NOTHING,)
            )
            inputs = [self.method.metadata.input_tensor_meta(i) for i in range(self.method.metadata.num_inputs())]
            outputs = [self.method.metadata.output_tensor_meta(i) for i in range(self.method.metadata.num_outputs())]
        except Exception as error:  # pybind's kinds
            raise DataError(f"cannot read {path}", first_line(error), FIX) from error
        told = parse(str(about), About, path.name, fix=FIX)
        names = told["outputs"] or [f"output{i}" for i in range(len(outputs))]
        if len(names) != len(outputs):
            raise DataError(f"cannot read {path}", f"it names {len(names)} of {len(outputs)} outputs", FIX)
        self.describe(
            [Port("image", DTYPES.get(each.dtype(), "other"), tuple(each.sizes())) for each in inputs],
            [
                Port(name, DTYPES.get(each.dtype(), "other"), tuple(each.sizes()))
                for name, each in zip(names, outputs, strict=True)
            ],
            decode(told["contract"], path.name),
        )

    @classmethod
    def require(cls, provider: str, compute_type: str | None) -> None:
        """Raise :class:`ConfigError` where ExecuTorch is not installed."""
        if importlib.util.find_spec("executorch") is None:
            raise ConfigError("ExecuTorch is not installed", ".pte files need it", 'pip install "tinymim[executorch]"')

    def _run(self, images_N3HW: np.ndarray) -> np.ndarray:
        import numpy as np
        import torch

        each = [self.method.execute([torch.from_numpy(image[None])])[0].numpy() for image in images_N3HW]
        return np.concatenate(each)

    def timer(self, shape: tuple[int, ...], seed: int = 0) -> Callable[[], float]:
        import torch

        self.run(random_input(shape, self.dtype, seed))  # refuses another size
        images = [torch.from_numpy(image[None]) for image in random_input(shape, self.dtype, seed)]

        def once() -> float:
            began = time.perf_counter_ns()
            for image in images:
                self.method.execute([image])
            return (time.perf_counter_ns() - began) / 1e6

        return once

    def placement(self) -> dict[str, Counter[str]]:
        """Parts of the graph that XNNPACK took, each many operators, and the operators that it left."""
        from executorch.exir._serialize._program import deserialize_pte_binary

        plan = next(p for p in deserialize_pte_binary(self.path.read_bytes()).program.execution_plan if p.chains)
        calls: Counter[str] = Counter()
        for chain in plan.chains:
            for step in chain.instructions:
                call = step.instr_args
                if hasattr(call, "delegate_index"):
                    calls[plan.delegates[call.delegate_index].id] += 1
                elif hasattr(call, "op_index"):
                    calls[plan.operators[call.op_index].name] += 1
        return {self.place.title: calls}

    def operator_times(self, shape: tuple[int, ...], runs: int) -> Counter[str]:
        """Nothing: the wheel's runtime is built without a profile."""
        return Counter()

    def unfused_pairs(self) -> int | None:
        """It cannot say."""
        return None
