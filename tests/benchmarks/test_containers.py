"""``tools/bench_containers.py``: each container gives back what it was given; a flipped bit is noticed by ours."""

import json

from tinymim.benchmarks import containers


def test_containers(tmp_path, capsys):
    """Those that are installed; the others are left out."""
    words = ["--topk", "3", "--records", "64", "--chunk", "16", "--reads", "200", "--out", str(tmp_path / "made")]
    assert containers.main(words) == 0
    rows = {row["container"]: row for row in json.loads((tmp_path / "made.json").read_text("utf-8"))["rows"]}
    assert {"safetensors", "TinyViT's files"} <= rows.keys()
    assert rows["safetensors"]["bit_flip"] == "an error (DataError)"
    assert rows["TinyViT's files"]["bit_flip"] == "unnoticed"
    assert all(row["write_per_s"] > 0 and row["read_per_s"] > 0 for row in rows.values())
    assert (tmp_path / "made.md").read_text("utf-8") in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
