"""Health metrics of a vision transformer during training: relations per head, attention entropy, outliers.

Relations and attention maps are held in parts: memory is linear in the tokens.

Legend: B = batch, T = tokens, R = some of them, D = width, M = relation heads, H = heads, L = blocks.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinymim.analysis.attention_maps import log_maps
from tinymim.distill import TinyMIM, read, relation_losses
from tinymim.distill.targets import Relation, read_from
from tinymim.models.tokens import num_heads

LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}  # layers that INT8 quantises
VALUE_QUANTILE, CHANNEL_QUANTILE = 0.999, 0.9  # of the values of a channel, and of the channels: see outlier
OUTLIER_LIMIT = 20.0  # largest value over the quantile; see activation_outliers


def head_kl(
    student: dict[str, Tensor], teacher: dict[str, Tensor], heads: int, relations: Sequence[str] = ("qk", "vv")
) -> dict[str, Tensor]:
    """KL(teacher || student) of token relations per head; its mean is the loss (TinyMIM, equation 9).

    Args:
        student: ``q``, ``k`` and ``v``, as far as the relations need them, each (B, T, D_s).
        teacher: The same, each (B, T, D_t).
        heads: Relation heads; must divide both widths.
        relations: Two letters each.

    Returns:
        Relation -> (M,), nats, mean over batch and query rows.
    """
    sides = [{part: x_BTD.chunk(heads, -1) for part, x_BTD in side.items()} for side in (student, teacher)]
    found: dict[str, list[Tensor]] = {name: [] for name in relations}
    for head in range(heads):
        s, t = ({part: x_MBTC[head] for part, x_MBTC in side.items()} for side in sides)
        for name, kl in relation_losses(s, t, 1, relations).items():
            found[name].append(kl)
    return {name: torch.stack(each) for name, each in found.items()}


@torch.no_grad()
def method_head_kl(method: TinyMIM, student_images: Tensor, teacher_images: Tensor) -> dict[str, Tensor]:
    """:func:`head_kl` of every relation that a method compares, on whole photos (its mask is not applied).

    Args:
        method: In evaluation mode.
        student_images: (B, 3, S, S), normalised.
        teacher_images: The same crops, normalised for the teacher.

    Returns:
        Relation, named like the method's loss (``qk``; ``qk@18:12`` if it is compared at several blocks) -> (M,), nats.
    """
    targets = [target for target in method.targets if isinstance(target, Relation)]
    if not targets:
        return {}
    learned = read(method.student, student_images, read_from(targets, "student"))
    out: dict[str, Tensor] = {}
    for target, s, t in method.compared(student_images, teacher_images, learned, targets):
        for name, kl_M in head_kl(s, t, method.relation_heads, target.parts).items():
            out[method.loss_name(target, name)] = kl_M
    return out


@torch.no_grad()
def attention_entropy(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the attention maps: low if a head attends to few tokens, log T if it attends to all equally.

    Args:
        model: Our ViT, or a timm model whose attention adds nothing to its scores (VisionTransformer, Eva).
        images: (B, 3, H, W), normalised for this model.

    Returns:
        (L, H) in nats, mean over batch and query rows; and the same as a share of log T, 0 to 1.

    Raises:
        ConfigError: the model adds a bias to its scores that cannot be read.
    """
    total_LH = torch.zeros(len(model.blocks), num_heads(model), device=images.device)
    tokens = 0
    for block, _, log_BHRT in log_maps(model, images):
        tokens = log_BHRT.shape[-1]
        total_LH[block - 1] -= (log_BHRT.exp() * log_BHRT).sum((0, 2, 3)) / tokens
    entropy_LH = total_LH / len(images)
    return entropy_LH, entropy_LH / math.log(tokens)


class Outlier(NamedTuple):
    """The largest activation of a tensor compared with its usual ones.

    Attributes:
        largest: Largest absolute value.
        usual: In nine of ten channels, 99.9 % of the absolute values are below this.
        channel: The channel of the largest value, from 0.
    """

    largest: float
    usual: float
    channel: int

    @property
    def ratio(self) -> float:
        """Largest value divided by the usual one."""
        return self.largest / self.usual if self.usual else math.inf if self.largest else 1.0


def outlier(x: Tensor) -> Outlier:
    """:class:`Outlier` of a tensor (..., D).

    The 99.9 % quantile is taken per channel, then the 90 % quantile over the channels: a quantile of the whole tensor
    would miss what matters. Outliers are in a few channels, at every token; one channel is 1 / D of the values, more
    than 0.1 % in any model narrower than 1,000. (With 40 times the usual value in one channel of a trained 128-wide
    ViT, the quantile of the whole tensor gives a ratio of 2.)
    """
    size_DN = x.detach().abs().float().flatten(0, -2).T.contiguous()
    above = size_DN.shape[1] - round(VALUE_QUANTILE * size_DN.shape[1])
    top_DK = size_DN.topk(max(above, 1), dim=1).values
    largest, channel = top_DK[:, 0].max(0)
    return Outlier(float(largest), float(top_DK[:, -1].quantile(CHANNEL_QUANTILE)), int(channel))


@torch.no_grad()
def activation_outliers(model: Any, images: Tensor) -> list[dict[str, Outlier]]:
    """Largest activation compared with the 99.9 % quantile, per block, for the tensors that INT8 quantises.

    Our INT8 files quantise the inputs of the four linear layers of a block, and nothing else in it
    (``tinymim_export.precision.qdq``); these are measured. ``stream`` is the block's output: float in our files,
    quantised by tools that put every sum into INT8, and the place where outliers grow.

    :data:`OUTLIER_LIMIT`: with one scale per tensor, largest / 127, everything below largest / 254 rounds to 0, and at
    a ratio r the usual values keep 127 / r levels on either side. Rounding noise is scale^2 / 12; for normally
    distributed values (usual = 3.3 sigma) the signal-to-noise ratio is 42.5 - 20 log10 r dB: 22 at 10, 16 at 20, 10 at
    40. Measured with one channel scaled up before every qkv, proj and fc1 of two trained ViTs (its weights scaled down:
    the same float model), all four inputs in INT8: the error of the features, as a share of their variance, is 0.02 %
    without, 0.2 % at 10, 1 % at 20, 4 to 6 % at 40, 23 to 37 % at 80. The limit is where it passes 1 %.

    Args:
        model: Our ViT, or timm's VisionTransformer.
        images: (B, 3, H, W), normalised for this model.

    Returns:
        A dict per block: ``qkv``, ``proj``, ``fc1``, ``fc2`` (the input of that layer) and ``stream``.
    """
    found: list[dict[str, Outlier]] = [{} for _ in model.blocks]

    def record(seen: dict[str, Outlier], name: str) -> Any:
        def note(_: Any, args: Any, result: Tensor | None = None) -> None:
            seen[name] = outlier(args[0] if result is None else result)

        return note

    handles = []
    for seen, block in zip(found, model.blocks, strict=True):
        handles += [
            block.get_submodule(path).register_forward_pre_hook(record(seen, name)) for name, path in LAYERS.items()
        ]
        handles.append(block.register_forward_hook(record(seen, "stream")))
    try:
        model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return found
