"""Swin and Hiera as timm runs them, whole and masked; their masked autoencoders against a plain re-computation."""

import pytest
import timm
import torch
import torch.nn.functional as F

import tinymim
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import hiera, save_student, swin
from tinymim.models.draws import rows_of
from tinymim.models.masked_hierarchical import HieraMAE, SimMIM, stored_mask_token
from tinymim.models.teachers import load_teacher

HIERA = dict(embed_dim=16, stages=(1, 2, 2, 1))
SWIN = dict(embed_dim=12, depths=(1, 2, 2, 2), num_heads=(1, 2, 2, 4))
SWIN_T = "swin_tiny_patch4_window7_224"
DECODER = dict(decoder_dim=24, decoder_depth=1, decoder_heads=2)


def model(name, size=(96, 64), **more):
    torch.manual_seed(0)
    return tinymim.create_model(name, img_size=size, **{**(SWIN if name.startswith("swin") else HIERA), **more})


def images(count=2, size=(96, 64)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "size"), [(SWIN_T, (224, 224)), (SWIN_T, (64, 160)), ("swin_s3_tiny_224", (96, 160))])
def test_swin_is_timms_at_any_size(name, size):
    """Windows and shifts of the size it was built for, whatever it is shown."""
    ours = model(name, size).eval()
    theirs = timm.create_model(name, num_classes=0, img_size=size, strict_img_size=False, **SWIN).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for shown in (size, (96, 160), (60, 100)):
        with torch.no_grad():
            pairs = (m.forward_intermediates(images(1, shown), intermediates_only=True) for m in (ours, theirs))
            for a, b in zip(*pairs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_swin_of_another_size_takes_the_tables(tmp_path):
    """Windows of our own files, square or not; the authors' names and buffers; a Swin of other heads is refused."""
    student = model(SWIN_T, (96, 160))
    assert {tuple(block.window_size) for block in swin.blocks_of(student)} == {(7, 7), (6, 7), (3, 5)}
    save_student(student, tmp_path / "student.pth")
    larger = model(SWIN_T, (224, 224))
    resized = tinymim.load_weights(larger, tmp_path / "student.pth", say=False).resized
    assert resized == [f"layers.{i}.blocks.{j}.attn.{swin.TABLE}" for i in (2, 3) for j in (0, 1)]
    again = model(SWIN_T, (96, 160)).eval()
    tinymim.load_weights(again, tmp_path / "student.pth", say=False)
    with torch.no_grad():
        assert torch.equal(again(images(1, (70, 90))), student.eval()(images(1, (70, 90))))

    theirs = {}
    for key, value in student.state_dict().items():
        stage = int(key.split(".")[1]) if ".downsample." in key else None
        theirs[key if stage is None else key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")] = value
    theirs |= {
        "norm.weight": torch.ones(96),
        "head.weight": torch.ones(5, 96),
        "layers.1.blocks.1.attn_mask": torch.ones(1),
    }
    theirs |= {"layers.0.blocks.0.attn.relative_position_index": torch.ones(49, 49)}
    official = {
        "model": {f"encoder.{key}": value for key, value in theirs.items()} | {"decoder.0.weight": torch.ones(1)}
    }
    fresh = model(SWIN_T, (96, 160))
    for parameter in fresh.parameters():
        parameter.data.zero_()
    report = tinymim.load_weights(fresh, official, say=False)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), student.state_dict().values(), strict=True)
    )
    assert "decoder.0.weight" in report.dropped
    with pytest.raises(CheckpointError, match="does not fit"):
        tinymim.load_weights(model(SWIN_T, (96, 160), num_heads=(1, 2, 4, 4)), tmp_path / "student.pth", say=False)
    with pytest.raises(CheckpointError, match=r"layers\.2\.blocks\.1"):  # a deeper one is not loaded in part
        tinymim.load_weights(model(SWIN_T, (96, 160), depths=(1, 2, 1, 2)), student.state_dict(), say=False)


