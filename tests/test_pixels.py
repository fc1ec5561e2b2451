"""Photos of every kind as 8-bit RGB."""

import numpy as np
import pytest
from PIL import Image

from tinymim.data.pixels import to_rgb


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
