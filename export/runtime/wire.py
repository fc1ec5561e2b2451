"""The wire format of protobuf, as far as .onnx files need it where the package onnx is not installed.

A message is a row of fields: a key (number and wire type), then a varint, 8 or 4 bytes, or a length and so many bytes.
Source: https://protobuf.dev/programming-guides/encoding
"""

from collections.abc import Iterator
from typing import BinaryIO

LENGTH = 2  # wire type of strings, bytes and messages
FIXED = {1: 8, 5: 4}  # wire type -> bytes


class NotProtobuf(ValueError):
    """Bytes that are no protobuf message."""


def fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of every field: bytes, or an int where it is a varint.

    Raises:
        NotProtobuf: damaged.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == LENGTH:
            size, at = _varint(message, at)
        elif kind in FIXED:
            size = FIXED[kind]
        else:
            raise NotProtobuf(f"wire type {kind}")
        if at + size > len(message):
            raise NotProtobuf("it ends in the middle of a field")
        yield number, message[at : at + size]
        at += size


def wire_field(number: int, value: bytes | str | int) -> bytes:
    """One field as bytes: a varint, or something with a length."""
    if isinstance(value, int):
        return _to_varint(number << 3) + _to_varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _to_varint(number << 3 | LENGTH) + _to_varint(len(data)) + data


def spans(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of every top-level field of an open file of ``size`` bytes, its key included.

    Raises:
        NotProtobuf: damaged.
    """
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(20)  # the longest key and length
        key, used = _varint(head, 0)
        kind = key & 7
        if kind == 0:
            _, used = _varint(head, used)
        elif kind == LENGTH:
            length, used = _varint(head, used)
            used += length
        elif kind in FIXED:
            used += FIXED[kind]
        else:
            raise NotProtobuf(f"wire type {kind}")
        if at + used > size:
            raise NotProtobuf("it ends in the middle of a field")
        yield key >> 3, at, at + used
        at += used


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise NotProtobuf("it ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise NotProtobuf("a number of more than ten bytes")


def _to_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
