"""Load weights, with a report on every key, and write clean student files. ``formats.py`` reads the formats."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tinymim import progress
from tinymim.compat import is_first_process
from tinymim.errors import CheckpointError
from tinymim.files import atomic_path, versions
from tinymim.models.backbone import Backbone
from tinymim.models.formats import (
    DROPPED,
    TABLE,
    Checkpoint,
    State,
    count_blocks,
    describe,
    file_grid,
    infer_config,
    read_checkpoint,
    rename,
)
from tinymim.models.hierarchical import name_of, native_size
from tinymim.models.position import resize_position, resize_relative_table
from tinymim.models.stored import build_stored
from tinymim.models.vit import ARGUMENTS, IMAGENET_MEAN, IMAGENET_STD, SHAPE

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ENCODER = re.compile(r"(cls_token|dist_token)$|patch_embed\.|blocks\.|stages\.|layers\.")  # must be on both sides, but:
NEW = re.compile(rf"\.(ls[12]\.gamma|attn\.{TABLE})$")  # a segmentor may add layer scale and tables to a student
FOREIGN = {  # parts that a plain ViT never has, by the names of their tensors
    r"attn\.[qk]_norm\.": "normalised queries and keys",
    r"(reg_token|register_tokens|storage_tokens)$": "register tokens",
    r"(norm_pre|ln_pre|pre_norm)\.": "a norm before its blocks",
    r"(^|\.|_)(rope|rotary|freqs|periods)": "rotary positions",
    r"(mlp|ffn)\.(w\d+|fc1_[gx]|gate_proj)\.": "a gated MLP (SwiGLU)",
    r"rel(ative)?_pos": "relative positions",
    r"blocks\.\d+\.(?!norm[12]\.).*(norm|ln)\w*\.(weight|bias)$": "further norms in its blocks",
    r"attn\.([qkv]_proj|[qkv]_bias|[qkv])\b": "separate queries, keys and values",
    r"^patch_embed\.(?!proj\.)": "another patch embedding",
}
PARTS = FOREIGN | {r"(ls\d\.gamma|gamma_\d)$": "layer scale", r"_token$": "such a token", r"\.bias$": "biases"}


@dataclass
class LoadReport:
    """What happened to every key of a load: parameter names, and notes for the user."""

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


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | dict[str, Any] | Checkpoint,
    *,
    new_dist_token: bool = False,
    say: bool = True,
) -> LoadReport:
    """Load an encoder's weights, resizing positions and relative-position tables to the model's grid.

    Args:
        model: :class:`~tinymim.models.ViT` or another of our backbones, our segmentation backbone, or timm's
            VisionTransformer or BEiT.
        source: File, state dict or :class:`Checkpoint`.
        new_dist_token: Accept a file without distillation token for a model with one: the token, its position and its
            bias rows are copied from the class token.
        say: Print the report (first process only).

    Returns:
        The :class:`LoadReport`.

    Raises:
        CheckpointError: nothing fits; width, depth, patch size or head count differ; only one side has a part of the
            encoder, e.g. a distillation token or register tokens; or a tensor holds NaN or no floating-point numbers.
            The model stays as it was.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    target = model.state_dict()
    report = LoadReport(source=checkpoint.path, dropped=list(checkpoint.dropped))
    if hasattr(model, "adapt_state"):
        return _load_adapted(model, target, checkpoint, report, say)
    state = rename(checkpoint.state, set(target))
    check_plain(key for key in state if key not in target)
    looks = f"the file looks like {describe(checkpoint.state, checkpoint.config)}"
    _check_shape(model, target, state, checkpoint, looks)

    grid = tuple(getattr(model, "grid_size", None) or model.patch_embed.grid_size)  # type: ignore[union-attr,arg-type]
    prefix = int(getattr(model, "num_prefix_tokens", 1))  # type: ignore[arg-type]
    file_prefix, old_grid = file_grid(state, checkpoint.config, grid, prefix)
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
    _resize(state, target, old_grid, grid, prefix, report)

    wrong = [k for k in state if k in target and state[k].shape != target[k].shape]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{key} is {tuple(state[key].shape)} in the file and {tuple(target[key].shape)} in the model"
            + (f" ({len(wrong)} such tensors)" if len(wrong) > 1 else ""),
            looks,
            "set num_heads to the table's number of columns" if key.endswith(TABLE) else "use the model of this file",
        )
    _compare_names(target, state, checkpoint, report)
    if not any(k.startswith("blocks.") for k in report.loaded):
        raise CheckpointError("nothing in the file fits the model", looks, "give a checkpoint of this architecture")
    _zero_biases(state, target, report)
    _check_parts(report)
    if "pos_embed" in report.missing and any(k.endswith(TABLE) for k in report.loaded):
        state["pos_embed"] = torch.zeros_like(target["pos_embed"])
        report.notes.append("pos_embed set to zero: the file has relative positions only (BEiT)")
    elif "pos_embed" in report.missing:
        report.notes.append("the file stores no positions; the model keeps its own (MAE's are fixed sines)")
    report.notes += _untold_heads(checkpoint, getattr(model, "num_heads", None))
    return _copy(model, state, report, say)