@pytest.mark.parametrize("name", ["hiera_tiny_224", "hiera_small_abswin_256"])
@pytest.mark.parametrize("q_pool", [1, 2, 3])
def test_masked_hiera_is_timms(name, q_pool):
    ours = model(name, (96, 128)).eval()
    theirs = timm.create_model(name, num_classes=0, img_size=(96, 128), q_pool=q_pool, **HIERA).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    keep = torch.stack([torch.tensor([1, 4, 7, 8, 11]), torch.tensor([0, 2, 5, 9, 10])])
    mask = torch.zeros(2, 12, dtype=torch.bool).scatter(1, keep, True)
    seen = []
    sdpa = F.scaled_dot_product_attention
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.append((q, k)) or sdpa(q, k, v))
        _, wanted = theirs.forward_features(images(2, (96, 128)), mask=mask, return_intermediates=True)
        captured = list(seen)
        maps, found = hiera.run_masked(ours, images(2, (96, 128)), keep, q_pool, wanted=(2, 6))
    for a, b in zip(maps, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for block, mine in found.items():
        for a, b in zip(mine, captured[block - 1], strict=True):  # theirs: (B, heads, windows, tokens, channels)
            flat = b.transpose(1, 2).flatten(0, 1) if b.ndim == 5 else b
            torch.testing.assert_close(a, flat, rtol=1e-4, atol=1e-5)
        q, k, windowed = hiera.tokens_seen(ours, block, q_pool)
        assert windowed == (len(mine[0]) > 2)
        assert mine[0].shape[2] * len(mine[0]) == q * 5 * 2
        assert mine[1].shape[2] * len(mine[1]) == k * 5 * 2
    with torch.no_grad():  # the teacher's pass, which stops there
        _, early = hiera.run_masked(ours, images(2, (96, 128)), keep, q_pool, wanted=(2,), whole=False)
    assert all(torch.equal(a, b) for a, b in zip(early[2], found[2], strict=True))


def test_a_hiera_that_pools_less_tells_its_strides():
    ours = model("hiera_tiny_224", q_pool=2).eval()
    assert [stage.stride for stage in ours.stage_info] == [4, 8, 16, 16]
    assert ours(images(1, (50, 70))).shape == (1, 128, 4, 5)


def test_hiera_mae_against_a_plain_recomputation():
    """As Meta's code computes it: units as a grid of squares, one place after the other."""
    mae = HieraMAE(model("hiera_tiny_224"), mask_ratio=0.4, **DECODER).eval()
    x, order = images(), torch.stack([torch.tensor([4, 0, 5, 2, 1, 3]), torch.tensor([1, 3, 2, 0, 5, 4])])
    visible = order[:, :3]
    theirs = timm.create_model("hiera_tiny_224", num_classes=0, img_size=(96, 64), q_pool=2, **HIERA).eval()
    theirs.load_state_dict(mae.encoder.state_dict(), strict=False)
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, visible, True)
    losses = []
    with torch.no_grad():
        _, maps = theirs.forward_features(x, mask=mask, return_intermediates=True)
        for b in range(2):
            canvas = mae.mask_token.expand(1, 24, -1).reshape(6, 4, 24).clone()  # rows and columns of 16 pixels
            for place, unit in enumerate(sorted(visible[b].tolist())):
                fused = maps[-1][b, place]
                for head, fine in zip(mae.multi_scale_fusion_heads, maps, strict=False):
                    fused = fused + head(fine[b, place].permute(2, 0, 1)[None])[0].permute(1, 2, 0)
                r, c = 2 * (unit // 2), 2 * (unit % 2)
                canvas[r : r + 2, c : c + 2] = mae.decoder_embed(mae.encoder_norm(fused))
            tokens = canvas.reshape(1, 24, 24) + mae.decoder_pos_embed
            for block in mae.decoder_blocks:
                tokens = block(tokens, (6, 4))
            pred = mae.decoder_pred(mae.decoder_norm(tokens))[0].reshape(6, 4, -1)
            for r in range(6):
                for c in range(4):
                    if (r // 2) * 2 + c // 2 in visible[b].tolist():
                        continue
                    target = x[b, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].flatten()
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                    losses.append((pred[r, c] - target).square().mean())
        found = mae.losses(x, order)
    torch.testing.assert_close(found["pixel"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    assert found["loss"] is found["pixel"]


def test_simmim_against_a_plain_recomputation():
    """Tokens replaced one by one; absolute error of masked pixels alone."""
    mim = SimMIM(model(SWIN_T), mask_ratio=0.6).eval()
    x, order = images(), torch.stack([torch.tensor([4, 0, 5, 2, 1, 3]), torch.tensor([1, 3, 2, 0, 5, 4])])
    theirs = timm.create_model(SWIN_T, num_classes=0, img_size=(96, 64), **SWIN).eval()
    theirs.load_state_dict(mim.encoder.state_dict(), strict=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for b in range(2):
            tokens = theirs.patch_embed(x[b : b + 1])
            hidden = order[b, 2:].tolist()  # ceil(0.6 * 6) = 4 of 6
            for unit in hidden:
                r, c = 8 * (unit // 2), 8 * (unit % 2)
                tokens[0, r : r + 8, c : c + 8] = mim.encoder.mask_token[0, 0]
            pred = mim.decoder(mim.norm(theirs.layers(tokens)).permute(0, 3, 1, 2))[0]
            for unit in hidden:
                r, c = 32 * (unit // 2), 32 * (unit % 2)
                total += float((pred - x[b])[:, r : r + 32, c : c + 32].abs().sum())
                count += 3 * 32 * 32
        found = mim.losses(x, order)
    assert float(found["pixel"]) == pytest.approx(total / count, rel=1e-5)


def autoencoder(name, **more):
    return HieraMAE(model(name), **DECODER, **more) if name.startswith("hiera") else SimMIM(model(name), **more)


@pytest.mark.parametrize("name", ["hiera_tiny_224", SWIN_T])
def test_masked_pixels_are_not_seen(name):
    """They change the target, and nothing that is compared with it."""
    whole = autoencoder(name).eval()
    order, block = torch.arange(6)[None], whole.encoder.depth
    changed = images(1)
    changed[:, :, 64:] += torch.randn(3, 32, 64)  # the last two units
    with torch.no_grad():
        a, b = (whole.read(x, order, {block}) for x in (images(1), changed))
    assert all(torch.equal(mine, other) for mine, other in zip(a[1][block], b[1][block], strict=True))
    assert not torch.equal(a[0], b[0])


@pytest.mark.parametrize("name", ["hiera_tiny_224", SWIN_T])
def test_every_parameter_learns_and_recomputing_changes_nothing(name):
    """DistributedDataParallel waits for all gradients; so it does with gradient checkpointing."""
    plain, saving = autoencoder(name).train(), autoencoder(name).train()
    saving.load_state_dict(plain.state_dict())
    saving.encoder.set_grad_checkpointing(True)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    for each in (plain, saving):
        each.losses(images(), order)["loss"].backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None, key
        torch.testing.assert_close(a.grad, b.grad, msg=key)


@pytest.mark.parametrize("name", ["hiera_tiny_224", SWIN_T])
def test_masks_follow_a_photos_place_in_the_batch(name):
    whole = autoencoder(name)
    torch.manual_seed(3)
    order = whole.draw(images(4))
    assert order.sort(1).values.tolist() == [[*range(6)]] * 4
    torch.manual_seed(3)
    with rows_of(2, 2, 4):
        assert torch.equal(whole.draw(images(4)[2:]), order[2:])


def test_a_photo_of_another_size_than_the_decoders():
    mae = HieraMAE(model("hiera_tiny_224"), **DECODER)
    assert mae.losses(images(1, (64, 128)))["loss"].isfinite()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HieraMAE(model("hiera_tiny_224", (96, 80))), "96 x 80 pixels cannot be masked by units of 32"),
        (lambda: HieraMAE(model("hiera_tiny_224", (32, 32))), "at least two"),
        (lambda: HieraMAE(model("hiera_tiny_224"), q_pool=4), "q_pool=4"),
        (lambda: HieraMAE(model(SWIN_T)), "the student is a swin_tiny"),
        (lambda: HieraMAE(model("hiera_tiny_224"), decoder_dim=96, decoder_heads=5), "96 wide with 5 heads"),
        (lambda: model("hiera_tiny_224", num_heads=3), "block 1 of this Hiera has 3 heads and is 16 wide"),
        (lambda: HieraMAE(model("hiera_tiny_224"), **DECODER).losses(images(1, (96, 80))), "96 x 80"),
        (lambda: SimMIM(model("hiera_tiny_224")), "the student is a hiera_tiny"),
        (lambda: SimMIM(tinymim.create_model("tinymim_vit_tiny", img_size=64, depth=1)), "the student is a ViT"),
        (lambda: SimMIM(model(SWIN_T), mask_patch=16), "mask_patch=16"),
        (lambda: SimMIM(model(SWIN_T), mask_patch=64), "by units of 64"),
        (lambda: SimMIM(model(SWIN_T), decode_stage=5), "decode_stage=5"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.slow
def test_a_teacher_from_metas_file(tmp_path, capsys):
    """Named and run as timm's; decoder, norms and classifier are dropped and named."""
    named = model("hiera_tiny_224", (96, 96), embed_dim=96, stages=(1, 2, 7, 2)).state_dict()
    beside = HieraMAE(model("hiera_tiny_224"), **DECODER).state_dict()
    beside = {key: value for key, value in beside.items() if not key.startswith("encoder.")}
    torch.save({"model_state": {**named, **beside, "head.projection.bias": torch.ones(3)}}, tmp_path / "meta.pth")
    found = load_teacher("timm/hiera_tiny_224.mae", img_size=64, weights=tmp_path / "meta.pth")
    assert (found.model.img_size, found.model.depth, found.name) == ((64, 64), 12, "timm/hiera_tiny_224.mae")
    assert found.sha256
    assert not any(p.requires_grad for p in found.model.parameters())
    assert torch.equal(found.model.blocks[0].mlp.fc1.weight, named["blocks.0.mlp.fc1.weight"])
    said = capsys.readouterr().out
    assert f"({len(beside)} in all)" in said
    assert "resized: pos_embed" in said
    assert "unexpected" not in said
    with pytest.raises(CheckpointError, match="does not fit hiera_small_224"):
        tinymim.load_weights(model("hiera_small_224"), tmp_path / "meta.pth")
    with pytest.raises(ConfigError, match="did you mean"):
        load_teacher("timm/hiera_tiny_225", img_size=64, weights=tmp_path / "meta.pth")


def test_the_mask_token_is_in_the_students_file(tmp_path):
    mim = SimMIM(model(SWIN_T))
    save_student(mim.encoder, tmp_path / "student.pth")
    token = stored_mask_token(tmp_path / "student.pth", mim.encoder)
    assert torch.equal(token, mim.encoder.mask_token)
    found = load_teacher(str(tmp_path / "student.pth"), img_size=64).model  # other readers leave it out
    assert "mask_token" not in found.state_dict()
    save_student(found, tmp_path / "without.pth")
    assert stored_mask_token(tmp_path / "without.pth", found) is None
    torch.save({"mask_token": token * float("nan")}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match="NaN"):
        stored_mask_token(tmp_path / "broken.pth", mim.encoder)
