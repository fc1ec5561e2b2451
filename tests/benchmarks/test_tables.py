"""The tools of the measured comparisons: their committed tables follow from the committed numbers; they start."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tinymim.benchmarks import camvid, deployment, distill_tables, headline, segmentors_table, transferred_page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (segmentors_table, "compare"),
        (segmentors_table, "../tinymim/demo/compare_camvid"),
        (segmentors_table, "compare_camvid_labels37"),
        (deployment, "deployment"),
        (camvid, "study_camvid"),
        (distill_tables, "bench_distill_amd_epyc"),
    ],
)
def test_the_committed_table_is_written_from_the_committed_numbers(module, name):
    docs = ROOT / "docs"
    page = docs / f"{Path(name).name}.md"
    assert module.table(json.loads((docs / f"{name}.json").read_text())) == page.read_text()


def test_the_committed_page_of_what_was_transferred_is_written_from_its_numbers():
    page = ROOT / "docs/transferred/transferred.md"
    assert transferred_page.markdown(json.loads(page.with_suffix(".json").read_text())) == page.read_text()


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("compare_segmentors", ["--data-root", "--student", "--models", "--stages", "--seconds"]),
        ("study_deployment", ["--checkpoint", "--data-root", "--others", "--backbone-size", "--limit"]),
        ("study_camvid", ["--photos", "--labels", "--seeds", "--teacher-epochs", "--stages"]),
        ("headline", ["--data", "--seg-data", "--out"]),
        ("prepare_ade20k", ["--out", "--check", "--keep-zip"]),
        ("bench_distill", ["--pair", "--size", "--all", "--photos", "--loss", "--profile", "--check"]),
        ("gpu_check", ["--prepare", "--wheels", "--parts", "--minutes", "--quick"]),
        ("train_seg", ["--data-root", "--work-dir", "--student", "--resume", "--overwrite", "--dry-run", "--amp"]),
        ("test_seg", ["--data-root", "--tta", "--json", "--markdown", "--cfg-options"]),
    ],
)
def test_every_tool_starts_and_has_its_options(tool, options, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(tool).main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in options)


def test_a_dry_run_that_fails_is_said():
    from tinymim.errors import CheckFailed

    with pytest.raises(CheckFailed, match="ended with 2"):
        headline.dry_run(["segment", "no_such_config"])
