"""The tracker: elimination, losses, files, training that resumes to the bit, ONNX against PyTorch, the command."""

import json
import os
import signal

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.attack.kills import logged
from tinymim.cli import main
from tinymim.engine import load_recipe
from tinymim.engine.loop import StepLoop
from tinymim.errors import CheckpointError, ConfigError, DataError
from tinymim.models import create_model, model_from_checkpoint, save_student
from tinymim.track import (
    FirstBox,
    OneStream,
    TemplateMatcher,
    Tracker,
    evaluate_tracker,
    generate_sequences,
    load_tracker,
    read_sequences,
    save_tracker,
    train_tracker,
)
from tinymim.track.losses import centre_map, focal_loss, track_losses
from tinymim.track.method import TrackModel, TrackSchedule, parameter_groups
from tinymim.track.network import default_elimination, hann_window, read_box
from tinymim.track.pairs import Pairs
from tinymim.track.stored import TorchNetwork
from tinymim_export import export, verify
from tinymim_export.precision.quantize import quantize
from tinymim_export.runtime import OnnxNetwork

STUDENT = dict(depth=3, embed_dim=24, num_heads=2)
BOX = ["--box", "30", "30", "12", "12"]
SMALL = dict(template_size=32, img_size=64, channels=8, samples=8, student_args=STUDENT)


def build(**options):
    torch.manual_seed(0)
    model = Tracker(
        create_model("tinymim_vit_tiny", img_size=64, **STUDENT),
        **dict(template_size=32, search_size=64, channels=8) | options,
    )
    for stack in (model.head.score, model.head.offset, model.head.size):  # as if trained: the maps are not flat
        torch.nn.init.normal_(stack[-1].weight, std=0.5)
    return model.eval()


def crops(batch=2, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, generator=rng), torch.randn(batch, 3, 64, 64, generator=rng)


