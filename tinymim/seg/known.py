"""What an MMSegmentation config may hold: the keywords of the constructors its types name, and values in their ranges.

Known at a place are the config's own keys and the parameters of the registered type there, so that legal additions work
(``optim_wrapper.clip_grad.max_norm=1``); a type that nobody here has registered, or that takes any keyword, is not
checked.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import mmengine.registry
import mmseg.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from tinymim.distill.recipe_keys import LARGE, Key, Kind, Number, check_size, key_of, unknown_key
from tinymim.errors import ConfigError, did_you_mean
from tinymim.models.backbone import PLAIN, backbone_arguments, backbone_names

REGISTRIES = [
    value
    for room in (mmseg.registry, mmengine.registry)
    for value in vars(room).values()
    if isinstance(value, Registry)
]
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
SECTIONS = (  # what a run is built from; other top-level names are a config's own variables
    "model",
    *LOADERS,
    "train_cfg",
    "val_cfg",
    "optim_wrapper",
    "param_scheduler",
    "default_hooks",
    "custom_hooks",
    "val_evaluator",
    "visualizer",
    "log_processor",
    "randomness",
    "teacher",
)
TOP = {*inspect.signature(Runner).parameters, "custom_imports", "tta_model", "tta_pipeline", "teacher"} - {"cfg"}
TEACHER: dict[str, Key] = {  # the config's ``teacher``, of tinymim.seg.distillation
    "checkpoint": Kind(words="a file", example="segmentor.pth"),
    "kl": Number(1.0),
    "channel": Number(0.0),
    "temperature": Number(1.0, above=True),
    "channel_temperature": Number(4.0, above=True),
}
LOADER_KEYS = {*inspect.signature(DataLoader).parameters, "num_batch_per_epoch", "disable_subprocess_warning"}
PARAMWISE = {  # of the constructors of MMEngine, MMSegmentation and ours
    "layer_decay",
    "published_quirks",
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "num_layers",
    "flat_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
    "decay_rate",
    "decay_type",
}
NODES: dict[str, set[str]] = {  # places without a type
    **dict.fromkeys(LOADERS, LOADER_KEYS),
    "train_cfg": {"by_epoch", "max_epochs", "max_iters", "val_begin", "val_interval", "dynamic_intervals"},
    "optim_wrapper": {"optimizer", "constructor", "paramwise_cfg", "type", "clip_grad", "accumulative_counts"},
    "optim_wrapper.clip_grad": {"type", "max_norm", "norm_type", "error_if_nonfinite", "foreach", "clip_value"},
    "optim_wrapper.paramwise_cfg": PARAMWISE,
    "model.test_cfg": {"mode", "crop_size", "stride"},
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
    "env_cfg.mp_cfg": {"mp_start_method", "opencv_num_threads"},
    "randomness": {"seed", "deterministic", "diff_rank_seed"},
    "teacher": {*TEACHER},
    "custom_imports": {"imports", "allow_failed_imports"},
    "model_wrapper_cfg": {"type", "device_ids", "broadcast_buffers", "find_unused_parameters", "static_graph"},
}
OPEN = ("optim_wrapper.paramwise_cfg", "model.test_cfg")  # custom classes read others
BUILDERS = {"type", "_scope_", "_delete_"}  # keys that a registry takes before the constructor
WRAPPED = {"norm_cfg": {"requires_grad"}, "init_cfg": {"override"}, "optim_wrapper": {"constructor", "paramwise_cfg"}}
WHOLE, SHARE = Number(least=1, whole=True), Number(least=-1, most=1)
VALUES: dict[str, Key] = {  # last part of a dotted key -> the values it may have
    **dict.fromkeys(("max_iters", "max_epochs", "val_interval", "num_classes"), WHOLE),
    "batch_size": Number(least=1, most=LARGE, whole=True),
    **dict.fromkeys(("num_workers", "prefetch_factor"), Number(most=1024, whole=True)),
    **dict.fromkeys(("lr", "weight_decay", "eps"), Number()),
    **dict.fromkeys(("dropout_ratio", "layer_decay"), SHARE),
    "seed": Number(most=2**32 - 1, whole=True),
    "channels": Number(least=1, most=LARGE, whole=True),
}
PAIRS = ("crop_size", "size", "img_size")  # pixels: one number, or two
OURS = {"RunFolderHook": ("interval", "keep", "log_interval")}  # at least 1


def check_options(cfg: Config, options: Mapping[str, Any], added: Container[str] = ()) -> None:
    """Refuse options that do not fit the config, before they are merged.

    Args:
        cfg: The config as its file gives it.
        options: Dotted key -> value; "{references}" of studies may have any value.
        added: Keys that were asked for with ``+``.

    Raises:
        ConfigError: an unknown key, with the nearest one that is known, or a value of another type.
    """
    for option, value in options.items():
        node: Any = cfg
        parts = option.split(".")
        for i, part in enumerate(parts):
            place = ".".join(parts[:i])
            if isinstance(node, list | tuple):
                if not part.isdecimal() or int(part) >= len(node):
                    raise ConfigError(
                        f"--cfg-options {option} does not fit the config",
                        f"{place} is a list of {len(node)}",
                        f"use a number from 0 to {len(node) - 1}",
                    )
                node = node[int(part)]
            elif not isinstance(node, dict | Config):
                raise ConfigError(
                    f"--cfg-options {option} does not fit the config",
                    f"{place} is {node!r}, no dict",
                    f"set {place} itself",
                )
            elif part in node:
                node = node[part]
            elif option in added or part in BUILDERS | (known := _known(place, node, options)):
                if ".".join(parts[: i + 1]) not in NODES:
                    break  # whatever stands below, nothing is known of it
                node = {}
            else:
                prefix = f"{place}." if place else ""
                names, any_key = constructor(node.get("type"), node)
                raise unknown_key(
                    prefix + part,
                    [prefix + key for key in known | {*node}],
                    "the config",
                    can_be_added=any_key or not names,
                )
        else:
            _check_kind(option, node, value)


def _check_kind(name: str, before: Any, value: Any) -> None:
    """Refuse a value of another type than the one it replaces."""
    number = isinstance(before, int | float)
    for kind, words, also in (
        (bool, "True or False", bool),
        (dict, "a dict", dict),
        (list | tuple, "a list", list | tuple | int | float),
        (int | float, "a number", list | tuple | dict | int | float),
    ):
        if isinstance(before, kind):
            if value is not None and not isinstance(value, also) and not _is_reference(value):
                like = f", as {before!r} is" if number else ""
                raise ConfigError(f"{name}={value!r}", f"it must be {words}{like}", f"--cfg-options {name}=...")
            return


def _is_reference(value: Any) -> bool:
    """Whether a value is a "{reference}" of a study, which is filled in later."""
    return isinstance(value, str) and re.fullmatch(r"\{[\w.]+\}", value) is not None


def _known(place: str, node: Mapping[str, Any] | Config, options: Mapping[str, Any]) -> set[str]:
    """Keys that are known at a place, whether or not they are set there; the options may also change its type."""
    if not place:
        return TOP
    names, _ = constructor(options.get(f"{place}.type", node.get("type")), node)
    return {*names} | NODES.get(place, set()) | WRAPPED.get(place.rpartition(".")[2], set())


def check_config(cfg: Config, sections: Iterable[str] = SECTIONS) -> None:
    """Refuse a config with keys that its types do not have, and values outside their range.

    Args:
        cfg: The config.
        sections: Its top-level names that are checked.

    Raises:
        ConfigError: names the dotted key; nothing has been built yet.
    """
    for key in cfg:
        if key not in TOP and isinstance(cfg[key], dict | list) and (near := _near(key)):
            raise ConfigError(f"unknown key {key!r} in the config", "no run reads it", f"did you mean {near!r}?")
    for section in sections:
        if section in cfg:
            for name, node in dicts(cfg[section], section):
                _check_node(name, node)
    check_size("model", cfg.get("model"))


def _near(key: str) -> str | None:
    """The section that a top-level name misspells: one letter less, more, other, or two swapped."""
    for known in SECTIONS:
        same = len(known) - len(key)
        if abs(same) <= 1 and key[:3] == known[:3] and sorted(key) != sorted(known):
            short, long = sorted((key, known), key=len)
            if any(short[:i] + short[i + (not same) :] == long[:i] + long[i + 1 :] for i in range(len(long))):
                return known
        if sorted(key) == sorted(known) and key != known:
            return known
    return None


def _check_node(name: str, node: Mapping[str, Any]) -> None:
    """Check the type, the keys and the values of one dict of a config."""
    for key in ("type", "constructor"):
        kind = node.get(key)
        if isinstance(kind, str) and "." not in kind and not registered(kind) and not name.endswith("clip_grad"):
            every = {each for registry in REGISTRIES for each in registry.module_dict}
            own = 'custom_imports = dict(imports=["MODULE"]) imports your own'
            raise ConfigError(
                f"{name}.{key}={kind!r} is unknown",
                "neither MMSegmentation nor a module of custom_imports has registered it",
                did_you_mean(kind, every, own),
            )
    names, any_key = constructor(node.get("type"), node)
    extra = BUILDERS | NODES.get(name, set()) | WRAPPED.get(name.rpartition(".")[2], set())
    if names and not any_key and (wrong := sorted({*node} - {*names} - extra)):
        known = [f"{name}.{key}" for key in {*names, *extra} - BUILDERS]
        raise unknown_key(f"{name}.{wrong[0]}", known, f"a {node['type']} of the config", can_be_added=False)
    if "type" not in node and name in NODES and name not in OPEN and (wrong := sorted({*node} - NODES[name])):
        known = [f"{name}.{key}" for key in NODES[name]]
        raise unknown_key(f"{name}.{wrong[0]}", known, "the config", can_be_added=False)
    for key, value in node.items():
        rule = WHOLE if key in OURS.get(str(node.get("type")), ()) else VALUES.get(key)
        if rule is None and key in names:
            rule = key_of(names[key])
        if key in PAIRS:
            _check_pair(f"{name}.{key}", value)
        elif rule is not None and not isinstance(value, list | tuple):
            rule.check(f"{name}.{key}", value)


def _check_pair(name: str, value: Any) -> None:
    """One number of pixels, two of them, or None."""
    sides = value if isinstance(value, list | tuple) else [value, value]
    if value is not None and (len(sides) != 2 or not all(type(n) is int and 0 < n <= LARGE for n in sides)):
        raise ConfigError(
            f"{name}={value!r}",
            f"it must be a number of pixels, or two (height, width), from 1 to {LARGE}",
            f"--cfg-options {name}=(512,512)",
        )


def dicts(node: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted name, dict) of a node and of everything below it; not of albumentations' own transforms."""
    if isinstance(node, Mapping):
        yield name, node
        children: Iterable[Any] = () if node.get("type") == "Albu" else node.items()
    else:
        children = enumerate(node) if isinstance(node, list | tuple) else ()
    for key, child in children:
        yield from dicts(child, f"{name}.{key}")


