"""``tinymim predict``: write masks and overlays of photos and videos. Needs numpy, Pillow and onnxruntime only."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.label_files import save_mask
from tinymim.data.photo_files import list_photos
from tinymim.data.shards import base, matches
from tinymim.errors import CheckFailed, ConfigError, DataError, TinyMIMError
from tinymim.files import atomic_path, environment, write_json, write_text
from tinymim.progress import Progress
from tinymim_export.runtime.pictures import (
    VIDEOS,
    Palette,
    Video,
    VideoWriter,
    blend,
    count_ids,
    overlaid,
    palette_for,
    save_picture,
)
from tinymim_export.runtime.predictor import Predictor, read_photo
from tinymim_export.runtime.streams import Pace, Stream, Window, is_stream, shown, write_rate
from tinymim_export.tables import markdown_table, text_table


@dataclass
class PredictRow:
    """One photo, or one video.

    Attributes:
        source: The photo or video.
        mask: The mask file; for a video, the folder of masks; None if only an overlay was written.
        overlay: The overlay file, or None.
        size: Height and width in pixels.
        frames: Number of frames; 1 for a photo.
        ms: Median time per photo or frame in milliseconds: resize, network, argmax; without reading and writing files.
        share: Class name -> fraction of the pixels, largest first.
    """

    source: str
    mask: str | None
    overlay: str | None
    size: tuple[int, int]
    frames: int
    ms: float
    share: dict[str, float]


@dataclass
class PredictResult:
    """Result of ``tinymim predict``: the files it wrote, times, and skipped photos."""

    file: str
    sha256: str
    engine: str
    mode: str
    rows: list[PredictRow]
    skipped: list[tuple[str, str]]
    notes: list[str]
    environment: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = [vars(row) | {"size": list(row.size)} for row in self.rows]
        skipped = [{"photo": name, "why": why} for name, why in self.skipped]
        return {"kind": "tinymim.predict"} | vars(self) | {"rows": rows, "skipped": skipped}

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to ``path`` if given."""
        if path is not None:
            write_json(path, self.to_dict())
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """One line per photo; written to ``path`` if given."""
        text = markdown_table(self._table())
        if path is not None:
            write_text(path, text)
        return text

    def print(self) -> None:
        """One line per photo (the first 20), notes, and what was skipped."""
        print(text_table(self._table()[:21]))
        if len(self.rows) > 20:
            print(f"... and {len(self.rows) - 20} more")
        for note in self.notes:
            print(f"note: {note}")
        for name, why in self.skipped:
            print(f"skipped: {name} ({why})")
        print(
            f"{Path(self.file).name} ({self.engine}, {self.mode}): {len(self.rows)} written, "
            f"{len(self.skipped)} skipped",
            flush=True,
        )

    def _table(self) -> list[list[str]]:
        lines = [["photo", "size", "ms", "classes"]]
        for row in self.rows:
            largest = ", ".join(f"{name} {100 * part:.1f} %" for name, part in list(row.share.items())[:3])
            frames = f", {row.frames} frames" if row.frames != 1 else ""
            lines.append([Path(row.source).name, f"{row.size[0]}x{row.size[1]}{frames}", f"{row.ms:.1f}", largest])
        return lines


