"""One reader for every published checkpoint format; clean student files out; a report of every key.

Reads MAE (encoder and full), TinyMIM (pre-trained, fine-tuned, starred), MAE-Lite, timm, BEiT, MMSegmentation and our
own files, ``.pth`` and ``.safetensors``. Nothing in a file is ever run: tensors load with ``weights_only=True`` and
unknown pickled globals become inert placeholders.
"""

import math
import os
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.errors import CheckpointError
from tinymim.files import atomic_path, sha256_file, versions
from tinymim.models.position import num_extra_rows, resize_position, resize_relative_table
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViT

State = dict[str, Tensor]
TABLE = "relative_position_bias_table"
DROPPED = re.compile(  # parts of a file that are no encoder: decoders, heads of a segmentor, teachers, adapters
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
    """Stands for any pickled object of a foreign file; accepts everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self


@dataclass
class Checkpoint:
    """A file's encoder tensors (wrappers and foreign parts removed) and what our own files say about them."""

    state: State
    meta: dict[str, Any]
    top: str
    dropped: list[str] = field(default_factory=list)
    path: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """The ViT constructor arguments our files store; empty for foreign files."""
        config = self.meta.get("backbone") or self.meta.get("config")
        return config if isinstance(config, dict) else {}


@dataclass
class LoadReport:
    """What happened to every key of a load: parameter names, plus remarks a person should see."""

    source: str = ""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")

        lines = [f"loaded {len(self.loaded)} tensors" + (f" from {self.source}" if self.source else "")]
        for label in ("missing", "unexpected", "resized", "dropped"):
            if names := getattr(self, label):
                lines.append(f"  {label}: {some(names)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _torch_load(path: Path) -> Any:
    """``torch.load`` with ``weights_only=True``; every global it would refuse becomes an inert placeholder."""
    unsafe: set[str] = set()
    while True:
        stand_ins = [(type("_Inert", (_Inert,), {}), name) for name in sorted(unsafe)]
        try:
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None or found[1] in unsafe:
                raise CheckpointError(
                    f"cannot read {path}",
                    f"it is no checkpoint of tensors ({str(error).splitlines()[0][:200]})",
                    "save it again as a plain state_dict (torch.save(model.state_dict(), ...)) or .safetensors",
                ) from error
            unsafe.add(found[1])
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"cannot read {path}",
                f"the file is damaged or no PyTorch checkpoint ({type(error).__name__}: {str(error)[:160]})",
                "download or copy it again and compare its size and sha256 with the source",
            ) from error


def read_checkpoint(source: str | os.PathLike[str] | dict[str, Any]) -> Checkpoint:
    """Read a file (or take a loaded object) and find the encoder's tensors in it.

    Args:
        source: Path of a ``.pth`` or ``.safetensors`` file, or a state dict, possibly wrapped.

    Returns:
        The :class:`Checkpoint`; keys without ``module.``, ``backbone.``, ``model.`` or ``encoder.`` in front.

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
            import json

            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt") as file:
                    content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
                    meta = json.loads((file.metadata() or {}).get("tinymim", "{}"))
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
    """Remove wrappers' prefixes and everything that is no encoder."""
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
    """Words for the model a state dict belongs to, e.g. ``ViT-Base (width 768, 12 blocks, patch 16, grid 14x14)``."""
    try:
        shape = infer_config(state, config)
    except CheckpointError as error:
        return f"a vision transformer; {error.what}"
    if shape is None:
        return "no vision transformer that this reader knows"
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
    """ViT constructor arguments readable from tensor shapes (``num_heads`` only from relative-position tables)."""
    state = _rename(state, set())
    patch = state.get("patch_embed.proj.weight")
    blocks = {int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))}
    if patch is None or patch.ndim != 4 or not blocks:
        return None
    table = state.get(f"blocks.0.attn.{TABLE}")
    last = state.get("conv1x1.1.weight")
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    prefix, grid = _file_grid(state, config or {})
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


def _rename(state: State, wanted: set[str]) -> State:
    """Foreign names to timm's; names the model has already (``wanted``) stay as they are."""
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
    if shared in out and shared not in wanted:  # BEiT's shared table -> one a block
        table = out.pop(shared)
        for i in sorted({int(m[1]) for k in out if (m := re.match(r"blocks\.(\d+)\.", k))}):
            out[f"blocks.{i}.attn.{TABLE}"] = table.clone()
    return out


