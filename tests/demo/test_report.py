"""Report pages: self-contained, escaped, no absolute paths, numbers as given; curves of any metrics.jsonl."""

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinymim.cli._next import segment_line
from tinymim.errors import DataError
from tinymim.files import environment, write_json
from tinymim.models import create_model, save_student
from tinymim_export.report import page as report
from tinymim_export.report import plots

VOID = {"meta", "img", "br", "link", "input", "hr", "path", "circle"}


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order; collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """Everything a reader sees (and the style sheet)."""
        return " ".join(self.words)


def check_self_contained(path: Path) -> Page:
    """Nothing is loaded from elsewhere, and nothing tells where the page was made."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for _, name, value in page.attributes:
        if name in ("src", "href", "data", "srcset", "poster"):
            assert value.startswith("data:image/")
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    assert not re.search(r"(?<![\w.>/])/(?:home|root|tmp|work|usr|var|private)\b", re.sub(r"data:[^\"]*", "", text))
    assert str(path.parent) not in text
    return page


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run & <co>"
    folder.mkdir()
    lines = [{"step": 0, "val_loss": 2.5, "val_qk": 1.0}]
    for step in range(1, 121):
        lines.append({"step": step, "loss": 2.0 / step + 0.125, "qk": 1.0 / step, "lr": 1e-3 * step / 120, "note": "x"})
    lines.append({"step": 120, "val_loss": 0.625, "val_qk": 0.25, "time": 99.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 121, "lo')
    (folder / "config.py").write_text(f'data = "{tmp_path}/photos/secret"\nlr = 1e-3\n')
    (folder / "student.pth").write_bytes(b"12345")
    write_json(folder / "env.json", environment())
    return folder


def test_run_report(run_folder: Path) -> None:
    path = report.run_report(run_folder)
    assert path == run_folder / "report.html"
    page = check_self_contained(path)
    text = page.text
    assert "run & <co>" in text  # escaped in the file, whole for the reader
    assert "120 steps" in text
    assert "0.625" in text
    assert "from 2.5" in text
    assert number_of(page, "svg") == 3  # loss with its held-out twin, qk, lr
    assert ".../secret" in text
    assert "tinymim distill" in text
    assert "student.pth" in text
    assert "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5" in text  # sha256 of 12345


def number_of(page: Page, tag: str) -> int:
    """How many of a tag the page has (each has a viewBox or a class)."""
    return sum(1 for t, name, _ in page.attributes if t == tag and name.lower() == "viewbox")


def test_run_report_takes_the_next_commands_it_is_given(run_folder: Path) -> None:
    text = report.run_report(run_folder, next_commands=[("Do <this>", "tinymim x --y <z>")]).read_text()
    assert "Do &lt;this&gt;" in text
    assert "tinymim x --y &lt;z&gt;" in text


def test_run_report_names_the_config_of_the_student(run_folder: Path) -> None:
    """As ``tinymim distill`` has it written."""
    save_student(
        create_model("tinymim_vit_tiny", img_size=64), run_folder / "student.pth", {"recipe": "tinymim_tiny_small_data"}
    )
    text = report.run_report(run_folder, segment=segment_line).read_text()
    assert "tinymim segment linear_tinymim_t_small_data --data-root FOLDER --student " in text
    assert str(run_folder.parent) not in text


def test_run_report_needs_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no metrics"):
        report.run_report(tmp_path)


def test_a_report_of_odd_numbers(tmp_path: Path) -> None:
    """One step, NaN, infinities, constants, percent: a page all the same."""
    lines = [
        {"step": 1, "loss": float("nan"), "a": 3.0, "still": 3.0},
        {"step": 2, "loss": float("inf"), "a": 4.0, "still": 3.0},
        {"step": 2, "mIoU": 0.5, "constant_mIoU": 0.04, "flag": True},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = check_self_contained(report.run_report(tmp_path))
    assert "50" in [word.strip() for word in page.words]
    assert number_of(page, "svg") == 1  # only "a" has two numbers that can be drawn and differ


def test_read_metrics_leaves_out_what_is_no_curve(run_folder: Path) -> None:
    metrics = report.read_metrics(run_folder / "metrics.jsonl")
    assert set(metrics) == {"loss", "qk", "lr", "val_loss", "val_qk"}
    assert metrics["loss"][-1] == (120.0, 2.0 / 120 + 0.125)
    assert metrics["val_loss"] == [(0.0, 2.5), (120.0, 0.625)]


def test_curve_is_where_the_numbers_are() -> None:
    svg = plots.curve_svg([plots.Series("a", [(0, 0.0), (10, 1.0)], exact=True)])
    start, end = re.search(r'class="line"[^>]*d="M([\d.,]+)L([\d.,]+)"', svg).groups()
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in (start, end))
    assert (x0, x1) == (plots.LEFT, plots.WIDTH - plots.RIGHT)
    assert y0 == plots.HEIGHT - plots.BOTTOM  # 0 at the bottom
    assert plots.TOP < y1 < y0 - 150
    assert plots.curve_svg([plots.Series("a", [])]) == ""
    assert plots.curve_svg([plots.Series("a", [(1, float("nan")), (2, 1.0)])]) == ""


def test_ticks_and_numbers() -> None:
    assert plots.ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert plots.ticks(0.13, 0.27, 4) == pytest.approx([0.15, 0.2, 0.25])
    assert [plots.tick_label(v, [34.1, 34.12, 34.14]) for v in (34.1, 34.12)] == ["34.10", "34.12"]
    assert [plots.tick_label(v, [34.1, 34.125]) for v in (34.1, 34.125)] == ["34.100", "34.125"]
    assert plots.tick_label(600.0, [600.0, 800.0]) == "600"
    assert [plots.number(v) for v in (0, 0.01234, 4.5, 12345.6, 1e-6)] == ["0", "0.0123", "4.5", "12,346", "1e-6"]


def test_moving_average_keeps_the_mean_of_a_constant_and_follows_a_ramp() -> None:
    assert plots.smooth([2.0] * 9, 5) == [2.0] * 9
    assert plots.smooth(list(range(9)), 3)[4] == 4


def test_stacked_bar_shares_add_up() -> None:
    bar = plots.stacked_bar([("a", 1.0, "1 ms"), ("b", 3.0, "3 <ms>")])
    assert [float(w) for w in re.findall(r"width:([\d.]+)%", bar)] == [25.0, 75.0]
    assert "3 &lt;ms&gt;" in bar


def test_mask_picture_has_the_colours_of_the_palette() -> None:
    mask = np.array([[0, 1], [1, 255]])
    picture = np.asarray(plots.mask_image(mask, [(10, 20, 30), (40, 50, 60)]).convert("RGB"))
    assert picture[0, 0].tolist() == [10, 20, 30]
    assert picture[1, 0].tolist() == [40, 50, 60]
    assert picture[1, 1].tolist() == [128, 128, 128]


def test_gallery_names_only_classes_that_occur() -> None:
    photo, truth = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)
    text = report.gallery(
        [("best", photo, truth, truth + 2)], ["sky", "sea", "sand"], [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    )
    assert text.count("<img") == 3
    assert "sky" in text
    assert "sand" in text
    assert "sea" not in text
    assert report.gallery([], ["a"], [(0, 0, 0)]) == ""


def test_hide_paths() -> None:
    assert report.hide_paths("data = '/home/me/photos/x.jpg'") == "data = '.../x.jpg'"
    assert report.hide_paths("a/b/c 1/2 runs/x") == "a/b/c 1/2 runs/x"


def test_reports_are_written_without_torch(run_folder: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'mmseg', 'mmengine', 'onnx', 'timm'): sys.modules[name] = None\n"
        f"from tinymim_export.report.page import run_report\nprint(run_report({str(run_folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
