"""Drawn scenes with exact labels: the data of ``tinymim demo`` without your own photos. NumPy and Pillow only.

The twelve classes share colours on purpose (sky and water, grass, crops and leaves, asphalt, rock and plaster), so a
model must use texture, shape and position. Every scene is a function of (seed, split, number).

Legend: H, W = photo size in pixels; m = pixels per metre where an object stands.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tinymim.demo.canvas import Canvas, Points, box, trapeze
from tinymim.errors import DataError
from tinymim.files import write_json

CLASSES = ("sky", "mountain", "grass", "crops", "water", "road", "house", "wall", "tree", "car", "balloon", "sign")
PALETTE = (
    (120, 180, 235),
    (132, 122, 140),
    (116, 186, 88),
    (214, 190, 72),
    (44, 110, 196),
    (96, 96, 104),
    (226, 142, 92),
    (164, 76, 60),
    (34, 112, 62),
    (206, 48, 60),
    (232, 96, 196),
    (246, 232, 120),
)
SKY, MOUNTAIN, GRASS, CROPS, WATER, ROAD, HOUSE, WALL, TREE, CAR, BALLOON, SIGN = range(12)
NOTHING = None  # paint without touching the label: shadows

VIVID = ((204, 52, 44), (228, 146, 38), (44, 104, 184), (240, 214, 84), (52, 132, 78), (150, 62, 140), (236, 236, 232))
PLASTER = ((222, 206, 176), (196, 170, 140), (176, 182, 188), (214, 160, 132), (160, 176, 150), (232, 228, 220))
BRICK = ((158, 78, 60), (140, 92, 74), (172, 104, 78), (126, 118, 112))
TILES = ((150, 74, 56), (104, 76, 70), (90, 96, 108), (128, 58, 48))
GREENS = ((92, 138, 58), (112, 150, 70), (76, 118, 52), (138, 152, 78), (84, 128, 76))
LEAVES = (*GREENS, (58, 98, 48), (168, 124, 48), (52, 92, 62))
STRAW = ((186, 164, 84), (150, 160, 76), (128, 148, 62), (204, 178, 104), (142, 116, 76))
ROCK = ((112, 110, 122), (128, 116, 108), (94, 108, 118), (104, 120, 98))


def draw_scene(width: int, height: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Returns:
        Photo (H, W, 3) uint8 and label (H, W) uint8, ids into ``CLASSES``.
    """
    canvas = Canvas(width, height, rng)
    _sky(canvas)
    if rng.random() < 0.6:
        _mountains(canvas)
    _ground(canvas)
    ground_HW, span = canvas.label_HW.copy(), height - canvas.horizon
    things = rng.permutation(np.repeat(np.arange(len(THINGS)), 3))
    for depth, i in zip(sorted(rng.uniform(0.1, 0.92, rng.integers(4, 8))), things, strict=False):
        thing, likes = THINGS[i]
        y, places = canvas.horizon + span * depth, rng.uniform(0.04, 0.96, 6) * width
        liked = [likes.get(int(ground_HW[int(y), int(x)]), 1) for x in places]
        canvas.fade = 0.3 * math.exp(-6 * depth)
        if max(liked) > 0:
            thing(canvas, places[int(np.argmax(liked))], y)
    return _camera(canvas), canvas.label_HW


def _sky(c: Canvas) -> None:
    fall = np.clip(c.y_HW / c.horizon, 0, 1)[..., None]
    c.photo_HW3[:] = c.top + (c.haze - c.top) * fall
    clouds = np.clip(c.noise(4, 3, 4) - c.rng.uniform(0.0, 1.6), 0, 1) * 0.8
    c.paint(c.spread(clouds), np.array((246, 244, 242), np.float32), SKY, 0.96 + 0.06 * c.noise(6, 5, 2))
    for _ in range(c.rng.choice(3, p=(0.4, 0.42, 0.18))):
        _balloon(c)


