"""The ``next:`` line that gives a student its head names a config that takes its weights."""

import argparse
import shlex

import pytest

import tinymim
from tinymim.cli import segment
from tinymim.cli._next import segment_line
from tinymim.models import create_model, save_student
from tinymim.seg import TinyMIMBackbone
from tinymim.seg.config import find_config, merge_options

STUDENTS = [  # name, arguments, recipe -> config
    ("tinymim_vit_tiny", {}, None, "upernet_tinymim_t_light"),
    ("tinymim_vit_tiny", {}, "tinymim_tiny_small_data", "linear_tinymim_t_small_data"),
    ("tinymim_vit_tiny", dict(num_heads=12), None, "upernet_tinymim_t_light"),
    ("tinymim_vit_tiny", dict(depth=3), "tinymim_tiny_small_data", "linear_tinymim_t"),
    ("tinymim_vit_tiny", dict(depth=2, embed_dim=24, num_heads=2), None, "linear_tinymim_t"),
    ("tinymim_vit_star_tiny", {}, None, "upernet_tinymim_star_t"),
    ("tinymim_vit_small", dict(num_heads=12), None, "upernet_tinymim_s_light"),
    ("tinymim_vit_base", {}, None, "upernet_tinymim_b_light"),
    ("hiera_tiny_224", {}, None, "upernet_hiera_tiny"),
    ("tiny_vit_5m_224", {}, None, "upernet_tinyvit_5m"),
    ("tiny_vit_11m_224", {}, None, "upernet_tinyvit_11m"),
    ("tiny_vit_21m_384", {}, None, "upernet_tinyvit_21m"),
    ("tiny_vit_21m_224", {}, None, "upernet_tinyvit_21m"),
    (
        "tiny_vit_5m_224",
        dict(embed_dims=[48, 64, 96, 128], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4], mlp_ratio=3.5),
        None,
        "upernet_tinyvit_5m",
    ),
    ("tinymim_vit_tiny", dict(mlp_ratio=3.0), None, "linear_tinymim_t"),
]


LARGE = ("_base", "_11m_", "_21m_")


@pytest.mark.parametrize(
    ("name", "arguments", "recipe", "config"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if any(size in case[0] for size in LARGE) else [])
        for case in STUDENTS
    ],
)
def test_the_config_takes_the_student(tmp_path, name, arguments, recipe, config):
    file = tmp_path / "a student.pth"
    save_student(create_model(name, img_size=64, **arguments), file, {"recipe": recipe})
    words = shlex.split(segment_line(file))
    assert words[:2] == ["tinymim", "segment"]
    parser = argparse.ArgumentParser()
    segment.add_arguments(parser)
    args = parser.parse_args(words[2:])
    assert args.config == config
    cfg = find_config(config)
    merge_options(cfg, {**(args.cfg_options or {}), "model.backbone.img_size": (64, 64)})
    backbone = TinyMIMBackbone(**{key: value for key, value in cfg.model.backbone.items() if key != "type"})
    assert {*tinymim.load_weights(backbone, args.student, say=False).unexpected} <= {"norm.weight", "norm.bias"}
    widths = cfg.model.decode_head.in_channels
    assert [*backbone.out_channels] == ([widths] if isinstance(widths, int) else [*widths])
