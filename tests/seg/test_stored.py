"""The config inside a segmentor's file is data: what real runs wrote is read, nothing in it runs, opens or grows."""

import sys

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS

from tinymim.errors import TinyMIMError
from tinymim.files import config_file
from tinymim.literals import read_literals
from tinymim.seg import load_segmentor, train_segmentor

MODULE = """
from mmseg.registry import MODELS
from tinymim.seg import TinyMIMBackbone


@MODELS.register_module()
class OwnBackbone(TinyMIMBackbone):
    pass
"""
CALL = "subprocess.check_output"


@pytest.fixture(scope="module")
def trained(scenes, small, tmp_path_factory):
    """The folder of a segmentor with a backbone of its own, registered by a module of its config."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_backbone.py").write_text(MODULE)
    (folder / "mine.py").write_text(
        f"_base_ = {str(config_file('upernet_tinymim_demo'))!r}\n"
        "custom_imports = dict(imports=['tinymim.seg', 'own_backbone'], allow_failed_imports=False)\n"
        "model = dict(backbone=dict(type='OwnBackbone'))\n"
    )
    sys.path.insert(0, str(folder))
    try:
        options = small(**{"train_cfg.max_iters": 1, "train_cfg.val_interval": 1})
        train_segmentor(folder / "mine.py", work_dir=folder / "run", data_root=scenes, cfg_options=options)
        yield folder
    finally:
        sys.path.remove(str(folder))
        MODELS.module_dict.pop("OwnBackbone", None)


def forget():
    MODELS.module_dict.pop("OwnBackbone", None)
    sys.modules.pop("own_backbone", None)


def test_an_own_backbone_is_imported_only_if_its_config_is_given(trained):
    for file in ("segmentor.pth", "checkpoints/iter_1.pth"):
        load_segmentor(trained / "run" / file)  # this process has registered it
        forget()
        with pytest.raises(TinyMIMError, match=r"type='OwnBackbone'(.|\n)*own_backbone(.|\n)*--config FILE"):
            load_segmentor(trained / "run" / file)
        assert "own_backbone" not in sys.modules
        options = Config.fromfile(str(trained / "run" / "config.py"))  # the user's asking: it may import
        load_segmentor(trained / "run" / file, options)


@pytest.fixture(scope="module")
def plain(trained):
    """State, meta and config of the same segmentor with our own backbone."""
    content = torch.load(trained / "run" / "segmentor.pth", weights_only=True)
    values = read_literals(content["meta"]["config"], "")
    values["model"]["backbone"]["type"] = "TinyMIMBackbone"
    values["custom_imports"] = dict(imports=["tinymim.seg"])
    return content["state_dict"], content["meta"], values


def store(plain, path, text):
    state, meta, _ = plain
    torch.save({"state_dict": state, "meta": {**meta, "config": text}}, path)
    return path


def text_with(plain, place="", value=None):
    """The config with one value changed, as ``name = literal`` lines."""
    values = read_literals("".join(f"{key} = {item!r}\n" for key, item in plain[2].items()), "")
    node = values
    *parts, last = place.split(".") if place else [""]
    for part in parts:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if place:
        node[int(last) if isinstance(node, list) else last] = value
    return "".join(f"{key} = {item!r}\n" for key, item in values.items())


def test_mmengines_own_spelling_is_read(plain, tmp_path):
    """``iter_N.pth`` of MMEngine and older files of ours hold ``dict(a=1)``, formatted by yapf."""
    text = Config(plain[2]).pretty_text
    assert "dict(" in text
    ours = store(plain, tmp_path / "a.pth", text_with(plain))
    theirs = store(plain, tmp_path / "b.pth", text)
    images = torch.randn(1, 3, 64, 64)
    logits = [load_segmentor(file)[0](images, mode="tensor") for file in (ours, theirs)]
    assert torch.equal(*logits)


FORGOTTEN = {
    "model.backbone.init_cfg": dict(type=CALL, checkpoint="http://127.0.0.1:1/x.pth"),
    "model.decode_head.init_cfg": dict(type="Pretrained", checkpoint="s3://x"),
    "custom_imports": dict(imports=["evil_module"]),
    "load_from": "evil.pth",
    "_base_": "/etc/passwd",
    "test_pipeline.0.backend_args": dict(backend="petrel"),
    "custom_hooks": [dict(type="HookOfMine")],
    "train_dataloader.dataset.pipeline.0.type": "AugmentationOfMine",
}


@pytest.mark.parametrize("place", [key for key in FORGOTTEN if key != "model.backbone.init_cfg"])
def test_what_testing_does_not_need_is_forgotten(plain, tmp_path, monkeypatch, place):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    model, cfg = load_segmentor(store(plain, tmp_path / "a.pth", text_with(plain, place, FORGOTTEN[place])))
    assert not model.training
    assert "custom_imports" not in cfg
    assert cfg.test_pipeline[0].get("backend_args") is None


HOSTILE = {
    "model.type": CALL,
    "model.backbone.type": CALL,
    "model.neck": dict(type="CheckpointHook"),  # registered, but no part of a model
    "model.data_preprocessor.type": CALL,
    "model.backbone.norm_cfg.type": "evil_module",
    "model.decode_head.loss_decode.type": "os.system",
    "model.backbone._scope_": "evil_module",
    "model.backbone": dict(type="TIMMBackbone", model_name="hf-hub:evil/x"),
    "model.auxiliary_head.norm_cfg": dict(type="BN", norm_layer="evil_module"),
    "model.decode_head.loss_decode.class_weight": "evil.pkl",
    "model.decode_head.act_cfg": dict(type=5),
    "default_hooks.checkpoint.type": CALL,
    "custom_hooks": [dict(type=CALL)],
    "visualizer": dict(type="evil_module.Hook"),
    "env_cfg.dist_cfg": dict(type=CALL),
    "optim_wrapper.optimizer.type": CALL,
    "param_scheduler.0.type": CALL,
    "test_pipeline.0.type": CALL,
    "tta_pipeline.1.transforms.0.0.type": CALL,
    "val_dataloader.dataset.pipeline.0.type": "evil_module",
    "val_dataloader.collate_fn": dict(type=CALL),
    "val_dataloader.worker_init_fn": dict(type=CALL),
    "val_dataloader.sampler.type": CALL,
    "val_dataloader.dataset.type": CALL,
}


@pytest.mark.parametrize("place", HOSTILE)
def test_types_that_are_not_registered_are_named(plain, tmp_path, monkeypatch, place):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TinyMIMError) as error:
        load_segmentor(store(plain, tmp_path / "a.pth", text_with(plain, place, HOSTILE[place])))
    value = HOSTILE[place]
    kind = (
        value
        if isinstance(value, str)
        else next(iter(reversed((value[0] if isinstance(value, list) else value).values())))
    )
    assert repr(kind) in error.value.what
    assert "--config FILE" in error.value.fix
    assert "evil_module" not in sys.modules


ABSURD = {
    "model.backbone.depth": 10**9,
    "model.backbone.embed_dim": 2**20,
    "model.backbone.img_size": (60_000, 60_000),
    "model.backbone.patch_size": 0,
    "model.backbone.num_heads": "x",
    "model.backbone.drop_path_rate": [0.1] * 2000,
    "model.auxiliary_head.num_convs": 10**9,
    "model.decode_head.pool_scales": list(range(1, 10_000)),
    "model.decode_head.num_classes": 10**12,
    "model.decode_head.in_index": 5,
    "model.decode_head.foo": 1,
    "model.decode_head": [],
    "model.data_preprocessor": [1],
    "model.test_cfg": 5,
    "model": 5,
    "test_pipeline": ["x"],
    "val_dataloader": None,
    "val_dataloader.num_workers": 10**9,
}


@pytest.mark.parametrize("place", ABSURD)
def test_absurd_values_are_our_error(plain, tmp_path, place):
    with pytest.raises(TinyMIMError):
        load_segmentor(store(plain, tmp_path / "a.pth", text_with(plain, place, ABSURD[place])))


def test_an_array_is_not_kept_as_data(scenes, small, tmp_path):
    """A value that the run folder could not hold is refused before anything is written."""
    (tmp_path / "mine.py").write_text(
        f"_base_ = {str(config_file('upernet_tinymim_demo'))!r}\n"
        "model = dict(decode_head=dict(loss_decode=dict(class_weight=[abs])))\n"
    )
    with pytest.raises(TinyMIMError, match=r"class_weight\.0 is a builtin_function"):
        train_segmentor(tmp_path / "mine.py", work_dir=tmp_path / "run", data_root=scenes, cfg_options=small())
    assert not (tmp_path / "run").exists()