def _balloon(c: Canvas) -> None:
    r = c.height * c.rng.uniform(0.08, 0.17)
    x, y = c.rng.uniform(0.05, 0.95) * c.width, c.rng.uniform(0.1, 0.75) * c.horizon
    first, second = c.pick(VIVID), c.pick(VIVID)
    across, down = np.clip((c.x_HW - x) / r, -1, 1), (c.y_HW - y) / r
    stripes = np.sin(np.arcsin(across) * c.rng.integers(3, 6) * 2) > 0
    if c.rng.random() < 0.4:
        stripes ^= np.sin(down * 6) > 0
    coat = np.where(stripes[..., None], first, second)
    mouth = trapeze(x, y + 0.8 * r, 0.5 * r, y + 1.45 * r, 0.16 * r)
    c.paint(c.shape(mouth, ellipses=((x, y, r, r * 1.05),)), coat, BALLOON, 0.92 + 0.2 * c.sun * across)
    basket = trapeze(x, y + 1.5 * r, 0.2 * r, y + 1.85 * r, 0.17 * r)
    c.paint(c.shape(basket), np.array((110, 78, 48), np.float32), BALLOON)


def _mountains(c: Canvas) -> None:
    for far in sorted(c.rng.uniform(0.1, 0.75, c.rng.integers(1, 3)), reverse=True):
        ridge = c.hills(c.horizon + 2, c.height * c.rng.uniform(0.1, 0.3) * (0.6 + far), 0.52)
        rock = c.pick(ROCK) * (1 - far * 0.7) + c.haze * far * 0.7
        folds = 1 + 0.13 * (1 - far) * c.noise(14, 9, 3) + 0.05 * c.sun
        snow = np.clip((ridge.min() + 0.06 * c.height - c.y_HW) / 3 + c.noise(10, 10, 2), 0, 1)[..., None] * (far > 0.4)
        c.paint(c.below(ridge), rock + (240 - rock) * 0.8 * snow, MOUNTAIN, folds)


def _ground(c: Canvas) -> None:
    edge = c.horizon + c.hills(0, c.height * 0.03)
    _, land_HW = c.below(edge)
    _cover(c, land_HW, c.rng.choice((GRASS, GRASS, CROPS, WATER)))
    if c.rng.random() < 0.75:  # a second patch: a shore or field edge that runs to one side or across
        t = c.depth()
        bend = 0.15 * c.noise(3, 3, 1)
        if c.rng.random() < 0.5:
            side = (c.x_HW - c.vanish) / c.width * c.rng.choice((-1, 1)) - c.rng.uniform(-0.5, 0.5) * t + bend * t
        else:
            side = (t - c.rng.uniform(0.12, 0.6)) + 0.5 * bend
        _cover(c, land_HW * np.clip(side * c.width / 3 + 0.5, 0, 1), c.rng.choice((GRASS, CROPS, CROPS, WATER)))
    if c.rng.random() < 0.62:
        _road(c)
    haze_HW = 0.3 * np.exp(-6 * c.depth()) * land_HW
    c.photo_HW3 += haze_HW[..., None] * (c.haze - c.photo_HW3)


def _cover(c: Canvas, alpha: np.ndarray, kind: int) -> None:
    t, area = c.depth(), c.spread(alpha)
    if kind == GRASS:
        c.paint(area, c.pick(GREENS), GRASS, 0.9 + 0.16 * c.noise(c.height / 5, c.width / 3, 2) + 0.08 * c.patches_HW)
    elif kind == CROPS:  # furrows that meet at the vanishing point
        across = (c.x_HW - c.vanish) / (t * c.width + 0.05 * c.width)
        wave = np.sin(across * c.rng.uniform(16, 30) + 0.35 * c.noise(8, 6, 2))
        tone = c.pick(STRAW) + (wave[..., None] > 0.2) * (c.pick(GREENS) - c.pick(STRAW)) * 0.55
        c.paint(area, tone, CROPS, 0.96 + 0.13 * wave * np.clip(t * 5, 0, 1) + 0.08 * c.grain_HW)
    else:  # water that mirrors the sky, in streaks that get narrower towards the horizon
        mirror = (c.haze + (c.top - c.haze) * t[..., None] * 0.9) * 0.82 - (8, 0, -4)
        streaks = c.noise(c.height / 4, 4, 2) * (0.35 + 0.65 * t) + 0.6 * c.noise(c.height / 2, 9, 1) * (1 - 0.8 * t)
        c.paint(area, mirror.astype(np.float32), WATER, 0.95 + 0.11 * streaks)


