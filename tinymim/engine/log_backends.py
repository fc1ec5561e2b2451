"""Where a run is logged besides its folder: TensorBoard, and MMEngine's visualisation back ends."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, VISBACKENDS

from tinymim.errors import ConfigError, did_you_mean
from tinymim.literals import read_literal_file
from tinymim.progress import say

BACKENDS = {  # word of --log -> MMEngine's class; the word is the package's name, too
    "tensorboard": "",
    "wandb": "WandbVisBackend",
    "mlflow": "MLflowVisBackend",
    "clearml": "ClearMLVisBackend",
    "neptune": "NeptuneVisBackend",
    "dvclive": "DVCLiveVisBackend",
    "aim": "AimVisBackend",
}


def check_backends(names: Sequence[str] | None) -> list[str]:
    """The back ends that a run asks for, each once.

    Args:
        names: Keys of :data:`BACKENDS`.

    Raises:
        ConfigError: an unknown one, or one that is not installed.
    """
    for name in names or ():
        if name not in BACKENDS:
            raise ConfigError(
                f"--log {name}", f"the back ends are {', '.join(BACKENDS)}", did_you_mean(name, BACKENDS, "choose one")
            )
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--log {name}", f"{name} is not installed", f"pip install {name}")
    return list(dict.fromkeys(names or ()))


def log_hooks(names: Sequence[str], out: Path, *, tensorboard: bool = False) -> list[Hook]:
    """The hooks that log to these back ends; the first process has them.

    Args:
        names: What :func:`check_backends` returned.
        out: Run folder.
        tensorboard: A recipe's wish for TensorBoard, too, if it is installed; without it there is a note.
    """
    if not is_main_process():
        return []
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        say("note: tensorboard is not installed, see metrics.jsonl; pip install 'tinymim[tensorboard]'")
    elif tensorboard:
        names = list(dict.fromkeys(["tensorboard", *names]))
    return [TensorBoardHook(out) if name == "tensorboard" else BackendHook(out, name) for name in names]


class _CopyHook(Hook):
    """Hands every new line of metrics.jsonl on; a resumed run goes on with the lines that are new.

    Args:
        out: Run folder.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.read = out, 0

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Those since the last call."""
        with open(self.out / "metrics.jsonl", "rb") as file:
            file.seek(self.read)
            lines = file.readlines()
            self.read = file.tell()
        yield from map(json.loads, lines)

    def begin(self, runner: Any, known: bool) -> None:
        """Start with the first line, or, if the back end has them, behind the lines so far."""
        metrics = self.out / "metrics.jsonl"
        metrics.touch()
        self.read = metrics.stat().st_size if known and runner.iter > 0 else 0

    def copy(self) -> None:
        """Hand new lines on."""
        raise NotImplementedError

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.copy()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self.copy()

    def after_train(self, runner: Any) -> None:
        self.copy()


@HOOKS.register_module()
class TensorBoardHook(_CopyHook):
    """Copies every line of metrics.jsonl to OUT/tensorboard; a resumed run continues without duplicates."""

    def before_train(self, runner: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.out / "tensorboard"
        known = folder.is_dir() and runner.iter > 0
        self.begin(runner, known)
        self.writer = SummaryWriter(str(folder), purge_step=runner.iter + 1 if known else None)
        self.copy()

    def copy(self) -> None:
        """Write and flush, so that a killed run loses nothing from before its last checkpoint."""
        found = list(self.new_lines())
        for record in found:
            for name, value in record.items():
                if name != "step":
                    self.writer.add_scalar(name, value, record["step"])
        if found:
            self.writer.flush()

    def after_train(self, runner: Any) -> None:
        super().after_train(runner)
        self.writer.close()


@HOOKS.register_module()
class BackendHook(_CopyHook):
    """Hands every line of metrics.jsonl, and the settings of config.py, to one of MMEngine's visualisation back ends.

    A run that is resumed is logged from there on.

    Args:
        out: Run folder; what the back end keeps here lies below it.
        name: Key of :data:`BACKENDS`.
    """

    def __init__(self, out: Path, name: str) -> None:
        super().__init__(out)
        self.name = name

    def before_train(self, runner: Any) -> None:
        folder = self.out / self.name
        self.begin(runner, folder.is_dir())
        self.backend = VISBACKENDS.build(dict(type=BACKENDS[self.name], save_dir=str(folder)))
        self.backend.add_config(Config(read_literal_file(self.out / "config.py")))
        self.copy()

    def copy(self) -> None:
        """Hand new lines on."""
        for record in self.new_lines():
            step = int(record.pop("step"))
            self.backend.add_scalars({name: float(value) for name, value in record.items()}, step=step)

    def after_train(self, runner: Any) -> None:
        super().after_train(runner)
        self.backend.close()
