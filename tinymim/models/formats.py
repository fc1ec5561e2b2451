"""Published checkpoint formats: rename an encoder's tensors to timm's names, describe the model.

MAE (encoder and full), TinyMIM (pre-trained, fine-tuned, starred), MAE-Lite, timm, BEiT, DINO, MMSegmentation, Hugging
Face (ViT, ViTMAE, DeiT, BEiT, DINOv2, DINOv3) and our own files. ``weight_files.py`` opens them, ``encoders.py`` finds
the encoder in them.
"""

import math
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinymim.errors import CheckpointError, DataError
from tinymim.models.encoders import State, find_encoder
from tinymim.models.position import num_extra_rows
from tinymim.models.stored import backbone_config, check_meta
from tinymim.models.vit import TABLE
from tinymim.models.weight_files import Inert, open_weights, walk, weights_file
from tinymim.schema import read_json

DROPPED = re.compile(  # parts of a file outside the encoder: decoders, heads of a segmentor, teachers, adapters
    r"^(decoder_|decoder\.|mask_token|decode_head\.|auxiliary_head\.|tch_model\.|attn_adapter\.|lm_head\."
    r"|multi_scale_fusion_heads\.|encoder_norm\.|rel_pos_bias\.relative_position_index)|relative_position_index$|num_batches_tracked$"
)
RENAMES = [  # MMSegmentation's and BEiT's names -> timm's
    (r"\.projection\.", ".proj."),
    (r"^layers\.", "blocks."),
    (r"\.ln1\.", ".norm1."),
    (r"\.ln2\.", ".norm2."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.gamma_1$", ".ls1.gamma"),
    (r"\.gamma_2$", ".ls2.gamma"),
    (r"^ln1\.", "norm."),
]


HUGGING_FACE = [  # their names -> timm's, or the original authors' where timm reads those
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_(\d)$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]
# heads of architectures that training scripts name in their files ("args": model)
ARCHITECTURES = {"mae_vit_tiny_patch16": 12, "mae_vit_base_patch16": 12, "mae_vit_large_patch16": 16}


@dataclass
class Checkpoint:
    """A file's encoder tensors (prefixes and foreign parts removed) and the metadata that our own files store.

    Attributes:
        state: Tensors under timm's names, as far as they are known.
        meta: What our own files store.
        dropped: Names of tensors outside the encoder.
        path: The file; empty for a state dict.
        heads: Heads per block, told by a config beside the file.
        usual_heads: Heads per block of the architecture that the file names; others may have been trained.
        notes: What the user should know about the choice of tensors.
    """

    state: State
    meta: dict[str, Any]
    dropped: list[str] = field(default_factory=list)
    path: str = ""
    heads: int | None = None
    usual_heads: int | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The backbone's constructor arguments, as our files store them; empty for foreign files."""
        return backbone_config(self.meta)

    @property
    def num_heads(self) -> int | None:
        """Heads per block; None: the file does not tell."""
        return self.config.get("num_heads") or self.heads

    def regrouped(self, num_heads: int) -> "Checkpoint":
        """A copy with another head count: the same weights in other groups."""
        return replace(self, meta={**self.meta, "backbone": {**self.config, "num_heads": num_heads}})


def read_checkpoint(source: str | os.PathLike[str] | dict[str, Any], *, part: str | None = None) -> Checkpoint:
    """Read a file (or take a loaded object) and find the encoder's tensors in it.

    Args:
        source: Path of a ``.pth``, ``.bin`` or ``.safetensors`` file, of a folder of Hugging Face, or a state dict,
            possibly wrapped.
        part: Start of the names of the wanted tensors, where a file holds several encoders, e.g. "model_ema".

    Returns:
        The :class:`Checkpoint`; its keys have no prefixes.

    Raises:
        CheckpointError: no such file, damaged, without tensors, or with metadata that cannot be true.
    """
    path = ""
    meta: dict[str, Any] = {}
    content: Any = source
    if not isinstance(source, dict):
        file = weights_file(source)
        path = str(file)
        content, meta = open_weights(file)
    if isinstance(content, dict) and isinstance(content.get("meta"), dict):
        meta = meta or {k: v for k, v in content["meta"].items() if not isinstance(v, Inert)}
    found = walk(content)
    if not found:
        raise CheckpointError(
            f"no tensors in {path or 'the state dict'}",
            "it is a pickled model, which is never run"
            if isinstance(content, Inert)
            else "none of its dictionaries holds any",
            "give a checkpoint of a vision transformer: torch.save(model.state_dict(), FILE)",
        )
    encoder = find_encoder(found, part, path or "FILE")
    state = encoder.state
    theirs = any(key.startswith("embeddings.") for key in state)
    if theirs:
        state = _from_hugging_face(state)
    dropped = encoder.beside + [key for key in state if DROPPED.search(key)]
    dropped += _block_of_queries(state)
    state = {key: value for key, value in state.items() if key not in dropped}
    check_meta(meta, state, path or "the state dict")
    heads = _heads_of_folder(Path(path), state) if theirs and path else None
    return Checkpoint(state, meta, dropped, path, heads, _usual_heads(content), encoder.notes)


def _block_of_queries(state: State) -> list[str]:
    """Tensors of a last block that has a norm and queries, keys and values only: D2-MAE drops it after pre-training."""
    last = f"blocks.{count_blocks(state) - 1}."
    own = [key for key in state if key.startswith(last)]
    return own if own and all(key.startswith((f"{last}norm1.", f"{last}attn.qkv.")) for key in own) else []


def _from_hugging_face(state: State) -> State:
    """Names of Hugging Face -> timm's; query, key and value in one tensor, where a missing bias is zero."""
    out: State = {}
    for key, value in state.items():
        new = key
        for pattern, text in HUGGING_FACE:
            new = re.sub(pattern, text, new)
        out[new] = value
    for key in [key for key in out if key.endswith(".attn.q.weight")]:
        stem = key.removesuffix("q.weight")
        if not all(f"{stem}{x}.weight" in out for x in "kv"):
            continue
        weights = [out.pop(f"{stem}{x}.weight") for x in "qkv"]
        biases = [out.pop(f"{stem}{x}.bias", None) for x in "qkv"]
        out[f"{stem}qkv.weight"] = torch.cat(weights)
        if any(bias is not None for bias in biases):
            pairs = zip(biases, weights, strict=True)
            out[f"{stem}qkv.bias"] = torch.cat([w.new_zeros(len(w)) if b is None else b for b, w in pairs])
    if "register_tokens" in out and "pos_embed" not in out:  # DINOv3, whose authors call them so
        out["storage_tokens"] = out.pop("register_tokens")
    return out


def _heads_of_folder(path: Path, state: State) -> int | None:
    """Heads of the ``config.json`` beside a file of Hugging Face; None without one.

    Raises:
        CheckpointError: the config is damaged, of another width, or names an activation that no plain ViT has.
    """
    file = path.with_name("config.json")
    if not file.is_file():
        return None
    try:
        config = read_json(file, dict[str, Any])
        heads, width, act = (config[key] for key in ("num_attention_heads", "hidden_size", "hidden_act"))
    except (DataError, LookupError) as error:
        raise CheckpointError(
            f"cannot read {file}", f"it is no config of a vision transformer ({error!r})", "download it again"
        ) from None
    proj = state.get("patch_embed.proj.weight")
    fits = isinstance(heads, int) and isinstance(width, int) and 0 < heads <= width and width % heads == 0
    if not fits or (proj is not None and len(proj) != width):
        raise CheckpointError(
            f"{file} does not fit the weights beside it",
            f"num_attention_heads={heads!r}, hidden_size={width!r}",
            "give a folder as save_pretrained writes it",
        )
    if act not in ("gelu", "gelu_python"):
        raise CheckpointError(
            f"{path} is not a plain vision transformer",
            f"its activation is {act!r}, not GELU",
            "choose another teacher",
        )
    return heads


def _usual_heads(content: Any) -> int | None:
    """Heads of the architecture that a training script wrote into its file."""
    args = content.get("args") if isinstance(content, dict) else None
    name = args.get("model") if isinstance(args, dict) else None
    return ARCHITECTURES.get(name) if isinstance(name, str) else None


def describe(state: State, config: dict[str, Any] | None = None) -> str:
    """Describe the model of a state dict, e.g. ``ViT-Base (width 768, 12 blocks, patch 16, grid 14x14)``."""
    if config and "name" in config:  # stored in our own files
        return str(config["name"])
    try:
        shape = infer_config(state, config)
    except CheckpointError as error:
        return f"a vision transformer; {error.what}"
    if shape is None:
        return "a model that this reader does not know"
    names = {192: "Tiny", 384: "Small", 768: "Base", 1024: "Large", 1280: "Huge"}
    width, patch = shape["embed_dim"], shape["patch_size"]
    grid = "x".join(str(size // patch) for size in shape["img_size"])
    words = [f"width {width}", f"{shape['depth']} blocks", f"patch {patch}", f"grid {grid}"]
    if shape["dist_token"]:
        words.append("distillation token")
    if shape["last_dim"]:
        words.append(f"{shape['last_dim']}-wide last layer (TinyMIM*)")
    if shape["rel_pos_bias"]:
        words.append("relative-position bias")
    return f"ViT-{names.get(width, '?')} ({', '.join(words)})"


def infer_config(state: State, config: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """ViT constructor arguments from tensor shapes (``num_heads`` only from relative-position tables); None: not a ViT.

    Raises:
        CheckpointError: the patch grid is unknown.
    """
    state = rename(state, set())
    patch = state.get("patch_embed.proj.weight")
    depth = count_blocks(state)
    if patch is None or patch.ndim != 4 or not depth:
        return None
    table = state.get(f"blocks.0.attn.{TABLE}")
    last = state.get("conv1x1.1.weight")
    last = last if last is not None and last.ndim == 2 else None
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    prefix, grid = file_grid(state, config or {})
    gamma = state.get("blocks.0.ls1.gamma")
    if fc1 is not None and (fc1.ndim != 2 or not fc1.numel()):
        return None
    return dict(
        img_size=(grid[0] * patch.shape[2], grid[1] * patch.shape[2]),
        patch_size=patch.shape[2],
        embed_dim=patch.shape[0],
        depth=depth,
        num_heads=None if table is None else table.shape[1],
        mlp_ratio=4.0 if fc1 is None else fc1.shape[0] / fc1.shape[1],
        rel_pos_bias=table is not None,
        init_values=None if gamma is None else 1.0,
        dist_token=prefix == 2,
        last_dim=None if last is None else last.shape[0],
    )


def count_blocks(state: State) -> int:
    """Number of blocks of a state dict in timm's names; 0 if they are not numbered 0, 1, 2, ..."""
    numbers = {int(m[1]) for k in state if (m := re.match(r"blocks\.(\d{1,3})\.", k))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def rename(state: State, wanted: set[str]) -> State:
    """Rename foreign keys to timm's; keys that the model already has (``wanted``) are kept."""
    out: State = {}
    for key, value in state.items():
        new = key
        if key not in wanted:
            for pattern, text in RENAMES:
                new = re.sub(pattern, text, new)
        out[new] = value
    for key in [k for k in out if k.endswith("attn.q_bias") and k not in wanted]:  # BEiT: the key bias is zero
        q = out.pop(key)
        v = out.pop(key.replace("q_bias", "v_bias"), torch.zeros_like(q))
        out[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    shared = f"rel_pos_bias.{TABLE}"
    if shared in out and shared not in wanted:  # BEiT's shared table -> one per block
        table = out.pop(shared)
        for i in sorted({int(m[1]) for k in out if (m := re.match(r"blocks\.(\d+)\.", k))}):
            out[f"blocks.{i}.attn.{TABLE}"] = table.clone()
    return out


def _smoother(pos_1TD: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether positions differ less from row to row on one grid than on another of as many patches."""

    def roughness(rows: int, columns: int) -> float:
        map_HWD = pos_1TD[0, -rows * columns :].float().reshape(rows, columns, -1)
        return float(map_HWD.diff(dim=0).square().mean() + map_HWD.diff(dim=1).square().mean())

    return roughness(*grid) < roughness(*other)


def _square(n: int) -> int | None:
    root = math.isqrt(max(n, 0))
    return root if root * root == n and root > 0 else None


def file_grid(
    state: State, config: dict[str, Any], model_grid: tuple[int, int] | None = None, model_prefix: int = 1
) -> tuple[int, tuple[int, int]]:
    """Number of prefix tokens and patch grid of a file.

    Our files store it. Others: a square grid, or the sides that a relative-position table implies; the model's own
    grid where the number of rows is the same and the positions vary more smoothly on it than on a square.

    Raises:
        CheckpointError: the grid is unknown.
    """
    pos = state.get("pos_embed")
    table = next((v for k, v in state.items() if k.endswith(TABLE)), None)
    for name, tensor, axes in (("pos_embed", pos, 3), (TABLE, table, 2)):
        if tensor is not None and (tensor.ndim != axes or not tensor.numel()):
            raise CheckpointError(
                "the file's positions are not those of a plain vision transformer",
                f"{name} has the shape {tuple(tensor.shape)}",
                "give another checkpoint, or name its architecture: --teacher timm/NAME --teacher-weights FILE",
            )
    if config.get("img_size") is not None:
        size, patch, prefix = config["img_size"], config.get("patch_size", 16), 2 if config.get("dist_token") else 1
        size = (size, size) if isinstance(size, int) else size
        grid = (-(-size[0] // patch), -(-size[1] // patch))
        if pos is not None and pos.shape[1] != prefix + grid[0] * grid[1]:
            raise CheckpointError(
                f"the file's config does not fit its tensors: img_size={tuple(size)}",
                f"that is a grid of {grid[0]}x{grid[1]}, and it has {pos.shape[1]} positions",
                "write the file again with the command that made it, or restore a copy",
            )
        return prefix, grid
    prefixes = (2,) if "dist_token" in state else (1, 2)
    if pos is not None and model_grid and pos.shape[1] == model_prefix + model_grid[0] * model_grid[1]:
        n = pos.shape[1] - model_prefix
        own = _sides(n, table, model_prefix) or ((side, side) if (side := _square(n)) else model_grid)
        if own in (model_grid, model_grid[::-1]) or (table is None and _smoother(pos, model_grid, own)):
            return model_prefix, model_grid
    if pos is not None and "cls_token" not in state:
        raise CheckpointError(
            f"the file has no class token ({pos.shape[1]} positions)",
            "its model has patches only, or pools them otherwise",
            "as a teacher, name its architecture: --teacher timm/NAME --teacher-weights FILE",
        )
    for prefix in prefixes:
        if pos is not None:
            n = pos.shape[1] - prefix
            if sides := _sides(n, table, prefix):
                flip = model_grid is not None and model_grid[0] > model_grid[1]
                return prefix, sides[::-1] if flip else sides
            if side := _square(n):
                return prefix, (side, side)
        elif table is not None:
            span = _square(table.shape[0] - num_extra_rows(prefix))
            if span and span % 2:
                return prefix, ((span + 1) // 2, (span + 1) // 2)
    if pos is None and table is None:
        return prefixes[0], model_grid or (14, 14)
    raise CheckpointError(
        f"the file's patch grid is unknown ({'no positions' if pos is None else f'{pos.shape[1]} positions'})",
        "it is not square, and only our own files store their image size",
        "load it into a model of its own img_size, save that with tinymim.models.save_student, and load the result",
    )


def _sides(n: int, table: Tensor | None, prefix: int) -> tuple[int, int] | None:
    """Sides h <= w of a grid with n patches and a table of (2h-1)(2w-1) + extra rows, or None."""
    if table is None:
        return None
    half, odd = divmod(4 * n + 1 - (table.shape[0] - num_extra_rows(prefix)), 2)  # h + w
    root = math.isqrt(max(half * half - 4 * n, 0))
    h, w = (half - root) // 2, (half + root) // 2
    return (h, w) if not odd and h > 0 and h * w == n and h + w == half else None