def _untold_heads(checkpoint: Checkpoint, heads: int | None) -> list[str]:
    """A note if a file of another head count would have been loaded just the same; else an empty list."""
    usual = checkpoint.usual_heads
    if heads is None or checkpoint.num_heads or heads == usual or any(k.endswith(TABLE) for k in checkpoint.state):
        return []
    others = f"its architecture usually has {usual}" if usual else "MAE-Lite's ViT-Tiny has 12, others 3"
    return [
        f"the file does not tell its head count: {heads} heads per block are assumed ({others}); for another, "
        f"build the model with num_heads={usual or 'N'} (model.backbone.num_heads={usual or 'N'})"
    ]


def _zero_biases(state: State, target: State, report: LoadReport) -> None:
    """Biases that no block of the file has are zero."""
    kinds: dict[str, list[str]] = {}
    for key in report.missing:
        if found := re.fullmatch(r"blocks\.\d+\.(.+\.bias)", key):
            kinds.setdefault(found[1], []).append(key)
    blocks = count_blocks(target)
    for kind, keys in kinds.items():
        if len(keys) == blocks and f"blocks.0.{kind.removesuffix('bias')}weight" in state:
            state.update({key: torch.zeros_like(target[key]) for key in keys})
            report.missing = [key for key in report.missing if key not in keys]
            report.loaded += keys
            report.notes.append(f"{kind} set to zero in every block: the file has none")


def _check_parts(report: LoadReport) -> None:
    """Refuse a file that would be loaded in part."""
    lost = [key for key in report.missing if ENCODER.match(key) and not NEW.search(key)]
    if lost:
        raise _not_plain(lost[0], "the model has {0} ({1}), the file has none")
    over = [key for key in report.unexpected if ENCODER.match(key)]
    if over:
        raise _not_plain(over[0], "the file has {0} ({1}), the model has none")


def check_plain(keys: Iterable[str]) -> None:
    """Refuse tensors that no plain vision transformer has.

    Raises:
        CheckpointError: e.g. register tokens, rotary positions, a gated MLP; they are named.
    """
    for key in keys:
        if any(re.search(pattern, key) for pattern in FOREIGN):
            raise _not_plain(key, "the file has {0} ({1}), the model has none")


def _not_plain(key: str, words: str) -> CheckpointError:
    part = next((text for pattern, text in PARTS.items() if re.search(pattern, key)), "other parts")
    fix = "as a teacher, name its architecture: --teacher timm/NAME --teacher-weights FILE"
    if part == "layer scale":
        fix = "build the model with init_values=1.0 (student_args.init_values=1.0, model.backbone.init_values=1.0)"
    if key.endswith(TABLE):
        fix = "build the model with rel_pos_bias=True (model.backbone.rel_pos_bias=True)"
    return CheckpointError(
        "the file is not a plain vision transformer of the model's kind", words.format(part, key), fix
    )


