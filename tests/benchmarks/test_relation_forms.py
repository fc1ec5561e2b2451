"""The table of compact forms, on a small teacher with random weights."""

import json

import numpy as np
from PIL import Image

from tinymim.benchmarks.relation_forms import holds, main


def test_forms_are_measured(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        image = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((80, 60))
        image.save(tmp_path / "photos" / f"{i}.png")
    words = (
        f"--data {tmp_path / 'photos'} --teacher timm/test_vit --block 3 --sizes 64 --batch 3 --out {tmp_path / 't'}"
    )
    assert main([*words.split(), "--forms", "fp16", "int8", "4x8", "48x8"]) == 0
    results = json.loads((tmp_path / "t.json").read_text())
    rows = {row["form"]: row for row in results["rows"]}
    assert [*rows] == ["fp16", "int8", "4x8", "top 8 of a row", "top 16 of a row"]  # a head has 32 channels
    assert rows["fp16"]["bytes"] == 3 * 17 * 64 * 2
    assert rows["4x8"]["bytes"] == 3 * (17 * 2 * 4 + 2 * 2 * 4 * 2)
    assert holds(rows["fp16"])
    assert rows["fp16"]["new"]["gradient"] < rows["4x8"]["new"]["gradient"]
    assert "| 64 | int8 |" in capsys.readouterr().out
