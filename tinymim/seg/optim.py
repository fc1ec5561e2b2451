"""Layer-wise learning rates for fine-tuning (the deeper the layer, the larger its rate), and bfloat16 on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn

from tinymim.errors import ConfigError

_POSITIONAL = ("pos_embed", "cls_token")
_TABLE = "relative_position_bias_table"


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TinyMIMLayerDecayOptimizerConstructor:
    """Rate of a parameter = base rate * layer_decay ** (depth + 1 - layer), layers from ``backbone.get_layer_id``.

    Heads keep the base rate. No weight decay on biases, other 1-D parameters, ``pos_embed``, ``cls_token``,
    ``dist_token`` and relative-position tables. Frozen parameters are left out.

    Args:
        optim_wrapper_cfg: MMEngine's ``optim_wrapper`` with its ``optimizer``.
        paramwise_cfg: ``dict(layer_decay=0.75, published_quirks=False)``. ``published_quirks=True`` restores what the
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
                "layer decay asks the backbone which layer a parameter belongs to",
                "use TinyMIMBackbone, or another optim_wrapper.constructor",
            )
        last = backbone.depth + 1
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = backbone.get_layer_id(name) if name.startswith("backbone.") else last
            if self.published_quirks and name == "backbone.dist_token":
                layer = last
            decayed = self._is_decayed(name, parameter)
            group = groups.setdefault((layer, decayed), self._new_group(layer, last, decayed))
            group["params"].append(parameter)
            group["param_names"].append(name)
        optimizer_cfg = {**self.optimizer_cfg, "params": [groups[key] for key in sorted(groups)]}
        optimizer = OPTIMIZERS.build(optimizer_cfg)
        wrapper_cfg = {"type": "OptimWrapper", **self.wrapper_cfg}
        return OPTIM_WRAPPERS.build(wrapper_cfg, default_args=dict(optimizer=optimizer))

    def _new_group(self, layer: int, last: int, decayed: bool) -> dict[str, Any]:
        scale = self.layer_decay ** (last - layer)
        return {
            "params": [],
            "param_names": [],
            "group_name": f"layer_{layer}_{'decay' if decayed else 'no_decay'}",
            "lr_scale": scale,
            "lr": self.optimizer_cfg["lr"] * scale,
            "weight_decay": self.optimizer_cfg.get("weight_decay", 0.0) if decayed else 0.0,
        }

    def _is_decayed(self, name: str, parameter: Tensor) -> bool:
        last_name = name.rpartition(".")[2]
        if parameter.ndim == 1 or last_name == "bias":
            return False
        if last_name in (*_POSITIONAL, "dist_token", _TABLE):
            return self.published_quirks
        return True


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
