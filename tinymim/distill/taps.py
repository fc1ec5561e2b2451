"""Read q, k, v and the features of any block of a vision transformer; nothing after the deepest one is computed.

    input        (B, T, D) the residual stream before the block
    q, k, v      (B, T, D) as they enter the dot product: after q/k norm and rotary embedding, before any additive bias
    attn_pre     (B, T, D) H, what attention adds to the residual stream     (TinyMIM, arXiv 2301.01296, section 3.1)
    attn_post    (B, T, D) H-hat, the residual stream after attention
    ffn_pre      (B, T, D) H-tilde, what the feed-forward layer adds
    output       (B, T, D) F_i, the residual stream after the block

``attn_pre`` and ``ffn_pre`` are read after layer scale and before drop path. Our models are run block by block. timm's
are run unchanged and read through hooks; their blocks must apply attention first and then the feed-forward layer, with
PyTorch's fused attention: VisionTransformer (MAE, DeiT, DINOv2, CLIP, SigLIP), BEiT and BEiT v2, EVA-02 and DINOv3,
SAM's image encoder. Parallel blocks and differential attention are refused.

Legend: B = batch, T = tokens, H = heads, C = channels per head, D = width, V = visible patches.
"""

from collections.abc import Collection, Mapping
from typing import Any

import timm.models.beit
import timm.models.eva
import timm.models.vision_transformer
import timm.models.vision_transformer_sam
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tinymim.errors import ConfigError
from tinymim.models.attention import attention
from tinymim.models.backbone import QKV, TAPS, TapByTap
from tinymim.models.teachers import TAPPABLE, TIMM
from tinymim.models.tokens import keep_patches, num_prefix

__all__ = ["QKV", "TAPPABLE", "TAPS", "qkv_at", "read"]
EARLY = ("input", *QKV)  # can be read from any block; the others need a pre-norm one
PRE_NORM = (
    timm.models.vision_transformer.Block,
    timm.models.beit.Block,
    timm.models.eva.EvaBlock,
    timm.models.vision_transformer_sam.Block,
)


def read(
    model: Any, images: Tensor, wanted: Mapping[int, Collection[str]], keep_BV: Tensor | None = None
) -> dict[int, dict[str, Tensor]]:
    """Run a model up to the deepest tap.

    Args:
        model: One of :data:`TAPPABLE`.
        images: (B, 3, H, W), normalised for this model.
        wanted: Block (from 1) -> names of :data:`TAPS`.
        keep_BV: Row-major indices of the patches to keep; the others are dropped. None: all.

    Returns:
        Block -> name -> (B, T, D), prefix tokens (class, distillation, registers) first.

    Raises:
        ConfigError: another class of model, no such block or tap, q, k, v of a block of windowed attention, or patches
            dropped from a model whose attention depends on their positions.
    """
    _check(model, wanted, keep_BV)
    if isinstance(model, TapByTap):
        return model.run_taps(images, wanted, keep_BV)
    return _read_timm(model, images, wanted, keep_BV)


def qkv_at(model: Any, images: Tensor, block: int) -> dict[str, Tensor]:
    """``q``, ``k``, ``v``, each (B, T, D), of one block (from 1); see :func:`read`."""
    return read(model, images, {block: QKV})[block]


# timm's models ----------------------------------------------------------------------------------------------------


class _DeepestTapRead(Exception):
    """The deepest tap has been read: stop the forward pass."""


