"""The config inside a segmentor's file: data, of which only registered types are built and no other file is opened."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmengine.registry
import mmseg.registry
from mmengine.config import Config

from tinymim.errors import ConfigError
from tinymim.literals import read_literals
from tinymim.seg.known import LOADERS, check_config, dicts, registered

BUILT = ("model", "val_dataloader", "test_dataloader", "test_pipeline", "tta_pipeline")  # by testing and export
MODEL = ("MODELS", "TASK_UTILS", "WEIGHT_INITIALIZERS")  # registries of what stands in a model, and in the other parts
DATA = ("DATASETS", "DATA_SAMPLERS", "TRANSFORMS", "FUNCTIONS")
DROPPED = ("custom_imports", "load_from", "resume", "launcher")
FILES = ("init_cfg", "pretrained", "backend_args", "file_client_args")  # of any part: they open files or addresses
NAMED = ("type", "model_name", "name")  # texts that may hold a dot
LAYER = re.compile(r"(norm|act|conv)_layer$")  # names of layers for timm, which MMSegmentation looks up as a type


def stored_config(text: str, checkpoint: str | Path) -> Config:
    """The config that a ``segmentor.pth`` or ``iter_N.pth`` holds as text, for inference.

    Nothing in it is executed or imported, and what it names besides the model's own tensors (``init_cfg``,
    ``pretrained``, ...) is forgotten: every weight comes from the file.

    Args:
        text: ``name = literal`` lines.
        checkpoint: The file, for errors.

    Raises:
        ConfigError: the text is no plain data, names a type that is not registered or a file, or describes no model.
    """
    values = read_literals(text, checkpoint)
    wanted = values.get("custom_imports")
    imports = wanted.get("imports") if isinstance(wanted, dict) else None
    own = [name for name in imports if name != "tinymim.seg"] if isinstance(imports, list) else []
    for key in DROPPED:
        values.pop(key, None)
    _check_shape(values, checkpoint)
    for section, value in values.items():
        for name, node in dicts(value, section):
            rooms = (MODEL if section == "model" else DATA) if section in BUILT else ()
            _check_type(name, node, checkpoint, rooms, own)
            if section in BUILT:
                _close(name, node, checkpoint, in_model=section == "model")
    cfg = Config(values)
    check_config(cfg, BUILT)
    return cfg


def _check_shape(values: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Refuse a config whose parts are not dicts and lists where the readers expect them."""
    model = values.get("model")
    head = model.get("decode_head") if isinstance(model, dict) else None
    backbone = model.get("backbone") if isinstance(model, dict) else None
    heads = head if isinstance(head, list) and head else [head]
    dicts_there = all(isinstance(part, dict) for part in (model, backbone, *heads))
    if not dicts_there or not all(
        isinstance(values.get(key, {}), dict) and isinstance((values.get(key) or {}).get("dataset", {}), dict)
        for key in LOADERS
    ):
        raise _wrong(checkpoint, "its config describes no segmentation model", "model.backbone or a head is no dict")
    assert isinstance(model, dict)
    for key in ("data_preprocessor", "test_cfg", "train_cfg"):
        if not isinstance(model.get(key) or {}, dict):
            raise _wrong(checkpoint, f"its config has model.{key}={model[key]!r:.80}", "it must be a dict")
    for key in ("test_pipeline", "tta_pipeline"):
        steps = values.get(key) or []
        if not isinstance(steps, Sequence) or not all(isinstance(step, dict) for step in steps):
            raise _wrong(checkpoint, f"its config has {key}={steps!r:.80}", "it must be a list of dicts")


def _check_type(
    name: str, node: Mapping[str, Any], checkpoint: str | Path, rooms: Sequence[str], own: Sequence[Any]
) -> None:
    """Refuse a type that is not registered, where it would be built (``rooms``); paths to functions everywhere."""
    places = [vars(room)[each] for room in (mmseg.registry, mmengine.registry) for each in rooms if each in vars(room)]
    for key, kind in node.items():
        if key == "_scope_" and kind not in ("mmseg", "mmengine"):
            raise _wrong(checkpoint, f"its config has {name}._scope_={kind!r:.80}", "it names another package")
        if key != "type" and not (rooms and LAYER.search(str(key)) and kind is not None):
            continue
        if isinstance(kind, str) and (registered(kind, places) if rooms else "." not in kind):
            continue
        modules = f"; it was trained with modules of its own ({', '.join(map(str, own))})" if own else ""
        raise ConfigError(
            f"the config in {checkpoint} has {name}.{key}={kind!r:.80}, which is not registered",
            f"a config inside a file is data: it imports no module and calls no function by its path{modules}",
            "if you trust it, give the config it was trained with, which may import modules: --config FILE "
            "(tinymim segment --test CONFIG FILE)",
        )


def _close(name: str, node: Mapping[str, Any], checkpoint: str | Path, *, in_model: bool) -> None:
    """Forget the files that a part would read, and refuse texts that name others."""
    assert isinstance(node, dict)
    for key in FILES:
        if key in node:
            node[key] = None
    kinds = registered(node["type"]) if isinstance(node.get("type"), str) else []
    if any(kind.__name__ == "TIMMBackbone" for kind in kinds):
        node["pretrained"] = False  # its default is to download
    for key, value in node.items() if in_model else ():
        for text in value if isinstance(value, list | tuple) else [value]:
            allowed = r"[\w.\- ]*" if key in NAMED else r"[\w\- ]*"
            if isinstance(text, str) and not re.fullmatch(allowed, text):
                raise _wrong(
                    checkpoint,
                    f"its config has {name}.{key}={text!r:.80}",
                    "a text in the model of a file may name no other file, address or function",
                )


def _wrong(checkpoint: str | Path, what: str, why: str) -> ConfigError:
    return ConfigError(
        f"{checkpoint}: {what}", why, "if you trust it, give the config it was trained with: --config FILE"
    )