def _road(c: Canvas) -> None:
    near, width = c.width * c.rng.uniform(0.0, 1.0), c.width * c.rng.uniform(0.16, 0.36)
    t = c.depth()
    bend = c.rng.uniform(-0.3, 0.3) * c.width * t * (1 - t)
    centre, half = c.vanish + (near - c.vanish) * t + bend, width * t + 0.6
    if c.rng.random() < 0.3:  # a road that crosses the picture
        level = c.rng.uniform(0.25, 0.75)
        depth, centre = c.rng.uniform(0.09, 0.2), level + 0.06 * (c.x_HW / c.width - 0.5)
        across = (t - centre) / depth
        alpha = np.clip((1 - np.abs(across)) * depth * (c.height - c.horizon) + 0.5, 0, 1) * (t > 0.02)
        dashes = np.sin(c.x_HW / c.width * 60) > 0
    else:
        across = (c.x_HW - centre) / half
        alpha = np.clip((1 - np.abs(across)) * half + 0.5, 0, 1) * (t > 0.015)
        dashes = np.sin(9 * np.log(t + 0.03)) > 0
    tone = c.pick(((104, 104, 108), (126, 120, 114), (88, 92, 100)), 10)
    c.paint(c.spread(alpha), tone, ROAD, 0.98 + 0.06 * c.noise(c.height / 2, c.width / 2, 1) + 0.05 * c.patches_HW)
    paint = np.array((228, 224, 208), np.float32)
    c.paint(c.spread(alpha * (np.abs(across) < 0.06) * dashes), paint, ROAD, opacity=0.85)
    c.paint(c.spread(alpha * (np.abs(np.abs(across) - 0.9) < 0.035)), paint, ROAD, opacity=0.7)


def _shadow(c: Canvas, x: float, y: float, rx: float, ry: float) -> None:
    area = c.shape(ellipses=((x - c.sun * rx * 0.25, y, rx, max(ry, 1.0)),))
    c.paint(area, np.full(3, 26, np.float32), NOTHING, opacity=0.42)


def _bricks(c: Canvas, x: float, y: float, brick: float) -> np.ndarray:
    """Shade (H, W) of brickwork: dark mortar, every second course shifted by half a brick."""
    row = np.floor((c.y_HW - y) / brick)
    along = (c.x_HW - x) / (2.2 * brick) + 0.5 * (row % 2)
    mortar = (((c.y_HW - y) / brick % 1) < 0.22) | ((along % 1) < 0.13)
    tint = np.sin(row * 12.9898 + np.floor(along) * 78.233) * 43758.5453 % 1  # a hash: one tone per brick
    return np.where(mortar, np.float32(0.72), (0.9 + 0.24 * tint).astype(np.float32))


def _house(c: Canvas, x: float, y: float) -> None:
    m = c.size_at(y) * c.rng.uniform(0.8, 1.15)
    w, h, roof = m * c.rng.uniform(0.8, 1.5), m * c.rng.uniform(0.8, 1.5), m * c.rng.uniform(0.35, 0.7)
    _shadow(c, x, y, w * 1.15, m * 0.12)
    brick = c.rng.random() < 0.35
    coat = _bricks(c, x, y, max(2.0, m / 9)) if brick else 1 + 0.05 * c.patches_HW
    lit = 1 + 0.12 * c.sun * np.clip((c.x_HW - x) / w, -1, 1)
    c.paint(c.shape(box(x - w, y - h, x + w, y)), c.pick(BRICK if brick else PLASTER), HOUSE, coat * lit)
    top = trapeze(x, y - h, w * 1.12, y - h - roof, w * 0.55)
    if c.rng.random() < 0.5:
        top = trapeze(x, y - h, w * 1.12, y - h - roof * 1.35, 0)
    courses = 0.94 + 0.12 * np.sin((c.y_HW - y) * 2 * math.pi / max(2.4, m / 7))
    c.paint(c.shape(top), c.pick(TILES), HOUSE, courses * lit)
    glass, frame = np.array((62, 76, 96), np.float32) + c.rng.normal(0, 12), np.full(3, 232, np.float32)
    columns, floors = max(2, round(2.6 * w / m)), max(1, round(1.6 * h / m))
    pane, storey = 2 * w / (columns * 2 + 1), h / (floors + 0.35)
    door = c.rng.integers(columns)
    for i in range(columns):
        for j in range(floors):
            left, high = x - w + pane * (2 * i + 1), y - h + storey * (j + 0.3)
            if j == floors - 1 and i == door:
                c.paint(c.shape(box(left, high, left + pane, y)), c.pick(VIVID) * 0.6, HOUSE)
                continue
            c.paint(c.shape(box(left - 0.6, high - 0.6, left + pane + 0.6, high + storey * 0.5 + 0.6)), frame, HOUSE)
            c.paint(c.shape(box(left, high, left + pane, high + storey * 0.5)), glass, HOUSE)


