"""HTML of the reports: what is not a literal of ours is escaped, wherever it stands."""

import math

import pytest

from tinymim_export.report.markup import Html, escape, html, join
from tinymim_export.report.page import POLICY, Section, hide_paths, table, write_report
from tinymim_export.report.plots import ScatterPoint, Series, chart, scatter, stacked_bar
from tinymim_export.report.training_health import PLACES, health_figures, outlier_verdict
from tinymim_export.tables import markdown_table, printable, text_table

SCRIPT = "<script>alert(1)</script>\"'&"


def test_values_are_escaped_and_html_is_not():
    assert html("<b>{}</b>", SCRIPT) == "<b>&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;</b>"
    assert html("<b>{}{:.1f}</b>", html("<i>{}</i>", "<"), 0.25) == "<b><i>&lt;</i>0.2</b>"
    assert join([html("<br>"), "<"], ", ") == "<br>, &lt;"
    assert html("<b>") + "<" == "<b>&lt;"
    assert "<" + html("<b>") == "&lt;<b>"
    assert escape(escape("<")) == "&lt;"
    assert isinstance(join([]), Html)
    assert escape("a\x1b\x00\ud800b\n") == "a\ufffd\ufffd\ufffdb\n"


def test_blocks_of_a_page_are_text_unless_they_are_html(tmp_path):
    blocks = [SCRIPT, table([SCRIPT], [[SCRIPT, html("<b>{}</b>", SCRIPT)]], SCRIPT)]
    lines = [Series(SCRIPT, [(0, 1), (1, 2)]), Series(SCRIPT, [(0, 1), (1, 2)], dots=True)]
    blocks += [chart(SCRIPT, lines), stacked_bar([(SCRIPT, 1, SCRIPT)])]
    blocks += [scatter(SCRIPT, [ScatterPoint(SCRIPT, 1, 2, group=SCRIPT, mark=True)], SCRIPT, SCRIPT)]
    page = write_report(tmp_path / "a.html", SCRIPT, SCRIPT, Section(SCRIPT, blocks, SCRIPT), footer=SCRIPT)
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 15
    assert f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">' in text


@pytest.mark.parametrize(
    "values", [(1e308, -1e308), (1e50, 1e50 * (1 + 1e-15)), (5e-324, 0), (math.nan, math.inf), (0, 0)]
)
def test_curves_of_absurd_numbers_are_drawn_or_left_out(values):
    for steps in ((0, 1), (1e300, 1e300), (-5, 1e308)):
        for dots in (False, True):
            chart("loss", [Series("loss", list(zip(steps, values, strict=True)), dots=dots)])


def test_damaged_lines_of_training_health_leave_a_page():
    """Whatever is left of the lines: no name is taken for a number, no twin is expected."""
    whole = {
        f"{kind}/block_{i:02d}/{place}": [(0.0, 1.0), (5.0, 30.0)]
        for kind in ("outlier", "outlier_channel")
        for i in (1, 2)
        for place in PLACES
    }
    whole |= {f"entropy/block_{i:02d}/head_{j:02d}": [(0.0, 0.5), (5.0, 0.4)] for i in (1, 2) for j in (1, 2)}
    whole |= {"kl_qk/head_01": [(0.0, 1.0)], "kl_qk/x": [(0.0, 1.0)], "entropy/x": [(0.0, 1.0)]}
    whole |= {"outlier/limit": [(0.0, 20.0), (5.0, 20.0)], "outlier/block_x/y": [(0.0, 1.0)]}
    assert "30 times" in outlier_verdict(whole)
    for lost in whole:
        less = {name: points for name, points in whole.items() if name != lost}
        short = whole | {lost: whole[lost][:1]}
        zero = whole | {lost: [(0.0, 0.0), (5.0, math.nan)]}
        for metrics in (less, short, zero):
            health_figures(metrics)
            outlier_verdict(metrics)


def test_names_that_are_no_utf8_do_not_stop_a_page(tmp_path):
    text = write_report(tmp_path / "a.html", "caf\udce9", "", Section("a", ["b"])).read_text("utf-8")
    assert "caf\ufffd" in text


def test_tables_for_markdown_and_terminals():
    rows = [["a"], ["x|y\n<script>\x1b[2J"]]
    assert markdown_table(rows).splitlines()[2] == "| x\\|y &lt;script> [2J |"
    assert "\x1b" not in text_table(rows)
    assert printable("a\nb\x1b[2J") == "a\nb?[2J"


@pytest.mark.parametrize("text", ["/home/me/a/b.pth", "C:\\me\\a\\b.pth"])
def test_folders_of_this_machine_are_hidden(text):
    assert hide_paths(f"--data {text}") == "--data .../b.pth"
