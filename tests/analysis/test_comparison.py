"""``tinymim analyse``: its numbers, its page, what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.analysis import analyse, attention_stats, cka, effective_rank
from tinymim.cli import main
from tinymim.errors import ConfigError, DataError
from tinymim.models import ViT, create_model, save_student
from tinymim_export.report.block_figures import five_numbers


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten photos, a student, and a teacher of another patch size."""
    folder = tmp_path_factory.mktemp("analyse")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    torch.manual_seed(0)
    save_student(ViT(img_size=32, embed_dim=24, depth=3, num_heads=2), folder / "student.pth")
    save_student(ViT(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4), folder / "teacher.pth")
    save_student(create_model("hiera_tiny_224", img_size=32), folder / "hiera.pth")
    return folder


def test_one_model(files):
    """Its numbers are those of the functions, on the same photos."""
    found = analyse(str(files / "student.pth"), photos=files / "photos", img_size=32, batch_size=10)
    assert set(found.cka) == {"A"}
    own = np.array(found.cka["A"])
    np.testing.assert_allclose(np.diag(own), 1, atol=1e-5)
    np.testing.assert_allclose(own, own.T, atol=1e-5)
    model = found.models["A"]
    assert np.array(model["distance"]).shape == np.array(model["entropy"]).shape == (3, 2)
    assert len(model["rank"]) == 3
    assert (model["width"], model["heads"], model["patch"], model["size"]) == (24, 2, 16, 32)
    assert found.photos["files"] == 10


def test_two_models_see_the_same_grid(files):
    """The second one's photos are resized until it has the first one's patches; distances are in the first's pixels."""
    found = analyse(str(files / "student.pth"), str(files / "teacher.pth"), photos=files / "photos", img_size=32)
    assert found.models["B"]["size"] == 16
    assert np.array(found.cka["A B"]).shape == (3, 2)
    assert max(map(max, found.models["B"]["distance"])) < 32  # a grid of 2 x 2 patches, 16 pixels apart


def test_stages_take_the_place_of_blocks(files):
    found = analyse(str(files / "hiera.pth"), str(files / "student.pth"), photos=files / "photos", img_size=32)
    assert np.array(found.cka["A B"]).shape == (4, 3)
    assert found.models["A"]["distance"] is None
    assert found.models["A"]["width"] == [96, 192, 384, 768]


def test_effective_rank():
    """The entropy of the singular values of all tokens, batch by batch as at once; 1 for tokens on a line."""
    model = ViT(img_size=32, embed_dim=24, depth=2, num_heads=2).eval()
    images = torch.randn(6, 3, 32, 32)
    tokens = model.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
    rows = tokens.flatten(0, 1).double()
    sizes = torch.linalg.svdvals(rows - rows.mean(0))
    p = sizes / sizes.sum()
    wanted = torch.exp(-(p * p.log()).sum())
    torch.testing.assert_close(effective_rank(model, images, blocks=[2])[0].double(), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(effective_rank(model, images.split(2)), effective_rank(model, images))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert effective_rank(model, images).tolist() == [1.0, 1.0]  # all tokens are equal


def test_hierarchical_similarity_is_that_of_its_maps():
    model = create_model("hiera_tiny_224", img_size=32).eval()
    images = torch.randn(5, 3, 32, 32)
    similar = cka(model, model, images)
    assert similar.shape == (4, 4)
    torch.testing.assert_close(similar.diagonal(), torch.ones(4), rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="cannot compute the attention maps"):
        attention_stats(model, images)


def test_command(files, capsys, tmp_path):
    """Page, numbers and the next command; absolute paths stay out of the page."""
    words = ["analyse", str(files / "student.pth"), str(files / "teacher.pth"), "--photos", str(files / "photos")]
    out = ["--img-size", "32", "--out", str(tmp_path / "a.html"), "--json", str(tmp_path / "a.json")]
    assert main([*words, *out]) == 0
    said = capsys.readouterr().out
    assert "similarity (CKA) to B's last block" in said
    assert "next: tinymim segment" in said
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6  # three similarities, rank, distance, entropy
    assert str(files) not in page.split("<h2>Next")[0]
    numbers = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert numbers["kind"] == "tinymim.analysis"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["student.pth", "student.pth", "student.pth"], "3 models"),
        (["nothing.pth"], "nothing.pth"),
        (["student.pth", "--limit", "3"], "--limit 3"),
        (["student.pth", "--img-size", "40"], "patches of 16"),
        (["student.pth", "--weights", "a", "b"], "--weights names 2"),
        (["student.pth", "--weights", "a"], "weights a for"),
        (["student.pth", "--out", "page"], "not an .html file"),
    ],
)
def test_bad_input(files, capsys, words, error, monkeypatch):
    """An error of ours, before photos are read, and no page."""
    monkeypatch.chdir(files)
    size = [] if "--img-size" in words else ["--img-size", "32"]
    assert main(["analyse", *words, "--photos", "photos", *size]) == 2
    assert error in capsys.readouterr().err
    assert not (files / "analysis.html").exists()


def test_too_few_photos(files, tmp_path):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "few" / "0.png")
    with pytest.raises(DataError, match="1 photos can be read"):
        analyse(str(files / "student.pth"), photos=tmp_path / "few", img_size=32)


def test_five_numbers():
    assert five_numbers([3.0, 1.0, 2.0, 4.0, 5.0]) == [1, 2, 3, 4, 5]
    assert five_numbers([1.0, 2.0]) == [1, 1.25, 1.5, 1.75, 2]
    assert five_numbers([7.0]) == [7] * 5
