"""Seeded damage: bytes, texts, JSON values, the metadata of an .onnx, the meta of a .pth."""

import json
import math
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCRIPT = "<script>alert(1)</script>\"'&|\n\x1b[2J\u20ac"
BAD: list[Any] = [None, True, -1, 0, 1, 2**31, 10**30, -(10**18), 1e308, math.nan, math.inf, "", "x", SCRIPT, "\ud800"]
BAD += [[], {}, [[]], {"a": {}}, "9" * 400, "../../../../etc/passwd", "x" * 300_000, [0] * 100_000, ["x"], {"kind": 1}]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, blank, repeat, or replace."""
    n = len(data)
    ways: list[Callable[[], bytes]] = [
        lambda: data[: rng.randrange(n + 1)],
        lambda: data[: max(n - rng.randrange(1, 64), 0)],
        lambda: data[rng.randrange(n + 1) :],
        lambda: b"",
        lambda: _flipped(data, rng, 1),
        lambda: _flipped(data, rng, 64),
        lambda: _blank(data, rng),
        lambda: data + bytes(rng.randrange(1, 4096)),
        lambda: data + data,
        lambda: b"\0" * n,
        lambda: rng.randbytes(min(n, 4096)),
        lambda: rng.choice((b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\x80\x02", b"GIF89a")) + data[8:],
    ]
    return rng.choice(ways)()


def _flipped(data: bytes, rng: random.Random, count: int) -> bytes:
    out = bytearray(data)
    for _ in range(count if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _blank(data: bytes, rng: random.Random) -> bytes:
    at, many = rng.randrange(len(data) + 1), rng.randrange(1, 512)
    return data[:at] + bytes(len(data[at : at + many])) + data[at + many :]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    for key, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list) and item:
            yield from places(item)


def damage_value(value: Any, rng: random.Random) -> Any:
    """Another value of the same outline: a key less, another type, a huge number, a deep nest."""
    value = json.loads(json.dumps(value, default=str))
    if not isinstance(value, dict | list) or not value or rng.random() < 0.08:
        return rng.choice(BAD)
    inside, key = rng.choice(list(places(value)))
    way = rng.randrange(6)
    if way == 0 and isinstance(inside, dict):
        del inside[key]
    elif way == 1 and isinstance(inside, dict):
        inside[rng.choice((SCRIPT, "", "__class__", "x" * 1000))] = inside.pop(key)
    elif way == 2:
        deep: Any = 1
        for _ in range(rng.choice((40, 300))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        inside[key] = deep
    else:
        inside[key] = rng.choice(BAD)
    return value


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with another value, a key twice, another encoding, or damaged bytes."""
    way = rng.random()
    if way < 0.2:
        return damage_bytes(data, rng)
    text = data.decode("utf-8")
    if way < 0.25:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp037")))
    if way < 0.3:
        at = text.find("{") + 1
        return (text[:at] + '"kind": 1, "kind": 2, "a": {}, "a": [],' + text[at:]).encode()
    if way < 0.33:
        return b"[" * 200_000
    return json.dumps(damage_value(json.loads(text), rng)).encode("utf-8")


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """A .jsonl file with one damaged line, or damaged bytes."""
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    rows = data.splitlines(keepends=True)
    at = rng.randrange(len(rows))
    rows[at] = damage_json(rows[at].strip(), rng) + b"\n"
    return b"".join(rows)


def damage_text(data: bytes, rng: random.Random) -> bytes:
    """A text file with a damaged line."""
    if rng.random() < 0.4:
        return damage_bytes(data, rng)
    rows = data.splitlines(keepends=True)
    at = rng.randrange(len(rows))
    extra = rng.choice(
        (b"(" * 5000, b"x = " + b"9" * 5000, SCRIPT.encode(), b"\xff\xfe", b"import os; os.abort()", b"\0")
    )
    rows[at : at + rng.randrange(2)] = [extra + b"\n"]
    return b"".join(rows)


def damage_onnx(data: bytes, rng: random.Random) -> bytes:
    """An .onnx with damaged metadata, or damaged bytes."""
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    import onnx

    proto = onnx.load_from_string(data)
    prop = rng.choice([prop for prop in proto.metadata_props if prop.key.startswith("tinymim.")])
    text = damage_json(prop.value.encode(), rng).decode("utf-8", "replace")
    prop.value = text
    return proto.SerializeToString()


def damage_pth(data: bytes, rng: random.Random) -> bytes:
    """A .pth with damaged meta, or damaged bytes."""
    if rng.random() < 0.4:
        return damage_bytes(data, rng)
    import io

    import torch

    try:
        content = torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError:  # MMEngine's checkpoints hold more than tensors
        return damage_bytes(data, rng)
    key = rng.choice(("meta", "meta", "meta", "top", "tensor"))
    if key == "meta" and isinstance(content.get("meta"), dict):
        content["meta"] = damage_value(content["meta"], rng)
    elif key == "top":
        content = damage_value({k: "x" for k in content}, rng)
    else:
        state = content.get("state_dict") or content.get("model") or content
        name = rng.choice([k for k, v in state.items() if isinstance(v, torch.Tensor)] or list(state))
        bad = (torch.zeros(3, 3), torch.full((2,), math.nan), "x", None, torch.zeros(0))
        state[name] = rng.choice(bad)
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


BY_NAME: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".py": damage_text,
    ".onnx": damage_onnx,
    ".pth": damage_pth,
}


def damage(path: Path, rng: random.Random) -> None:
    """Damage a file in place, in a way that fits its kind."""
    path.write_bytes(BY_NAME.get(path.suffix, damage_bytes)(path.read_bytes(), rng))