def _wall(c: Canvas, x: float, y: float) -> None:
    m = c.size_at(y)
    w, h = m * c.rng.uniform(1.4, 3.4), m * c.rng.uniform(0.32, 0.7)
    _shadow(c, x, y, w, m * 0.08)
    stone = _bricks(c, x, y, max(2.2, m / c.rng.uniform(5, 8)))
    c.paint(c.shape(box(x - w, y - h, x + w, y)), c.pick((*BRICK, *PLASTER[:3])), WALL, stone)
    c.paint(c.shape(box(x - w - 1, y - h - m * 0.07, x + w + 1, y - h)), np.full(3, 196, np.float32), WALL)


def _tree(c: Canvas, x: float, y: float) -> None:
    m = c.size_at(y) * c.rng.uniform(0.9, 1.5)
    _shadow(c, x, y, m * 0.8, m * 0.12)
    trunk = box(x - 0.08 * m, y - 0.9 * m, x + 0.08 * m, y)
    c.paint(c.shape(trunk), np.array((92, 70, 52), np.float32) + c.rng.normal(0, 8), TREE)
    leaf = c.pick(LEAVES)
    shade = 0.88 + 0.22 * c.grain_HW + 0.22 * c.sun * np.clip((c.x_HW - x) / m, -1, 1)
    if c.rng.random() < 0.4:  # a fir
        tiers = [
            trapeze(x, y - m * (0.35 + 0.5 * i), m * (0.75 - 0.16 * i), y - m * (1.25 + 0.5 * i), 0) for i in range(4)
        ]
        c.paint(c.shape(*tiers), leaf * 0.85, TREE, shade)
        return
    crown = [
        (x + m * c.rng.uniform(-0.5, 0.5), y - m * c.rng.uniform(0.9, 2.0), *(m * c.rng.uniform(0.36, 0.62, 2)))
        for _ in range(9)
    ]
    c.paint(c.shape(ellipses=crown), leaf, TREE, shade - 0.1 * np.clip((c.y_HW - y + 1.4 * m) / m, -1, 1))


def _car(c: Canvas, x: float, y: float) -> None:
    m = c.size_at(y) * c.rng.uniform(0.75, 0.95)
    way = float(c.rng.choice((-1, 1)))
    _shadow(c, x, y, m * 1.25, m * 0.16)

    def at(*points: tuple[float, float]) -> Points:
        return [(x + way * m * px, y - m * py) for px, py in points]

    roof = c.rng.uniform(0.82, 1.0)
    front, back = ((0.3, roof), (0.62, 0.58), (1.15, 0.48), (1.2, 0.16)), ((-0.95, 0.56), (-0.65, roof))
    body = at((-1.2, 0.16), (-1.2, 0.5), *back, *front)
    lit = 1.08 - 0.28 * np.clip((c.y_HW - y + m * 0.8) / m, 0, 1)
    c.paint(c.shape(body), c.pick(VIVID), CAR, lit)
    glass = np.array((58, 70, 86), np.float32)
    c.paint(c.shape(at((-0.8, 0.58), (-0.58, roof - 0.08), (-0.22, roof - 0.08), (-0.22, 0.58))), glass, CAR)
    c.paint(c.shape(at((-0.12, 0.58), (-0.12, roof - 0.08), (0.25, roof - 0.08), (0.48, 0.58))), glass, CAR)
    wheels = [(x + way * m * px, y - m * 0.17, m * 0.22, m * 0.22) for px in (-0.72, 0.72)]
    c.paint(c.shape(ellipses=wheels), np.full(3, 34, np.float32), CAR)
    hubs = [(wx, wy, rx * 0.45, ry * 0.45) for wx, wy, rx, ry in wheels]
    c.paint(c.shape(ellipses=hubs), np.full(3, 170, np.float32), CAR)


