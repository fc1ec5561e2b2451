"""A training that fails in the middle, as by a power cut: nothing is saved at that moment."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tinymim.engine.loop import StepLoop


@contextmanager
def power_cut(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """The block trains, and fails when it begins step ``at``, from 1."""
    step, taken = StepLoop.run_iter, []

    def stop(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == at:
            raise RuntimeError("power cut")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StepLoop, "run_iter", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            yield