def _square(n: int) -> int | None:
    root = math.isqrt(max(n, 0))
    return root if root * root == n and root > 0 else None


def _file_grid(
    state: State, config: dict[str, Any], model_grid: tuple[int, int] | None = None, model_prefix: int = 1
) -> tuple[int, tuple[int, int]]:
    """Prefix tokens and patch grid of a file.

    Our files say it. Others: a square grid, or with a relative-position table the sides it implies; the model's own
    grid where the number of rows is the same.
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
        "it is not square, and only files of ours store their image size",
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


def load_weights(
    model: nn.Module, source: str | os.PathLike[str] | dict[str, Any] | Checkpoint, *, new_dist_token: bool = False
) -> LoadReport:
    """Load an encoder's weights, resizing positions and relative-position tables to the model's grid.

    Args:
        model: :class:`~tinymim.models.ViT`, a segmentation backbone of ours, or a timm VisionTransformer / BEiT.
        source: File, state dict or :class:`Checkpoint`.
        new_dist_token: Let a file without distillation token into a model with one: the token, its position and its
            bias rows are copied from the class token.

    Returns:
        The :class:`LoadReport`, also printed (on the first process).

    Raises:
        CheckpointError: nothing fits, another width, depth, patch or head count, or a distillation token on one side
            only. The model is left as it was.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    target = model.state_dict()
    state = _rename(checkpoint.state, set(target))
    report = LoadReport(source=checkpoint.path, dropped=list(checkpoint.dropped))
    looks = f"the file looks like {describe(checkpoint.state, checkpoint.config)}"
    _check_shape(model, target, state, checkpoint, looks)

    grid = tuple(getattr(model, "grid_size", None) or model.patch_embed.grid_size)  # type: ignore[union-attr,arg-type]
    prefix = int(getattr(model, "num_prefix_tokens", 1))  # type: ignore[arg-type]
    file_prefix, file_grid = _file_grid(state, checkpoint.config, grid, prefix)
    if file_prefix > prefix:
        raise CheckpointError(
            "the file has a distillation token, the model has none",
            looks,
            'build the model with dist_token=True (tinymim.create_model("tinymim_vit_star_tiny"))',
        )
    if file_prefix < prefix:
        if not new_dist_token:
            raise CheckpointError(
                "the model has a distillation token, the file has none",
                looks,
                "pass new_dist_token=True to copy it from the class token, or use a model without one",
            )
        _add_dist_token(state, report)
    _resize(state, target, file_grid, grid, prefix, report)

    wrong = [k for k in state if k in target and state[k].shape != target[k].shape]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{key} is {tuple(state[key].shape)} in the file and {tuple(target[key].shape)} in the model"
            + (f" ({len(wrong)} such tensors)" if len(wrong) > 1 else ""),
            looks,
            "set num_heads to the table's number of columns" if key.endswith(TABLE) else "use the model of this file",
        )
    report.loaded = [k for k in target if k in state]
    report.missing = [k for k in target if k not in state and not DROPPED.search(k)]
    report.unexpected = [k for k in state if k not in target]
    if not any(k.startswith("blocks.") for k in report.loaded):
        raise CheckpointError("nothing in the file fits the model", looks, "give a checkpoint of this architecture")
    if "pos_embed" in report.missing and any(k.endswith(TABLE) for k in report.loaded):
        state["pos_embed"] = torch.zeros_like(target["pos_embed"])
        report.notes.append("pos_embed set to zero: the file has relative positions only (BEiT)")
    model.load_state_dict({k: v for k, v in state.items() if k in target}, strict=False)
    if int(os.environ.get("RANK", 0)) == 0:
        print(report)
    return report


