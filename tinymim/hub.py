"""Models of the Hugging Face hub by name: ``hf-hub:OWNER/NAME`` is a folder with model.safetensors and config.json.

Two files are fetched and read, both data: tensors, and a JSON object; pickles of a repository are left where they are.
"""

import functools
import os
import re
import shlex
import socket
from pathlib import Path

from tinymim.errors import CheckpointError, ConfigError, TinyMIMError

PREFIX = "hf-hub:"  # timm's word
WEIGHTS, CONFIG = "model.safetensors", "config.json"
NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
CACHED = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[^/\\]+)(?:[/\\]|$)")


def is_hub(name: str | os.PathLike[str]) -> bool:
    """Whether it is ``hf-hub:OWNER/NAME``."""
    return str(name).startswith(PREFIX)


def hub_name(path: str | os.PathLike[str]) -> str | None:
    """``OWNER/NAME@COMMIT`` of a file in the hub's cache; None for any other file."""
    found = CACHED.search(str(path))
    return f"{found['owner']}/{found['name']}@{found['commit']}" if found else None


@functools.cache  # a process reads one revision
def fetch(name: str) -> Path:
    """The folder, in huggingface_hub's cache, of ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION``.

    Raises:
        ConfigError: no such form of a name.
        CheckpointError: it cannot be fetched, or has no model.safetensors.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not NAME.fullmatch(name.removeprefix(PREFIX)):
        raise ConfigError(f"{name!r:.100} names no model of the hub", "it has an owner and a name", "hf-hub:OWNER/NAME")
    from huggingface_hub import snapshot_download

    go_offline_if_unreachable()
    try:
        found = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise CheckpointError(
            f"{name} cannot be fetched",
            f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}",
            f"where there is internet: hf download {repository} --local-dir FOLDER; then give that FOLDER in its place",
        ) from error
    if not (found / WEIGHTS).is_file():
        raise CheckpointError(
            f"{name} has no {WEIGHTS}",
            "pickled weights of a hub are not read",
            "ask its owner for safetensors, or fetch its file yourself and give that",
        )
    return found


def push(folder: str | os.PathLike[str], repository: str) -> str:
    """Upload a folder as it is, to a model repository that is made if need be, private until its owner says otherwise.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: no such form of a name.
        TinyMIMError: the hub cannot be reached, or refuses.
    """
    check_repository(repository)
    from huggingface_hub import HfApi

    go_offline_if_unreachable()
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        message = "Model card and weights by tinymim card"
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message).commit_url)
    except Exception as error:  # as above
        raise TinyMIMError(
            f"{folder} was not pushed to {repository}",
            f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}",
            f"where there is internet, after hf auth login: hf upload {repository} {shlex.quote(str(folder))}",
        ) from error


def check_repository(name: str) -> None:
    """Refuse what is no OWNER/NAME.

    Raises:
        ConfigError: it is not.
    """
    if not NAME.fullmatch(name) or "@" in name:
        raise ConfigError(
            f"--push {name!r:.100} names no repository", "it has an owner and a name", "--push OWNER/NAME"
        )


def go_offline_if_unreachable() -> None:
    """Spare the user the hub client's minute of retries when there is plainly no network (cached files still load)."""
    if any(os.environ.get(k) for k in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
