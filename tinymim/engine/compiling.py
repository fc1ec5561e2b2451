"""``torch.compile`` of the student's blocks: asked for, or kept where a timed pass is faster with it.

On two cores of an AMD EPYC (bfloat16, ViT-T at 128 pixels) a pass takes 0.98 of its time with it, after 2 s of
compiling (45 s where drop path is compiled as well): the products are oneDNN's either way. "auto" tries it on a GPU
only.
"""

from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from tinymim.engine.model import Trainable
from tinymim.engine.plan import time_passes
from tinymim.errors import ConfigError
from tinymim.models.draws import DropPath

PAYS = 1.03  # times as fast as without, or "auto" leaves it off


def compile_student(config: Config, model: Trainable, count: int, place: str) -> tuple[bool, str]:
    """Compile the blocks of the student if the recipe's ``compile`` says so.

    Args:
        config: Its ``compile``: "on", "off", or "auto": on a GPU, if a pass is faster.
        model: In its place, prepared.
        count: Images of the passes that are timed; all processes must call at once.
        place: "cpu" or "cuda".

    Returns:
        Whether they are compiled, and a line about how "auto" found out, else "".

    Raises:
        ConfigError: "on", and PyTorch cannot compile them here, or there are none.
    """
    if config.compile == "off" or (config.compile == "auto" and place == "cpu"):
        return False, ""
    blocks = getattr(model.encoder, "blocks", None)
    if blocks is None:
        if config.compile == "auto":
            return False, ""
        raise ConfigError("compile=on", f"a {type(model.encoder).__name__} has no blocks", "use compile=off")
    before = time_passes(config, model, [count], place) if config.compile == "auto" else {}
    switch(blocks, True)
    try:
        after = time_passes(config, model, [count], place)
    except Exception as error:  # whatever the compilers that it calls raise
        switch(blocks, False)
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if config.compile == "auto":
            return False, f"torch.compile failed and is off: {why}"
        raise ConfigError("compile=on", f"PyTorch cannot compile here: {why}", "use compile=off") from error
    if config.compile == "on":
        return True, ""
    gain = before[count] / after[count] if before and after else 0.0
    pays = gain >= PAYS
    if not pays:
        switch(blocks, False)
    return pays, f"torch.compile is {'on' if pays else 'off'}: with it a pass is {gain:.2f} times as fast"


def switch(blocks: Any, on: bool) -> None:
    """Compile blocks at their next call, or leave that. Drop path stays as it is: it draws by the rows of the pass."""
    for block in blocks:
        drops: list[nn.Module] = [module for module in block.modules() if isinstance(module, DropPath)]
        for drop in drops:
            if on:
                drop.forward = torch.compiler.disable(drop.forward)  # type: ignore[method-assign]
            else:
                vars(drop).pop("forward", None)
        if on:
            block.compile(dynamic=False)
        else:
            block._compiled_call_impl = None