def _load_adapted(model: Any, target: State, checkpoint: Checkpoint, report: LoadReport, say: bool) -> LoadReport:
    """:func:`load_weights` for a backbone that resizes a file's tensors itself; none may be missing."""
    state, report.resized = model.adapt_state(checkpoint.state, checkpoint.config)
    _compare_names(target, state, checkpoint, report)
    stored = {"name": "ViT"} | checkpoint.config if checkpoint.config else model.config
    why = [
        f"the file has {key}={stored.get(key)!r}, the model {model.config[key]!r}"
        for key in model.must_match
        if stored.get(key) != model.config[key]
    ]
    why += [f"the file has no {key}" for key in report.missing]
    why += [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(target[key].shape)} in the model"
        for key in report.loaded
        if state[key].shape != target[key].shape
    ]
    why += [f"the file has {key}, which the model lacks" for key in report.unexpected if ENCODER.match(key)]
    if why:
        raise CheckpointError(
            f"this checkpoint does not fit {model.config['name']}",
            why[0] + (f" ({len(why)} differences in all)" if len(why) > 1 else ""),
            "choose the model of this file, or another file",
        )
    return _copy(model, state, report, say)


def _compare_names(target: State, state: State, checkpoint: Checkpoint, report: LoadReport) -> None:
    report.notes += checkpoint.notes + unfinished(checkpoint)
    report.loaded = [k for k in target if k in state]
    report.missing = [k for k in target if k not in state and not DROPPED.search(k)]
    report.unexpected = [k for k in state if k not in target]


def _copy(model: nn.Module, state: State, report: LoadReport, say: bool) -> LoadReport:
    for key in report.loaded:
        check_values(key, state[key], report.source)
    model.load_state_dict({k: v for k, v in state.items() if k not in report.unexpected}, strict=False)
    if say and is_first_process():
        progress.say(report)
    return report


def check_values(key: str, value: torch.Tensor, path: str) -> None:
    """A tensor of an encoder is dense, in memory, of floating-point numbers, and finite.

    Raises:
        CheckpointError: it is not.
    """
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.device.type == "meta":
        why = f"{key} is {'without values (meta)' if value.device.type == 'meta' else 'sparse'}"
    elif value.dtype not in FLOATS:
        why = f"{key} is of {kind}, not of floating-point numbers: quantised or packed weights lack their scales"
    elif not value.isfinite().all():
        why = f"{key} has NaN or infinite values: the run that wrote it had diverged, or the file is damaged"
    else:
        return
    raise CheckpointError(f"the weights of {path or 'the state dict'} cannot be used", why, "give another checkpoint")


def unfinished(checkpoint: Checkpoint) -> list[str]:
    """A note if the file was written before its run had ended; else an empty list."""
    step, steps = (checkpoint.meta.get(key) for key in ("step", "steps"))
    if not (isinstance(step, int) and isinstance(steps, int) and step < steps):
        return []
    return [f"written after {step} of {steps} steps: its run had not ended (continue it with --resume)"]