class _CaptureQKV(TorchFunctionMode):
    """Captures q, k, v as they enter the fused attention of the current block; stops there if nothing else is read.

    All attention of the model is computed by :func:`tinymim.models.attention.attention`.
    """

    seen: dict[str, Tensor] | None = None
    stop = False
    batch = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.seen is not None and func is F.scaled_dot_product_attention:
            if args[0].shape[-1] != args[2].shape[-1]:
                raise ConfigError(
                    "q and v of this teacher have different widths",
                    "it uses differential attention",
                    "choose another teacher",
                )
            for name, value in zip(QKV, args, strict=False):
                value_BHTC = value if value.ndim == 4 else value.unflatten(0, (self.batch, -1))  # SAM's: (B * H, T, C)
                self.seen[name] = value_BHTC.transpose(1, 2).flatten(2)
            if self.stop:
                raise _DeepestTapRead
        return (attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _read_timm(
    model: Any, images: Tensor, wanted: Mapping[int, Collection[str]], keep_BV: Tensor | None
) -> dict[int, dict[str, Tensor]]:
    out: dict[int, dict[str, Tensor]] = {block: {} for block in wanted}
    capture, stream, handles = _CaptureQKV(), {}, []

    def hooks(block: int) -> list[Any]:
        module, last = model.blocks[block - 1], block == max(wanted)

        def enter(_: Any, args: Any) -> None:
            capture.seen, capture.batch, stream["in"] = out[block], len(args[0]), args[0]
            capture.stop = last and set(wanted[block]) <= set(EARLY)
            out[block]["input"] = args[0].reshape(capture.batch, -1, args[0].shape[-1])

        def between(_: Any, args: Any) -> None:
            stream["mid"] = args[0].reshape(stream["in"].shape)  # SAM's is flat from here on

        def adds(name: str) -> Any:
            def note(_: Any, args: Any) -> None:
                stream[name] = args[0]

            return note

        def leave(_: Any, args: Any, result: Tensor) -> None:
            capture.seen = None
            if not set(wanted[block]) <= set(EARLY):
                windowed = len(stream["attn_pre"]) != capture.batch  # SAM merges its windows after this point
                taps = {
                    "attn_pre": stream["mid"] - stream["in"] if windowed else stream["attn_pre"],
                    "attn_post": stream["mid"],
                    "ffn_pre": stream["ffn_pre"],
                    "output": result,
                }
                out[block] |= {name: value.reshape(capture.batch, -1, value.shape[-1]) for name, value in taps.items()}
            if last:
                raise _DeepestTapRead

        before_drop_path = [
            module.get_submodule(part).register_forward_pre_hook(adds(name))
            for part, name in (("drop_path1", "attn_pre"), ("drop_path2", "ffn_pre"))
            if set(wanted[block]) - set(EARLY)
        ]
        return [
            *before_drop_path,
            module.register_forward_pre_hook(enter),
            module.norm2.register_forward_pre_hook(between),
            module.register_forward_hook(leave),
        ]

    if keep_BV is not None:
        first = model.blocks[0].register_forward_pre_hook(
            lambda _, args: (keep_patches(args[0], keep_BV, num_prefix(model)), *args[1:])
        )
        handles.append(first)
    fused = {block: model.blocks[block - 1].attn.fused_attn for block in wanted}
    for block in wanted:
        handles += hooks(block)
        model.blocks[block - 1].attn.fused_attn = True
    try:
        with capture:
            model.forward_features(images)
    except _DeepestTapRead:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for block, was in fused.items():
            model.blocks[block - 1].attn.fused_attn = was
    return {block: {name: out[block][name] for name in names} for block, names in wanted.items()}


def _check(model: Any, wanted: Mapping[int, Collection[str]], keep_BV: Tensor | None) -> None:
    """Refuse what :func:`read` cannot give."""
    if not isinstance(model, TAPPABLE):
        raise ConfigError(
            f"cannot read a {type(model).__name__}",
            f"only tinymim's ViT and timm's {', '.join(kind.__name__ for kind in TIMM)} can be read",
            "use one of these as teacher or student",
        )
    blocks: Any = model.blocks  # type: ignore[union-attr]
    depth, own = len(blocks), isinstance(model, TapByTap)
    for block, names in wanted.items():
        if not 1 <= block <= depth:
            raise ConfigError(
                f"block {block} does not exist", f"the model has {depth} blocks, counted from 1", f"choose 1 to {depth}"
            )
        if unknown := [name for name in names if name not in TAPS]:
            raise ConfigError(f"no tap {unknown[0]!r}", f"the taps are {', '.join(TAPS)}", "choose one of these")
        module = blocks[block - 1]
        if not own and not (hasattr(module, "attn") and hasattr(module, "norm2")):
            raise ConfigError(
                f"block {block} is a {type(module).__name__}",
                "it does not apply attention first and then the feed-forward layer",
                "choose another teacher",
            )
        if getattr(module, "window_size", 0) and set(names) & set(QKV):
            whole = [i + 1 for i, each in enumerate(blocks) if not each.window_size]
            raise ConfigError(
                f"block {block} has windowed attention",
                "its q, k, v do not cover the whole image",
                f"choose a block of global attention: {', '.join(map(str, whole))}",
            )
        if not own and not isinstance(module, PRE_NORM) and set(names) - set(EARLY):
            raise ConfigError(
                f"block {block} is a {type(module).__name__}",
                "features can only be read from pre-norm blocks",
                "choose q, k, v, or another teacher",
            )
    # positions of timm's VisionTransformer are added once: patches can be dropped
    if keep_BV is not None and not (model.maskable if own else isinstance(model, VisionTransformer)):
        raise ConfigError(
            f"patches cannot be dropped from this {type(model).__name__}",
            "its attention uses the relative position of every pair of tokens",
            "leave the mask out, or use a model with absolute positions",
        )
