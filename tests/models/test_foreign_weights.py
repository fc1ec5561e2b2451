"""The one door of weights: wrappers, averages, head counts, parts we lack, Hugging Face's names, hostile files."""

import io
import json
import struct
import zipfile

import pytest
import torch

import tinymim
from tests.models.test_checkpoints import SIZE, assert_same, make
from tinymim.errors import CheckpointError, TinyMIMError
from tinymim.models import ViT, model_from_checkpoint, read_checkpoint, save_student
from tinymim.models.position import resize_position
from tinymim.models.teachers import load_teacher

QKV = "blocks.0.attn.qkv.weight"
STATE = make().state_dict()
PREFIXES = [
    *("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "model.backbone."),
    *(
        "net.",
        "student.",
        "encoder.",
        "backbone.module.",
        "visual.trunk.",
        "module.model.encoder._orig_mod.",
        "a.b.c.d.",
    ),
]


@pytest.mark.parametrize("outer", [(), ("state_dict",), ("checkpoint", "model_state_dict")])
def test_prefixes_in_any_order_and_depth(outer):
    for prefix in PREFIXES:
        content = {f"{prefix}{k}": v for k, v in STATE.items()} | {"head.weight": torch.ones(2, 24)}
        for name in reversed(outer):
            content = {name: content, "epoch": 3}
        model = make(1)
        report = tinymim.load_weights(model, content, say=False)
        assert_same(model, make())
        assert not report.missing, prefix


def test_wrappers_inside_names():
    """torch.compile, FSDP and checkpointing of single blocks."""
    inner = {k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod."): v for k, v in STATE.items()}
    model = make(1)
    tinymim.load_weights(model, inner, say=False)
    assert_same(model, make())
    with pytest.raises(CheckpointError, match="twice"):
        tinymim.load_weights(model, STATE | {f"module.{QKV}": STATE[QKV]})


EMA = {k: v + 1 for k, v in STATE.items()}
DEEPER = make(depth=3).state_dict()


@pytest.mark.parametrize(
    ("content", "wanted", "said"),
    [
        ({"model": STATE, "model_ema": EMA}, STATE, "part='model_ema'"),
        ({"state_dict_ema": EMA, "state_dict": STATE}, STATE, "not their moving average"),
        ({"state_dict": STATE, "ema_state_dict": {f"module.{k}": v for k, v in EMA.items()}}, STATE, "ema_state_dict"),
        (
            {**{f"model.{k}": v for k, v in STATE.items()}, **{f"ema_model.{k}": v for k, v in EMA.items()}},
            STATE,
            "ema",
        ),
        ({"encoder": STATE, "target_encoder": EMA}, STATE, "target_encoder"),
        ({"state_dict_ema": EMA}, EMA, "averaged weights"),
        ({"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in EMA.items()}}, EMA, ""),
        ({"student": STATE, "teacher": {f"backbone.{k}": v for k, v in EMA.items()}}, EMA, "DINO"),
        (
            {f"student.{k}": v for k, v in STATE.items()} | {f"teacher.{k}": v for k, v in DEEPER.items()},
            STATE,
            "teacher",
        ),
    ],
)
def test_several_encoders_in_a_file(content, wanted, said, capsys):
    """One is chosen, which one and why is printed, and the other can be named."""
    model = make(1)
    report = tinymim.load_weights(model, content)
    assert all(torch.equal(model.state_dict()[key], wanted[key]) for key in wanted)
    assert any(said in note for note in report.notes)
    assert said in capsys.readouterr().out


def test_a_part_can_be_asked_for():
    content = {"model": STATE, "model_ema": EMA}
    assert torch.equal(read_checkpoint(content, part="model_ema").state[QKV], EMA[QKV])
    with pytest.raises(CheckpointError, match="it has model, model_ema"):
        read_checkpoint(content, part="nothing")


def test_an_untold_head_count_is_said(tmp_path, capsys):
    """Weights do not show it: 12 heads would load into 3 and compute something else."""
    file = tmp_path / "mae_lite.pth"
    torch.save({"model": ViT(img_size=32, depth=1, num_heads=12).state_dict()}, file)
    tinymim.create_model("tinymim_vit_tiny", img_size=32, depth=1, checkpoint=file)
    assert "does not tell its head count: 3 heads per block" in capsys.readouterr().out
    torch.save({"model": torch.load(file)["model"], "args": {"model": "mae_vit_tiny_patch16"}}, file)
    model = tinymim.create_model("tinymim_vit_tiny", img_size=32, depth=1, checkpoint=file)
    assert "num_heads=12" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="--teacher-heads 12"):
        load_teacher(str(file))
    tinymim.create_model("tinymim_vit_tiny", img_size=32, depth=1, num_heads=12, checkpoint=file)
    save_student(model, tmp_path / "ours.pth")
    tinymim.load_weights(model, tmp_path / "ours.pth")
    assert "head count" not in capsys.readouterr().out


def test_the_grid_is_the_positions_own():
    """14 x 14 and 7 x 28 have as many patches; what varies smoothly is the grid."""
    square, wide = make(img_size=224), make(1, img_size=(112, 448))
    report = tinymim.load_weights(wide, square.state_dict(), say=False)
    assert report.resized == ["pos_embed"]
    assert torch.equal(wide.pos_embed, resize_position(square.pos_embed, (14, 14), (7, 28), 1))
    again = make(2, img_size=(112, 448))
    assert tinymim.load_weights(again, make(3, img_size=(112, 448)).state_dict(), say=False).resized == []


ONES = torch.ones(24)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.0.ls1.gamma": ONES}, "layer scale"),
        ({"blocks.0.gamma_1": ONES}, "layer scale"),
        ({"blocks.0.attn.q_norm.weight": ONES}, "normalised queries and keys"),
        ({"reg_token": torch.ones(1, 4, 24)}, "register tokens"),
        ({"norm_pre.weight": ONES}, "a norm before its blocks"),
        ({"rope.freqs": ONES}, "rotary"),
        ({"blocks.0.mlp.w12.weight": ONES}, "SwiGLU"),
        ({"blocks.0.attn.norm.weight": ONES}, "further norms"),
        ({"blocks.1.norm3.weight": ONES}, "further norms"),
        ({"blocks.0.attn.rel_pos_h": ONES}, "relative positions"),
        ({"blocks.0.attn.relative_position_bias_table": torch.ones(52, 2)}, "rel_pos_bias=True"),
        ({"patch_embed.norm.weight": ONES}, "another patch embedding"),
        ({"blocks.0.other.weight": ONES}, "other parts"),
        ({"cls_token": None}, "the file has none"),
        ({"blocks.1.attn.qkv.bias": None}, "biases"),
        ({"blocks.1.norm2.weight": None}, "the file has none"),
        ({"patch_embed.proj.weight": None}, "the file has none"),
    ],
)
def test_parts_on_one_side_only_are_refused_by_name(change, said):
    state = {k: v for k, v in (STATE | change).items() if v is not None}
    model = make(1)
    with pytest.raises(CheckpointError) as error:
        tinymim.load_weights(model, state)
    assert said in str(error.value)
    assert_same(model, make(1))


def test_blocks_without_biases_of_qkv_are_loaded_right():
    source = make()
    with torch.no_grad():
        for block in source.blocks:
            block.attn.qkv.bias.zero_()
    model = make(1)
    report = tinymim.load_weights(model, {k: v for k, v in source.state_dict().items() if "qkv.bias" not in k})
    assert_same(model, source)
    assert any("set to zero" in note for note in report.notes)


def hugging_face(model, style):
    """Our tensors under the names of transformers 5.24."""
    words = {
        "patch_embed.proj.": "embeddings.patch_embeddings." + ("" if style == "dinov3" else "projection."),
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "blocks.": "layer." if style == "dinov3" else "encoder.layer.",
        "attn.proj.": "attention.o_proj." if style == "dinov3" else "attention.output.dense.",
        ".ls1.gamma": ".layer_scale1.lambda1",
        ".ls2.gamma": ".layer_scale2.lambda1",
    }
    if style == "vit":
        words |= {".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after."}
        words |= {".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense."}
    if style == "dinov3":
        words |= {".mlp.fc1.": ".mlp.up_proj.", ".mlp.fc2.": ".mlp.down_proj."}
    out = {}
    for key, value in model.state_dict().items():
        new = "layernorm." + key.removeprefix("norm.") if key.startswith("norm.") and style != "dinov3" else key
        for ours, theirs in words.items():
            new = new.replace(ours, theirs)
        if ".attn.qkv." in new:
            names = ("q_proj", "k_proj", "v_proj") if style == "dinov3" else ("query", "key", "value")
            inner = "attention." if style == "dinov3" else "attention.attention."
            for name, part in zip(names, value.chunk(3), strict=True):
                if not (style == "dinov3" and new.endswith("bias") and name == "k_proj"):
                    out[new.replace("attn.qkv.", f"{inner}{name}.")] = part.clone()
        else:
            out[new] = value
    return out


@pytest.mark.parametrize(("style", "prefix", "suffix"), [("vit", "vit.", "safetensors"), ("dinov2", "", "bin")])
def test_folders_of_hugging_face(tmp_path, style, prefix, suffix):
    """ViTMAE and DINOv2: the folder, its file, heads from config.json; a config that does not fit is refused."""
    from safetensors.torch import save_file

    source = make(init_values=0.3 if style == "dinov2" else None)
    state = {f"{prefix}{k}": v for k, v in hugging_face(source, style).items()}
    state |= {"decoder.decoder_embed.weight": ONES} if style == "vit" else {"embeddings.mask_token": torch.ones(1, 24)}
    file = tmp_path / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin")
    save_file(state, file, {"format": "pt"}) if suffix == "safetensors" else torch.save(state, file)
    config = {"num_attention_heads": 2, "hidden_size": 24, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    for path in (tmp_path, file):
        model, _ = model_from_checkpoint(path, say=False)
        assert_same(model, source)
        assert model.num_heads == 2
    for change in (dict(hidden_act="quick_gelu"), dict(num_attention_heads=5), dict(hidden_size=48)):
        (tmp_path / "config.json").write_text(json.dumps(config | change), "utf-8")
        with pytest.raises(CheckpointError):
            model_from_checkpoint(tmp_path)


def test_hugging_faces_dinov3_is_read_by_timm_alone(tmp_path, monkeypatch):
    """Rotary positions and registers: refused as a plain model; its tensors reach timm's DINOv3."""
    import timm

    from tinymim.models import teachers

    source = make(init_values=0.3)
    with torch.no_grad():
        for block in source.blocks:
            block.attn.qkv.bias[24:48] = 0
    state = hugging_face(source, "dinov3") | {"embeddings.register_tokens": torch.ones(1, 4, 24)}
    del state["embeddings.position_embeddings"]
    torch.save(state, tmp_path / "f.bin")
    with pytest.raises(CheckpointError, match="register tokens"):
        load_teacher(str(tmp_path / "f.bin"), num_heads=2)
    real = timm.create_model
    small = dict(embed_dim=24, depth=2, num_heads=2)
    monkeypatch.setattr(teachers.timm, "create_model", lambda n, **more: real(n, **{**more, **small}))
    taught = load_teacher("timm/vit_small_patch16_dinov3_qkvb", weights=tmp_path / "f.bin", img_size=64).model
    assert torch.equal(taught.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(taught.blocks[0].attn.q_bias, source.blocks[0].attn.qkv.bias[:24])
    with pytest.raises(CheckpointError, match="_qkvb"):
        load_teacher("timm/vit_small_patch16_dinov3", weights=tmp_path / "f.bin", img_size=64)


def meta(**config):
    return {"model": STATE, "meta": {"config": make().config | config}}


HOSTILE = [
    *(meta(depth=value) for value in (10**9, 999, -1, 2.0, "2", True, 10**400)),
    *(meta(embed_dim=value) for value in (10**9, 0, 60000)),
    *(meta(num_heads=value) for value in (0, -2, "2", [1.5])),
    *(meta(img_size=value) for value in (10**6, (65536, 65536), 48, None, [64], "big")),
    *(meta(mlp_ratio=value) for value in (float("nan"), 1e9, -1)),
    meta(last_dim=60000),
    meta(patch_size=0),
    meta(name=5),
    meta(name="nothing"),
    meta(name="tiny_vit_5m_224", depths=[10**4] * 4),
    *({"model": STATE, "meta": {"config": make().config, **extra}} for extra in ({"mean": [1]}, {"std": [0, 1, 1]})),
    {"model": STATE, "meta": {"config": make().config, "relations": [1, "x"]}},
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_file_says_of_itself_is_checked(content, tmp_path):
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(TinyMIMError):
        model_from_checkpoint(tmp_path / "f.pth", say=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w * float("nan"), "NaN"),
        (lambda w: w.int(), "int32"),
        (lambda w: w.to(torch.float8_e4m3fn), "float8"),
        (lambda w: w.to("meta"), "without values"),
        (lambda w: w.to_sparse(), "sparse"),
        (lambda w: w + 0j, "complex"),
        (lambda w: w.tolist(), "the file has none"),
        (lambda w: torch.zeros(1).expand(10**6, 10**6), "claims more values"),
    ],
)
def test_tensors_that_are_no_weights(change, said, tmp_path):
    torch.save({"model": STATE | {QKV: change(STATE[QKV])}}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=said):
        tinymim.load_weights(make(1), tmp_path / "f.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_of_weights(dtype):
    model = make(1)
    tinymim.load_weights(model, {k: v.to(dtype) for k, v in STATE.items()}, say=False)
    torch.testing.assert_close(model.cls_token, STATE["cls_token"], atol=1e-2, rtol=1e-2)


class Allocates:
    def __reduce__(self):
        return (bytearray, (10**11,))


def archives(folder):
    """(name, bytes, what the error says)"""
    save_student(make(), folder / "ok.pth")
    ok = (folder / "ok.pth").read_bytes()
    bomb, header = io.BytesIO(), json.dumps({"a": {"dtype": "F32", "shape": [9**9], "data_offsets": [0, 4]}}).encode()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out, zipfile.ZipFile(io.BytesIO(ok)) as source:
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
        out.writestr("archive/data/0", bytes(2**26))
    script, pickled, legacy, whole = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), script)
    torch.save({"model": STATE, "x": Allocates()}, pickled)
    torch.save({"model": STATE, "x": Allocates()}, legacy, _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(1, 1), whole)
    yield from [("cut.pth", ok[: len(ok) // 2], "damaged"), ("bomb.pth", bomb.getvalue(), "claims")]
    yield from [("program.pth", script.getvalue(), "TorchScript"), ("whole.pth", whole.getvalue(), "pickled model")]
    yield from [("new.pth", pickled.getvalue(), "bytearray"), ("old.pth", legacy.getvalue(), "bytearray")]
    yield from [("x.onnx", b"\x08\x08", "ONNX"), ("x.pth", b"<html>", "text"), ("x.bin", b"", "empty")]
    yield from [("lfs.pth", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), ("x.npz", b"PK", "NumPy")]
    yield "big.safetensors", struct.pack("<Q", len(header)) + header + bytes(4), "damaged"


@pytest.mark.filterwarnings("ignore")
def test_files_that_are_no_checkpoints(tmp_path):
    for name, content, said in archives(tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            read_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    save_student(make(), tmp_path / "a.safetensors")
    (tmp_path / "renamed.pth").write_bytes((tmp_path / "a.safetensors").read_bytes())
    assert model_from_checkpoint(tmp_path / "renamed.pth", say=False)[0].config["embed_dim"] == SIZE["embed_dim"]


def test_damaged_student_files(tmp_path):
    """Seeded changes of bytes: read as before, or an error of ours; never another one."""
    import random

    save_student(make(), tmp_path / "a.pth")
    save_student(make(), tmp_path / "a.safetensors")
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for i in range(60):
        good = tmp_path / ("a.pth", "a.safetensors")[i % 2]
        content = bytearray(good.read_bytes())
        for _ in range(rng.choice((1, 5, 40))):
            content[rng.choice((rng.randrange(2000), -rng.randrange(1, 3000)))] = rng.randrange(256)
        bad = tmp_path / f"bad{good.suffix}"
        bad.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            model_from_checkpoint(bad, say=False)
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 30
