"""Files whose description builds their model: detectors, trackers."""

import os

from torch import nn

from tinymim.errors import CheckpointError
from tinymim.models.checkpoints import check_values
from tinymim.models.encoders import State


def fill_described(model: nn.Module, state: State, path: str | os.PathLike[str], what: str) -> None:
    """Load all tensors of a file into the model that its description gave.

    Args:
        model: Built from the description.
        state: The file's tensors.
        path: The file, for errors.
        what: What the model is, for errors.

    Raises:
        CheckpointError: a tensor with values that no weight has, or tensors that are not the model's.
    """
    for key, value in state.items():
        check_values(key, value, str(path))
    own, have = ({key: tuple(value.shape) for key, value in each.items()} for each in (model.state_dict(), state))
    if own != have:
        key = min(key for key in own.keys() | have.keys() if own.get(key) != have.get(key))
        raise CheckpointError(
            f"{path} does not hold the {what} that it describes",
            f"{key} is {have.get(key, 'absent')} in it, {own.get(key, 'absent')} by its description",
            "write it again with the command that made it, or restore a copy",
        )
    model.load_state_dict(state)
