"""``--cfg-options KEY=VALUE ...`` of every command, with the values of MMEngine's ``DictAction``."""

import argparse
from typing import Any

from tinymim.errors import ConfigError


class CfgOptions(argparse.Action):
    """Collect ``KEY=VALUE`` words into a dict; ``+KEY=VALUE`` asks for a key that the recipe or config does not know.

    Values are numbers, True, False, None, texts, and lists ``[1,2]`` or ``1,2`` and tuples ``(1,2)`` of these.

    Raises:
        ConfigError: a word without a key or value, or with brackets that do not match.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        found: dict[str, Any] = dict(getattr(namespace, self.dest, None) or {})
        for word in [values] if isinstance(values, str) else values:
            key, equals, text = word.partition("=")
            if not equals or not all(part for part in key.removeprefix("+").split(".")):
                raise ConfigError(
                    f"--cfg-options {word}",
                    "each word is KEY=VALUE",
                    "e.g. --cfg-options batch_size=64 betas=[0.9,0.95]",
                )
            found[key] = parse_value(key, text)
        setattr(namespace, self.dest, found)


def add_cfg_options(parser: argparse._ActionsContainer, help: str) -> None:
    """Add the option."""
    parser.add_argument("--cfg-options", nargs="+", action=CfgOptions, metavar="KEY=VALUE", help=help)


def parse_value(key: str, text: str) -> Any:
    """The value of an option's text.

    Raises:
        ConfigError: brackets that do not match, or a dict.
    """
    from mmengine.config import DictAction

    if text.lstrip().startswith(("{", "dict(")) or any(f"{a}{b}" in text for a in "[(," for b in ("{", "dict(")):
        raise ConfigError(
            f"--cfg-options {key}={text}",
            "a dict is given key by key",
            f"--cfg-options {key}.KEY=VALUE {key}.OTHER=VALUE",
        )
    try:
        return DictAction._parse_iterable(text)
    except (AssertionError, RecursionError):
        raise ConfigError(
            f"--cfg-options {key}={text}", "its brackets do not match", f"e.g. {key}=[1,2] or {key}=(1,2)"
        ) from None
