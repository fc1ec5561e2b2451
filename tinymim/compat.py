"""The one place that adapts MMEngine, MMCV and timm to current PyTorch and Pillow, and to machines without a GPU.

- ``install_mmcv_stand_in``: MMSegmentation imports MMCV's compiled operators although a plain UperNet needs none;
  ``mmcv-lite`` does not have them. A stand-in module lets the import pass and raises an error if an operator is called.
- ``use_device``: MMEngine chooses the first accelerator it sees, once, at import.
- ``use_cores``: PyTorch overlooks CPU quotas.
- ``let_timm_posterize``: timm's RandAugment sometimes posterizes to 0 bits, which newer Pillow refuses.
- ``start_cpu_processes``: MMEngine's launcher calls ``torch.cuda.set_device`` even on machines without a GPU.
- ``leave_processes``: a thread of gloo that outlives the interpreter aborts the process.
"""

import atexit
import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any

from tinymim.cores import cores
from tinymim.errors import ConfigError

_EXT = "mmcv._ext"


def install_mmcv_stand_in() -> bool:
    """Stand in for ``mmcv._ext`` when the real one is missing; return whether a stand-in is in place.

    The stand-in's ``__spec__.loader`` stays None: MMEngine reads that as "no operators here".
    """
    module = sys.modules.get(_EXT)
    if module is None and importlib.util.find_spec("mmcv") is not None and importlib.util.find_spec(_EXT) is None:
        module = types.ModuleType(_EXT, "Stand-in of tinymim for MMCV's compiled operators.")
        module.__spec__ = importlib.machinery.ModuleSpec(_EXT, loader=None)
        module.__getattr__ = _missing_operator  # type: ignore[method-assign]
        sys.modules[_EXT] = module
    return module is not None and module.__spec__ is not None and module.__spec__.loader is None


def _missing_operator(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def operator(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            f"the MMCV operator {name!r} was called, but this MMCV has no compiled operators",
            "mmcv-lite is installed; tinymim's own models need none of its operators",
            "use a model without it, or install a full mmcv >= 2.0.1, < 2.2 over mmcv-lite",
        )

    return operator


def let_timm_posterize() -> None:
    """0 bits give a black image in timm's RandAugment, as they did before Pillow raised an error for them."""
    from PIL import Image, ImageOps
    from timm.data import auto_augment

    def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
        if bits >= 8:
            return image
        return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)

    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize


def launched_processes() -> int:
    """Number of processes that ``torchrun`` started for this job; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those torchrun has started."""
    return int(os.environ.get("RANK", 0)) == 0


def use_device(device: str | None) -> str:
    """Make MMEngine use ``device`` ("cpu", "cuda", "cuda:1", ...; None: a GPU where there is one) and return its kind.

    Raises:
        ConfigError: an unknown device, or a GPU on a machine without one.
    """
    import mmengine.device.utils as mmengine_device
    import torch

    kind = (device or ("cuda" if torch.cuda.is_available() else "cpu")).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is unknown", "tinymim runs on cpu and cuda", "use --device cpu or cuda")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device {device!r} was requested, but PyTorch sees no GPU",
                "there is none, its driver is missing, or this is a CPU build of PyTorch",
                "use --device cpu, or install a CUDA build of PyTorch",
            )
        if device and ":" in device:
            torch.cuda.set_device(device)
    mmengine_device.DEVICE = kind
    use_cores()
    return kind


def use_cores() -> None:
    """Give PyTorch no more threads than :func:`tinymim.cores.cores`: it does not know the CPU quota of a container."""
    import torch

    if cores() < torch.get_num_threads():
        torch.set_num_threads(cores())


def start_cpu_processes(cfg: Any) -> None:
    """Join the gloo process group under ``torchrun`` on a machine without a GPU, and set ``cfg`` to match.

    MMEngine's own launcher cannot (it calls ``torch.cuda.set_device``), and its DDP wrapper needs a GPU id. A second
    call in the same process has no effect on the group.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    cfg["launcher"] = "pytorch"
    cfg["model_wrapper_cfg"] = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)


def leave_processes(code: int) -> None:
    """End a process that ``torchrun`` started with exit code ``code``; where there is no group, return.

    It ends here after an error, so that it does not wait for processes that wait for it; and under gloo, whose worker
    threads drop the last tensors whenever they come to it. If Python (before 3.14) is finalising by then, their wait
    for the interpreter's lock ends the thread, which C++ answers with ``terminate called without an active exception``.
    ``destroy_process_group`` does not join them while DDP's reducer lives: 10 of 60 short runs aborted with it, 16
    without.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if launched_processes() == 1 or dist is None or not dist.is_initialized():
        return
    ends_here = code != 0 or dist.get_backend() == "gloo"
    if code == 0:
        dist.destroy_process_group()
    if ends_here:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
