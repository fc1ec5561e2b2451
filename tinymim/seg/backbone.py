"""Any of our backbones in MMSegmentation: levels at strides 4, 8, 16 and 32, or the map of one tap.

Legend: B = batch, D = width, H, W = image height and width in pixels.
Parameters are directly under ``backbone.`` (``blocks``, ``fpn1`` .. ``fpn4``), as in the published TinyMIM models.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from mmseg.registry import MODELS
from torch import Tensor, nn

from tinymim.errors import ConfigError
from tinymim.models import Checkpoint, load_weights, read_checkpoint
from tinymim.models.backbone import PLAIN, Layers, Shell, Stage, build_backbone
from tinymim.models.vit import POSITIONAL
from tinymim.seg.config import say
from tinymim.seg.pyramid import STRIDES, Pyramid


def _published_order(init: Callable[..., None]) -> Callable[..., None]:
    """Positional arguments in the order of the published backbone, for callers of 0.1; all others go by keyword."""

    @functools.wraps(init)
    def wrapper(self: Any, *positional: Any, **keywords: Any) -> None:
        given = dict(zip(POSITIONAL, positional, strict=False))
        if len(positional) > len(POSITIONAL):
            raise TypeError(f"{type(self).__name__}() got {len(positional)} positional arguments")
        if twice := given.keys() & keywords.keys():
            raise TypeError(f"{type(self).__name__}() got {min(twice)!r} twice")
        init(self, **given, **keywords)

    return wrapper


@MODELS.register_module()
class TinyMIMBackbone(Shell):
    """A backbone (``inner``) and, for a plain one, TinyMIM's four-level pyramid; any image height and width.

    Levels that are already at strides 4, 8, 16 and 32 pass through unchanged; so does a single level. Attributes of
    the backbone (``config``, ``depth``, ``img_size``, ...) are available on this module, too.

    Args:
        img_size: Size (pixels) at which positions are stored; other sizes are interpolated at run time.
        name: A backbone of ``tinymim.models.backbone.backbone_names()``; the plain ViT by default.
        out_indices: Indices of the backbone's ``forward_intermediates`` that feed the levels. ViT: four blocks (from
            0), by default (3, 5, 7, 11), or one, whose map is the only level. Hierarchical model: stages, by default
            all. The parts after the last one are not run.
        norm_cfg: MMSegmentation's normalisation of the pyramid. SyncBN becomes BN if training is not distributed.
        pyramid_dim: Width of all four levels of a pyramid (TinyMIM*-T: 768); None keeps D, and the two coarse levels
            have no parameters.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)`` loads any file that ``tinymim.load_weights`` reads.
        with_cp: Recompute blocks in the backward pass to save memory (gradient checkpointing).
        frozen: Train the pyramid and the heads only; the backbone stays as it was loaded, without drop path.
        arguments: Keywords of the backbone: those of :class:`tinymim.models.ViT` (weights do not show the number of
            heads: give the one the student was trained with), or of timm's class; ``drop_path_rate``.

    Raises:
        ConfigError: options that do not fit together, or that the backbone does not have.
    """

    @_published_order
    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        *,
        name: str = PLAIN,
        out_indices: Sequence[int] | None = None,
        norm_cfg: dict[str, Any] | None = None,
        pyramid_dim: int | None = None,
        init_cfg: dict[str, Any] | None = None,
        with_cp: bool = False,
        frozen: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(build_backbone(name, img_size=img_size, **arguments))
        inner: Any = self.inner
        if out_indices is None:
            out_indices = (3, 5, 7, 11) if len(inner.stage_info) == 1 else range(len(inner.stage_info))
        self.layer_ids = Layers(inner)
        self.out_indices, stages = _check_taps(inner, out_indices)
        strides = tuple(stage.stride for stage in stages)
        last_dim = inner.config.get("last_dim")
        _check_pyramid(inner, self.out_indices, strides, last_dim, pyramid_dim)
        self.init_cfg = _check_init_cfg(init_cfg)
        if hasattr(inner, "norm"):
            self.norm = nn.Identity()  # the taps have no final norm
        inner.set_grad_checkpointing(with_cp)
        self.frozen = bool(frozen)
        if self.frozen:
            inner.requires_grad_(False)
        for part in inner.parts_after(self.out_indices[-1]):
            part.requires_grad_(False)  # never run: DDP would wait for their gradients
        self.fpn_names: tuple[str, ...] = ()
        self.out_channels = tuple(stage.width for stage in stages)
        if len(set(strides)) < len(strides):
            width = stages[0].width
            pyramid = Pyramid(width, last_dim or width, dict(norm_cfg or dict(type="SyncBN")), pyramid_dim)
            vars(self)["fpn"] = pyramid  # its modules are registered as this module's own
            self._modules.update(pyramid._modules)
            self.fpn_names, self.out_channels = tuple(pyramid._modules), (pyramid.width,) * len(strides)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W), normalised -> levels (B, D or pyramid_dim, ceil(H/s), ceil(W/s)), s = 4, 8, 16, 32."""
        return self.pyramid(self.trunk(images), images.shape[-2:])

    def train(self, mode: bool = True) -> "TinyMIMBackbone":
        """Set the mode; a frozen backbone stays in evaluation mode, its pyramid does not."""
        super().train(mode)
        for name, part in self._modules.items() if self.frozen else ():
            if part is not None and name not in self.fpn_names:
                part.train(False)
        return self

    def trunk(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> the taps (B, D, ceil(H/stride), ceil(W/stride)), one per level."""
        return self.inner.forward_intermediates(
            images, indices=self.out_indices, stop_early=True, intermediates_only=True
        )

    def pyramid(self, taps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, ...]:
        """Taps, and the image's height and width in pixels -> the levels."""
        return self.fpn(taps, size) if self.fpn_names else tuple(taps)

    def init_weights(self) -> None:
        """Load the file of ``init_cfg`` and print the report; without one, print that training starts from scratch.

        Raises:
            CheckpointError: the file does not fit.
            ConfigError: the file names another head count.
        """
        if self.init_cfg is None:
            say("backbone: no weights given (--student FILE or init_cfg), training from scratch")
            return
        checkpoint = read_checkpoint(self.init_cfg["checkpoint"])
        check_student(self, checkpoint)
        load_weights(self, checkpoint)  # prints its report

    def get_layer_id(self, name: str) -> int:
        """Layer of a parameter for layer decay: 0 = embeddings, i + 1 = block i, depth + 1 = pyramid and last layer.

        Args:
            name: Parameter name, with or without the prefix ``backbone.``.

        Raises:
            ConfigError: this backbone has no parameter of this name.
        """
        name = name.removeprefix("backbone.")
        layer, (top, dot, _) = self.layer_ids.of(name), name.partition(".")
        if layer > 0 and not (dot and top in self._modules):
            raise ConfigError(
                f"parameter {name!r} belongs to no layer of this backbone",
                f"its parts are {', '.join(self._modules)}",
                "give a name that named_parameters() returns",
            )
        return layer


def check_student(backbone: Any, checkpoint: Checkpoint) -> None:
    """Compare the model config stored in one of our files with the backbone (weights do not show the head count).

    Raises:
        ConfigError: they differ.
    """
    stored = checkpoint.config
    keys = [key for key in backbone.must_match if key in stored and stored[key] != backbone.config[key]]
    if keys:
        hint = " (and the in_channels of both heads)" if "embed_dim" in keys else ""
        raise ConfigError(
            f"{checkpoint.path} does not match the segmentation config: "
            + ", ".join(f"{key}={stored[key]} (the config has {backbone.config[key]})" for key in keys),
            "the file stores the arguments its model was built with",
            f"add --cfg-options {' '.join(f'model.backbone.{key}={stored[key]}' for key in keys)}{hint}, "
            "or choose the config of that size",
        )


def _check_taps(model: Any, out_indices: Sequence[int]) -> tuple[tuple[int, ...], list[Stage]]:
    """The taps as increasing numbers from 0, and the stage of each."""
    count, plain = model.stage_info[-1].taps.stop, len(model.stage_info) == 1
    taps = tuple(i % count for i in out_indices if -count <= i < count)
    if len(taps) not in (1, 4) or len(out_indices) != len(taps) or sorted(set(taps)) != list(taps):
        raise ConfigError(
            f"out_indices={tuple(out_indices)} does not fit {count} {'blocks' if plain else 'stages'}",
            "the pyramid needs four different blocks in increasing order, numbered from 0; one block needs no pyramid"
            if plain
            else "four levels are needed in increasing order, or one",
            "for 12 blocks use (3, 5, 7, 11); for 4 blocks (0, 1, 2, 3); for a linear head (11,)"
            if plain
            else "leave out_indices out, or give one stage, e.g. (2,)",
        )
    return taps, [next(stage for stage in model.stage_info if i in stage.taps) for i in taps]


def _check_pyramid(
    model: Any, taps: tuple[int, ...], strides: tuple[int, ...], last_dim: int | None, pyramid_dim: int | None
) -> None:
    """Refuse strides that the pyramid cannot turn into levels, and widths without a pyramid."""
    has_pyramid = len(taps) == 4 and strides != STRIDES
    if has_pyramid and set(strides) != {16}:
        raise ConfigError(
            f"taps at strides {', '.join(map(str, strides))} give no levels at strides 4, 8, 16, 32",
            "the pyramid scales a grid of stride 16 by 4, 2, 1 and 1/2 (a ViT with patch_size=16)",
            "use patch_size=16, or a backbone with levels at these strides",
        )
    if not has_pyramid and (pyramid_dim is not None or last_dim is not None):
        raise ConfigError(
            f"out_indices={taps} with pyramid_dim={pyramid_dim}, last_dim={last_dim}",
            "one block's map is used as it is, without a pyramid"
            if len(taps) == 1
            else "these levels are used as they are, without a pyramid",
            "leave pyramid_dim and last_dim out, or give four blocks",
        )
    if last_dim is not None and (pyramid_dim is None or taps[-1] != model.depth - 1):
        raise ConfigError(
            f"last_dim={last_dim} needs a pyramid_dim and the last block among out_indices",
            "the widened output of the last block feeds the coarsest level through a convolution",
            "give pyramid_dim=768 as TinyMIM*-T does, and end out_indices with the last block",
        )


def _check_init_cfg(init_cfg: dict[str, Any] | None) -> dict[str, Any] | None:
    if init_cfg is None or (init_cfg.get("type") == "Pretrained" and init_cfg.get("checkpoint")):
        return init_cfg
    raise ConfigError(
        f"init_cfg={init_cfg} is not understood",
        "the backbone can only be initialised from a file",
        'use init_cfg=dict(type="Pretrained", checkpoint="student.pth"), or None to train from scratch',
    )
