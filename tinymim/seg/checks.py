"""What is tried on a config before it trains."""

from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from tinymim.errors import ConfigError


def check_batch(cfg: Config, outline: Any) -> None:
    """Refuse a batch of one photo where batch normalisation would see one value per channel, as after global pooling.

    One forward pass without data (PyTorch's meta device) finds it; nothing is computed, no random number is drawn.

    Args:
        cfg: The config.
        outline: Its :func:`~tinymim.seg.config.model_outline`; None passes, and training tells.

    Raises:
        ConfigError: ``train_dataloader.batch_size`` is 1, and the model cannot be trained with it.
    """
    if outline is None or int(cfg.train_dataloader.batch_size) > 1:
        return
    alone: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                alone.append(name)

        return hook

    height, width = cfg.model.data_preprocessor.size
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for name, module in outline.train().named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                    module.register_forward_pre_hook(look(name))
            features = outline.extract_feat(torch.zeros(1, 3, height, width, device="meta"))
            for head in (outline.decode_head, getattr(outline, "auxiliary_head", None)):
                for part in head if isinstance(head, nn.ModuleList) else [head] if head is not None else []:
                    part(features)
    except Exception:  # the pass found it, or the model does more than a meta device can: then training tells
        pass
    if alone:
        raise ConfigError(
            "a batch of one photo cannot train this model",
            f"batch normalisation in model.{alone[0]} sees one value per channel, which has no variance",
            "use two or more photos: --cfg-options train_dataloader.batch_size=2 (and a smaller crop to save memory)",
        )