def _sign(c: Canvas, x: float, y: float) -> None:
    m = c.size_at(y) * c.rng.uniform(0.9, 1.3)
    _shadow(c, x, y, m * 0.35, m * 0.07)
    c.paint(c.shape(box(x - 0.05 * m, y - m, x + 0.05 * m, y)), np.full(3, 120, np.float32), SIGN)
    side, mid = m * c.rng.uniform(0.42, 0.62), y - m * 1.35
    first, second = c.pick(VIVID), c.pick(((240, 238, 230), (34, 34, 38)), 6)
    if first.min() > 190:  # white on white would be no sign
        second = 60 - 0.1 * second
    u, v = (c.x_HW - x) / side, (c.y_HW - mid) / side
    pattern = c.rng.integers(3)
    if pattern == 0:  # checkerboard
        marks = (np.floor(u * 2) + np.floor(v * 2)) % 2 == 0
    elif pattern == 1:  # diagonal stripes
        marks = np.sin((u + v) * 5) > 0
    else:  # rings
        marks = np.sin(np.hypot(u, v) * 9) > 0
    disc, square = ((x, mid, side, side),), box(x - side, mid - side, x + side, mid + side)
    board = c.shape(square) if pattern < 2 else c.shape(ellipses=disc)
    c.paint(board, np.where(marks[..., None], first, second), SIGN)


def _camera(c: Canvas) -> np.ndarray:
    """Light, vignette, exposure, sensor noise: photo (H, W, 3) uint8."""
    slope = 1 + 0.07 * c.sun * (c.x_HW / c.width - 0.5)
    corner = np.hypot(c.x_HW / c.width - 0.5, c.y_HW / c.height - 0.5)
    photo = c.photo_HW3 * c.light * (slope * (1.04 - 0.22 * corner**2))[..., None]
    photo = 255 * np.clip(photo / 255, 0, 1.2) ** c.rng.uniform(0.85, 1.2) * c.rng.uniform(0.82, 1.12)
    photo += c.rng.uniform(2, 6) * c.rng.standard_normal(photo.shape, np.float32)
    return np.clip(photo, 0, 255).astype(np.uint8)


# objects on the ground, and their preference for each kind of ground: 0 never, 1 by default, 2 preferred
THINGS: tuple[tuple[Callable[[Canvas, float, float], None], dict[int, int]], ...] = (
    (_house, {WATER: 0, ROAD: 0}),
    (_tree, {WATER: 0, ROAD: 0}),
    (_wall, {WATER: 0, ROAD: 0}),
    (_car, {WATER: 0, ROAD: 2}),
    (_sign, {WATER: 0}),
)


def write_scenes(
    root: str | Path, *, train: int = 480, val: int = 80, size: tuple[int, int] = (160, 128), seed: int = 0
) -> Path:
    """Write a dataset of drawn scenes in ADE20K layout with ``dataset.json``.

    Args:
        root: Folder to fill: ``images/{training,validation}/*.jpg``, ``annotations/{training,validation}/*.png``.
        train: Scenes for training.
        val: Scenes for validation; scene ``i`` of one split never equals scene ``i`` of the other.
        size: Width and height in pixels.
        seed: The same seed and sizes give the same bytes (with the same Pillow and NumPy).

    Returns:
        ``root``.

    Raises:
        DataError: a split without scenes, or scenes smaller than 32 pixels.
    """
    root, (width, height) = Path(root), size
    if min(train, val) < 1 or min(size) < 32:
        raise DataError(
            f"cannot draw {train} + {val} scenes of {width}x{height} pixels",
            "each split needs at least one scene, and the smallest size is 32x32",
            "use more scenes or a larger size",
        )
    for split, (name, count) in enumerate((("training", train), ("validation", val))):
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            photo, label = draw_scene(width, height, np.random.default_rng((seed, split, i)))
            Image.fromarray(photo).save(root / "images" / name / f"scene_{i:05d}.jpg", quality=92)
            mask = Image.fromarray(label)
            mask.save(root / "annotations" / name / f"scene_{i:05d}.png", compress_level=3)
    meta = {"classes": CLASSES, "palette": PALETTE, "ignore": [], "zero_is_ignored": False}
    write_json(root / "dataset.json", meta)
    return root
