"""Every published layout, made by the test, through the one reader."""

import argparse
import pickle
import subprocess
import sys

import pytest
import torch

import tinymim
from tinymim.errors import CheckpointError
from tinymim.files import sha256_file
from tinymim.models import ViT, model_from_checkpoint, read_checkpoint, save_student
from tinymim.models.position import resize_position, resize_relative_table

SIZE = dict(img_size=64, embed_dim=24, depth=2, num_heads=2)


def make(seed=0, **more):
    torch.manual_seed(seed)
    model = ViT(**(SIZE | more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def assert_same(model, source, but=()):
    for key, value in source.state_dict().items():
        if key not in but:
            assert torch.equal(model.state_dict()[key], value), key


def decoder():
    return {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_embed.weight": torch.zeros(8, 24),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
        "decoder_norm.bias": torch.zeros(8),
        "decoder_pred.weight": torch.zeros(9, 8),
    }


def test_mae_encoder_and_full(tmp_path):
    """Top-level 'model'; decoder keys dropped; a Namespace beside it stays inert."""
    source = make()
    torch.save({"model": {**source.state_dict(), **decoder()}, "args": argparse.Namespace(lr=1)}, tmp_path / "full.pth")
    model = make(1)
    report = tinymim.load_weights(model, tmp_path / "full.pth")
    assert_same(model, source)
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    assert set(report.loaded) == set(source.state_dict())
    assert "decoder_embed.weight" in report.dropped


def test_training_checkpoint_of_the_paper_and_legacy_pickle(tmp_path):
    """{model, optimizer, epoch, scaler, args}, in both of torch's file formats."""
    source = make()
    content = {
        "model": source.state_dict(),
        "optimizer": {"state": {}},
        "epoch": 3,
        "scaler": {},
        "args": argparse.Namespace(blr=1.5e-4),
    }
    for new in (True, False):
        torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
        model = make(1)
        tinymim.load_weights(model, tmp_path / "c.pth")
        assert_same(model, source)


def test_fine_tuned(tmp_path):
    """fc_norm and head are unexpected, norm is missing, and both are said."""
    state = {k: v for k, v in make().state_dict().items() if not k.startswith("norm.")}
    state |= {"fc_norm.weight": torch.ones(24), "head.weight": torch.ones(5, 24)}
    report = tinymim.load_weights(make(1), {"model": state})
    assert report.missing == ["norm.weight", "norm.bias"]
    assert report.unexpected == ["fc_norm.weight", "head.weight"]
    assert "missing: norm.weight" in str(report)


def test_star_and_the_distillation_token():
    """198 positions or a token on one side only are errors; new_dist_token copies the class token's."""
    star = make(dist_token=True, last_dim=40)
    extra = {"head.weight": torch.ones(5, 40), "head_dist.weight": torch.ones(5, 40), "fc_norm.weight": torch.ones(40)}
    target = make(1, dist_token=True, last_dim=40)
    report = tinymim.load_weights(target, {"model": star.state_dict() | extra})
    assert_same(target, star)
    assert set(report.unexpected) == set(extra)

    with pytest.raises(CheckpointError, match="the model has none"):
        tinymim.load_weights(make(), {"model": star.state_dict()})
    without = {k: v for k, v in star.state_dict().items() if k != "dist_token"}
    with pytest.raises(CheckpointError, match="the model has none"):  # 18 rows alone tell it
        tinymim.load_weights(make(), {"model": without})

    plain = make(2)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError, match="new_dist_token=True"):
        tinymim.load_weights(target, {"model": plain.state_dict()})
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())
    report = tinymim.load_weights(target, {"model": plain.state_dict()}, new_dist_token=True)
    assert torch.equal(target.dist_token, plain.cls_token)
    assert torch.equal(target.pos_embed[:, 1], plain.pos_embed[:, 0])
    assert torch.equal(target.pos_embed[:, 2:], plain.pos_embed[:, 1:])
    assert any("copied from the class token" in note for note in report.notes)


@pytest.mark.parametrize("wrap", ["model.", "module.model."])
def test_mae_lite(wrap):
    """Student under model. or module.model.; teacher and adapter dropped."""
    source = make()
    prefix = wrap.removesuffix("model.")
    state = {f"{wrap}{k}": v for k, v in {**source.state_dict(), **decoder()}.items()}
    state |= {
        f"{prefix}tch_model.blocks.0.norm1.weight": torch.zeros(64),
        f"{prefix}attn_adapter.0.weight": torch.zeros(4, 2, 1, 1),
    }
    model = make(1)
    report = tinymim.load_weights(model, {"start_epoch": 400, "model": state, "optimizer": {}})
    assert_same(model, source)
    assert report.unexpected == []


