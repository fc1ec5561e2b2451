"""Layer-wise learning rate decay for fine-tuning (deeper layers have larger rates), and bfloat16 on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from tinymim.errors import ConfigError
from tinymim.models.backbone import DecayGroup, decay_groups


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TinyMIMLayerDecayOptimizerConstructor:
    """Rate of a parameter = base rate * layer_decay ** (depth + 1 - layer), layers from ``backbone.get_layer_id``.

    Heads keep the base rate. No weight decay on biases, other 1-D parameters, and those the backbone names (for a ViT
    tokens, positions and relative-position tables). Frozen parameters are left out.

    Args:
        optim_wrapper_cfg: MMEngine's ``optim_wrapper`` with its ``optimizer``.
        paramwise_cfg: ``dict(layer_decay=0.75, published_quirks=False)``. ``published_quirks=True`` does what the
            published runs did: ``pos_embed``, ``cls_token`` and the tables are decayed, and ``dist_token`` is decayed
            and has the full rate.

    Raises:
        ConfigError: unknown options, or a model whose backbone has no ``get_layer_id``.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        options = dict(paramwise_cfg or {})
        self.layer_decay = float(options.pop("layer_decay", 1.0))
        self.published_quirks = bool(options.pop("published_quirks", False))
        if options or not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"paramwise_cfg={paramwise_cfg} is not understood",
                "the options are layer_decay (above 0, at most 1) and published_quirks",
                "use paramwise_cfg=dict(layer_decay=0.75, published_quirks=False)",
            )
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop("optimizer"))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper for a segmentor (wrapped by DDP or not)."""
        model = getattr(model, "module", model)
        backbone: Any = getattr(model, "backbone", None)
        if not hasattr(backbone, "get_layer_id"):
            raise ConfigError(
                f"{type(backbone).__name__} has no get_layer_id",
                "layer decay needs the backbone's layer of each parameter",
                "use TinyMIMBackbone, or another optim_wrapper.constructor",
            )
        last = backbone.depth + 1
        late = ("backbone.dist_token",) if self.published_quirks else ()
        groups = decay_groups(
            model.named_parameters(),
            lambda name: backbone.get_layer_id(name) if name.startswith("backbone.") and name not in late else last,
            () if self.published_quirks else getattr(backbone, "no_weight_decay", tuple)(),
        )
        groups.sort(key=lambda group: (group.layer, group.decayed))
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, "params": [self._options(group, last) for group in groups]})
        wrapper_cfg = {"type": "OptimWrapper", **self.wrapper_cfg}
        return OPTIM_WRAPPERS.build(wrapper_cfg, default_args=dict(optimizer=optimizer))

    def _options(self, group: DecayGroup, last: int) -> dict[str, Any]:
        scale = self.layer_decay ** (last - group.layer)
        return {
            "params": group.params,
            "param_names": group.names,
            "group_name": f"layer_{group.layer}_{'decay' if group.decayed else 'no_decay'}",
            "lr_scale": scale,
            "lr": self.optimizer_cfg["lr"] * scale,
            "weight_decay": self.optimizer_cfg.get("weight_decay", 0.0) if group.decayed else 0.0,
        }


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """bfloat16 products in the forward pass on the CPU; weights, gradients and sums stay float32.

    MMEngine's ``AmpOptimWrapper`` runs on GPUs only. bfloat16 has float32's range, so no loss scale is needed.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of a forward pass."""
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield
