"""Files that are whole or absent, run folders, the live line."""

import errno
import io
import json
import logging
import os

import pytest

from tinymim.cli import run_command
from tinymim.errors import TinyMIMError
from tinymim.files import atomic_path, environment, sha256_file, write_json
from tinymim.progress import LOG, Progress, clock, say


def test_atomic_path_leaves_all_or_nothing(tmp_path):
    target = tmp_path / "deep/file.json"
    write_json(target, {"a": 1})
    assert json.loads(target.read_text()) == {"a": 1}

    def fill_the_disk():
        with atomic_path(target) as part:
            part.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(TinyMIMError, match="cannot write"):
        fill_the_disk()
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in target.parent.iterdir()] == ["file.json"]
    assert len(sha256_file(target)) == 64


def test_environment_names_versions():
    stamp = environment()
    assert stamp["cores"] >= 1
    assert {"python", "torch", "numpy"} <= set(stamp["versions"])


def test_progress_is_plain_lines_off_a_terminal_and_one_line_on_it():
    plain = io.StringIO()
    line = Progress("work", 3, plain_every=0.0, stream=plain)
    for step in (1, 2, 3):
        line.update(step, images=8, waited=0.0, loss=0.5)
    line.close("3 steps")
    assert "\r" not in plain.getvalue()
    assert "work 3/3" in plain.getvalue()
    assert "images/s" in plain.getvalue()
    assert "loss 0.5" in plain.getvalue()

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    live = Terminal()
    line = Progress("work", 2, stream=live)
    line.update(1, loss=1.0)
    line.update(2, loss=0.5)
    line.close()
    assert live.getvalue().count("\n") == 1
    assert live.getvalue().count("\r") >= 2


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_failing_disk_is_our_error_at_every_command(capsys):
    """Whatever the operating system refuses where nobody has foreseen it: one message, exit code 2."""

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/somewhere/file")

    assert run_command("tinymim x", "", lambda parser: None, fail, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("tinymim x: error: cannot use /somewhere/file\n  why: Input/output error\n  fix: ")


def test_messages_and_the_line_go_through_logging(capsys):
    say("one\ntwo")
    say("warning: three")
    Progress("work", 1).update(1)
    assert capsys.readouterr().out == "one\ntwo\nwarning: three\nwork 1/1  ETA 0s\n"
    LOG.setLevel(logging.WARNING)
    try:
        say("one")
        say("\nwarning: three")
        Progress("work", 1).update(1)
    finally:
        LOG.setLevel(logging.INFO)
    assert capsys.readouterr().out == "\nwarning: three\n"


def test_a_closed_pipe_is_an_error_as_with_print(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(BrokenPipeError):
        say("gone")
