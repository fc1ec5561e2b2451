"""The score of a segmentor: its mIoU after a short training, from the weights cut from its parent."""

import os
import shutil
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config as SegConfig

from tinymim.contract.search import Candidate
from tinymim.literals import read_literals
from tinymim.seg import estimate_segmentor, load_segmentor, train_segmentor
from tinymim.seg.config import config_text


@dataclass(frozen=True)
class SegmentScore:
    """Trains a candidate, whole, and scores it on the validation photos; all candidates see the same batches.

    Args:
        steps: Of the training.
        settings: Keywords of :func:`tinymim.seg.train_segmentor`: ``data_root``, ``batch_size``, ``lr``, ...
        options: Dotted keys of the config.
    """

    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    name = "mIoU"

    def _options(self) -> dict[str, Any]:
        """The steps, validated once, at their end."""
        every = {"train_cfg.val_interval": self.steps, "default_hooks.checkpoint.interval": max(self.steps // 4, 1)}
        return {"train_cfg.max_iters": self.steps, **every, **self.options}

    def __call__(self, candidate: Candidate) -> float:
        """Train, and keep the trained weights as the candidate's."""
        run, start = candidate.folder / "run", candidate.folder / "start.pth"
        resume = (run / "config.py").is_file()  # a search that was stopped goes on within a candidate
        if not resume:
            shutil.copyfile(candidate.student, start)
        cfg = load_segmentor(start)[1]
        cfg.custom_imports = dict(imports=["tinymim.seg"])
        cfg.model.init_cfg = dict(type="Pretrained", checkpoint=str(start))
        result = train_segmentor(cfg, work_dir=run, resume=resume, cfg_options=self._options(), **self.settings)
        os.replace(run / "segmentor.pth", candidate.student)
        shutil.rmtree(run)
        start.unlink(missing_ok=True)
        return float(result.miou)

    def minutes(self, cfg: SegConfig) -> float:
        """Minutes of training a segmentor on this machine, without its validation; nothing is written."""
        given = {key: value for key, value in self.settings.items() if key != "amp"}
        cfg = SegConfig(read_literals(config_text(cfg), "the config"))
        cost = estimate_segmentor(cfg, cfg_options=self._options(), **given)
        batch = self.settings.get("batch_size") or cfg.train_dataloader.batch_size
        return cost.seconds_per_crop * batch * self.steps / 60

    def described(self) -> dict[str, Any]:
        """What the scores depend on, as JSON values; the folder is left out: it may move."""
        kept = {key: value for key, value in self.settings.items() if key != "data_root"}
        return {"steps": self.steps, **kept, "options": self.options}
