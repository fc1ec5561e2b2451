"""Published checkpoint formats: find the encoder's tensors in a file, rename them to timm's names, describe the model.

MAE (encoder and full), TinyMIM (pre-trained, fine-tuned, starred), MAE-Lite, timm, BEiT, MMSegmentation and our own
files, ``.pth`` and ``.safetensors``. Nothing in a file is ever executed: tensors load with ``weights_only=True`` and
unknown pickled globals become inert placeholders.
"""

import math
import os
import pickle
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinymim.errors import CheckpointError
from tinymim.models.position import num_extra_rows
from tinymim.models.vit import TABLE
from tinymim.schema import parse

State = dict[str, Tensor]
DROPPED = re.compile(  # parts of a file outside the encoder: decoders, heads of a segmentor, teachers, adapters
    r"^(decoder_|decoder\.|mask_token|decode_head\.|auxiliary_head\.|tch_model\.|attn_adapter\.|lm_head\."
    r"|rel_pos_bias\.relative_position_index)|relative_position_index$|num_batches_tracked$"
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


class _Inert(dict):
    """Stands in for any pickled object of a foreign file; accepts everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self


@dataclass
class Checkpoint:
    """A file's encoder tensors (prefixes and foreign parts removed) and the metadata that our own files store."""

    state: State
    meta: dict[str, Any]
    top: str
    dropped: list[str] = field(default_factory=list)
    path: str = ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The backbone's constructor arguments, as our files store them; empty for foreign files."""
        config = self.meta.get("backbone") or self.meta.get("config")
        return dict(config) if isinstance(config, dict) else {}

    def regrouped(self, num_heads: int) -> "Checkpoint":
        """A copy with another head count: the same weights in other groups."""
        return replace(self, meta={**self.meta, "backbone": {**self.config, "num_heads": num_heads}})


def _torch_load(path: Path) -> Any:
    """``torch.load`` with ``weights_only=True``; every global it would refuse becomes an inert placeholder."""
    unsafe: set[str] = set()
    while True:
        # torch's message leaves "builtins." out, its table of allowed names does not
        names = unsafe | {f"builtins.{name}" for name in unsafe if "." not in name}
        stand_ins = [(type("_Inert", (_Inert,), {}), name) for name in sorted(names)]
        try:
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None or found[1] in unsafe:
                raise CheckpointError(
                    f"cannot read {path}",
                    "it is not a checkpoint of tensors" + (f" (it holds {found[1]})" if found else ""),
                    "give a .pth of tensors (torch.save(model.state_dict(), ...)) or a .safetensors file",
                ) from error
            unsafe.add(found[1])
        except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"cannot read {path}",
                f"the file is damaged or not a PyTorch checkpoint ({type(error).__name__}: {str(error)[:160]})",
                "download or copy it again and compare its size and sha256 with the source",
            ) from error


def read_checkpoint(source: str | os.PathLike[str] | dict[str, Any]) -> Checkpoint:
    """Read a file (or take a loaded object) and find the encoder's tensors in it.

    Args:
        source: Path of a ``.pth`` or ``.safetensors`` file, or a state dict, possibly wrapped.

    Returns:
        The :class:`Checkpoint`; its keys have no prefix ``module.``, ``backbone.``, ``model.`` or ``encoder.``.

    Raises:
        CheckpointError: no such file, damaged, or without tensors.
    """
    path = ""
    meta: dict[str, Any] = {}
    content: Any = source
    if not isinstance(source, dict):
        path = str(source)
        if not Path(path).is_file():
            raise CheckpointError(f"no checkpoint at {path}", "the file does not exist", "check the path")
        if path.endswith(".safetensors"):
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt") as file:
                    content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
                    meta = parse(
                        (file.metadata() or {}).get("tinymim", "{}"), dict[str, Any], f"the metadata of {path}"
                    )
            except (SafetensorError, ValueError) as error:
                raise CheckpointError(
                    f"cannot read {path}", f"damaged safetensors file ({error})", "download it again"
                ) from error
        else:
            content = _torch_load(Path(path))
    top = "raw"
    if isinstance(content, dict):
        if isinstance(content.get("meta"), dict):
            meta = meta or {k: v for k, v in content["meta"].items() if not isinstance(v, _Inert)}
        for key in ("state_dict", "model", "module", "model_state"):
            if isinstance(content.get(key), dict) and any(isinstance(v, Tensor) for v in content[key].values()):
                top, content = key, content[key]
                break
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state:
        raise CheckpointError(
            f"no tensors in {path or 'the state dict'}",
            "none of state_dict, model, module or the top level holds any",
            "give a checkpoint of a vision transformer",
        )
    state, dropped = _strip(state)
    return Checkpoint(state, meta, top, dropped, path)


def _strip(state: State) -> tuple[State, list[str]]:
    """Remove prefixes of wrappers and everything outside the encoder."""
    dropped: list[str] = []
    for prefix in ("module.", "_orig_mod."):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    for prefix in ("backbone.", "model.", "encoder."):
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if any("patch_embed." in k or k.startswith(("blocks.", "layers.")) for k in inside):
            dropped += [k for k in state if not k.startswith(prefix)]
            state = inside
    dropped += [k for k in state if DROPPED.search(k)]
    return {k: v for k, v in state.items() if not DROPPED.search(k)}, dropped


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
    blocks = {int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))}
    if patch is None or patch.ndim != 4 or not blocks:
        return None
    table = state.get(f"blocks.0.attn.{TABLE}")
    last = state.get("conv1x1.1.weight")
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    prefix, grid = file_grid(state, config or {})
    gamma = state.get("blocks.0.ls1.gamma")
    return dict(
        img_size=(grid[0] * patch.shape[2], grid[1] * patch.shape[2]),
        patch_size=patch.shape[2],
        embed_dim=patch.shape[0],
        depth=max(blocks) + 1,
        num_heads=None if table is None else table.shape[1],
        mlp_ratio=4.0 if fc1 is None else fc1.shape[0] / fc1.shape[1],
        rel_pos_bias=table is not None,
        init_values=None if gamma is None else 1.0,
        dist_token=prefix == 2,
        last_dim=None if last is None else last.shape[0],
    )


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


def _square(n: int) -> int | None:
    root = math.isqrt(max(n, 0))
    return root if root * root == n and root > 0 else None


def file_grid(
    state: State, config: dict[str, Any], model_grid: tuple[int, int] | None = None, model_prefix: int = 1
) -> tuple[int, tuple[int, int]]:
    """Number of prefix tokens and patch grid of a file.

    Our files store it. Others: a square grid, or the sides that a relative-position table implies; the model's own
    grid where the number of rows is the same.

    Raises:
        CheckpointError: the grid is unknown.
    """
    if config.get("img_size") is not None:
        size, patch = config["img_size"], config.get("patch_size", 16)
        size = (size, size) if isinstance(size, int) else size
        return (2 if config.get("dist_token") else 1), (-(-size[0] // patch), -(-size[1] // patch))
    pos = state.get("pos_embed")
    table = next((v for k, v in state.items() if k.endswith(TABLE)), None)
    prefixes = (2,) if "dist_token" in state else (1, 2)
    if pos is not None and model_grid and pos.shape[1] == model_prefix + model_grid[0] * model_grid[1]:
        sides = _sides(pos.shape[1] - model_prefix, table, model_prefix)
        if sides is None or sides in (model_grid, model_grid[::-1]):
            return model_prefix, model_grid
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
