"""Photos of every kind as 8-bit RGB, as a viewer shows them, through every door."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.export.photographs import photograph
from tinymim.data.photos import read_photo as read_of_distill
from tinymim.data.pixels import UnreadablePhoto, open_crop, open_photo, photo_size, to_rgb
from tinymim_export.runtime.photos import load_photos
from tinymim_export.runtime.predictor import read_photo as read_of_predict

PHOTO = np.asarray(photograph(0))  # 60 x 90
GREY = np.asarray(photograph(0).convert("L"))
AS_STORED = {  # orientation -> how a photo is stored that a viewer then shows upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def grey_rgb(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


def png(path, depth, kind, rows, before=b"", after=b"", size=None):
    """A PNG chunk by chunk, as Pillow cannot write it: ``rows`` are the bytes of each line."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", *(size or (90, 60)), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    extra = [chunk(part[:4], part[4:]) if part else b"" for part in (before, after)]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra[0] + chunk(b"IDAT", data) + extra[1] + chunk(b"IEND", b"")
    )
    return path


def deep(values):
    """Big-endian 16-bit lines of a PNG."""
    return [row.tobytes() for row in values.astype(">u2")]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("turn", AS_STORED)
def test_photos_are_upright_for_every_door(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(AS_STORED[turn](PHOTO))).save(path, exif=exif, quality=95)
    seen = np.asarray(open_photo(path))
    assert photo_size(path) == (90, 60)
    assert seen.shape == PHOTO.shape
    assert abs(seen.astype(int) - PHOTO).mean() < (0.5 if suffix in ("png", "tif") else 5)
    for other in (read_of_distill(path), read_of_predict(path), load_photos(tmp_path)[0]):
        assert np.array_equal(np.asarray(other), seen)


@pytest.mark.parametrize("turn", AS_STORED)
def test_a_crop_is_that_of_the_whole_photo(tmp_path, turn):
    """To the bit where no smaller decoding is allowed; else the same place of the upright photo, at 1/2, 1/4 or 1/8."""
    exif = Image.Exif()
    exif[0x0112] = turn
    for size, box in (((61, 95), (7, 9, 50, 44)), ((483, 751), (203, 77, 707, 405))):  # not multiples of 8
        path = tmp_path / "a.jpg"
        stored = AS_STORED[turn](np.asarray(photograph(3, size)))
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
        whole = open_photo(path)
        seen = []
        for side, scale in ((box[3] - box[1], 1), (164, 2), (82, 4), (41, 8), (8, 8)):
            if size[0] < 400 and scale > 1:
                continue
            part = open_crop(path, lambda full: seen.append(full) or box, side)  # noqa: B023
            assert part.mode == "RGB"
            wanted = whole.crop(box) if scale == 1 else whole.resize(part.size, Image.Resampling.BOX, box=box)
            assert abs(part.width * scale - (box[2] - box[0])) <= scale
            assert min(part.size) >= min(side, box[3] - box[1])
            difference = abs(np.asarray(part, int) - np.asarray(wanted))
            assert difference.max() == 0 if scale == 1 else difference.mean() < 5
            mirrored = abs(np.asarray(part, int) - np.asarray(wanted)[:, ::-1])
            assert mirrored.mean() > 20
        assert set(seen) == {(size[1], size[0])}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "I;16"])
def test_a_crop_of_every_kind_of_photo(tmp_path, mode):
    suffix = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
    photo = photograph(1).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        photo = Image.fromarray(np.asarray(photo).astype(np.uint16) * 257)
    photo.save(tmp_path / f"a.{suffix}")
    box = (3, 5, 80, 50)
    part = open_crop(tmp_path / f"a.{suffix}", lambda _: box, 45)
    assert np.array_equal(np.asarray(part), np.asarray(open_photo(tmp_path / f"a.{suffix}").crop(box)))


def test_a_damaged_photo_has_no_crop(tmp_path):
    photograph(0, (300, 300)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadablePhoto):
        open_crop(tmp_path / "a.jpg", lambda size: (0, 0, *size), 32)