def predict(
    file: str | Path,
    source: str | Path,
    out: str | Path | None,
    *,
    overlay: bool = False,
    alpha: float = 0.5,
    overwrite: bool = False,
    classes: Sequence[str] | None = None,
    quiet: bool = False,
    rate: bool = False,
    show: bool = False,
    seconds: float | None = None,
    **options: Any,
) -> PredictResult:
    """Segment photos and write masks: palette PNGs of class ids at each photo's own size.

    Args:
        file: The .onnx file.
        source: A photo, a folder of photos (searched recursively), a pattern of these, a video, a camera's number, or a
            stream's URL. A camera or a stream goes on until it ends, ``seconds`` are over, or Ctrl-C; all three keep
            what was written.
        out: ``mask.png`` for one photo, else a folder; for a video a folder of mask frames, or ``overlay.mp4``; None:
            only show.
        overlay: Also write the photo with its classes overlaid in colour and a legend below it.
        alpha: Share of colour in the overlay, 0 to 1.
        overwrite: Replace files that exist.
        classes: Class names, for files without any.
        quiet: No progress line.
        rate: Draw frames per second into overlays of a video; always drawn into those of a camera or a stream.
        show: Show a video, camera or stream in a window.
        seconds: End a camera or a stream after this time.
        options: Options of :class:`tinymim_export.runtime.predictor.Predictor`.

    Raises:
        ConfigError: options that do not fit together, or outputs that exist.
        DataError: no photo can be read.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--alpha {alpha} is not possible", "it is the share of colour, 0 to 1", "e.g. --alpha 0.5")
    out, address, live = None if out is None else Path(out), str(source), is_stream(source)
    source = Path(source)
    if not live and not source.exists() and matches(source) is None:
        raise DataError(f"no photo, folder or video at {source}", "it does not exist", "check the path")
    is_video = live or (source.suffix.lower() in VIDEOS and source.is_file())
    _check_video_options(is_video, live, out, rate, show, seconds)
    jobs: list[tuple[Path, Path]] = []
    if is_video:
        if out is not None:
            _check_video_out(None if live else source, out, overwrite)
    else:
        assert out is not None
        jobs = _jobs(source, out)
        _check_photo_out(jobs, overlay, overwrite)
    predictor = Predictor(file, **options)
    if classes is not None:
        if predictor.classes is not None:
            raise ConfigError(
                f"{predictor.name} has its own class names", "they are in its metadata", "leave --classes out"
            )
        predictor.classes = list(classes)
    skipped: list[tuple[str, str]] = []
    if is_video:
        window = Window() if show else None
        frames = Stream(address) if live else Video(source)
        drawn = Drawing(overlay or show or (out is not None and bool(out.suffix)), alpha, rate or live, window, seconds)
        rows = [_video(predictor, frames, shown(address) if live else str(source), out, overlay, drawn, quiet)]
    else:
        rows = _photos(predictor, source, jobs, overlay, alpha, skipped, quiet)
    engine, mode = predictor.engine, "stretched" if predictor.stretch else predictor.mode
    return PredictResult(str(file), engine.sha256, engine.label, mode, rows, skipped, predictor.notes, environment())


def _jobs(source: Path, out: Path) -> list[tuple[Path, Path]]:
    """(photo, mask file) for each photo of ``source``."""
    if source.is_file():
        if out.suffix and out.suffix.lower() != ".png":
            raise ConfigError(
                f"a mask cannot be {out.suffix}", "class ids need a lossless format", "e.g. --out mask.png"
            )
        return [(source, out if out.suffix and not out.is_dir() else out / f"{source.stem}.png")]
    if out.suffix.lower() in (".png", ".jpg", *VIDEOS) or out.is_file():
        raise ConfigError(
            f"{out} is not a folder", f"{source} is a folder and needs one for its masks", "e.g. --out masks"
        )
    top = base(source)
    if top == source and out.resolve().is_relative_to(top.resolve()):
        raise ConfigError(
            f"{out} is inside {source}", "its masks would be read as photos next time", "choose a folder next to it"
        )
    photos = list_photos(source, option="predict", shards=False)
    stems = Counter(photo.with_suffix("") for photo in photos)
    # both a.jpg and a.png: their masks keep the suffix
    names = [photo.stem if stems[photo.with_suffix("")] == 1 else photo.name for photo in photos]
    masks = [out / p.relative_to(top).with_name(f"{name}.png") for p, name in zip(photos, names, strict=True)]
    if clash := [mask for mask, count in Counter(masks).items() if count > 1]:
        both = " and ".join(str(photo) for photo, mask in zip(photos, masks, strict=True) if mask == clash[0])
        raise ConfigError(f"two photos share the mask {clash[0]}", both, "rename one of them")
    return list(zip(photos, masks, strict=True))


def _overlay_path(mask: Path) -> Path:
    return mask.with_name(f"{mask.stem}_overlay.jpg")


def _check_photo_out(jobs: Sequence[tuple[Path, Path]], overlay: bool, overwrite: bool) -> None:
    for photo, mask in jobs:
        for path in (mask, _overlay_path(mask)) if overlay else (mask,):
            if path.exists() and path.samefile(photo):
                raise ConfigError(f"--out is the photo {photo} itself", "it would be lost", "choose another --out")
            _refuse_existing(path, overwrite)


def _check_video_options(
    is_video: bool, live: bool, out: Path | None, rate: bool, show: bool, seconds: float | None
) -> None:
    if out is None and not show:
        raise ConfigError("--out is missing", "nothing would be kept", "e.g. --out masks")
    if not is_video and (rate or show):
        what = "--show" if show else "--fps"
        raise ConfigError(f"{what} does not go with photos", "it is for videos, cameras, streams", "leave it out")
    if seconds is not None and not (live and seconds > 0):
        what, why = f"--seconds {seconds:g} is not possible", "it ends a camera or a stream, after more than no time"
        raise ConfigError(what, why, "leave it out")


def _check_video_out(source: Path | None, out: Path, overwrite: bool) -> None:
    if out.suffix and out.suffix.lower() != ".mp4":
        raise ConfigError(
            f"a video cannot become {out}",
            "it gives an overlay video or a folder of masks",
            "e.g. --out overlay.mp4, or --out masks",
        )
    if source is not None and out.exists() and out.samefile(source):
        raise ConfigError(f"--out is the video {source} itself", "it would be lost", "choose another --out")
    _refuse_existing(out if out.suffix else out / "000001.png", overwrite)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists", "it would be replaced", "add --overwrite, or choose another --out")


def _photos(
    predictor: Predictor,
    source: Path,
    jobs: Sequence[tuple[Path, Path]],
    overlay: bool,
    alpha: float,
    skipped: list[tuple[str, str]],
    quiet: bool,
) -> list[PredictRow]:
    rows: list[PredictRow] = []
    failed: list[TinyMIMError] = []
    progress = None if quiet or len(jobs) == 1 else Progress("predict", len(jobs))
    for done, (path, out) in enumerate(jobs, 1):
        try:
            rows.append(_photo(predictor, path, out, alpha if overlay else None))
        except (DataError, ConfigError, CheckFailed, MemoryError) as error:  # the others may do
            if isinstance(error, MemoryError):
                error = DataError(f"{path} is too large", "it does not fit into the memory", "make the photo smaller")
            failed.append(error)
            unread = error.what.startswith("cannot read")
            skipped.append((str(path), error.why if unread else f"{error.what}: {error.why}"))
        if progress is not None:
            progress.update(done, images=1)
    if progress is not None:
        progress.close()
    if not rows:
        if source.is_file() or not failed[0].what.startswith("cannot read"):
            raise failed[0]
        raise DataError(f"no photo in {source} can be read", failed[0].why, "copy the photos again")
    return rows


def _photo(predictor: Predictor, path: Path, out: Path, alpha: float | None) -> PredictRow:
    """Segment one photo and write its mask, and its overlay where ``alpha`` is given."""
    photo = read_photo(path)
    began = time.perf_counter()
    mask = predictor.mask(photo)
    ms = 1e3 * (time.perf_counter() - began)
    ranked, palette = _ranked(predictor, count_ids(mask)), _palette(predictor)
    save_mask(mask, out, palette)
    if alpha is not None:
        names = [(f"{name} {_percent(part)}", palette[i]) for i, name, part in ranked]
        save_picture(overlaid(photo, mask, palette, alpha, names), _overlay_path(out))
    over = None if alpha is None else str(_overlay_path(out))
    share = {name: part for _, name, part in ranked}
    return PredictRow(str(path), str(out), over, photo.shape[:2], 1, ms, share)


@dataclass
class Drawing:
    """What is drawn of a video: ``overlays`` at all, ``alpha`` parts of colour, frames per second, in a window."""

    overlays: bool
    alpha: float
    rate: bool
    window: Window | None
    seconds: float | None


def _video(
    predictor: Predictor, video: Video | Stream, name: str, out: Path | None, overlay: bool, how: Drawing, quiet: bool
) -> PredictRow:
    """Write an overlay video if ``out`` is an .mp4, else a folder of masks 000001.png, ... (and overlays)."""
    live = isinstance(video, Stream) and video.live
    progress = None if quiet or not (video.frames or live) else Progress("predict", video.frames)
    times, counts, size, pace = [], np.zeros(256, np.int64), (0, 0), Pace()
    to_mp4, began = out is not None and bool(out.suffix), time.perf_counter()

    def frames() -> Any:
        nonlocal size
        try:
            for i, photo in enumerate(video, 1):
                start = time.perf_counter()
                mask = predictor.mask(photo)
                times.append(1e3 * (time.perf_counter() - start))
                counts[:] += count_ids(mask)
                rate, size, picture = pace.tick(), photo.shape[:2], None
                if how.overlays:
                    picture = blend(photo, mask, _palette(predictor), how.alpha)
                    picture = write_rate(picture, rate) if how.rate else picture
                yield i, picture, mask
                if progress is not None:
                    progress.update(i, images=1)
                over = how.seconds is not None and time.perf_counter() - began >= how.seconds
                if over or (how.window is not None and not how.window.show(picture)):
                    return
        except DataError as error:
            if not (live and times):
                raise
            predictor.notes.append(f"{error.what}: {error.why}")

    with contextlib.ExitStack() as stack:
        if how.window is not None:
            stack.callback(how.window.close)
        writer = None
        if to_mp4:
            writer = VideoWriter(stack.enter_context(atomic_path(out)), video.rate)  # type: ignore[arg-type]
            stack.callback(writer.close)
        try:
            for i, picture, mask in stack.enter_context(contextlib.closing(frames())):
                if writer is not None:
                    writer.add(picture, time.perf_counter() - began if live else None)
                elif out is not None:
                    path = out / f"{i:06d}.png"
                    save_mask(mask, path, _palette(predictor))
                    if overlay:
                        save_picture(picture, _overlay_path(path))
        except KeyboardInterrupt:
            if not (live and times):
                raise
            predictor.notes.append("ended by Ctrl-C")
    if progress is not None:
        progress.close()
    if not times:
        raise DataError(f"{name} holds no frames", "no picture could be decoded", "convert it to .mp4")
    if live and video.dropped:  # type: ignore[union-attr]
        predictor.notes.append(f"{video.dropped} frames of {name} came while others were computed")  # type: ignore[union-attr]
    over = str(out) if out is not None and (to_mp4 or overlay) else None
    share = {name: part for _, name, part in _ranked(predictor, counts)}
    masks = None if to_mp4 or out is None else str(out)
    return PredictRow(name, masks, over, size, len(times), float(np.median(times)), share)


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.005 else "< 1 %"


def _palette(predictor: Predictor) -> Palette:
    palette = predictor.palette or []
    return [*palette, *palette_for(256)[len(palette) :]]


def _ranked(predictor: Predictor, counts: np.ndarray) -> list[tuple[int, str, float]]:
    """(id, name, share of the pixels) of the ids that occur, the largest first."""
    known, total = predictor.classes or [], int(counts.sum())
    names = [known[i] if i < len(known) else f"class {i}" for i in range(256)]
    names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return [(i, names[i], int(counts[i]) / total) for i in order]
