"""The model of fine-tuning: a classifier with its losses; timm's mixup, weight average and schedule as hooks."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tinymim.data.labelled import fixed_draws
from tinymim.distill.frozen import prepare_frozen
from tinymim.distill.logits import hard_distillation, soft_distillation
from tinymim.distill.method import register_method
from tinymim.distill.recipe_keys import Choice, Key, Kind, Number
from tinymim.engine.model import Trainable
from tinymim.engine.run_folder import bare
from tinymim.models.classifier import Classifier
from tinymim.models.logit_teacher import LabelTeacher


@register_method("finetune", verb="finetune", title="fine-tune", base="_finetune.py")
class ClassifyModel(Trainable):
    """Cross entropy, and with a teacher DeiT's distillation: (1 - alpha) * labels + alpha * teacher.

    The labels train the class head, the teacher the second head of a model with a distillation token; without one both
    train the same head. Evaluation scores the running average of the weights if there is one.

    Args:
        network: The classifier.
        smoothing: Label smoothing for labels that are not mixed (timm's Mixup smooths mixed ones).
        ema_decay: Decay of the running average of the weights; None: no average.
        teacher: Frozen classifier with the same classes, or None.
        distillation: "hard" or "soft".
        alpha: Weight of the teacher (DeiT: 0.5).
        tau: Temperature of soft distillation (DeiT's published runs: 1).
        frozen_bn: Batch norm normalises by its running statistics in training, too, and keeps them.
        autocast: torch.bfloat16 or None.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        "num_heads": Number(None, least=1, whole=True),  # heads per block; None: the file's, else the model's
        "photos_per_class": Number(None, least=1, whole=True),  # train on so many of each, drawn by the seed; None: all
        "layer_decay": Number(0.65, most=1, above=True),  # rate of a layer divided by that of the next one
        "aa": Key("rand-m9-mstd0.5-inc1"),  # timm's name of a RandAugment policy; None: none
        "reprob": Number(0.25, most=1),  # random erasing with random pixels
        "mixup": Number(0.8),
        "cutmix": Number(1.0),
        "mixup_prob": Number(1.0, most=1),
        "switch_prob": Number(0.5, most=1),  # probability of cutmix instead of mixup
        "smoothing": Number(0.1, most=1, below=True),
        "head": Kind(example="by_class"),  # None: new; by_class: rows of the student file's classes; or a file of rows
        "frozen_bn": Choice(None, (None, False, True)),  # batch norm keeps the student's running statistics
        "clip_grad": Number(None, above=True),  # largest norm of the gradients
        "eval_squash": Choice(None, (None, False, True)),  # score whole photos, resized to a square; None: a crop
        "ema": Number(None, most=1, below=True, off=True),  # decay of a running average of the weights, e.g. 0.9999
        "teacher": Kind(),  # timm/NAME with a classifier, or a classifier.pth: DeiT's distillation
        "teacher_weights": Kind(example="FILE"),  # weights file for a timm teacher
        "distillation": Choice("hard", ("hard", "soft")),
        "alpha": Number(0.5, most=1),  # weight of the teacher
        "tau": Number(1.0, above=True),  # temperature of soft distillation
    }

    def __init__(
        self,
        network: Classifier,
        *,
        smoothing: float = 0.1,
        ema_decay: float | None = None,
        teacher: LabelTeacher | None = None,
        distillation: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        frozen_bn: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(autocast)
        self.network = network
        self.ema = None
        if ema_decay is not None:
            # under fsdp, statistics of batch norm are whole beside sharded weights: one tensor at a time
            foreach = not any(buffer.is_floating_point() for buffer in network.buffers())
            self.ema = ModelEmaV3(network, decay=ema_decay, use_warmup=True, foreach=foreach)
            self.ema.requires_grad_(False)  # never in the loss: DistributedDataParallel would wait for its gradients
        self.criterion = LabelSmoothingCrossEntropy(smoothing)
        self.teacher = None if teacher is None else teacher.model
        self.view = None if teacher is None else teacher.view
        self.distillation, self.alpha, self.tau, self.frozen_bn = distillation, alpha, tau, frozen_bn
        self.train()

    @property
    def encoder(self) -> Classifier:
        """The classifier that is saved: the average of the weights if there is one."""
        return self.network if self.ema is None else self.ema.module  # type: ignore[return-value]

    @property
    def learned(self) -> nn.Module:
        """The classifier and its average."""
        return self.network if self.ema is None else nn.ModuleDict({"network": self.network, "ema": self.ema.module})

    def prepare(self, dtype: torch.dtype) -> None:
        if self.teacher is not None:
            prepare_frozen(self.teacher, dtype)

    def train(self, mode: bool = True) -> "ClassifyModel":
        """Training mode for the classifier; teacher, average and frozen batch norm stay in evaluation mode."""
        super().train(mode)
        still = [part for part in (self.teacher, self.ema) if part is not None]
        if self.frozen_bn:
            still += [part for part in self.network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        for part in still:
            part.eval()
        return self

    def forward(self, image: Tensor, label: Tensor, mode: str = "loss") -> dict[str, Tensor]:  # type: ignore[override]
        """Normalised images (B, 3, S, S) and labels (B,), or mixed ones (B, K) -> named losses.

        In evaluation: ``loss``, and ``top1`` and ``top5`` as fractions.
        """
        self.last_batch = {"image": image, "label": label}
        with self.cast(image.device.type):
            if not self.training:
                return self._scores(self.encoder(image).float(), label)
            class_BK, dist_BK = self.network.answers(image)
            criterion = self.criterion if label.ndim == 1 else SoftTargetCrossEntropy()
            loss = criterion(class_BK.float(), label)
            if self.teacher is None or self.view is None:
                return {"loss": loss}
            with torch.no_grad():
                teacher_BK = self.teacher(self.view(image))
            student_BK = class_BK if dist_BK is None else dist_BK
            if self.distillation == "hard":
                distilled = hard_distillation(student_BK, teacher_BK)
            else:
                distilled = soft_distillation(student_BK, teacher_BK, self.tau)
        return {"labels": loss, "teacher": distilled, "loss": (1 - self.alpha) * loss + self.alpha * distilled}

    @staticmethod
    def _scores(logits_BK: Tensor, label_B: Tensor) -> dict[str, Tensor]:
        best = logits_BK.topk(min(5, logits_BK.shape[1])).indices == label_B[:, None]
        return {
            "loss": F.cross_entropy(logits_BK, label_B),
            "top1": best[:, 0].float().mean(),
            "top5": best.any(dim=1).float().mean(),
        }

    def example(self, config: Any, count: int, place: str) -> dict[str, Tensor]:
        """Random pixels and labels."""
        image = torch.randn(count, 3, config.img_size, config.img_size, device=place)
        return {"image": image, "label": torch.zeros(count, dtype=torch.long, device=place)}


@HOOKS.register_module()
class MixupHook(Hook):
    """timm's mixup and cutmix on each process's share of the batch; (seed, step, process) fixes the random numbers."""

    def __init__(self, mixup: Mixup, seed: int, device: str) -> None:
        self.mixup, self.seed, self.device = mixup, seed, device

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        image, label = (data_batch[key].to(self.device, non_blocking=True) for key in ("image", "label"))
        with fixed_draws(self.seed, batch_idx, get_rank()):
            data_batch["image"], data_batch["label"] = self.mixup(image, label)


@HOOKS.register_module()
class AverageHook(Hook):
    """timm's running average of the weights, after every step."""

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model: Any = bare(runner.model)
        model.ema.update(model.network, step=batch_idx)


@HOOKS.register_module()
class CosineHook(Hook):
    """timm's cosine schedule per step: linear warm-up from 0, half a cosine down to ``final``, times ``lr_scale``."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, warmup: int, final: float) -> None:
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(steps - warmup, 1),
            lr_min=final,
            warmup_t=warmup,
            warmup_lr_init=0.0,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.scheduler.step_update(batch_idx)
