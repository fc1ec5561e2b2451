"""``tinymim predict`` on cameras and streams: a video served over HTTP and UDP by the test, and what is not there."""

import contextlib
import functools
import http.server
import socket
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from tinymim import cli
from tinymim.errors import ConfigError, DataError
from tinymim_export.runtime import predict as module
from tinymim_export.runtime.pictures import Video, VideoWriter
from tinymim_export.runtime.predict import predict
from tinymim_export.runtime.streams import Pace, Stream, Window, is_stream, shown, write_rate

FRAMES, SIZE = 12, (48, 64)


class Bright:
    """Stands in for a segmentor file: bright pixels are class 1; ``wait`` seconds a frame."""

    wait, interrupt_at = 0.0, 0

    def __init__(self, file, **_):
        self.engine = SimpleNamespace(sha256="0" * 64, label="onnxruntime cpu")
        self.notes, self.classes, self.palette = [], ["dark", "bright"], [(0, 0, 0), (255, 0, 0)]
        self.stretch, self.mode, self.calls = False, "whole", 0

    def mask(self, photo):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        time.sleep(self.wait)
        return (photo[..., 0] > 127).astype(np.uint8)


@pytest.fixture(autouse=True)
def bright(monkeypatch):
    monkeypatch.setattr(module, "Predictor", Bright)
    monkeypatch.setattr(Bright, "wait", 0.0)
    monkeypatch.setattr(Bright, "interrupt_at", 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    writer = VideoWriter(path, Fraction(10))
    for i in range(FRAMES):
        frame = np.zeros((*SIZE, 3), np.uint8)
        frame[:, : 4 * (i + 1)] = 255
        writer.add(frame)
    writer.close()
    return path


@pytest.fixture
def served(clip):
    """The clip's folder over HTTP, with no lengths: ``/clip.mp4``, and ``/clip.ts`` as a live source sends it."""
    with av.open(str(clip)) as given, av.open(str(clip.with_suffix(".ts")), "w", format="mpegts") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(clip.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.contextmanager
def sending(clip, seconds):
    """The clip again and again as MPEG-TS over UDP, at its own speed, as a camera would; yields its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop = threading.Event()

    def send():
        with av.open(f"udp://127.0.0.1:{port}?pkt_size=1316", "w", format="mpegts") as out:
            stream = out.add_stream("libx264", rate=20, options={"tune": "zerolatency", "g": "4"})
            stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
            end = time.monotonic() + seconds
            while time.monotonic() < end and not stop.is_set():
                frame = np.full((*SIZE, 3), 255, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                time.sleep(0.05)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    yield f"udp://127.0.0.1:{port}?timeout=2000000"
    stop.set()
    thread.join()


def test_a_video_behind_a_url_gives_all_its_frames(served, tmp_path):
    Bright.wait = 0.01
    result = predict("x.onnx", f"{served}/clip.mp4", tmp_path / "masks", quiet=True)
    (row,) = result.rows
    assert (row.frames, row.size, row.source) == (FRAMES, SIZE, f"{served}/clip.mp4")
    first = np.asarray(Image.open(tmp_path / "masks" / "000001.png"))
    assert first.shape == SIZE
    assert abs(int(first.sum()) - 4 * SIZE[0]) <= SIZE[0], "bright pixels of the first frame"
    assert len([*(tmp_path / "masks").iterdir()]) == FRAMES


def test_a_live_source_gives_its_newest_frame_and_counts_the_others(clip, tmp_path, capsys):
    Bright.wait = 0.2  # slower than the 20 frames a second that come
    with sending(clip, 20) as address:
        code = cli.main(["predict", "x.onnx", address, "--out", str(tmp_path / "over.mp4"), "--seconds", "1.2"])
    assert code == 0
    said = capsys.readouterr().out
    assert "came while others were computed" in said
    assert f"--out {tmp_path / 'over.mp4'} --seconds 1.2 --overlay --overwrite" in said
    frames = [*Video(tmp_path / "over.mp4")]
    assert 2 <= len(frames) <= 12
    with av.open(str(tmp_path / "over.mp4")) as made:
        length = made.duration / av.time_base
    assert 0.5 < length < 10, "as long as it was recorded, whatever the rate"
    red, corner = frames[-1][40:, 40:].mean((0, 1)), frames[-1][6:10, 8:30].mean((0, 1))
    assert red[0] > 200
    assert red[2] < 180, "half white, half red"
    assert corner[0] < 150, "the black box with the rate"


def test_ctrl_c_ends_a_stream_and_keeps_what_was_written(clip, tmp_path):
    Bright.interrupt_at = 4
    with sending(clip, 20) as address:
        result = predict("x.onnx", address, tmp_path / "over.mp4", quiet=True)
    assert result.rows[0].frames == 3
    assert "ended by Ctrl-C" in result.notes
    assert len([*Video(tmp_path / "over.mp4")]) == 3
    Bright.interrupt_at = 1
    with sending(clip, 20) as address, pytest.raises(KeyboardInterrupt):
        predict("x.onnx", address, tmp_path / "none.mp4", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["over.mp4"]


def test_a_file_is_interrupted_as_before(clip, tmp_path):
    Bright.interrupt_at = 4
    with pytest.raises(KeyboardInterrupt):
        predict("x.onnx", clip, tmp_path / "over.mp4", quiet=True)
    assert not [*tmp_path.iterdir()]


def test_a_stream_that_ends_is_kept(clip, tmp_path):
    with sending(clip, 1.5) as address:
        result = predict("x.onnx", address, tmp_path / "masks", quiet=True, overlay=True)
    assert result.rows[0].frames >= 2
    assert (tmp_path / "masks" / "000001_overlay.jpg").is_file()


def test_the_rate_is_drawn_into_a_video_only_where_asked(clip, tmp_path):
    for name, rate in (("plain", False), ("rate", True)):
        predict("x.onnx", clip, tmp_path / f"{name}.mp4", quiet=True, rate=rate)
    plain, rate = ([*Video(tmp_path / f"{name}.mp4")] for name in ("plain", "rate"))
    assert len(plain) == len(rate) == FRAMES
    assert np.abs(plain[-1].astype(int) - rate[-1]).max() > 100
    picture = np.full((*SIZE, 3), 200, np.uint8)
    drawn = write_rate(picture, 12.34)
    assert (drawn != picture).any()
    assert (picture == 200).all()


def test_what_is_not_there_is_an_error(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "x.onnx", "97", "--out", "masks"]) == 2
    assert "no camera 97" in capsys.readouterr().err
    for source, words in (
        (f"{served}/none.mp4", "cannot read http"),
        ("http://me:secret@127.0.0.1:9/x", "cannot read http://127.0.0.1:9/x"),
        ("nosuch://x", "cannot read nosuch"),
    ):
        with pytest.raises(DataError, match=words) as raised:
            predict("x.onnx", source, tmp_path / "masks", quiet=True)
        assert "secret" not in str(raised.value)
    for options, words in (
        (dict(out=None), "--out is missing"),
        (dict(out="a.avi"), "cannot become"),
        (dict(out="masks", seconds=0), "--seconds 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            predict("x.onnx", f"{served}/clip.mp4", **options)
    Image.new("RGB", (8, 8)).save("photo.png")
    with pytest.raises(ConfigError, match="--fps does not go with photos"):
        predict("x.onnx", "photo.png", "mask.png", rate=True)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ConfigError, match="--show has no screen"):
        predict("x.onnx", f"{served}/clip.mp4", None, show=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.png"]


def test_a_window_shows_pictures_until_it_is_closed(served, monkeypatch):
    seen = []
    fake = SimpleNamespace(
        WINDOW_NORMAL=0,
        WND_PROP_VISIBLE=4,
        namedWindow=lambda *_: None,
        imshow=lambda title, picture: seen.append(picture.copy()),
        waitKey=lambda ms: ord("q") if len(seen) == 3 else -1,
        getWindowProperty=lambda *_: 1.0,
        destroyWindow=lambda title: seen.append(title),
    )
    monkeypatch.setitem(sys.modules, "cv2", fake)
    monkeypatch.setenv("DISPLAY", ":0")
    result = predict("x.onnx", f"{served}/clip.mp4", None, show=True, quiet=True)
    assert result.rows[0].frames == 3
    assert seen[-1] == Window.title
    assert seen[0].shape == (*SIZE, 3)


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()
    assert [is_stream(text) for text in ("0", "7", "rtsp://a/b", "HTTP://x", "photos", "C:/x", "1.mp4", "²")] == [
        True,
        False,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert shown("rtsp://me:pw@cam/1 failed") == "rtsp://cam/1 failed"
    pace = Pace()
    assert pace.tick() == 0.0
    assert pace.tick() > 0


def test_a_reader_that_stops_early_leaves_no_open_stream(served):
    stream = Stream(f"{served}/clip.mp4")
    for _ in stream:
        break
    with pytest.raises(Exception, match="not open"):
        next(stream.container.decode(video=0))
