"""Run folders: one writer, nothing of others removed, nothing of dead processes left, refusals that change nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinymim import folders
from tinymim.errors import ConfigError, TinyMIMError
from tinymim.files import HOST, atomic_path, environment, noted_output, write_env, write_json, write_text
from tinymim.folders import LOCK, hold, open_run, remove_dead_parts


def begin(out: Path, **options: bool) -> None:
    """A run that writes its first files."""
    with open_run(out, **options) as run:
        run.begin()
        if run.fresh:
            write_text(out / "config.py", "a = 1\n")
            write_env(out, {})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def killed(code: str, *words: object) -> None:
    """Run code in a process that kills itself."""
    lines = "import os, sys\nfrom pathlib import Path\nfrom tinymim.folders import *\nfrom tinymim.files import *\n"
    code = f"{lines}out = Path(sys.argv[1])\n{code}\nos.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_used_folder_needs_resume_or_overwrite(tmp_path):
    out = tmp_path / "runs" / "run"
    begin(out)
    assert names(out) == ["config.py", "env.json"]  # the lock is gone
    with pytest.raises(ConfigError, match="run-2"):
        begin(out)
    (out / "note.txt").touch()
    begin(out, resume=True)
    assert "note.txt" in names(out)
    begin(out, overwrite=True)
    assert names(out) == ["config.py", "env.json"]
    with pytest.raises(ConfigError, match="no run to resume"):
        begin(tmp_path / "absent", resume=True)
    with pytest.raises(ConfigError, match="leave one out"):
        begin(out, resume=True, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        begin(tmp_path / "file")
    assert not (tmp_path / "absent").exists()


def test_an_empty_folder_is_fine_and_a_failed_build_leaves_it_as_it_was(tmp_path):
    for out, kept in ((tmp_path / "a" / "b", False), (tmp_path / "empty", True)):
        if kept:
            out.mkdir()
        for options in ({}, {"overwrite": True}):
            with pytest.raises(ZeroDivisionError), open_run(out, **options):  # noqa: PT012
                (out / "log").mkdir()
                raise ZeroDivisionError
            assert out.exists() is kept
    assert names(tmp_path) == ["empty"]
    begin(tmp_path / "empty")
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "empty", overwrite=True):
        raise ZeroDivisionError
    assert names(tmp_path / "empty") == ["config.py", "env.json"]  # the replacing run never began


@pytest.mark.parametrize(
    "content", [{"photo.jpg": ""}, {"env.json": "[]"}, {"env.json": '{"NODE_ENV": 1}'}, {"config.py": ""}]
)
def test_overwrite_leaves_the_folders_of_others_alone(tmp_path, content):
    """Only what a run of ours has written is replaced."""
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="does not look like a run of tinymim"):
        begin(tmp_path, overwrite=True)
    assert names(tmp_path) == sorted(content)
    with pytest.raises(KeyError), open_run(tmp_path, resume=True) as run:  # noqa: PT012  (the caller finds no run)
        assert not run.fresh
        raise KeyError
    assert names(tmp_path) == sorted(content)


def test_overwrite_never_takes_home_or_here_or_what_holds_them(tmp_path, monkeypatch):
    out = tmp_path / "run"
    begin(out)
    (out / "inside").mkdir()
    for name in ("cwd", "home"):
        place = {"cwd": tmp_path, "home": tmp_path} | {name: out / "inside"}
        monkeypatch.chdir(place["cwd"])
        monkeypatch.setenv("HOME", str(place["home"]))
        with pytest.raises(ConfigError, match=r"inside would be removed with it"):
            begin(out, overwrite=True)
    with pytest.raises(ConfigError, match="would be removed with it"):
        begin(Path("/"), overwrite=True)
    assert "env.json" in names(out)


def test_overwrite_follows_no_link(tmp_path):
    out, other = tmp_path / "run", tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").touch()
    begin(out)
    (out / "photos").symlink_to(other)
    (out / "a.jpg").symlink_to(other / "a.jpg")
    begin(out, overwrite=True)
    assert names(other) == ["a.jpg"]
    assert names(out) == ["config.py", "env.json"]
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(ConfigError, match="does not look like a run"):
        begin(tmp_path / "link", overwrite=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "away")
    with pytest.raises(ConfigError, match="cannot create the folder"):
        begin(tmp_path / "nowhere")


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path, options):
    out = tmp_path / "run"
    begin(out)
    with open_run(out, resume=True) as run:
        run.begin()
        code = "from tests.test_folders import *\nbegin(Path(sys.argv[1]), **json.loads(sys.argv[2]))"
        argv = [sys.executable, "-c", code, str(out), json.dumps(options)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} on {HOST} is writing to it" in done.stderr
        with pytest.raises(ConfigError, match="is in use"), hold(out):  # in the same process, too
            pass
    assert names(out) == ["config.py", "env.json"]
    with hold(out):
        pass


def test_a_killed_process_leaves_no_lock_and_its_data_workers_hold_none(tmp_path):
    out = tmp_path / "run"
    code = "held = open_run(out); held.__enter__()\nif os.fork() == 0:\n    import time; time.sleep(3); os._exit(0)"
    killed(code, out)
    assert names(out) == [LOCK]
    began = time.monotonic()
    begin(out)
    assert time.monotonic() - began < 2
    assert names(out) == ["config.py", "env.json"]


def test_killed_before_it_began_a_run_starts_again_with_or_without_resume(tmp_path, capsys):
    for options in ({}, {"resume": True}, {"overwrite": True}):
        out = tmp_path / f"run{len(options)}{'resume' in options}"
        killed("held = open_run(out); held.__enter__(); (out / 'log').mkdir()", out)
        begin(out, **options)
        assert names(out) == ["config.py", "env.json"]
    assert "starts again at step 0" in capsys.readouterr().out


def test_killed_while_it_replaced_a_run_nothing_of_the_old_one_is_resumed(tmp_path):
    begin(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    code = (
        "import tinymim.folders as f\n"
        "def kill(*_): os.kill(os.getpid(), 9)\n"
        "f.shutil.rmtree = kill\n"
        "with open_run(out, overwrite=True) as run: run.begin()"
    )
    killed(code, tmp_path)
    assert names(tmp_path) == [LOCK, "checkpoints"]
    with open_run(tmp_path, resume=True) as run:
        assert run.fresh
        run.begin()
    assert names(tmp_path) == []


def test_part_files_of_the_dead_go_and_of_the_living_stay(tmp_path):
    out = tmp_path / "run"
    begin(out)
    (out / "checkpoints").mkdir()
    killed("part = atomic_path(out / 'checkpoints' / 'step_1.pth'); part.__enter__().write_text('x')", out)
    with subprocess.Popen(["sleep", "5"]) as other:
        old, young = time.time() - 90_000, time.time() + 5
        files = {
            f".a.{other.pid}.{HOST}.part": (young, True),
            f".b.{other.pid}.part": (old, False),  # older than the process that has its number now
            f".c.{os.getpid()}.{HOST}.part": (young, False),  # our own number, in an earlier life
            ".d.1.another-host.part": (young, True),
            ".e.1.another-host.part": (old, False),
            ".f.99999999999999999999.part": (young, False),
            "g.12.part": (old, True),  # not our pattern
            ".h.part": (old, True),
        }
        for name, (when, _) in files.items():
            (out / name).write_text("x")
            os.utime(out / name, (when, when))
        (out / f".i.{2**22 + 1}.part").symlink_to(tmp_path)
        begin(out, resume=True)
        kept = [name for name, (_, stays) in files.items() if stays]
        assert {p.name for p in out.rglob("*.part")} == {*kept, f".i.{2**22 + 1}.part"}
        other.kill()
    remove_dead_parts(out)
    assert not list(out.glob(".a.*"))


def test_a_file_system_without_locks_is_said_and_works(tmp_path, monkeypatch, capsys):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    begin(tmp_path / "run")
    assert "cannot be locked" in capsys.readouterr().out
    assert names(tmp_path / "run") == ["config.py", "env.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_every_failure_of_the_disk_is_ours_and_keeps_the_old_file(tmp_path, monkeypatch, number, call):
    target = tmp_path / "file.json"
    write_json(target, {"a": 1})

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TinyMIMError, match="cannot write") as caught:
        write_json(target, {"a": 2})
    assert os.strerror(number) in caught.value.why
    assert names(tmp_path) == ["file.json"]
    assert json.loads(target.read_text()) == {"a": 1}
    assert ("space" in caught.value.fix) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_the_disk_has_the_bytes_before_the_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    with atomic_path(tmp_path / "a") as part:
        part.write_text("x")
    assert order == ["fsync", "replace", "fsync"]


def test_a_kill_between_product_and_env_json_accuses_nobody(tmp_path):
    """env.json names the sha256 of a product only while that is the product."""
    with noted_output(tmp_path, "student.pth"):
        write_text(tmp_path / "student.pth", "1")
    first = json.loads((tmp_path / "env.json").read_text())
    assert first == environment() | {"outputs": first["outputs"]}
    killed(
        "with noted_output(out, 'student.pth'): write_text(out / 'student.pth', '2'); os.kill(os.getpid(), 9)", tmp_path
    )
    assert json.loads((tmp_path / "env.json").read_text())["outputs"] == {}
    with noted_output(tmp_path, "student.pth"):
        write_text(tmp_path / "student.pth", "1")
    assert json.loads((tmp_path / "env.json").read_text()) == first


def test_a_folder_that_cannot_be_made_or_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot create the folder"):
        begin(tmp_path / "file" / "run")

    def read_only(path, flags, mode=0o777):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(folders.os, "open", read_only)
    with pytest.raises(ConfigError, match="cannot write to the folder"):
        begin(tmp_path / "new")
