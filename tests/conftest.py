"""Shared fixtures. Tests that need the maintainers' data skip with a reason in a user's clone."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
# before torch is imported, and for every subprocess: tiny models are faster on one thread, and bit-identical losses
# need the same number of threads on both sides
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# The first backward pass of a process decides whether autograd has threads. After torch.onnx.export it finds a device
# for one, and then no forked child could train.
torch.zeros(1, requires_grad=True).sum().backward()
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Tests with ``skipif(..., reason="needs a GPU")`` are marked ``gpu``: tools/gpu_check.py runs them."""
    for item in items:
        if any(mark.kwargs.get("reason") == "needs a GPU" for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The maintainers' folder of golden numbers and photos."""
    if not SHARED.is_dir():
        if os.environ.get("TINYMIM_REQUIRE_SHARED"):  # CI: a skip here would hide a whole class of checks
            pytest.fail(f"{SHARED} is absent but required")
        pytest.skip("needs ../shared (golden numbers and photos, not part of the repository)")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path):
    """Golden numbers: ``golden(name)`` -> (json, npz or None); ``golden.state(prefix, shapes)`` -> state dict."""
    import importlib.util
    import json

    import numpy as np
    import torch

    folder = shared / "golden"
    spec = importlib.util.spec_from_file_location("golden_weights", folder / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)

    def load(name):
        arrays = folder / f"{name}.npz"
        return json.loads((folder / f"{name}.json").read_text()), np.load(arrays) if arrays.is_file() else None

    def state(prefix, shapes):
        return {k: torch.from_numpy(weights.tensor(f"{prefix}{k}", tuple(s))) for k, s in shapes.items()}

    load.state, load.tensor = state, weights.tensor
    return load