def registered(name: str, registries: Iterable[Registry] = REGISTRIES) -> list[Any]:
    """The classes and functions that registries of MMSegmentation and MMEngine have under a name.

    Nothing is imported by that name, as ``Registry.get`` would.
    """
    for registry in REGISTRIES:
        registry.import_from_location()  # MMSegmentation's own modules
    plain = name.removeprefix("mmseg.").removeprefix("mmengine.")
    found = [registry.module_dict[plain] for registry in registries if plain in registry.module_dict]
    return list({id(each): each for each in found}.values())


def constructor(type: Any, node: Mapping[str, Any] | Config) -> tuple[dict[str, inspect.Parameter], bool]:
    """Keywords of whatever is registered under a type, and whether it takes any others, too; unknown types take any."""
    kinds = registered(type) if isinstance(type, str) else []
    names: dict[str, inspect.Parameter] = {}
    any_key = not kinds
    for kind in kinds:
        own, open_ = keywords(kind)
        if kind.__name__ == "TinyMIMBackbone" and (name := node.get("name", PLAIN)) in backbone_names():
            arguments = backbone_arguments(name)
            own, open_ = own | (arguments or {}), arguments is None
        names |= own
        any_key |= open_
    return names, any_key


@functools.cache
def keywords(kind: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Keywords of a class or function, and whether it takes any others: ``**kwargs`` that it does not hand on to the
    next class, whose keywords then count, too."""
    found: dict[str, inspect.Parameter] = {}
    chain: list[Any] = [kind]
    if isinstance(kind, type):
        chain = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    for code in chain:
        parameters = inspect.signature(code).parameters.values()
        found = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} | found
        rest = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), None)
        if rest is None:
            return {key: each for key, each in found.items() if key != "self"}, False
        taken, handed_on = _use_of(code, rest)
        found |= {key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in taken if key not in found}
        if not handed_on:
            break
    return {key: each for key, each in found.items() if key != "self"}, True


def _use_of(code: Callable[..., Any], rest: str) -> tuple[set[str], bool]:
    """Keys that a function takes out of its ``**rest``, and whether it hands it on to another ``__init__``."""
    try:
        source = textwrap.dedent(inspect.getsource(code))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return set(), False
    taken = set(re.findall(rf"\b{rest}(?:\.(?:pop|get|setdefault)\(|\[)\s*['\"](\w+)", source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__":
            for keyword in node.keywords:
                if keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == rest:
                    return taken, True
    return taken, False