def test_how_to_turn_it_may_come_after_the_pixels_or_be_damaged(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.ascontiguousarray(np.rot90(PHOTO))
    late = png(tmp_path / "a.png", 8, 2, lying, after=b"eXIf" + exif.tobytes()[6:], size=(60, 90))
    assert np.array_equal(np.asarray(open_photo(late)), PHOTO)
    photograph(0).save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xffgarbage")
    assert open_photo(tmp_path / "b.jpg").size == photo_size(tmp_path / "b.jpg") == (90, 60)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
def test_ordinary_photos_are_what_pillow_reads(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    try:
        photograph(1).convert(mode).save(path)
    except OSError:  # not every format has every mode
        return
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(open_photo(path)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "PA", "tRNS colour", "LA 16 bit", "half"])
def test_what_is_transparent_is_white(tmp_path, kind):
    clear = np.zeros(GREY.shape, bool)
    clear[:, :40] = True
    alpha = np.where(clear, 0, 255).astype(np.uint8)
    path, wanted = tmp_path / "a.png", PHOTO.astype(int)
    if kind == "RGBA":
        Image.fromarray(np.dstack([PHOTO, alpha])).save(path)
    elif kind == "LA":
        Image.fromarray(np.dstack([GREY, alpha]), "LA").save(path)
        wanted = grey_rgb(GREY).astype(int)
    elif kind == "PA":
        path = tmp_path / "a.webp"
        Image.fromarray(np.dstack([PHOTO, alpha])).save(path, lossless=True, exact=True)
    elif kind == "P":
        picture = Image.fromarray(np.where(clear, 0, 1 + GREY // 2).astype(np.uint8))
        picture.putpalette([value for i in [9, *range(255)] for value in (i, i, i)])
        picture.save(path, transparency=0)
        wanted = grey_rgb(GREY // 2).astype(int)
    elif kind == "tRNS colour":
        png(
            path,
            8,
            2,
            np.where(clear[..., None], [9, 8, 7], PHOTO).astype(np.uint8),
            b"tRNS" + struct.pack(">HHH", 9, 8, 7),
        )
    elif kind == "LA 16 bit":
        png(path, 16, 4, deep(np.dstack([GREY, alpha]).astype(int) * 257))
        wanted = grey_rgb(GREY).astype(int)
    else:
        Image.fromarray(np.dstack([PHOTO, np.full(GREY.shape, 51, np.uint8)])).save(path)  # a fifth of it
        wanted, clear = 0.2 * PHOTO + 0.8 * 255, ~clear & clear
    wanted[clear] = 255
    assert abs(np.asarray(open_photo(path)) - wanted).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_greys_of_every_camera(tmp_path, bits, suffix):
    values = GREY.astype(np.uint32) * ((1 << bits) - 1) // 255
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / f"a.{suffix}")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "b.tif")
    for path in tmp_path.iterdir():
        assert np.array_equal(np.asarray(open_photo(path)), grey_rgb(GREY))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_greys_of_few_bits(tmp_path, bits):
    values = GREY[:, :88] >> (8 - bits)
    lines = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:].ravel()) for row in values]
    path = png(tmp_path / "a.png", bits, 0, lines, size=(88, 60))
    assert np.array_equal(np.asarray(open_photo(path)), grey_rgb(values * (255 // ((1 << bits) - 1))))


def test_deep_colours(tmp_path):
    path = png(tmp_path / "a.png", 16, 2, deep(PHOTO.astype(int) * 257))
    assert np.array_equal(np.asarray(open_photo(path)), PHOTO)
    with pytest.raises(UnreadablePhoto, match="fill 12 bits or fewer"):
        open_photo(png(path, 16, 2, deep(PHOTO.astype(int) * 16)))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_the_first_frame_of_several(tmp_path, suffix):
    lossless = dict(lossless=True) if suffix == "webp" else {}
    photograph(0).save(tmp_path / f"a.{suffix}", save_all=True, append_images=[photograph(1)], **lossless)
    assert np.array_equal(np.asarray(open_photo(tmp_path / f"a.{suffix}")), PHOTO)


def _cut(path, kind="JPEG"):
    photograph(0).save(path, kind)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_cut, "truncated"),
        (lambda path: path.write_bytes(b""), "cannot identify"),
        (lambda path: path.mkdir(), "no regular file"),
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: None, "No such file"),
        (lambda path: png(path, 8, 2, [], size=(60000, 60000)), "bomb"),
        (lambda path: png(path, 8, 2, [], size=(0, 60)), "cannot identify"),
        (lambda path: _cut(path, "PNG"), "truncated"),
        (lambda path: Image.fromarray(np.full((4, 4), -5, np.int32)).save(path, "TIFF"), "8- or 16-bit"),
        (lambda path: Image.fromarray(np.zeros((4, 4), np.float32)).save(path, "TIFF"), "8-bit picture"),
    ],
)
def test_what_cannot_be_read_is_one_error_at_once(tmp_path, make, why):
    path = tmp_path / "a.jpg"
    make(path)
    with pytest.raises(UnreadablePhoto, match=rf"cannot read the photo .*a\.jpg\n  why: .*{why}"):
        open_photo(path)
    assert read_of_distill(path) is None


def test_a_jpeg_may_be_decoded_smaller(tmp_path):
    photograph(0).resize((720, 480)).save(tmp_path / "a.jpg")
    assert open_photo(tmp_path / "a.jpg", at_least=(100, 100)).size == (180, 120)


def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
        rgb = np.asarray(to_rgb(image))
    assert rgb.shape == (16, 16, 3)
    assert (rgb == (values >> 8)[..., None]).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "RGB"])
def test_other_modes_are_pillows(mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_floats_are_refused():
    with pytest.raises(ValueError, match="8-bit picture"):
        to_rgb(Image.fromarray(np.zeros((4, 4), np.float32)))