def _check_shape(model: nn.Module, target: State, state: State, checkpoint: Checkpoint, looks: str) -> None:
    """Width, patch, depth and head count must agree before a single tensor is copied."""
    depths = [1 + max((int(m[1]) for k in s if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
              for s in (target, state)]  # fmt: skip
    patch = "patch_embed.proj.weight"
    differs = patch in state and patch in target and state[patch].shape != target[patch].shape
    if not depths[1] or differs or depths[0] != depths[1]:
        raise CheckpointError(
            "this checkpoint does not fit the model",
            f"{looks}; the model is {describe(target, getattr(model, 'config', None))}",
            "choose the model of this size, or another file",
        )
    heads, own = checkpoint.config.get("num_heads"), getattr(model, "num_heads", None)
    if heads is not None and own is not None and heads != own:
        raise CheckpointError(
            f"the file was trained with {heads} heads a block, the model has {own}",
            "weights of another head count load but compute something else",
            f"build the model with num_heads={heads} (--num-heads {heads}, model.backbone.num_heads={heads})",
        )


def _add_dist_token(state: State, report: LoadReport) -> None:
    """Copy the class token, its position and its bias rows to a new distillation token."""
    state["dist_token"] = state["cls_token"].clone()
    if "pos_embed" in state:
        pos = state["pos_embed"]
        state["pos_embed"] = torch.cat([pos[:, :1], pos[:, :1], pos[:, 1:]], dim=1)
    for key in [k for k in state if k.endswith(TABLE)]:
        state[key] = torch.cat([state[key][:-3], state[key][-3:], state[key][-3:]])
    report.notes.append("dist_token and its position were copied from the class token (new_dist_token=True)")


def _resize(
    state: State, target: State, old: tuple[int, int], new: tuple[int, int], prefix: int, report: LoadReport
) -> None:
    """Resize positions and relative tables in place; names go to ``report.resized``."""
    if old == new:
        return
    for key, value in state.items():
        if key == "pos_embed" and key in target:
            state[key] = resize_position(value, old, new, prefix)
        elif key.endswith(TABLE) and key in target:
            state[key] = resize_relative_table(value, old, new)
        else:
            continue
        report.resized.append(key)


def model_from_checkpoint(
    path: str | os.PathLike[str], *, num_heads: int | None = None, option: str = "--num-heads"
) -> tuple[ViT, Checkpoint]:
    """Build the ViT a file holds and load it.

    Args:
        path: Any readable checkpoint.
        num_heads: Heads a block, for files that do not store it.
        option: The command-line option an error should name for it.

    Raises:
        CheckpointError: not a ViT, or the head count is unknown.
    """
    checkpoint = read_checkpoint(path)
    config = dict(checkpoint.config) or infer_config(checkpoint.state)
    if not config:
        raise CheckpointError(
            f"{path} holds no vision transformer this reader knows",
            f"its first tensors are {', '.join(list(checkpoint.state)[:3])}",
            "give a ViT checkpoint (MAE, TinyMIM, BEiT, timm names or ours)",
        )
    stored = config.get("num_heads")
    if stored is None and num_heads is None:
        raise CheckpointError(
            f"the head count of {path} is unknown",
            f"weights cannot tell it; the file looks like {describe(checkpoint.state)}",
            f"add {option} N (usual: 3 at width 192, 6 at 384, 12 at 768, 16 at 1024)",
        )
    config["num_heads"] = num_heads or stored
    if checkpoint.meta and num_heads and stored and num_heads != stored:
        raise CheckpointError(
            f"{path} was trained with {stored} heads, not {num_heads}", "our files store it", f"leave {option} out"
        )
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "rel_pos_bias", "init_values",
             "dist_token", "last_dim")  # fmt: skip
    model = ViT(**{k: v for k, v in config.items() if k in names})
    load_weights(model, checkpoint)
    return model.eval(), checkpoint


def save_student(model: ViT, path: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> None:
    """Write ``{"model": tensors, "meta": plain dict}``, atomically; loads with ``weights_only=True``.

    Args:
        model: The student; nothing but its own tensors is written.
        path: File to write; ``.safetensors`` works too.
        meta: Added to name, constructor arguments, mean, std and versions.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    full = {
        "name": "ViT",
        "config": model.config,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "recipe": None,
        "teacher_sha256": None,
        "versions": versions(),
    } | (meta or {})
    if not str(path).endswith(".safetensors"):
        save_torch({"model": state, "meta": full}, path)
        return
    import json

    from safetensors.torch import save_file

    with atomic_path(path) as part:
        save_file(state, part, metadata={"tinymim": json.dumps(full)})


def save_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save``, written aside and renamed.

    Raises:
        TinyMIMError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    with atomic_path(path) as part:
        try:
            torch.save(value, part)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise OSError(f"writing failed ({str(error).splitlines()[0][:120]})") from error


def file_stamp(path: str | os.PathLike[str]) -> dict[str, str]:
    """Name and sha256 of a file, for results and reports."""
    return {"file": Path(path).name, "sha256": sha256_file(path)}
