"""What a stage is called follows from values: defaults that are inherited count, comments and names of files do not."""

import json
import shutil
from pathlib import Path

import pytest

from tinymim.engine import recipe as recipes
from tinymim.errors import ConfigError, DataError
from tinymim.study import stages as study_stages
from tinymim.study import verbs
from tinymim.study.definition import load_study, read_result, study_names
from tinymim.study.stages import make_stages, settings, stage_names

COMMITTED = sorted(Path(__file__).parents[2].glob("docs/studies/*/cells/*/seed*.json"))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of the shipped recipes that may be edited."""
    folder = shutil.copytree(recipes.FOLDER, tmp_path / "recipes", ignore=shutil.ignore_patterns("studies"))
    monkeypatch.setattr(recipes, "FOLDER", folder)
    return folder


def named(verb="distill", **options):
    """The folder of a stage, with nothing kept from before."""
    for cached in (verbs._recipe_values, verbs._config_values, study_stages._sha256):
        cached.cache_clear()
    return make_stages({"a": dict(verb=verb, **options)}, ["a"], 0, {}, Path("out"))["a"].folder.name


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_default_that_recipes_inherit_counts(shipped):
    before, other = named(), named("pretrain")
    edit(shipped / "_base.py", "weight_decay = 0.05", "weight_decay = 0.1")
    assert named() != before
    assert named("pretrain") != other
    assert named(cfg_options={"weight_decay": 0.05}) == before
    assert named("finetune") == named("finetune", recipe="finetune_tiny")


def test_comments_formatting_and_names_do_not_count(shipped):
    before = named(recipe="tinymim_tiny_from_mae_base")
    path = shipped / "tinymim_tiny_from_mae_base.py"
    edit(path, '_base_ = "./_base.py"', '# why not\n\n_base_ = "./" "_base.py"\ndrop_path = 0.1  # as inherited')
    assert named() == before
    path.rename(shipped / "tinymim_other.py")
    assert named(recipe="tinymim_other") == before
    assert named(recipe=str(shipped / "tinymim_other.py")) == before


def test_where_a_value_is_written_does_not_count():
    assert named(epochs=7, img_size=64) == named(cfg_options={"epochs": 7, "img_size": 64})
    assert named(epochs=300) == named() != named(epochs=301)
    assert named(cfg_options={"student_args": {"depth": 4}}) == named(
        cfg_options={"student_args": {"depth": 4}}, seed=0
    )
    assert named("finetune", student="tinymim_vit_tiny") != named("finetune")  # a file, not the recipe key
    assert named(teacher="timm/x") != named(teacher="timm/y")
    assert named(lr=1e-3) != named(lr=2e-3)


def test_a_key_that_comes_later_changes_nothing_where_it_keeps_what_was_done(shipped, monkeypatch):
    before = named()
    edit(shipped / "_base.py", "tensorboard = False", "tensorboard = False\nlater = None")
    assert named() == before
    assert named(cfg_options={"later": "x"}) != before
    edit(shipped / "_base.py", "later = None", "later = None\nhead_map = True")
    assert named() != before
    monkeypatch.setitem(verbs.ADDED, "head_map", True)
    assert named() == before
    assert named(cfg_options={"head_map": False}) != before


def test_files_enter_by_content(tmp_path, shipped):
    """Of a teacher, named by an option or by the recipe, and of a student; not where they lie."""
    for name in ("one", "two"):
        (tmp_path / name).write_text("same")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    edit(shipped / "tinymim_tiny_from_mae_base.py", '"timm/vit_base_patch16_224.mae"', repr(two))
    before, student = named(teacher=one), named("finetune", student=one)
    assert named(teacher=two) == named() == before
    assert named("finetune", student=two) == student
    (tmp_path / "two").write_text("other")
    assert named(teacher=two) == named() != before
    assert named("finetune", student=two) != student


def test_configs_of_mmsegmentation_enter_by_value(tmp_path):
    """All that is inherited and overridden; not comments, the file's name, worker processes or what only tests read."""
    base, config = tmp_path / "base.py", tmp_path / "mine.py"
    base.write_text("model = dict(channels=64)\nload = dict(num_workers=2, data_root='data/x')\ntest_cfg = dict(a=1)")
    config.write_text('_base_ = "./base.py"')

    def found(**more):
        return named("segment", config=str(config), data_root="elsewhere", **more)

    before = found()
    assert found(cfg_options={"model.channels": 64}) == before
    assert found(cfg_options={"model.channels": 65}) != before
    assert found(cfg_options={"load.num_workers": 0, "load.data_root": "y", "test_cfg.a": 2}) == before
    assert named("segment", config=str(config)) != named(
        "segment", config=str(config), cfg_options={"load.data_root": "y"}
    )
    config = config.rename(tmp_path / "renamed.py")
    edit(config, "_base_", "# a comment\n_base_")
    assert found() == before
    edit(base, "channels=64", "channels=65")
    assert found() != before
    config = "upernet_of_nobody"
    with pytest.raises(ConfigError, match="no config upernet_of_nobody"):
        found()
    config = "upernet_tinymim_t"
    with pytest.raises(ConfigError, match="does not fit the config"):
        found(cfg_options={"model.decode_head.channels.x": 1})


def test_a_recipe_that_cannot_be_is_said_at_once():
    for options, words in (
        (dict(recipe="tinymim_tiny"), "unknown recipe"),
        (dict(recipe="mae_tiny"), "tinymim pretrain runs such recipes"),
        (dict(epochs=0), "epochs=0"),
        (dict(cfg_options={"drop_paht": 0.1}), "did you mean 'drop_path'"),
    ):
        with pytest.raises(ConfigError, match=words):
            named(**options)


@pytest.mark.slow
def test_every_committed_result_is_one_of_its_study():
    """The names of its stages follow from what the tree says today. Has a recipe key come? See verbs.ADDED."""
    assert COMMITTED
    found = set()
    for name in study_names():
        study = load_study(name)
        folder = Path(__file__).parents[2] / "docs/studies"
        for cell in study.cells:
            for seed in study.seeds:
                if value := read_result(study, cell, seed, folder):
                    found.add((name, value["cell"], value["seed"]))
    there = [json.loads(path.read_text()) for path in COMMITTED]
    assert found == {(value["study"], value["cell"], value["seed"]) for value in there}


def test_pseudo_labels_enter_the_hash_by_their_files(tmp_path):
    def name(value):
        stage = dict(verb="segment", config="upernet_tinymim_demo", data_root="{segments}", pseudo=value)
        verbs.check_stage("segment", {key: item for key, item in stage.items() if key != "verb"})
        return stage_names(settings({"seg": stage}, ["seg"], 0), {"segments": "same"})["seg"]

    layout = tmp_path / "layout"
    for folder in ("images/training", "annotations/training"):
        (layout / folder).mkdir(parents=True)
        (layout / folder / "a.png").write_bytes(b"1")
    first = name(f"{layout}=0.5")
    assert name(f"{shutil.copytree(layout, tmp_path / 'moved')}=0.5") == first
    assert name(f"{layout}") == name(f"{layout}=1") != first
    (layout / "annotations/training/a.png").write_bytes(b"22")
    assert name(f"{layout}=0.5") != first
    with pytest.raises(DataError, match="no folder at"):
        name(f"{tmp_path / 'none'}=0.5")
