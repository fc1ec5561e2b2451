"""Load a trained segmentor from its file."""

import re
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from tinymim.errors import CheckpointError, ConfigError
from tinymim.models.weight_files import open_described
from tinymim.seg.config import building, find_config, heads, model_outline, plain_batch_norm
from tinymim.seg.stored import stored_config


def read_segmentor(checkpoint: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dict and meta of a ``segmentor.pth`` or of MMEngine's ``iter_N.pth``; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, or no segmentor.
    """
    state, meta = open_described(checkpoint)
    if not any(key.startswith("decode_head.") for key in state):
        raise CheckpointError(
            f"{checkpoint} holds no segmentor",
            "it has no decode_head (a student.pth is a backbone only)",
            "give the segmentor.pth or checkpoints/iter_N.pth of a `tinymim segment` run",
        )
    return state, meta


def load_segmentor(checkpoint: str | Path, config: str | Path | Config | None = None) -> tuple[nn.Module, Config]:
    """Build and load a segmentor for inference, on the CPU, in evaluation mode, SyncBN turned into BN.

    Args:
        checkpoint: ``segmentor.pth``, or MMEngine's ``iter_N.pth``.
        config: Path, name or Config, which may import modules; by default the text stored in the file, as data.

    Returns:
        The ``EncoderDecoder`` (with ``cfg`` and ``dataset_meta`` as MMSegmentation's inference expects) and its config.

    Raises:
        CheckpointError: not a segmentor, or it does not fit the config.
        ConfigError: there is no config, or it does not build; see :func:`~tinymim.seg.stored.stored_config`.
    """
    state, meta = read_segmentor(checkpoint)
    text = meta.get("config") or meta.get("cfg")
    if config is not None:
        cfg = find_config(config)
        classes = _classes(state, cfg)
        for head in heads(cfg):
            head.num_classes = classes
    elif isinstance(text, str):
        cfg = stored_config(text, checkpoint)
    else:
        raise ConfigError(
            f"{checkpoint} does not store its config",
            "only segmentor.pth files of tinymim do",
            "give the config it was trained with, too: --config FILE (tinymim segment --test CONFIG FILE)",
        )
    plain_batch_norm(cfg)
    cfg.model.backbone.init_cfg = None
    init_default_scope("mmseg")
    outline = model_outline(cfg)
    if outline is not None:  # a wrong size is found before it takes memory
        _compare(outline, state, checkpoint)
    with building("model"):
        model = MODELS.build(cfg.model)
    if outline is None:
        _compare(model, state, checkpoint)
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()}, strict=False)
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else {}  # of an iter_N.pth
    model.cfg = cfg
    model.dataset_meta = {key: meta.get(key) or (dataset or {}).get(key) for key in ("classes", "palette")}
    return model.eval(), cfg


def class_names(model: Any) -> list[str]:
    """A loaded segmentor's class names; "class 0", "class 1", ... if its file has none."""
    return list(model.dataset_meta["classes"] or [f"class {i}" for i in range(int(model.num_classes))])


def _classes(state: dict[str, Any], cfg: Config) -> int:
    """Classes of the file's last head; the config's number if the head uses a threshold or other parameter names."""
    head = cfg.model.decode_head
    last = head[-1] if isinstance(head, list) else head
    scores = [value for key, value in state.items() if re.fullmatch(r"decode_head\.(\d+\.)?conv_seg\.weight", key)]
    return int(last.num_classes) if last.get("out_channels") or not scores else int(scores[-1].shape[0])


def _compare(model: nn.Module, state: dict[str, Any], checkpoint: str | Path) -> None:
    """Be strict: every tensor must be present and have the right shape.

    Raises:
        CheckpointError: one is missing, unknown or of another shape.
    """
    target = model.state_dict()
    state = {key.removeprefix("module."): value for key, value in state.items()}
    missing = [key for key in target if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in target]
    wrong = [key for key in state if key in target and state[key].shape != target[key].shape]
    if missing or extra or wrong:
        what = [
            f"{len(names)} {word} ({names[0]}, ...)"
            for word, names in (("missing", missing), ("unknown", extra), ("of another shape", wrong))
            if names
        ]
        raise CheckpointError(
            f"{checkpoint} does not fit the config: {', '.join(what)}",
            "it was trained with another config",
            "leave the config out (segmentor.pth stores its own), or name the one of that run",
        )
