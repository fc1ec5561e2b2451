"""Tokens of a teacher in few bytes: what a store keeps of a view, so that a student is compared as with the teacher.

A relation needs its scores Q K^T only, and after the softmax not even what is the same for a whole row. So the keys
of each head are centred over the tokens, and of the scores the largest singular components are kept: the columns of
U sqrt(S) and V sqrt(S), of V V^T those of the principal axes of V. Each column is rounded to 8, 4 or 2 bits between its
smallest and largest value. What is read by a feature, or by two relations, is kept whole: every token and head rounded
by itself. docs/store_relations.md has what each form costs and loses.

Legend: B = batch, T = tokens, D = width, H = relation heads, C = D / H, R = components of a head.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinymim.distill.targets import Relation, Target
from tinymim.errors import ConfigError
from tinymim.store.layout import Array

WHOLE = ("fp16", "int8", "int4")  # forms that keep every channel
DEFAULT = "4x8+12x4+8x2"
FEATURES = "int8"  # of what is kept whole beside components


@dataclass(frozen=True)
class Entry:
    """A tap, or the pair of a relation, of one block.

    Attributes:
        block: The teacher's, from 1.
        taps: One name, or the two of a relation of different taps.
        form: One of :data:`WHOLE`, or components x bits, the largest first: "4x8+12x4+8x2".
        tokens: T that are kept, the first ones.
        width: D.
        heads: H.
        centred: Whether only differences within a row of scores are kept (enough for a softmax).
    """

    block: int
    taps: tuple[str, ...]
    form: str
    tokens: int
    width: int
    heads: int
    centred: bool

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Components and bits of each, for every head: (C, 8) of int8; empty for fp16."""
        channels = self.width // self.heads
        whole: dict[str, list[tuple[int, int]]] = {"fp16": [], "int8": [(channels, 8)], "int4": [(channels, 4)]}
        return whole[self.form] if self.form in whole else parse_form(self.form)

    def arrays(self) -> list[Array]:
        """What a record holds of it."""
        if self.form == "fp16":
            return [Array(f"b{self.block}_{tap}", "float16", (self.tokens, self.width)) for tap in self.taps]
        width = self.heads * sum(count * bits // 8 for count, bits in self.parts)
        columns = self.tokens if self.form in WHOLE else sum(count for count, _ in self.parts)
        return [
            array
            for tap in self.taps
            for array in (
                Array(f"b{self.block}_{tap}", "uint8", (self.tokens, width)),
                Array(f"b{self.block}_{tap}_range", "float16", (2, self.heads, columns)),
            )
        ]

    def encode(self, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tap -> (B, T, D) becomes array -> (B, ...), of the shapes and types of :meth:`arrays`."""
        given = {name: taps[name][:, : self.tokens].float() for name in self.taps}
        if self.form == "fp16":
            return {f"b{self.block}_{name}": x_BTD.half() for name, x_BTD in given.items()}
        heads = {name: x_BTD.unflatten(2, (self.heads, -1)).transpose(1, 2) for name, x_BTD in given.items()}
        if self.form not in WHOLE:
            rank = sum(count for count, _ in self.parts)
            first, second = heads[self.taps[0]], heads[self.taps[-1]] if len(self.taps) == 2 else None
            heads = dict(zip(self.taps, components(first, second, rank, centred=self.centred), strict=True))
        out: dict[str, Tensor] = {}
        for name, x_BHTR in heads.items():
            out[f"b{self.block}_{name}"], out[f"b{self.block}_{name}_range"] = self._round(x_BHTR)
        return out

    def decode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What :meth:`encode` gave -> tap -> float32 (B, T, H * R), whose relations in H heads are those of the tap."""
        out: dict[str, Tensor] = {}
        for tap in self.taps:
            codes = arrays[f"b{self.block}_{tap}"]
            if self.form == "fp16":
                out[tap] = codes.float()
                continue
            low, step = self._axes(arrays[f"b{self.block}_{tap}_range"].float()).unbind(1)  # (B, H, T or 1, R or 1)
            x_BHTR = unpack(codes.unflatten(2, (self.heads, -1)), self.parts).transpose(1, 2) * step + low
            if self.form not in WHOLE:  # scores are divided by sqrt(R), and these by sqrt(C)
                x_BHTR = x_BHTR * (x_BHTR.shape[3] * self.heads / self.width) ** 0.25
            out[tap] = x_BHTR.transpose(1, 2).flatten(2)
        return out

    def _axes(self, range_B2HX: Tensor) -> Tensor:
        """Lows and steps in the shape of tokens: a range for each token (whole), or for each component."""
        return range_B2HX[..., None] if self.form in WHOLE else range_B2HX[:, :, :, None]

    def _round(self, x_BHTR: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, T, bytes) and ranges, low and step, (B, 2, H, T or R)."""
        axis = 3 if self.form in WHOLE else 2
        bits = torch.cat([x_BHTR.new_full((count,), 2**bits - 1) for count, bits in self.parts])
        most_R = bits[:1] if self.form in WHOLE else bits
        low, high = x_BHTR.amin(axis), x_BHTR.amax(axis)
        low = low.half().float()
        step = ((high - low) / most_R).clamp_min(1e-7).half().float().clamp_min(2.0**-24)
        range_B2HX = torch.stack([low, step], 1)
        low, step = self._axes(range_B2HX).unbind(1)
        codes = ((x_BHTR - low) / step).round_().clamp_(min=0).minimum(bits).to(torch.uint8)
        return pack(codes.transpose(1, 2), self.parts).flatten(2), range_B2HX.half()


def components(a_BHTC: Tensor, b_BHTC: Tensor | None, rank: int, *, centred: bool) -> list[Tensor]:
    """Factors (B, H, T, R) of the scores A B^T, of which they keep the R largest singular components.

    Args:
        a_BHTC: A.
        b_BHTC: B; None: A, then there is one factor F and F F^T are the scores.
        rank: R, at most C; smaller where there are fewer.
        centred: Subtract from B its mean over the tokens: the scores change by a constant in each row. (A single
            factor is not centred.)
    """
    with one_thread():
        return _components(a_BHTC.double(), None if b_BHTC is None else b_BHTC.double(), rank, centred)


def _components(a: Tensor, b: Tensor | None, rank: int, centred: bool) -> list[Tensor]:
    if b is None:
        axes = torch.linalg.eigh(a.mT @ a)[1].flip(-1)[..., :rank]
        return [(a @ axes).float()]
    b = b - b.mean(2, keepdim=True) if centred else b
    power, basis = torch.linalg.eigh(b.mT @ b)  # B = P sqrt(power) basis^T with orthonormal P
    root = power.clamp_min(0).sqrt()
    left = a @ basis * root[..., None, :]  # A B^T = left P^T
    square, axes = torch.linalg.eigh(left.mT @ left)
    singular, axes = square.clamp_min(0).flip(-1)[..., :rank].sqrt(), axes.flip(-1)[..., :rank]
    inverse = torch.where(root > root.amax(-1, keepdim=True) * 1e-7, 1 / root, 0.0)
    right = b @ (basis * inverse[..., None, :]) @ axes
    half = singular.sqrt()[..., None, :]
    return [torch.where(half > 0, left @ axes / half, 0.0).float(), (right * half).float()]


@contextmanager
def one_thread() -> Iterator[None]:
    """Eigenvectors of many small matrices: on a busy machine LAPACK's threads wait for each other (measured: 0.25 s
    became 30 s), and on a free one they gain nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pack(codes: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    """Codes (..., R) of several widths in bits -> uint8 (..., bytes)."""
    out = []
    for part, (_, bits) in zip(codes.split([count for count, _ in parts], -1), parts, strict=True):
        each = part.unflatten(-1, (-1, 8 // bits))
        shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
        out.append((each << shifts).sum(-1).to(torch.uint8))
    return torch.cat(out, -1)


def unpack(packed: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    """:func:`pack` undone, as float32 (..., R)."""
    out = []
    for part, (_, bits) in zip(packed.split([count * bits // 8 for count, bits in parts], -1), parts, strict=True):
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        out.append(((part[..., None] >> shifts) & (2**bits - 1)).flatten(-2).float())
    return torch.cat(out, -1)


def parse_form(form: str) -> list[tuple[int, int]]:
    """ "8x8+24x4" -> [(8, 8), (24, 4)].

    Raises:
        ConfigError: it is no such sum, or components that do not fill bytes.
    """
    found = [re.fullmatch(r"(\d{1,4})x([248])", part) for part in form.split("+")]
    parts = [(int(each[1]), int(each[2])) for each in found if each]
    if len(parts) < len(found) or any(count < 1 or count * bits % 8 for count, bits in parts):
        raise ConfigError(
            f"the form {form!r}",
            f"it is {', '.join(WHOLE)}, or components x bits (8, 4 or 2) that fill bytes, the largest first",
            f"e.g. --form {DEFAULT}: of each head 4 components in 8 bits, 12 in 4 and 8 in 2",
        )
    return parts


def plan_entries(
    targets: Iterable[Target], form: str, *, tokens: int, width: int, heads: int, centred: bool
) -> list[Entry]:
    """What is kept for targets: components of relations, the rest whole.

    Args:
        targets: What a student will be compared with.
        form: Of relations; one of :data:`WHOLE` keeps everything in it.
        tokens: T.
        width: D.
        heads: H.
        centred: See :class:`Entry`.

    Raises:
        ConfigError: an unknown form, or more components than a head has channels.
    """
    asked = [*targets]
    count = 0 if form in WHOLE else sum(count for count, _ in parse_form(form))
    if count > width // heads:
        raise ConfigError(
            f"the form {form} has {count} components",
            f"a head of this teacher has {width // heads} channels",
            f"choose fewer, or --form {FEATURES}",
        )
    blocks = dict.fromkeys(target.teacher_block for target in asked)
    out: list[Entry] = []
    for block in blocks:
        of = [target for target in asked if target.teacher_block == block]
        pairs = dict.fromkeys(
            tuple(dict.fromkeys(part)) for target in of if isinstance(target, Relation) for part in target.parts
        )
        whole = {tap for target in of if not isinstance(target, Relation) for tap in target.taps}
        whole |= {tap for pair in pairs for tap in pair if sum(tap in other for other in pairs) > 1 or form in WHOLE}
        while more := {tap for pair in pairs if {*pair} & whole for tap in pair} - whole:
            whole |= more
        given: dict[str, Any] = dict(block=block, tokens=tokens, width=width, heads=heads, centred=False)
        out += [Entry(taps=pair, form=form, **{**given, "centred": centred}) for pair in pairs if not {*pair} & whole]
        first = {tap for tap in whole if all(tap not in t.taps or not t.patches for t in of)}  # the class token only
        own = form if form in WHOLE else FEATURES
        out += [
            replace(Entry(taps=(tap,), form=own, **given), tokens=1 if tap in first else tokens)
            for tap in dict.fromkeys(tap for target in of for tap in target.taps)
            if tap in whole
        ]
    return out


def arrays_of(entries: Iterable[Entry]) -> list[Array]:
    """What a record holds: the seed of the view, and the arrays of the entries."""
    return [Array("seed", "int32"), *(array for entry in entries for array in entry.arrays())]


def entries_of(header: Mapping[str, Any]) -> list[Entry]:
    """The entries that ``relations`` of a header names."""
    shared: dict[str, Any] = dict(width=header["width"], heads=header["heads"])
    return [
        Entry(
            each["block"],
            tuple(each["taps"]),
            each["form"],
            each["tokens"],
            centred=each["form"] not in WHOLE and header["softmax"],
            **shared,
        )
        for each in header["entries"]
    ]
