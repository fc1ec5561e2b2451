"""TinyMIM's targets in a store: compact forms, the commands that write, check and train from them, refusals."""

import json
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tinymim.cli import main
from tinymim.distill.compact import DEFAULT, Entry, components, entries_of, pack, parse_form, plan_entries, unpack
from tinymim.distill.method import renormalisation
from tinymim.distill.relation_targets import relation_targets
from tinymim.distill.relations import relation_kl, relation_logits, relation_losses
from tinymim.distill.sources import LiveTeacher, TargetSource
from tinymim.distill.stored_logits import StoredLogits
from tinymim.distill.stored_relations import StoredRelations
from tinymim.distill.targets import parse_target
from tinymim.errors import ConfigError, DataError
from tinymim.models.teachers import load_teacher
from tinymim.store.targets import TargetStore

B, T, D, H = 3, 17, 64, 2
RECIPE = "tinymim_tiny_small_data"
FORM = "4x8+12x4"  # a head of the small teacher has 32 channels
STUDENT = "student_args.depth=2 student_args.embed_dim=32 student_args.num_heads=2 precision=fp32"
Setting = namedtuple("Setting", "photos weights store")


def tokens(seed=0, batch=B):
    """q, k, v with a decaying spectrum, as those of trained models."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=draw) * 0.85 ** torch.arange(D)
    return {name: torch.randn(batch, T, D, generator=draw) @ mixing.T for name in "qkv"}


def through(words, form, taps, *, softmax=True):
    """Taps that were encoded and decoded for some targets at block 3, and the bytes of a view."""
    targets = [parse_target(word, 3, 2) for word in words]
    entries = plan_entries(targets, form, tokens=T, width=D, heads=H, centred=softmax)
    kept = {name: value for entry in entries for name, value in entry.encode(taps).items()}
    arrays = [array for entry in entries for array in entry.arrays()]
    assert {a.name: (str(kept[a.name].dtype)[6:], tuple(kept[a.name].shape[1:])) for a in arrays} == {
        a.name: (a.dtype, a.shape) for a in arrays
    }
    return {k: v for entry in entries for k, v in entry.decode(kept).items()}, sum(a.bytes for a in arrays), entries


@pytest.mark.parametrize("parts", [[(4, 8)], [(4, 4), (8, 2)], [(2, 8), (6, 4), (4, 2)]])
def test_codes_of_any_width_are_packed(parts):
    most = torch.cat([torch.full((count,), 2**bits - 1) for count, bits in parts])
    codes = (torch.rand(5, 3, len(most)) * (most + 1)).floor().to(torch.uint8)
    packed = pack(codes, parts)
    assert packed.shape[-1] == sum(count * bits for count, bits in parts) // 8
    assert torch.equal(unpack(packed, parts), codes.float())


@pytest.mark.parametrize("centred", [True, False])
def test_components_are_the_best_of_their_number(centred):
    q, k = (x.unflatten(2, (H, -1)).transpose(1, 2) for x in (tokens()["q"], tokens()["k"]))
    wanted = q @ (k - k.mean(2, keepdim=True) * centred).mT
    for rank in (5, 32):
        a, b = components(q, k, rank, centred=centred)
        s = torch.linalg.svdvals(wanted)
        torch.testing.assert_close(
            (a @ b.mT - wanted).norm(dim=(2, 3)), s[..., rank:].norm(dim=-1), rtol=1e-3, atol=1e-2
        )
    (f,) = components(q, None, 5, centred=centred)
    rest = torch.linalg.svdvals(q @ q.mT)[..., 5:].norm(dim=-1)
    torch.testing.assert_close((f @ f.mT - q @ q.mT).norm(dim=(2, 3)), rest, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("form", "most"), [("fp16", 1e-3), ("int8", 5e-3), ("32x8", 5e-3), ("4x8+28x4", 4e-2)])
@pytest.mark.parametrize("words", [["qk+vv"], ["qq+kk+vv"], ["qk+qq+vv"]])
def test_relations_and_gradients_survive(form, most, words):
    taps, student = tokens(), {k: v[..., :32].clone().requires_grad_() for k, v in tokens(1).items()}
    kept, size, entries = through(words, form, taps)
    if words == ["qk+qq+vv"] and "x" in form:  # q is in two relations, k in one with it
        assert {entry.form for entry in entries if {*entry.taps} & {*"qk"}} == {"int8"}
    assert size < 3 * T * D * 2 * 1.01
    pairs = words[0].split("+")
    for pair in pairs:
        scores = (relation_logits(of[pair[0]], of[pair[1]], H) for of in (kept, taps))
        assert relation_kl(*scores) < most
    grads = []
    for given in (taps, kept):
        loss = sum(relation_losses(student, given, H, pairs).values())
        grads.append((loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, [student["q"]])])))
    assert grads[1][0] == pytest.approx(grads[0][0], rel=most)
    assert torch.cosine_similarity(grads[0][1].double(), grads[1][1].double(), 0) > 1 - most


def test_scores_without_softmax_and_features_are_kept_whole():
    kept, _, _ = through(["qk+vv"], "32x8", tokens(), softmax=False)
    wanted = relation_logits(tokens()["q"], tokens()["k"], H)
    assert (relation_logits(kept["q"], kept["k"], H) - wanted).abs().max() < 0.02 * wanted.abs().max()
    taps = {**tokens(), "output": tokens(2)["q"]}
    kept, _, entries = through(["vv", "output", "class_token"], "8x4", taps)
    assert [(e.taps, e.form, e.tokens) for e in entries] == [(("v",), "8x4", T), (("output",), "int8", T)]
    assert (kept["output"] - taps["output"]).norm() < 0.01 * taps["output"].norm()
    kept, size, entries = through(["class_token"], "8x4", taps)
    assert kept["output"].shape == (B, 1, D)
    assert size == D + 2 * H * 2
    kept, _, _ = through(["qk", "q" + "kv"], "8x4", taps)
    assert all((kept[name] - taps[name]).norm() < 0.01 * taps[name].norm() for name in "qkv")


def test_constant_tokens_and_few_tokens_are_kept():
    taps = {name: torch.zeros(B, T, D) for name in "qk"} | {"v": torch.full((B, T, D), 3.0)}
    kept, _, _ = through(["qk+vv"], "32x8", taps)
    assert all(torch.isfinite(x).all() for x in kept.values())
    scores = relation_logits(kept["v"], kept["v"], H)
    torch.testing.assert_close(scores, relation_logits(taps["v"], taps["v"], H), rtol=2e-3, atol=0.05)


def test_a_whole_form_has_no_components():
    (entry,) = plan_entries([parse_target("output", 3, 2)], "fp16", tokens=T, width=D, heads=H, centred=True)
    assert entry.parts == []


@pytest.mark.parametrize("form", ["4x3", "3x4", "8", "int2", "", "0x8", "4x8+", "8x8+3x2"])
def test_other_forms_are_refused(form):
    with pytest.raises(ConfigError, match="components x bits"):
        parse_form(form)


def test_more_components_than_channels_are_refused():
    with pytest.raises(ConfigError, match="a head of this teacher has 32 channels"):
        through(["vv"], "40x8", tokens())


# the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("relations")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(6):
        image = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((90, 70 + i))
        image.save(folder / "photos" / f"{i}.png")
    weights = write_teacher(folder / "t.safetensors", 0)
    made = Setting(folder / "photos", weights, folder / "store")
    assert cache(made) == 0
    return made


def write_teacher(path, seed):
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=0)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.25)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def cache(setting, *more, out=None, epochs=2):
    given = ["cache", "--recipe", RECIPE, "--teacher", "timm/test_vit", "--teacher-weights", setting.weights]
    given += ["--data", setting.photos, "--img-size", 64, "--epochs", epochs, "--form", FORM, "--workers", 0]
    given += ["--batch-size", 4, "--device", "cpu", "--out", out or setting.store]
    options = ["--cfg-options", "target_block=3", *STUDENT.split()]
    return main([str(word) for word in (*given, *options, *more)])


def distill(setting, out, *more, steps=3, options=""):
    given = ["distill", "--recipe", RECIPE, "--store", setting.store, "--data", setting.photos, "--teacher"]
    given += ["timm/test_vit", "--img-size", 64, "--batch-size", 6, "--max-steps", steps, "--device", "cpu"]
    given += ["--out", out, *more]
    words = f"target_block=3 {STUDENT} workers=0 watch_every=0 warmup_epochs=0 {options}".split()
    return main([str(word) for word in (*given, "--cfg-options", *words)])


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def live(setting):
    """The teacher of the store beside the student."""
    teacher = load_teacher("timm/test_vit", weights=setting.weights, grid=4)
    scale, shift = renormalisation((teacher.mean, teacher.std))
    source = LiveTeacher(teacher.model, align="image")
    return lambda images, wanted: source.read(images * scale + shift, wanted, (4, 4))


def test_the_header_says_what_is_kept(setting):
    store = TargetStore.open(setting.store)
    header = store.header
    assert header["kind"] == "relations"
    assert header["relations"]["targets"] == ["qk+vv@3"]
    assert header["relations"]["heads"] == 2
    assert header["teacher"]["name"] == "timm/test_vit"
    assert header["augmentation"]["img_size"] == 64
    assert header["augmentation"]["scale"] == [0.25, 1.0]
    assert header["augmentation"]["rand_augment"] is None
    assert store.layout.record_bytes == 4 + 3 * (17 * 2 * 10 + 2 * 2 * 16 * 2)
    source = StoredRelations(store)
    assert isinstance(source, TargetSource)
    assert source.entries == entries_of(header["relations"])
    assert source.entries[0] == Entry(3, ("q", "k"), FORM, 17, 64, 2, True)


def test_training_from_the_store_is_training_beside_the_teacher(setting, tmp_path, monkeypatch, capsys):
    """The real command, twice, on the same views; the second reads the live teacher in place of the records."""
    assert distill(setting, tmp_path / "stored", steps=4, options="color_jitter=0") == 0
    assert "each 2 times" in capsys.readouterr().out
    read = live(setting)
    monkeypatch.setattr(StoredRelations, "read", lambda self, images, wanted, grid, **_: read(images, wanted))
    assert distill(setting, tmp_path / "live", steps=4, options="color_jitter=0") == 0
    stored, beside = losses(tmp_path / "stored"), losses(tmp_path / "live")
    assert len(stored) == 4
    assert stored != beside
    np.testing.assert_allclose(stored, beside, rtol=0.02)


def test_the_students_colours_change_and_the_teachers_do_not(setting, tmp_path):
    assert distill(setting, tmp_path / "a", steps=1) == 0
    assert distill(setting, tmp_path / "b", steps=1, options="color_jitter=0") == 0
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_a_stopped_run_goes_on(setting, tmp_path):
    assert distill(setting, tmp_path / "a", steps=2, options="save_every=1") == 0
    assert distill(setting, tmp_path / "a", "--resume", steps=2, options="save_every=1") == 0
    assert len(losses(tmp_path / "a")) == 2


def test_a_plan_writes_nothing_and_check_says_the_tolerance(setting, tmp_path, capsys):
    assert cache(setting, "--plan", out=tmp_path / "s") == 0
    assert not (tmp_path / "s").exists()
    plan = capsys.readouterr().out
    assert "ImageNet-1k" in plan
    assert "1,408 bytes a view" in plan
    check = (
        f"cache --check --teacher-weights {setting.weights} --data {setting.photos} --out {setting.store} --workers 0"
    )
    assert main(check.split()) == 0
    said = capsys.readouterr().out
    assert "nats from its relations" in said
    line = next(line for line in said.splitlines() if line.startswith("next:"))
    assert "--teacher timm/test_vit" in line
    assert "--cfg-options target_block=3 student_args.depth=2" in plan
    assert "target_block=3" in line
    named = check.replace("--teacher-weights ", "--recipe tinymim_tiny_small_data --cfg-options teacher_weights=")
    assert main(named.split()) == 0  # a word of the recipe
    other = write_teacher(tmp_path / "other.safetensors", 1)
    assert main(check.replace(str(setting.weights), str(other)).split()) == 2
    assert "targets of another teacher" in capsys.readouterr().err
    assert main(["cache", "--out", str(setting.store)]) == 0
    assert "qk+vv@3 in 2 heads" in capsys.readouterr().out


def test_check_finds_changed_targets(setting, tmp_path, capsys):
    out = tmp_path / "s"
    assert cache(setting, out=out, epochs=1) == 0
    store = TargetStore.open(out)
    chunk = store.layout.at(0, 0)
    arrays = {name: value.copy() for name, value in store.read(chunk).items()}
    arrays["b3_v"][2] = arrays["b3_v"][3]
    store.place.write(chunk.name, store.layout.encode(chunk, arrays))  # with a checksum that fits
    check = f"cache --check --teacher-weights {setting.weights} --data {setting.photos} --out {out} --workers 0"
    assert main(check.split()) == 1
    assert "is not what timm/test_vit gives now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        (["--img-size", "32"], "", "img_size 64"),
        (["--targets", "qq+vv"], "", "does not hold qq@3"),
        ([], "target_block=2", "does not hold qk@2, vv@2"),
        ([], "crop_scale=[0.5,1.0]", "made with scale"),
        ([], "relation_heads=4", "relation_heads 2"),
        ([], "softmax=False", "softmax True"),
        ([], "align=tokens", "align image"),
        ([], "mask=both", "mask None"),
        (["--teacher", "timm/vit_base_patch16_224.mae"], "", "the teacher timm/test_vit"),
        (["--val-data", "PHOTOS"], "", "the store holds none of held-out photos"),
        (["--teacher", "timm/test_vit", "timm/test_vit2"], "", "several teachers"),
        (["--teacher-weights", "nowhere.pth"], "", "nowhere.pth"),
    ],
)
def test_other_runs_are_refused(more, options, message, setting, tmp_path, capsys):
    words = [str(setting.photos) if word == "PHOTOS" else word for word in more]
    assert distill(setting, tmp_path / "r", *words, options=options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "fix:" in said
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--topk", "5"], "--topk and --recipe"),
        (["--mixup", "0.8"], "--mixup and --recipe"),
        (["--form", "40x8"], "a head of this teacher has 32 channels"),
        (["--form", "4x3"], "components x bits"),
        (["--cfg-options", "mask=both"], "mask=both and a store"),
        (["--cfg-options", "teacher_drop_path=0.1"], "teacher_drop_path"),
        (["--recipe", "mae_tiny"], "mae_tiny"),
        (["--form", "8x8"], "is another store"),
        (["--targets", "vv"], "is another store"),
    ],
)
def test_other_stores_are_refused(more, message, setting, capsys):
    capsys.readouterr()
    assert cache(setting, *more) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "fix:" in said


def test_other_methods_are_refused():
    with pytest.raises(ConfigError, match="the method dmae"):
        relation_targets(SimpleNamespace(name="dmae"), 64, DEFAULT)


def test_relations_need_a_recipe_and_logits_none(setting, tmp_path, capsys):
    words = f"cache --teacher timm/test_vit --data {setting.photos} --form int8 --out {tmp_path / 's'}"
    assert main(words.split()) == 2
    assert "--form" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no logits"):
        StoredLogits(TargetStore.open(setting.store))
    assert parse_form(DEFAULT)
