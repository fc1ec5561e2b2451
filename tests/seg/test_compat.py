"""The stand-in for MMCV's compiled operators and the bends for machines without a GPU."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from tinymim import compat
from tinymim.errors import ConfigError


@pytest.mark.slow
def test_mmseg_models_import_with_mmcv_lite():
    """In a fresh process: the import order of a user's config."""
    code = (
        "import tinymim.seg, mmseg.models, mmseg.apis, sys, mmcv.ops\n"
        "from tinymim.compat import install_mmcv_stand_in as again\n"
        "assert again() is (sys.modules['mmcv._ext'].__spec__.loader is None)\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def test_an_operator_of_the_stand_in_complains():
    if not compat.install_mmcv_stand_in():
        pytest.skip("a compiled mmcv is installed")
    from mmcv.ops import point_sample  # noqa: F401  (importable)

    extension = sys.modules["mmcv._ext"]
    assert importlib.util.find_spec("mmcv._ext").loader is None
    with pytest.raises(ConfigError, match="'nms'"):
        extension.nms(torch.zeros(1, 4))


def test_a_real_extension_is_left_alone(monkeypatch):
    import types

    real = types.ModuleType("mmcv._ext")
    real.__spec__ = importlib.util.spec_from_file_location("mmcv._ext", __file__)
    monkeypatch.setitem(sys.modules, "mmcv._ext", real)
    assert compat.install_mmcv_stand_in() is False
    assert sys.modules["mmcv._ext"] is real


def test_devices(monkeypatch):
    import mmengine.device

    assert compat.use_device("cpu") == "cpu"
    assert mmengine.device.get_device() == "cpu"
    with pytest.raises(ConfigError, match="unknown"):
        compat.use_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compat.use_device(None) == "cpu"
    with pytest.raises(ConfigError, match="sees no GPU"):
        compat.use_device("cuda:1")
