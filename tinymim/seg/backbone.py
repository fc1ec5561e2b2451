"""The plain ViT as an MMSegmentation backbone: four levels at strides 4, 8, 16 and 32, or one at stride 16.

Legend: B = batch, D = width, H, W = image height and width in pixels.
Parameters sit directly under ``backbone.`` (``blocks``, ``fpn1`` .. ``fpn4``), as in the published TinyMIM models.
"""

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmseg.registry import MODELS
from torch import Tensor, nn

from tinymim.errors import ConfigError
from tinymim.models import Checkpoint, load_weights, read_checkpoint
from tinymim.models.vit import ViT
from tinymim.seg.config import say


@MODELS.register_module()
class TinyMIMBackbone(ViT):
    """Plain ViT with TinyMIM's four-level pyramid, or one level without a pyramid; any image height and width.

    Args:
        img_size: Size (pixels) at which positions are stored; other sizes are interpolated at run time.
        patch_size: Patch side, 16 (the strides are 4, 8, 16, 32).
        embed_dim: Width D.
        depth: Number of blocks.
        num_heads: Heads in every block. Weights cannot tell them: give the number the student was trained with.
        rel_pos_bias: A relative-position bias table per block (the published fine-tuning setting).
        init_values: Layer-scale start value; None for none.
        drop_path_rate: Largest stochastic-depth rate of a linear ramp.
        out_indices: The four blocks (0-based) whose outputs feed the levels, or one: its map is the only level, as it
            is. Blocks after the last one are not run.
        norm_cfg: MMSegmentation's normalisation of the pyramid. SyncBN becomes BN where training is not distributed.
        dist_token: A distillation token (TinyMIM*-T).
        last_dim: Width of LayerNorm -> Linear -> GELU after the last block (TinyMIM*-T: 1280).
        pyramid_dim: Width of all four levels (TinyMIM*-T: 768); None keeps D and a parameter-free coarse end.
        mlp_ratio: Hidden width of the MLPs over D.
        with_cp: Recompute blocks in the backward pass to save memory (gradient checkpointing).
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)`` loads any file ``tinymim.load_weights`` reads.

    Raises:
        ConfigError: options that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        rel_pos_bias: bool = False,
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        norm_cfg: dict[str, Any] | None = None,
        dist_token: bool = False,
        last_dim: int | None = None,
        pyramid_dim: int | None = None,
        init_cfg: dict[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        with_cp: bool = False,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            rel_pos_bias=rel_pos_bias,
            init_values=init_values,
            drop_path_rate=drop_path_rate,
            dist_token=dist_token,
            last_dim=last_dim,
        )
        self.out_indices = _check_taps(out_indices, depth, patch_size, last_dim, pyramid_dim)
        self.init_cfg = _check_init_cfg(init_cfg)
        self.norm = nn.Identity()  # the taps carry no final norm
        self.set_grad_checkpointing(with_cp)
        for block in self.blocks[self.out_indices[-1] + 1 :]:
            block.requires_grad_(False)  # never run: DDP would wait for their gradients

        self.fpn_names = self._make_pyramid(embed_dim, pyramid_dim, last_dim, dict(norm_cfg or dict(type="SyncBN")))
        self.out_channels = (pyramid_dim or embed_dim,) * len(self.out_indices)

    def _make_pyramid(
        self, D: int, pyramid_dim: int | None, last_dim: int | None, norm_cfg: dict[str, Any]
    ) -> tuple[str, ...]:
        """Make what turns the taps into levels; return the names of its modules, from the finest."""
        if len(self.out_indices) == 1:
            return ()
        wide = pyramid_dim or D
        between = D if pyramid_dim is None else pyramid_dim // 2
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(D, between, kernel_size=2, stride=2),
            build_norm_layer(norm_cfg, between)[1],
            nn.GELU(),
            nn.ConvTranspose2d(between, wide, kernel_size=2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(D, wide, kernel_size=2, stride=2))
        self.fpn3: nn.Module
        self.fpn4: nn.Module
        if pyramid_dim is None:
            self.fpn3, self.fpn4 = nn.Identity(), nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)
        else:
            self.fpn3 = nn.Conv2d(D, wide, kernel_size=1)
            self.fpn4 = nn.Sequential(nn.Conv2d(last_dim or D, wide, kernel_size=3, stride=2, padding=1))
        return ("fpn1", "fpn2", "fpn3", "fpn4")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Images (B, 3, H, W), normalised -> levels (B, D or pyramid_dim, ceil(H/s), ceil(W/s)), s = 4, 8, 16, 32."""
        return self.pyramid(self.trunk(images), images.shape[-2:])

    def trunk(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> the taps (B, D, ceil(H/16), ceil(W/16)), one a level."""
        return self.forward_intermediates(images, indices=self.out_indices, stop_early=True, intermediates_only=True)

    def pyramid(self, taps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, ...]:
        """Taps, and the image's height and width in pixels -> the levels."""
        if not self.fpn_names:
            return tuple(taps)
        levels = [getattr(self, name)(tap) for name, tap in zip(self.fpn_names, taps, strict=True)]
        for i, stride in enumerate((4, 8)):  # cut off a ragged image's padding; 16 and 32 have the right size already
            # not -(-side // stride): ONNX rounds negative quotients towards zero
            levels[i] = levels[i][..., : (size[0] + stride - 1) // stride, : (size[1] + stride - 1) // stride]
        return tuple(levels)

    def init_weights(self) -> None:
        """Load the file of ``init_cfg`` and print the report, or say that training starts from scratch.

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
            ConfigError: a name this backbone does not have.
        """
        name = name.removeprefix("backbone.")
        top, _, rest = name.partition(".")
        if name in ("cls_token", "dist_token", "pos_embed") or top == "patch_embed":
            return 0
        if top == "blocks" and rest.partition(".")[0].isdigit() and int(rest.partition(".")[0]) < self.depth:
            return int(rest.partition(".")[0]) + 1
        if top in ("norm", "conv1x1", "fpn1", "fpn2", "fpn3", "fpn4"):
            return self.depth + 1
        raise ConfigError(
            f"parameter {name!r} belongs to no layer of this backbone",
            f"it knows the embeddings, blocks 0 to {self.depth - 1}, conv1x1 and fpn1 to fpn4",
            "teach TinyMIMBackbone.get_layer_id the new name",
        )


def check_student(backbone: ViT, checkpoint: Checkpoint) -> None:
    """Compare what one of our files says of its model with the backbone (weights cannot tell the head count).

    Raises:
        ConfigError: they differ.
    """
    told = checkpoint.config
    keys = [
        key
        for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
        if key in told and told[key] != backbone.config[key]
    ]
    if keys:
        hint = " (and the in_channels of both heads)" if "embed_dim" in keys else ""
        raise ConfigError(
            f"{checkpoint.path} is another model than the segmentation config: "
            + ", ".join(f"{key}={told[key]} (the config has {backbone.config[key]})" for key in keys),
            "the file stores how its model was built",
            f"add --cfg-options {' '.join(f'model.backbone.{key}={told[key]}' for key in keys)}{hint}, "
            "or choose the config of that size",
        )


def _check_taps(
    out_indices: Sequence[int], depth: int, patch_size: int, last_dim: int | None, pyramid_dim: int | None
) -> tuple[int, ...]:
    """Return the taps, four or one, as rising numbers from 0."""
    if patch_size != 16:
        raise ConfigError(
            f"patch_size={patch_size} gives no levels at strides 4, 8, 16, 32",
            "the pyramid scales the patch grid by 4, 2, 1 and 1/2",
            "use patch_size=16",
        )
    taps = tuple(i % depth for i in out_indices if -depth <= i < depth)
    if len(taps) not in (1, 4) or len(out_indices) != len(taps) or sorted(set(taps)) != list(taps):
        raise ConfigError(
            f"out_indices={tuple(out_indices)} does not fit {depth} blocks",
            "the pyramid needs four different blocks in rising order, numbered from 0; one block needs no pyramid",
            "for 12 blocks use (3, 5, 7, 11); for 4 blocks (0, 1, 2, 3); for a linear head (11,)",
        )
    if len(taps) == 1 and (pyramid_dim is not None or last_dim is not None):
        raise ConfigError(
            f"out_indices={tuple(out_indices)} with pyramid_dim={pyramid_dim}, last_dim={last_dim}",
            "one block's map is handed on as it is, without a pyramid",
            "leave pyramid_dim and last_dim out, or give four blocks",
        )
    if last_dim is not None and (pyramid_dim is None or taps[-1] != depth - 1):
        raise ConfigError(
            f"last_dim={last_dim} needs a pyramid_dim and the last block among out_indices",
            "the widened output of the last block feeds the coarsest level through a convolution",
            "give pyramid_dim=768 as TinyMIM*-T does, and end out_indices with the last block",
        )
    return taps


def _check_init_cfg(init_cfg: dict[str, Any] | None) -> dict[str, Any] | None:
    if init_cfg is None or (init_cfg.get("type") == "Pretrained" and init_cfg.get("checkpoint")):
        return init_cfg
    raise ConfigError(
        f"init_cfg={init_cfg} is not understood",
        "the backbone only loads files",
        'use init_cfg=dict(type="Pretrained", checkpoint="student.pth"), or None to train from scratch',
    )