def options(sequences, out, **more):
    cfg = SMALL | more.pop("cfg_options", {})
    return (
        dict(data=sequences, out=out, max_steps=4, batch_size=4, workers=0, device="cpu", save_every=2, cfg_options=cfg)
        | more
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_sequences(
        tmp_path_factory.mktemp("track") / "sequences", sequences=2, frames=6, size=(64, 80), seed=3
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "tracker.pth"
    save_tracker(build(), path)
    return path


# the network ------------------------------------------------------------------------------------------------------


def test_without_elimination_it_is_the_plain_blocks():
    """Both crops' patches with their own positions through the blocks as they are, bit for bit."""
    model, (template, search) = build(keep=1.0), crops()
    net = model.backbone
    tokens = [
        net.patch_embed(crop)[0] + pos for crop, pos in ((template, model.template_pos), (search, model.search_pos))
    ]
    x = torch.cat(tokens, dim=1)
    for block in net.blocks:
        x = block(x, (4, 4), None)
    plain = net.norm(x)[:, 4:].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(model.features(template, search), plain)
    assert torch.equal(build(eliminate_in=[]).features(template, search), plain)


def test_elimination_keeps_what_the_templates_centre_attends_to():
    """Kept cells have what a run on them alone gives; the others are zero; 16 -> 12 -> 9 -> 7 cells at 0.7."""
    model, (template, search) = build(), crops()
    features = model.features(template, search)
    alive = features.abs().sum(1).flatten(1) > 0
    assert alive.sum(1).tolist() == [7, 7]
    once = build(eliminate_in=[2])
    net, places = once.backbone, []
    kept = once._eliminate

    def noted(block, x, place, Z):
        attention = block.attn
        q, k, _ = attention.qkv(block.norm1(x)).reshape(2, x.shape[1], 3, 2, 12).permute(2, 0, 3, 1, 4)
        share = (q[:, :, :1] @ k.transpose(2, 3) / 12**0.5).softmax(-1).mean(1)[:, 0, Z:]  # centre of 2x2: the first
        places.append(share.topk(12).indices.sort().values)
        return kept(block, x, place, Z)

    once._eliminate = noted
    features = once.features(template, search)
    cells = (features.abs().sum(1).flatten(1) > 0).nonzero()[:, 1].view(2, 12)
    assert torch.equal(cells, places[0])
    z, x = net.patch_embed(template)[0] + once.template_pos, net.patch_embed(search)[0] + once.search_pos
    x = net.blocks[0](torch.cat([z, x], dim=1), (4, 4), None)
    x = net.blocks[1](x, (4, 4), None)  # its MLP acts on each patch alone: dropping after it is the same
    x = torch.cat([x[:, :4], x[:, 4:].gather(1, cells[..., None].expand(-1, -1, 24))], dim=1)
    wanted = net.norm(net.blocks[2](x, (4, 4), None))[:, 4:]
    got = features.flatten(2).transpose(1, 2).gather(1, cells[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(got, wanted)


def test_blocks_positions_and_what_is_trained():
    assert default_elimination(12) == (4, 7, 10)
    assert default_elimination(24) == (7, 13, 19)
    assert default_elimination(2) == (1, 2)
    model = build()
    assert torch.equal(model.search_pos, model.backbone.pos_embed[:, 1:])
    assert model.template_pos.shape == (1, 4, 24)
    groups = parameter_groups(model, 0.1, 1e-4)
    trained = [p for group in groups for p in group["params"]]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {group["lr_scale"] for group in groups} == {0.1, 1.0}
    losses = TrackModel(model)(**TrackModel(model).example(load_recipe("track_tiny", SMALL), 2, "cpu"))
    losses["loss"].backward()
    assert all(p.grad is not None for p in trained)  # what several processes wait for


def test_backbones_that_have_no_single_sequence_of_patches():
    with pytest.raises(ConfigError, match="hierarchical"):
        Tracker(create_model("hiera_tiny_224", img_size=64, embed_dim=8, stages=(1, 1, 1, 1)))
    with pytest.raises(ConfigError, match="relative-position bias"):
        Tracker(create_model("tinymim_vit_tiny", img_size=64, rel_pos_bias=True, **STUDENT))
    for wrong in (dict(template_size=30), dict(eliminate_in=[4]), dict(eliminate_in=[0]), dict(keep=0.0)):
        with pytest.raises(ConfigError):
            build(**wrong)


def test_the_wide_last_layer_and_distillation_token_of_a_starred_student():
    star = create_model("tinymim_vit_star_tiny", img_size=64, **STUDENT | {"last_dim": 40})
    maps = Tracker(star, template_size=32, search_size=64, channels=8)(*crops())
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        "score": (2, 1, 4, 4),
        "offset": (2, 2, 4, 4),
        "size": (2, 2, 4, 4),
    }


def test_boxes_are_read_at_the_largest_score_and_hanns_window_moves_it():
    maps = {"score": torch.zeros(1, 1, 4, 4), "offset": torch.full((1, 2, 4, 4), 0.25), "size": torch.rand(1, 2, 4, 4)}
    maps["score"][0, 0, 0, 3], maps["score"][0, 0, 1, 2] = 0.9, 0.8
    box, score = read_box(maps)
    assert box[0].tolist() == pytest.approx([3.25 / 4, 0.25 / 4, *maps["size"][0, :, 0, 3].tolist()])
    assert score.item() == pytest.approx(0.9)
    window = hann_window(4)
    assert window[0, 0, 1, 2] == window.max()
    assert read_box(maps, window)[0][0, :2].tolist() == pytest.approx([2.25 / 4, 1.25 / 4])


def test_losses_by_hand():
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    target = centre_map(box, 4)  # sigma 0.25 cells
    assert target[0, 2, 2] == 1
    assert target[0, 2, 1].item() == pytest.approx(np.exp(-8))
    score = torch.full((1, 4, 4), 0.5)
    hand = 0.25 * np.log(2) * (1 + sum((1 - y) ** 4 for y in target.flatten().tolist() if y < 1))
    assert focal_loss(score, target).item() == pytest.approx(hand, rel=1e-5)
    exact = {"score": target[:, None], "offset": torch.zeros(1, 2, 4, 4), "size": torch.full((1, 2, 4, 4), 0.5)}
    losses = track_losses(exact, box)
    assert losses["iou"].item() == pytest.approx(1)
    assert losses["loss"].item() == pytest.approx(losses["centre"].item(), abs=1e-5)
    off = {**exact, "offset": torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)}  # a cell: half its width
    losses = track_losses(off, box)
    assert losses["iou"].item() == pytest.approx(1 / 3)
    assert losses["giou"].item() == pytest.approx(2 / 3)  # the hull is the union
    assert losses["l1"].item() == pytest.approx(0.125)
    total = losses["centre"] + 2 * losses["giou"] + 5 * losses["l1"]
    assert losses["loss"].item() == pytest.approx(total.item())


def test_rates_and_shares_by_step():
    hook = TrackSchedule(300, 0, 4e-4, drop_at=0.8, keep=0.7, keep_from=20 / 300, keep_to=80 / 300)
    assert [hook.rate(step) for step in (0, 239, 240)] == pytest.approx([4e-4, 4e-4, 4e-5])
    assert [hook.share(step) for step in (0, 20, 50, 80, 299)] == pytest.approx([1, 1, 0.85, 0.7, 0.7])
    recipe = load_recipe("track_ostrack", verb="track")
    assert recipe.base_lr * recipe.batch_size / 256 == pytest.approx(4e-4)
    assert (recipe.batch_size, recipe.epochs, recipe.samples, recipe.drop_at) == (128, 300, 60_000, 240 / 300)
    assert (recipe.template_size, recipe.img_size, recipe.channels, recipe.weight_decay) == (128, 256, 256, 1e-4)
    assert (recipe.backbone_lr, recipe.clip_grad, recipe.keep, recipe.eliminate_in) == (0.1, 0.1, 0.7, None)


# training ---------------------------------------------------------------------------------------------------------


def test_pairs_are_where_they_say(tmp_path):
    """The target's own pixels are in the box of the search crop and in the middle of the template; no state is kept."""
    (tmp_path / "a/img").mkdir(parents=True)
    truth = []
    for i in range(6):
        frame = Image.new("RGB", (120, 90), (0, 0, 255))
        truth.append((15 + 10 * i, 30, 24, 20))
        frame.paste((255, 0, 0), (truth[-1][0], 30, truth[-1][0] + 24, 50))
        frame.save(tmp_path / f"a/img/{i}.png")
    (tmp_path / "a/groundtruth.txt").write_text("".join("{},{},{},{}\n".format(*box) for box in truth), "utf-8")
    pairs = Pairs(read_sequences(tmp_path), samples=12, sizes=(32, 64), seed=5)
    assert pairs.sequences[0].visible.all()
    for i in range(12):
        item = pairs[(1, i)]
        assert all(torch.equal(value, item[key]) for key, value in pairs[(1, i)].items() if key != "skipped")
        if item["image"].float().std(0).max() < 1:  # made grey
            continue
        cx, cy, w, h = item["box"].tolist()
        red = item["image"][0].float() - item["image"][2]
        rows, columns = (red > 100).nonzero().T
        assert (rows.min() / 64, columns.min() / 64) == pytest.approx(
            (max(cy - h / 2, 0), max(cx - w / 2, 0)), abs=0.04
        )
        assert item["template"][0, 16, 16] > 150 > item["template"][0, 1, 16]
    (tmp_path / "a/img/3.png").write_bytes(b"damaged since it was checked")
    skipped = [path for i in range(12) for path in pairs[(0, i)]["skipped"]]
    assert {path.rpartition("/")[2] for path in skipped} == {"3.png"}


@pytest.mark.slow
def test_interrupt_and_resume_are_exact(data, tmp_path, monkeypatch):
    """Pairs, elimination, rates and clipped gradients continue as if nothing had happened."""
    more = dict(val_data=data, cfg_options={"drop_path": 0.2, "val_every": 2})
    whole = train_tracker(**options(data, tmp_path / "whole", **more))
    original = StepLoop.run_iter

    def interrupt(self, batch):
        original(self, batch)
        if self.iter == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepLoop, "run_iter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_tracker(**options(data, tmp_path / "cut", **more))
    monkeypatch.setattr(StepLoop, "run_iter", original)
    again = train_tracker(**options(data, tmp_path / "cut", resume=True, **more))
    assert logged(again.metrics) == logged(whole.metrics)
    states = [load_tracker(result.tracker)[0].state_dict() for result in (whole, again)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert again.val_iou == whole.val_iou
    halves = train_tracker(**options(data, tmp_path / "halves", micro_batch=2, **more))
    losses = [[line["loss"] for line in logged(run.metrics) if "loss" in line] for run in (whole, halves)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_bad_input_is_said_before_the_folder_is_made(data, tmp_path, monkeypatch):
    save_student(create_model("hiera_tiny_224", img_size=64, embed_dim=8, stages=(1, 1, 1, 1)), tmp_path / "hiera.pth")
    (tmp_path / "empty").mkdir()
    for changes, error, words in (
        (dict(student=tmp_path / "hiera.pth"), ConfigError, "hierarchical"),
        (dict(student=tmp_path / "nothing.pth"), CheckpointError, "no checkpoint"),
        (dict(data=tmp_path / "empty"), DataError, "no sequence"),
        (dict(cfg_options={"img_size": 60}), ConfigError, "do not fit patches"),
        (dict(strategy="fsdp"), ConfigError, "fsdp"),
        (dict(cfg_options={"keep": 0}), ConfigError, "keep"),
        (dict(cfg_options={"eliminate_in": [9]}), ConfigError, "eliminate_in"),
        (dict(recipe="mae_tiny"), ConfigError, "tinymim pretrain runs such recipes"),
    ):
        print(changes)  # shown if it is not refused
        with pytest.raises(error, match=words):
            train_tracker(**options(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_students_weights_are_the_trackers(data, tmp_path):
    """Width, depth and heads from the file; positions interpolated for each crop; the result is a student's file."""
    student = create_model("tinymim_vit_tiny", img_size=96, depth=2, embed_dim=36, num_heads=3)
    save_student(student, tmp_path / "student.pth")
    cfg = {key: value for key, value in SMALL.items() if key != "student_args"} | {"backbone_lr": 0}
    result = train_tracker(
        **options(data, tmp_path / "run", student=tmp_path / "student.pth", max_steps=1) | dict(cfg_options=cfg)
    )
    model, meta = load_tracker(result.tracker)
    assert (model.backbone.depth, model.backbone.embed_dim, model.backbone.num_heads) == (2, 36, 3)
    assert all(torch.equal(value, model.backbone.state_dict()[key]) for key, value in student.state_dict().items())
    assert meta["student_sha256"]
    assert model.template_pos.shape == (1, 4, 36)
    back, _ = model_from_checkpoint(result.tracker, say=False)
    assert torch.equal(back.blocks[1].attn.qkv.weight, student.blocks[1].attn.qkv.weight)


# files ------------------------------------------------------------------------------------------------------------


def test_a_stored_tracker_is_the_same_and_a_damaged_one_refused(stored, tmp_path):
    maps, (template, search) = build()(*crops()), crops()
    assert all(torch.equal(value, maps[name]) for name, value in load_tracker(stored)[0](template, search).items())
    content = torch.load(stored, weights_only=True)
    for change, words in (
        (lambda c: c["meta"]["tracker"].update(search_size=10**9), "does not describe its tracker"),
        (lambda c: c["meta"]["tracker"].update(search_size=80), "search_pos is"),
        (lambda c: c["meta"]["tracker"].update(eliminate_in=[7]), "no tracker can be built"),
        (lambda c: c["meta"].pop("backbone"), "does not describe its backbone"),
        (lambda c: c["meta"]["backbone"].update(depth=900), "too few for so many blocks"),
        (lambda c: c["model"].pop("head.score.0.weight"), "does not hold the tracker"),
        (lambda c: c["model"]["search_pos"].fill_(float("nan")), "NaN"),
        (lambda c: c["meta"].update(name="ViT"), "holds no tracker"),
    ):
        wrong = torch.load(stored, weights_only=True)
        change(wrong)
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(CheckpointError, match=words):
            load_tracker(tmp_path / "wrong.pth")
    assert content["meta"]["tracker"]["eliminate_in"] == [1, 2, 3]


@pytest.fixture(scope="module")
def exported(stored):
    made = export(stored, stored.with_name("tracker.onnx"))
    assert {row.name for row in made.parity.rows} == {"box", "confidence", "score", "offset", "size"}
    return stored.with_name("tracker.onnx")


@pytest.mark.slow  # an export takes seconds
def test_the_file_gives_what_pytorch_gives(stored, exported, data, tmp_path, monkeypatch, capsys):
    """Elimination included; on whole sequences the same boxes; verified, and not after a change."""
    theirs, ours = OnnxNetwork(exported, threads=1), TorchNetwork(stored)
    assert theirs.verified
    assert (theirs.sizes, theirs.factors) == (ours.sizes, ours.factors) == ((32, 64), (2.0, 4.0))
    rng = np.random.default_rng(0)
    for _ in range(4):
        views = [rng.integers(0, 256, (side, side, 3), np.uint8) for side in theirs.sizes]
        (a, sure_a), (b, sure_b) = theirs.locate(*views), ours.locate(*views)
        assert a == pytest.approx(b, abs=1e-5)
        assert sure_a == pytest.approx(sure_b, abs=1e-5)
    sequences = read_sequences(data)
    scores = [evaluate_tracker(OneStream(network), sequences) for network in (theirs, ours)]
    assert scores[0].auc == pytest.approx(scores[1].auc, abs=1e-6)
    monkeypatch.chdir(tmp_path)
    for name, file in (("onnx", exported), ("torch", stored)):
        assert main(["track", str(file), str(data / "scene_0000"), *BOX, "--out", name]) == 0
    assert np.allclose(*(np.loadtxt(f"{name}/boxes.txt", delimiter=",") for name in ("onnx", "torch")), atol=0.02)
    assert "not verified" not in capsys.readouterr().out
    assert verify(exported, stored).passed
    with pytest.raises(ConfigError, match="is a tracker"):
        quantize(exported, "half.onnx", precision="fp16")
    proto = onnx.load(exported)
    for prop in proto.metadata_props:
        if prop.key == "tinymim.tracker":
            prop.value = prop.value.replace('"search_factor": 4.0', '"search_factor": 5.0')
    onnx.save(proto, exported.with_name("changed.onnx"))
    assert not OnnxNetwork(exported.with_name("changed.onnx")).verified


def test_what_an_export_of_a_tracker_refuses(stored, tmp_path):
    for given in (dict(size=(64, 64)), dict(dynamic=True), dict(output="mask"), dict(part="backbone")):
        with pytest.raises(ConfigError, match="and a tracker"):
            export(stored, tmp_path / "out.onnx", **given)
    assert not list(tmp_path.iterdir())


# the command ------------------------------------------------------------------------------------------------------


def test_the_command(stored, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file, frames = str(stored), str(data / "scene_0000")
    assert main(["track", "--test", file, "--data", str(data), "--baseline", "--json", "scores.json"]) == 0
    value = json.loads((tmp_path / "scores.json").read_text())
    assert value["kind"] == "tinymim.track_scores"
    assert [each["tracker"] for each in value["baselines"]] == [TemplateMatcher.name, FirstBox.name]
    assert len(value["curves"]["success"]) == 21
    assert main(["track", file, frames, *BOX, "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "frames per second" in said
    assert "with every frame" in said
    assert len(np.loadtxt(tmp_path / "out/boxes.txt", delimiter=",")) == 6
    for words, told in (
        ([file], "a VIDEO, too"),
        ([file, frames], "--box is missing"),
        ([file, str(tmp_path / "no.mp4"), *BOX], "no video at"),
        ([file, frames, *BOX, "--out", "out"], "exists"),
        ([file, frames, *BOX, "--steps", "3"], "--max-steps is for training"),
        (["--test", file], "--data is missing"),
        (["--test", "--data", str(data)], "needs FILE"),
        (["--data", str(data), "--baseline"], "--baseline is for --test"),
        ([], "--data is missing"),
        (["--test", str(data / "scene_0000/groundtruth.txt"), "--data", str(data)], "error"),
    ):
        assert main(["track", *words]) == 2, words
        assert told in capsys.readouterr().err


def test_a_video_file_and_one_that_ends_early(stored, data, tmp_path, monkeypatch, capsys):
    from fractions import Fraction

    from tinymim_export.runtime.pictures import VideoWriter

    monkeypatch.chdir(tmp_path)
    writer = VideoWriter(tmp_path / "clip.mp4", Fraction(25))
    for path in read_sequences(data)[0].frames * 8:
        writer.add(np.asarray(Image.open(path)))
    writer.close()
    assert main(["track", str(stored), "clip.mp4", *BOX]) == 0
    assert len(np.loadtxt(tmp_path / "clip_track/boxes.txt", delimiter=",")) == 48
    import av

    with av.open("clip.mp4") as source, av.open("front.mp4", "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "short.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "text.mp4").write_text("no video", "utf-8")
    capsys.readouterr()
    for name, told in (("short.mp4", "frames are in the file"), ("text.mp4", "cannot read the video")):
        assert main(["track", str(stored), name, *BOX]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "short_track").exists()


@pytest.mark.slow
def test_a_minute_of_training_beats_a_box_that_stays(tmp_path):
    """On generated sequences of another seed: a tracker from random weights follows what moves (docs/track.md)."""
    shape = dict(size=(120, 160), frames=60)
    train = generate_sequences(tmp_path / "train", sequences=40, **shape)
    test = read_sequences(generate_sequences(tmp_path / "test", sequences=12, seed=1, **shape))
    plain = dict(student_args=dict(depth=3, embed_dim=64, num_heads=4), channels=32, backbone_lr=1.0, keep=1.0)
    given = dict(workers=0, device="cpu", save_every=10_000, cfg_options=plain)
    result = train_tracker(data=train, out=tmp_path / "run", **given)
    trained = evaluate_tracker(OneStream(TorchNetwork(result.tracker)), test)
    still = evaluate_tracker(FirstBox(), test)
    print(f"trained {trained.auc:.3f}, first box {still.auc:.3f}")
    assert trained.auc > 1.2 * still.auc