def test_d2_mae():
    """The block of queries and keys after the last one is left out."""
    source = make()
    state = {f"model.{k}": v for k, v in {**source.state_dict(), **decoder()}.items()}
    for key in ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"):
        state[f"model.blocks.{source.depth}.{key}"] = state[f"model.blocks.0.{key}"]
    model = make(1)
    report = tinymim.load_weights(model, {"model": state})
    assert_same(model, source)
    assert len([key for key in report.dropped if f"blocks.{source.depth}." in key]) == 4


def test_beit():
    """q/v bias become qkv.bias with a zero key bias; a shared table goes to every block; no absolute positions."""
    source = make(rel_pos_bias=True, init_values=0.1)
    with torch.no_grad():
        source.pos_embed.zero_()
        for block in source.blocks:
            block.attn.qkv.bias[24:48] = 0
            block.attn.relative_position_bias_table.copy_(source.blocks[0].attn.relative_position_bias_table)
    state = {}
    for key, value in source.state_dict().items():
        if key.endswith("qkv.bias"):
            state[key.replace("qkv.bias", "q_bias")], state[key.replace("qkv.bias", "v_bias")] = value[:24], value[48:]
        elif key.endswith("bias_table"):
            state["rel_pos_bias.relative_position_bias_table"] = value
        elif key != "pos_embed":
            state[key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value
    state["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    state["mask_token"] = torch.zeros(1, 1, 24)
    model = make(1, rel_pos_bias=True, init_values=0.1)
    report = tinymim.load_weights(model, {"module": state})
    assert_same(model, source)
    assert any("pos_embed set to zero" in note for note in report.notes)


def test_mmsegmentation(tmp_path):
    """state_dict under backbone.: our names, and MMSegmentation's own MAE names."""
    source = make(rel_pos_bias=True, init_values=1.0)
    ours = {f"backbone.{k}": v for k, v in source.state_dict().items()}
    ours["decode_head.conv_seg.weight"] = torch.ones(3, 3)
    theirs = {}
    for key, value in source.state_dict().items():
        for a, b in (
            ("blocks.", "layers."),
            ("norm1.", "ln1."),
            ("norm2.", "ln2."),
            ("mlp.fc1.", "ffn.layers.0.0."),
            ("mlp.fc2.", "ffn.layers.1."),
            ("patch_embed.proj.", "patch_embed.projection."),
            ("ls1.gamma", "gamma_1"),
            ("ls2.gamma", "gamma_2"),
        ):
            key = key.replace(a, b)
        theirs[f"backbone.{key}"] = value
    for state in (ours, theirs):
        torch.save({"state_dict": state, "meta": {"iter": 1}}, tmp_path / "iter.pth")
        model = make(1, rel_pos_bias=True, init_values=1.0)
        report = tinymim.load_weights(model, tmp_path / "iter.pth")
        assert_same(model, source)
        assert report.unexpected == []


@pytest.mark.parametrize(("old", "new"), [((4, 4), (2, 6)), ((3, 5), (4, 4)), ((2, 6), (5, 3))])
def test_other_grids(tmp_path, old, new):
    """Positions and tables of any grid are resized; ours store a non-square one."""
    patch = 16
    source = make(img_size=(old[0] * patch, old[1] * patch), rel_pos_bias=True)
    save_student(source, tmp_path / "s.pth", {})
    model = make(1, img_size=(new[0] * patch, new[1] * patch), rel_pos_bias=True)
    report = tinymim.load_weights(model, tmp_path / "s.pth")
    assert set(report.resized) == {"pos_embed", *(f"blocks.{i}.attn.relative_position_bias_table" for i in (0, 1))}
    assert torch.equal(model.pos_embed, resize_position(source.pos_embed, old, new, 1))
    table = source.blocks[0].attn.relative_position_bias_table
    assert torch.equal(model.blocks[0].attn.relative_position_bias_table, resize_relative_table(table, old, new))


def test_grids_of_plain_state_dicts():
    """Without our meta: the same row count is the model's own grid; a bias table tells the sides; else an error."""
    wide = make(img_size=(32, 128))
    same = make(1, img_size=(32, 128))
    assert tinymim.load_weights(same, wide.state_dict()).resized == []
    assert_same(same, wide)
    wide = make(img_size=(32, 96), rel_pos_bias=True)
    square = make(1, rel_pos_bias=True)
    tinymim.load_weights(square, wide.state_dict())
    assert torch.equal(square.pos_embed, resize_position(wide.pos_embed, (2, 6), (4, 4), 1))
    with pytest.raises(CheckpointError, match="patch grid is unknown"):
        tinymim.load_weights(make(1), make(img_size=(32, 96)).state_dict())


def test_safetensors_and_rebuild(tmp_path):
    source = make(rel_pos_bias=True, init_values=0.3)
    save_student(source, tmp_path / "s.safetensors", {"recipe": "x"})
    model, checkpoint = model_from_checkpoint(tmp_path / "s.safetensors")
    assert_same(model, source)
    assert checkpoint.meta["recipe"] == "x"


@pytest.mark.slow
def test_equal_weights_are_equal_files(tmp_path):
    """Whatever the file is called and whoever writes it: a hash of it tells weights apart, and nothing else."""
    torch.manual_seed(0)
    model = ViT(img_size=32, embed_dim=24, depth=1, num_heads=2)
    code = (
        "import sys, torch; from tinymim.models import model_from_checkpoint, save_student; "
        "save_student(model_from_checkpoint(sys.argv[1], say=False)[0], sys.argv[2])"
    )
    save_student(model, tmp_path / "a.pth")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pth"), str(tmp_path / "b.pth")], check=True)
    assert sha256_file(tmp_path / "a.pth") == sha256_file(tmp_path / "b.pth")
    with torch.no_grad():
        model.cls_token += 1e-3
    save_student(model, tmp_path / "c.pth")
    assert sha256_file(tmp_path / "a.pth") != sha256_file(tmp_path / "c.pth")


def test_head_count():
    """Our files know their heads; foreign ones need the option, and the error names it."""
    with pytest.raises(CheckpointError, match="num_heads=2"):
        tinymim.load_weights(make(num_heads=3), {"model": make().state_dict(), "meta": {"config": make().config}})


def test_head_count_of_a_foreign_file(tmp_path):
    torch.save({"model": make().state_dict()}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="--teacher-heads N"):
        model_from_checkpoint(tmp_path / "f.pth", option="--teacher-heads")
    assert model_from_checkpoint(tmp_path / "f.pth", num_heads=2)[0].num_heads == 2


@pytest.mark.parametrize(
    ("make_file", "words"),
    [
        (lambda: {"model": make(embed_dim=48, num_heads=2).state_dict()}, "width 48"),
        (lambda: {"model": make(depth=3).state_dict()}, "3 blocks"),
        (lambda: {"model": make(patch_size=8).state_dict()}, "patch 8"),
        (
            lambda: {"model": {"layer1.0.conv1.weight": torch.zeros(3, 3, 1, 1)}},
            "a model that this reader does not know",
        ),
        (lambda: {"epoch": 3}, "no tensors"),
    ],
)
def test_wrong_model(tmp_path, make_file, words):
    """Nothing that fits, another width, depth or patch: an error that says what the file looks like."""
    torch.save(make_file(), tmp_path / "x.pth")
    model = make(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        tinymim.load_weights(model, tmp_path / "x.pth")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Bomb:
    """Pickles to a call that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_mmengine_checkpoint(tmp_path):
    """An iter_N.pth as MMEngine writes it: history buffers, numpy scalars, bound functions; still only tensors."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    source = make()
    hub = {"loss": HistoryBuffer([1.0, 2.0], [1, 1]), "lr": np.float64(0.1), "array": np.ones(3)}
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()}
    torch.save({"state_dict": state, "message_hub": hub, "meta": {"iter": 3}}, tmp_path / "iter_3.pth")
    model = make(1)
    tinymim.load_weights(model, tmp_path / "iter_3.pth")
    assert_same(model, source)


def test_nothing_in_a_file_runs(tmp_path):
    source = make()
    torch.save({"model": source.state_dict(), "args": Bomb(tmp_path / "boom")}, tmp_path / "evil.pth")
    model = make(1)
    tinymim.load_weights(model, tmp_path / "evil.pth")
    assert_same(model, source)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2])])
def test_damaged_files(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "bad.pth")
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "absent.pth")


def test_truncated_file(tmp_path):
    save_student(make(), tmp_path / "s.pth", {})
    (tmp_path / "s.pth").write_bytes((tmp_path / "s.pth").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"damaged|no checkpoint"):
        read_checkpoint(tmp_path / "s.pth")
