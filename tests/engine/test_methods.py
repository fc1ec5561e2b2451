"""A method from outside the package: one file, trained by its recipe, with tensors of its own for each photo."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.cli import main
from tinymim.distill import METHODS, Method, TinyMIM, register_method
from tinymim.engine import distill, load_recipe, pretrain, recipe_names
from tinymim.errors import ConfigError
from tinymim.models import ViT, save_student

TOY = '''
"""The student's class token learns a vector that is stored for each photo."""

import torch
from tinymim.distill import Method, register_method
from tinymim.distill.recipe_keys import Number


@register_method("stored_vectors", verb="distill", title="toy")
class StoredVectors(Method):
    keys = {"pull": Number(1.0, above=True), "store": Number(None)}

    def __init__(self, student, pull):
        super().__init__()
        self.student, self.pull = student, pull
        self.map = torch.nn.Linear(student.embed_dim, 3)

    @classmethod
    def from_recipe(cls, recipe, student, *, pretrained=True):
        return cls(student, recipe.pull)

    @property
    def learned(self):
        return torch.nn.ModuleDict({"student": self.student, "map": self.map})

    def per_photo(self, photo, epoch):
        number = int(photo.stem)
        return {"vector": torch.tensor([float(number), float(epoch), 1.0])}

    def losses(self, images, extra):
        assert extra["vector"].shape == (len(images), 3)
        distance = (self.map(self.student(images)[:, 0]) - extra["vector"]).square().mean()
        return {"distance": distance, "loss": self.pull * distance}