def _check_shape(model: nn.Module, target: State, state: State, checkpoint: Checkpoint, looks: str) -> None:
    """Width, patch, depth and head count must agree before a single tensor is copied."""
    depths = [count_blocks(target), count_blocks(state)]
    patch = "patch_embed.proj.weight"
    differs = patch in state and patch in target and state[patch].shape != target[patch].shape
    if not depths[1] or differs or depths[0] != depths[1]:
        raise CheckpointError(
            "this checkpoint does not fit the model",
            f"{looks}; the model is {describe(target, getattr(model, 'config', None))}",
            "choose the model of this size, or another file",
        )
    heads, own = checkpoint.num_heads, getattr(model, "num_heads", None)
    if heads is not None and own is not None and heads != own:
        raise CheckpointError(
            f"the file was trained with {heads} heads per block, the model has {own}",
            "weights of another head count would load but compute something else",
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


def stored_shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """The shape of a ViT's blocks in a file: patch, width, depth, heads (None: unknown), MLP, tables, layer scale.

    A subset of :class:`~tinymim.models.ViT`'s keywords; empty for other models.
    """
    config = checkpoint.config or infer_config(checkpoint.state) or {}
    shape = {key: config[key] for key in SHAPE if key in config}
    return shape | ({"num_heads": checkpoint.num_heads} if shape and checkpoint.num_heads else {})


def model_from_checkpoint(
    path: str | os.PathLike[str], *, num_heads: int | None = None, option: str = "--num-heads", say: bool = True
) -> tuple[Any, Checkpoint]:
    """Build the backbone of a file and load its weights.

    Args:
        path: Any readable checkpoint.
        num_heads: Heads per block, for files that do not store it.
        option: The command-line option for it, named in errors.
        say: Print what was loaded.

    Returns:
        A :class:`~tinymim.models.ViT`, the backbone that one of our files names, or the hierarchical model of timm's
        with exactly the file's tensors, in evaluation mode; and the file.

    Raises:
        CheckpointError: the backbone or its head count is unknown.
    """
    checkpoint = read_checkpoint(path)
    config = dict(checkpoint.config)
    if not config and (name := name_of(checkpoint.state)):
        config = {"name": name, "img_size": native_size(name)}
    if "name" in config:
        model = build_stored(config, checkpoint.state, checkpoint.path)
        load_weights(model, checkpoint, say=say)
        return model.eval(), checkpoint
    check_plain(key for key in rename(checkpoint.state, set()) if not key.endswith(TABLE))
    config = config or infer_config(checkpoint.state) or {}
    if not config:
        raise CheckpointError(
            f"{path} holds no vision transformer that this reader knows",
            f"its first tensors are {', '.join(list(checkpoint.state)[:3])}",
            "give a ViT checkpoint (MAE, TinyMIM, BEiT, timm names or ours), or one of timm's Hiera, Swin, TinyViT",
        )
    stored = config.get("num_heads") or checkpoint.num_heads
    if stored is None and num_heads is None:
        raise CheckpointError(
            f"the head count of {path} is unknown",
            f"weights do not show it; the file looks like {describe(checkpoint.state)}",
            f"add {option} {checkpoint.usual_heads or 'N'} (usual: 3 at width 192, 6 at 384, 12 at 768, 16 at 1024)",
        )
    config["num_heads"] = num_heads or stored
    if num_heads and stored and num_heads != stored:
        raise CheckpointError(
            f"{path} was trained with {stored} heads, not {num_heads}",
            "the file tells its head count",
            f"leave {option} out",
        )
    if num_heads and not stored:
        checkpoint = replace(checkpoint, heads=num_heads)
    if "pos_embed" not in checkpoint.state and not config.get("rel_pos_bias"):
        raise CheckpointError(
            f"{path} is not a plain vision transformer",
            "it has no positions (pos_embed): they are rotary, or computed in a way that the file does not tell",
            "for a teacher, name the architecture, too: --teacher timm/NAME --teacher-weights FILE",
        )
    arguments = {key: config[key] for key in ARGUMENTS if key in config}
    model = build_stored(arguments, checkpoint.state, checkpoint.path)
    load_weights(model, checkpoint, say=say)
    return model.eval(), checkpoint


def save_student(model: Backbone, path: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> None:
    """Write ``{"model": tensors, "meta": plain dict}``, atomically; loads with ``weights_only=True``.

    Args:
        model: The student; only its own tensors are written.
        path: File to write; ``.safetensors`` works too.
        meta: Added to name, constructor arguments, mean, std and versions.
    """
    module: Any = model
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    full = {
        "name": model.config.get("name", "ViT"),
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
    from safetensors.torch import save_file

    with atomic_path(path) as part:
        save_file(state, part, metadata={"tinymim": json.dumps(full)})


def save_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a temporary file that is then renamed; equal values give equal bytes, whatever the file name.

    Raises:
        TinyMIMError: the disk is full or the folder cannot be written; no partial file is left.
    """
    with atomic_path(path) as part:
        try:
            with open(part, "wb") as file:  # given a path, torch writes its name into the file
                torch.save(value, file)
        except RuntimeError as error:  # how torch's zip writer reports a full disk
            raise OSError(f"writing failed ({str(error).splitlines()[0][:120]})") from error
