"""Files that users write, and --cfg-options: every mistake is our error, before anything is made."""

import argparse
import ast
import sys

import numpy as np
import pytest
from PIL import Image

from tinymim.cli import main
from tinymim.cli._cfg_options import add_cfg_options, parse_value
from tinymim.engine import load_recipe, pretrain
from tinymim.errors import ConfigError
from tinymim.literals import read_literal_file
from tinymim.seg.config import find_config
from tinymim.study.definition import load_study

USER = dict(
    syntax=("a = 1\nb = dict(\n", r"syntax\.py, line 2: SyntaxError: '\(' was never closed"),
    zero=("x = 1\ny = x / 0\n", r"zero\.py, line 2: ZeroDivisionError"),
    nested=("def f():\n    raise KeyError('k')\n\na = f()\n", r"nested\.py, line 2: KeyError: 'k'"),
    inherited=("_base_ = './zero.py'\n", r"zero\.py, line 2: ZeroDivisionError"),
    wrong_base=("_base_ = './syntax.py'\n", r"syntax\.py, line 2: SyntaxError"),
    no_base=("_base_ = './gone.py'\n", r"no_base\.py: FileNotFoundError.*gone\.py"),
    leaves=("import sys\nsys.exit(3)\n", r"leaves\.py, line 2: SystemExit: 3"),
    raising=("custom_imports = dict(imports=['raises_it'])\n", r"raises_it\.py, line 3: ZeroDivisionError"),
    missing=("custom_imports = dict(imports=['no_such_module'])\n", r"No module named 'no_such_module'; a module of"),
    inner=("custom_imports = dict(imports=['needs_it'])\n", r"needs_it\.py, line 1: No module named 'no_such_module'"),
    imports=("custom_imports = dict(importz=['a'])\n", r"imports\.py: TypeError"),
    imports_5=("custom_imports = 5\n", r"imports_5\.py: TypeError"),
    latin=(b"a = '\xe4'\n", "it is not UTF-8 text"),
    binary=(b"\x00\x01\xff", "it is not UTF-8 text|null bytes"),
)
READERS = dict(recipe=load_recipe, study=load_study, config=find_config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of :data:`USER`, and the modules that they import."""
    folder = tmp_path_factory.mktemp("user")
    for name, (content, _) in USER.items():
        (folder / f"{name}.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "raises_it.py").write_text("x = 1\n\n1 / 0\n")
    (folder / "needs_it.py").write_text("import no_such_module\n")
    (folder / "folder.py").mkdir()
    return folder


@pytest.mark.parametrize("name", USER)
def test_mistakes_in_files_are_told_with_file_and_line(files, monkeypatch, name):
    """Whoever reads the file; no list of ``sys.path`` is shown."""
    monkeypatch.syspath_prepend(files)
    for reader in READERS.values():
        with pytest.raises(ConfigError, match=USER[name][1]) as error:
            reader(str(files / f"{name}.py"))
        assert sys.path[1] not in error.value.why.replace(str(files), "")


@pytest.mark.slow
def test_a_file_that_inherits_from_itself(tmp_path):
    (tmp_path / "itself.py").write_text("_base_ = './itself.py'\n")
    with pytest.raises(ConfigError, match=r"itself\.py: RecursionError"):
        load_recipe(str(tmp_path / "itself.py"))


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file(files, reader):
    for name in ("folder.py", "absent.py"):
        with pytest.raises(ConfigError):
            READERS[reader](str(files / name))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "base.py").write_bytes(b"\xef\xbb\xbfepochs = 7\n")
    (tmp_path / "mine.py").write_bytes(
        b"\xef\xbb\xbf_base_ = './base.py'\nmethod = 'mae'\nstudent = 'tinymim_vit_tiny'\n"
    )
    assert load_recipe(str(tmp_path / "mine.py")).epochs == 7


def test_a_recipe_keeps_only_data(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("method = 'mae'\nstudent = 'tinymim_vit_tiny'\nstudent_args = dict(depth=[lambda: 1])\n")
    with pytest.raises(ConfigError, match=r"student_args\.depth\.0 is a function"):
        load_recipe(str(recipe))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("student_args=5", "it must be a dict"),
        ("decoder=3", "it must be a dict"),
        ("student_args.embed_dmi=3", "did you mean 'student_args.embed_dim'"),
        ("decoder.dmi=3", "did you mean 'decoder.dim'"),
        ("drop_paht=0.1", r"did you mean 'drop_path'\?; to add a new key: --cfg-options \+drop_paht=VALUE"),
        ("student_args.depth=two", "it must be a whole number"),
        ("student_args.depth=1000000000", "no model has more than 1024"),
        ("student_args.embed_dim=1000000000", "no model has more"),
        ("decoder.depth=5000", "no model has more than 1024"),
        ("epochs=inf", "it must be a number"),
        ("epochs=-1", "it must be a number of at least 0"),
        ("batch_size=two", "it must be a whole number of at least 1"),
        ("batch_size=1e3", "it must be a whole number"),
        ("img_size=1000000000", "it must be a whole number from 16 to 16384"),
        ("workers=-3", "it must be a whole number from 0"),
        ("workers=100000", "from 0 to 1024"),
        ("seed=99999999999", "it must be a whole number from 0 to 4294967295"),
        ("betas=[0.9]", "two numbers"),
        ("targets=5", "it must be a list of texts"),
        ("teachers=[a]", "it must be a list of dicts"),
        ("hops=5", "it must be a list of dicts"),
        ("chain=5", "it must be a text"),
        ("teacher_heads=x", "it must be a whole number"),
        ("tensorboard=maybe", "it must be one of"),
        ("method=[mae]", "it must be one of"),
        ("custom_imports=5", "it must be a dict"),
        ("epochs.x=3", "cannot apply"),
    ],
)
def test_recipe_options(option, words):
    key, _, text = option.partition("=")
    with pytest.raises(ConfigError, match=words):
        load_recipe("tinymim_tiny_from_mae_base", {key: parse_value(key, text)})


def test_a_new_recipe_key_has_to_be_asked_for():
    assert load_recipe("mae_tiny", {"+mine": 3}).mine == 3


@pytest.mark.parametrize("word", ["a", "=3", "+=3", "a..b=1", "a=[1,2", "a={'b':1}", "a=[{'b':1}]", "a=dict(b=1)"])
def test_words_that_are_no_option(word):
    parser = argparse.ArgumentParser()
    add_cfg_options(parser, "")
    with pytest.raises(ConfigError) as error:
        parser.parse_args(["--cfg-options", "b=1", word])
    assert error.value.what == f"--cfg-options {word}"


def test_a_wrong_word_ends_a_command(capsys):
    for verb in (["pretrain", "--data", "x"], ["segment", "upernet_tinymim_demo"]):
        assert main([*verb, "--cfg-options", "a"]) == 2
        assert capsys.readouterr().err.startswith(f"tinymim {verb[0]}: error: --cfg-options a\n")


def test_values_are_those_of_dict_action():
    texts = dict(a="1", b="1e-3", c="True", d="None", e="[1,2]", f="(1,2)", g="x,y", h="[(1,2),[]]", i="", j="a-b/c=d")
    values = [1, 1e-3, True, None, [1, 2], (1, 2), ["x", "y"], [(1, 2), []], "", "a-b/c=d"]
    assert [parse_value(key, text) for key, text in texts.items()] == values


def test_a_run_folder_keeps_any_command_line_as_data(tmp_path, monkeypatch):
    """What was typed round-trips, and ``--resume`` runs none of it."""
    name = "photos\\New\\x" + 'q"""+str(1 % 0)+"""' + "a'b\nc\udcff{{ fileDirname }}\u2028\x0c"
    photos, out = tmp_path / "data" / name, tmp_path / "run"
    photos.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(photos / f"{i}.png")
    words = ["pretrain", "--data", str(photos), "--out", str(out), "--model", "tinymim_vit_tiny", "--img-size", "32"]
    monkeypatch.setattr(sys, "argv", ["tinymim", *words])
    settings = dict(data=photos, out=out, img_size=32, batch_size=4, workers=0, device="cpu", max_steps=1)
    options = {"student_args": dict(depth=1, embed_dim=12, num_heads=1), "decoder": dict(dim=12, depth=1, heads=1)}
    pretrain("mae_tiny", **settings, cfg_options=options)
    assert read_literal_file(out / "config.py")["data"] == str(photos)
    line = next(text for text in (out / "config.py").read_text("utf-8").splitlines() if text.startswith("# command: "))
    assert ast.literal_eval(line.removeprefix("# command: ")) == ["tinymim", *words]
    pretrain("mae_tiny", **settings, cfg_options=options, resume=True)
    config = out / "config.py"
    config.write_text(config.read_text("utf-8") + "\nseed = __import__('os').abort()\n", "utf-8")
    with pytest.raises(ConfigError, match="is not plain data"):
        pretrain("mae_tiny", **settings, cfg_options=options, resume=True)
