"""The examples of CONTRIBUTING.md: run as they stand, then used through the package's own doors."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tinymim
from tests.export.tiny import write_segmentor
from tinymim.distill import METHODS
from tinymim.engine import distill, pretrain
from tinymim.errors import ConfigError
from tinymim.models import backbone as backbones
from tinymim.models.teachers import TEACHERS, load_teacher
from tinymim_export import bench
from tinymim_export.precision import PRECISIONS
from tinymim_export.precision.quantize import quantize
from tinymim_export.runtime.engines import RUNTIMES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def examples(tmp_path_factory):
    """All of them, in their order, as a module; taken out of the registries afterwards."""
    folder = tmp_path_factory.mktemp("examples")
    registries = (TEACHERS, METHODS, backbones._BUILDERS, PRECISIONS, RUNTIMES)
    before = [dict(registry) for registry in registries]
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 6
    assert max(len(block.splitlines()) for block in blocks) <= 35
    (folder / "contributed.py").write_text("\n".join(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)  # of the child that measures memory
        yield importlib.import_module("contributed")
        sys.modules.pop("contributed")
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.mark.slow
def test_a_file_in_its_room_is_enough(tmp_path):
    """Each example, and a recipe of the method, dropped into a copy of the packages: found without another line."""
    shutil.copytree(ROOT / "tinymim", tmp_path / "tinymim")
    shutil.copytree(ROOT / "export", tmp_path / "tinymim_export")
    rooms = (
        "tinymim/models",
        "tinymim/distill",
        "tinymim/distill",
        "tinymim/models",
        "tinymim_export/precision",
        "tinymim_export/runtime/engines",
    )
    for i, (room, block) in enumerate(zip(rooms, re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL), strict=True)):
        (tmp_path / room / f"mine{i}.py").write_text(block)
    (tmp_path / "tinymim/recipes/mine.py").write_text("method = 'patch_colours'\nstudent = 'toy'\n")
    code = (
        "import sys, tinymim\n"
        "from tinymim.engine import load_recipe, recipe_names\n"
        "from tinymim.models.teachers import load_teacher\n"
        "from tinymim_export.precision import PRECISIONS\n"
        "from tinymim_export.runtime.engines import RUNTIMES\n"
        "assert tinymim.__file__.startswith(sys.argv[1])\n"
        "assert 'mine' in recipe_names('pretrain') and load_recipe('mine').colour_weight == 1.0\n"
        "assert tinymim.create_model('toy', img_size=32).depth == 1\n"
        "assert load_teacher('mine/x', img_size=32).model.depth == 2\n"
        "assert '12-bit' in PRECISIONS and 'one-thread' in RUNTIMES\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env, cwd=tmp_path)


def test_the_recipe_is_the_file():
    shown = re.search(r"`(tinymim/recipes/\w+\.py)`, whole\):\n\n```\n(.*?)```", TEXT, re.DOTALL)
    assert shown[2] == (ROOT / shown[1]).read_text()


def test_teacher():
    teacher = load_teacher("mine/x", img_size=32)
    assert (teacher.name, teacher.mean, teacher.model.embed_dim) == ("mine/x", (0.5,) * 3, 48)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


SMALL = dict(img_size=32, batch_size=4, max_steps=1, epochs=1, workers=0, device="cpu")


def test_method(photos, tmp_path):
    (tmp_path / "mine.py").write_text("method = 'patch_colours'\nstudent = 'tinymim_vit_tiny'\ncolor_jitter = None")
    small = {"student_args": dict(depth=1, embed_dim=24, num_heads=2), "colour_weight": 2.0, "watch_every": 0}
    made = pretrain(
        str(tmp_path / "mine.py"),
        data=photos,
        out=tmp_path / "run",
        **SMALL,
        cfg_options=small,
    )
    assert made.losses["loss"] == pytest.approx(2 * made.losses["colour"])
    assert torch.load(made.student, weights_only=True)["meta"]["method"] == "patch_colours"


def test_method_with_teachers(photos, tmp_path):
    """One and several; the maps are resumed, no teacher is saved, and a mistyped teacher is our error."""
    (tmp_path / "mine.py").write_text("method = 'mean_token'\nstudent = 'tinymim_vit_tiny'\n")
    small = {"student_args": dict(depth=1, embed_dim=24, num_heads=2), "watch_every": 0}
    given = dict(data=photos, **SMALL, cfg_options=small)
    for name, teacher in (("one", "mine/x"), ("two", ["mine/x", "mine/y=0.5"])):
        made = distill(str(tmp_path / "mine.py"), teacher=teacher, out=tmp_path / name, **given)
        shares = [made.losses[f"teacher{i + 1}"] for i in range(len(made.losses) - 1)]
        assert len(shares) == (1 if name == "one" else 2)
        assert made.losses["loss"] == pytest.approx(sum(shares))
    (checkpoint,) = (tmp_path / "two/checkpoints").glob("*.pth")
    assert {key.split(".")[0] for key in torch.load(checkpoint, weights_only=True)["model"]} == {"student", "maps"}
    with pytest.raises(ConfigError, match="no teacher"):
        distill(str(tmp_path / "mine.py"), out=tmp_path / "none", **given)


def test_backbone():
    from tinymim.seg import TinyMIMBackbone

    assert isinstance(tinymim.create_model("toy", img_size=32), backbones.Backbone)
    levels = TinyMIMBackbone(name="toy", width=12, out_indices=(0,))(torch.zeros(1, 3, 32, 32))
    assert [tuple(level.shape) for level in levels] == [(1, 12, 2, 2)]


@pytest.mark.slow
def test_precision_and_runtime(tmp_path):
    path = write_segmentor(tmp_path / "fp32.onnx")
    made = quantize(path, tmp_path / "small.onnx", precision="12-bit")
    assert made.parity.passed
    result = bench([str(path), str(tmp_path / "small.onnx")], runtime="one-thread", runs=10, threads=2)
    assert {row.engine for row in result.rows} == {"one-thread cpu"}