'''
RECIPE = """
custom_imports = dict(imports=["toy_method"])
method = "stored_vectors"
student = "tinymim_vit_tiny"
student_args = dict(depth=1, embed_dim=24, num_heads=2)
img_size = 32
batch_size = 4
color_jitter = None
drop_path = 0.0
precision = "fp32"
warmup_epochs = 0
watch_every = 0
workers = 1
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Photos, and a recipe of a method that lives outside the package."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 44, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i:02d}.png")
    (tmp_path / "toy_method.py").write_text(TOY)
    (tmp_path / "toy.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    METHODS.pop("stored_vectors", None)
    sys.modules.pop("toy_method", None)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["distance"], line["loss"]) for line in lines if "loss" in line]


def test_a_method_from_outside_trains_by_recipe(toy, capsys):
    command = [
        "distill",
        "--recipe",
        str(toy / "toy.py"),
        "--data",
        str(toy / "photos"),
        "--val-data",
        str(toy / "photos"),
        "--device",
        "cpu",
        "--epochs",
        "4",
        "--lr",
        "0.01",
        "--save-every",
        "6",
        "--out",
        str(toy / "run"),
        "--cfg-options",
        "pull=2.0",
    ]
    assert main(command) == 0
    assert "toy: 12 steps" in capsys.readouterr().out
    whole = losses(toy / "run")
    assert [step for step, _, _ in whole] == list(range(1, 13))
    assert all(loss == pytest.approx(2 * distance) for _, distance, loss in whole)
    assert whole[-1][1] < whole[0][1]
    meta = torch.load(toy / "run/student.pth", weights_only=True)["meta"]
    assert (meta["method"], meta["teacher"], meta["relations"]) == ("stored_vectors", None, None)
    assert (toy / "run/report.html").is_file()
    (toy / "run/checkpoints/step_00000012.pth").unlink()
    assert main([*command, "--resume"]) == 0  # its own layers are in the checkpoint
    assert losses(toy / "run") == whole
    assert main([*command[:3], "--print-config"]) == 0
    assert "pull = 1.0" in capsys.readouterr().out


def test_its_keys_are_checked_and_nobody_elses_are_known(toy):
    run = dict(data=toy / "photos", out=toy / "run", device="cpu")
    for options, words in (
        ({"pull": 0}, "pull=0: it must be a number of at least 0 .not 0."),
        ({"pul": 1}, "unknown key 'pul'.*did you mean 'pull'"),
        ({"targets": ["qk"]}, "unknown key 'targets'"),
    ):
        with pytest.raises(ConfigError) as error:
            distill(str(toy / "toy.py"), **run, cfg_options=options)
        text = f"{error.value.what}: {error.value.why} {error.value.fix}"
        assert re.search(words, text), text
    assert not (toy / "run").exists()
    with pytest.raises(ConfigError, match="a stored_vectors recipe"):
        load_recipe(str(toy / "toy.py"), verb="pretrain")


def test_recipes_belong_to_the_command_of_their_method():
    assert {"mae_tiny", "mae_base"} <= set(recipe_names("pretrain"))
    assert {"tinymim_chain", "tinymim_tiny_from_mae_base"} <= set(recipe_names("distill"))
    assert set(recipe_names()) == {
        n for verb in ("pretrain", "distill", "finetune", "track") for n in recipe_names(verb)
    }
    assert load_recipe("mae_tiny").decoder == {"dim": 96, "depth": 1, "heads": 3}
    assert "targets" not in load_recipe("mae_tiny")
    with pytest.raises(ConfigError, match="method='nothing'"):
        load_recipe("mae_tiny", {"method": "nothing"})


def test_a_name_is_given_once():
    with pytest.raises(ConfigError, match="two methods are called 'tinymim'"):

        @register_method("tinymim", verb="distill", title="distil")
        class Other(Method):
            pass

    assert METHODS["tinymim"] is TinyMIM


class Recorded:
    """Targets that were computed before, as a store would give them."""

    def __init__(self, teacher, images):
        from tinymim.distill import LiveTeacher

        live = LiveTeacher(teacher)
        self.width, self.depth, self.heads, self.class_token = live.width, live.depth, live.heads, live.class_token
        taps = live.read(images, {live.depth: ("q", "k", "v")}, (2, 2))[live.depth]
        self.rows = dict(taps)

    def per_photo(self, photo, epoch):
        return {name: value[int(photo)] for name, value in self.rows.items()}

    def read(self, images, wanted, grid, *, keep_BV=None, extra=None):
        return {block: {name: extra[name] for name in names} for block, names in wanted.items()}


def test_targets_from_a_store_give_the_losses_of_the_live_teacher():
    torch.manual_seed(0)
    student = ViT(img_size=32, embed_dim=24, depth=2, num_heads=2)
    teacher = ViT(img_size=32, embed_dim=48, depth=3, num_heads=4)
    images = torch.randn(5, 3, 32, 32)
    live = TinyMIM(student, teacher).losses(images, images)
    source = Recorded(teacher, images)
    method = TinyMIM(student, source)
    assert method.teacher is None
    assert len(method.normalisations) == 1
    rows = [method.per_photo(i, 0) for i in range(5)]
    stored = method.losses(images, extra={name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    assert {name: float(loss) for name, loss in stored.items()} == {name: float(loss) for name, loss in live.items()}


@pytest.mark.parametrize("job", [pretrain, distill])
def test_a_backbone_that_cannot_be_a_student_is_refused(toy, job):
    """Hierarchical backbones segment; neither masking nor distillation reads inside their blocks yet."""
    save_student(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), toy / "teacher.pth")
    more = {"teacher": str(toy / "teacher.pth")} if job is distill else {}
    with pytest.raises(ConfigError, match="which only plain transformers offer"):
        job(data=toy / "photos", out=toy / "run", img_size=32, device="cpu", model="hiera_tiny_224", **more)
    assert not (toy / "run").exists()


def test_a_method_cannot_declare_a_key_of_every_run(toy):
    text = (toy / "toy_method.py").read_text()
    (toy / "toy_method.py").write_text(text.replace('"store": Number(None)', '"epochs": Number(1.0)'))
    with pytest.raises(ConfigError, match="declares the recipe key 'epochs'"):
        load_recipe(str(toy / "toy.py"))


def test_no_registry_replaces_what_it_has():
    from tinymim.models.backbone import build_backbone, register_backbone
    from tinymim.models.teachers import TEACHERS, load_teacher, register_teacher

    loads = TEACHERS["timm/"]
    with pytest.raises(ConfigError, match="two functions load teachers called timm/NAME"):
        register_teacher("timm/")(lambda name, **_: None)
    assert TEACHERS["timm/"] is loads
    with pytest.raises(ConfigError, match="two backbones are called 'vit'"):
        register_backbone("vit")(lambda **_: None)
    assert isinstance(build_backbone("vit", img_size=32, depth=1), ViT)
    with pytest.raises(ConfigError, match="no teacher"):
        load_teacher(None)


def test_a_run_of_segmentation_is_not_resumed_as_another(toy):
    (toy / "run").mkdir()
    (toy / "run" / "config.py").write_text("model = dict(type='EncoderDecoder')\n")
    with pytest.raises(ConfigError, match="holds another kind of run"):
        pretrain(data=toy / "photos", out=toy / "run", img_size=32, batch_size=4, device="cpu", resume=True)
