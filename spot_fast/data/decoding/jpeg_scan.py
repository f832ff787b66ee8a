"""Checks that all pixels of a JPEG are in its file, by walking through every Huffman code of every scan.

Decoders fill lost or overwritten data with grey or garbage. The walk finds three signs: a scan ends before all of its
blocks, data is left after the last block, or bits are no code of the file's tables. It adds up code lengths and
decodes no coefficient; refining scans only need to know which ones are zero.

Marker, scan and code are those of ITU-T T.81: B.2 (syntax), F.2.2 (sequential), G.2 (progressive). Not judged are
arithmetic-coded, lossless and hierarchical files, and those that give their height after the pixels.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

from PIL import Image, ImageChops

from spot_fast.data.decoding.jpeg import OTHER_FRAMES

_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_TABLES, _SCAN, _INTERVAL, _END = 0xC4, 0xDA, 0xDD, 0xD9
_SMALL = 2048  # bytes; a smaller scan is always walked through
_ZEROS = bytes(16)
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff+([\xd0-\xd7])")
_PAD = bytes(4096)  # longer than an MCU, so that the walk may read beyond the end
_SLACK = 2  # bytes that a scan may have too few or too many: some encoders end it sloppily
_MOST_DC, _MOST_AC = 11, 10  # bits of a coefficient of 8-bit images
# A table entry packs how many bits to advance (lowest _STEP bits) and by how many coefficients (above).
_BITS, _STEP = 31, 5
_EOB, _BAD = 128, 1024

_SHORT, _EXCESS, _NO_CODE = "data is lost in a scan", "data is left behind a scan", "a scan is overwritten"


@dataclass
class _Component:
    across: int  # blocks in a row, and rows, of a scan of this component alone
    down: int
    horizontal: int  # blocks in an MCU
    vertical: int
    dc_done: bool = False
    left: int = 0  # bit mask of coefficients whose lower bits are still to come
    nonzero: list[int] | None = None  # bit mask of nonzero coefficients of each block


class _Damaged(Exception):
    pass


class _Scanner:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.components: dict[int, _Component] = {}
        self.codes: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
        self.entries: dict[tuple, list[int]] = {}
        self.interval = self.mcus = 0
        self.progressive = False

    def run(self) -> str | None:
        """The damage; None if there is none, or the file is not judged."""
        data, at, scans = self.data, 2, 0
        while at + 4 <= len(data):
            if data[at] != 0xFF:
                at += 1  # decoders skip bytes between segments
                continue
            code = data[at + 1]
            if code in (0x00, 0xFF) or 0xD0 <= code <= 0xD8:
                at += 1
                continue
            if code == _END:
                break
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            segment = data[at + 4 : end]
            if code in OTHER_FRAMES:
                return None
            if code in (*_SEQUENTIAL, _PROGRESSIVE):
                if self.components or not self._frame(segment):
                    return None
                self.progressive = code == _PROGRESSIVE
            elif code == _TABLES:
                self._tables(segment)
            elif code == _INTERVAL:
                self.interval = int.from_bytes(segment[:2], "big")
            elif code == _SCAN:
                found = _END_OF_SCAN.search(data, end)
                stop = len(data) if found is None else found.start()
                self._scan(segment, data[end:stop].rstrip(b"\xff") if found else data[end:stop])
                scans += 1
                end = stop
            at = end
        if scans and any(not component.dc_done or component.left for component in self.components.values()):
            return "a scan is missing"
        return None

    def _frame(self, segment: bytes) -> bool:
        if len(segment) < 6 or segment[0] != 8:
            return False
        height, width = (int.from_bytes(segment[i : i + 2], "big") for i in (1, 3))
        parts = [segment[i : i + 3] for i in range(6, 6 + 3 * segment[5], 3)]
        sizes = [(part[1] >> 4, part[1] & 15) for part in parts if len(part) == 3]
        if not height or not width or not sizes or len(sizes) < segment[5] or not all(map(all, sizes)):
            return False
        most = max(h for h, _ in sizes), max(v for _, v in sizes)
        self.mcus = math.ceil(width / (8 * most[0])) * math.ceil(height / (8 * most[1]))
        for part, (h, v) in zip(parts, sizes, strict=True):
            across = math.ceil(math.ceil(width * h / most[0]) / 8)
            down = math.ceil(math.ceil(height * v / most[1]) / 8)
            self.components[part[0]] = _Component(across, down, h, v)
        return True

    def _tables(self, segment: bytes) -> None:
        at = 0
        while at + 17 <= len(segment):
            counts = segment[at + 1 : at + 17]
            symbols = iter(segment[at + 17 : at + 17 + sum(counts)])
            codes, code = {}, 0
            for length, count in enumerate(counts, 1):
                for symbol in (next(symbols, None) for _ in range(count)):
                    if symbol is None or code >= 1 << length:
                        raise _Damaged("a table of codes makes no sense")
                    codes[code << 16 - length] = length, symbol
                    code += 1
                code <<= 1
            self.codes[segment[at] >> 4, segment[at] & 15] = codes
            self.entries.clear()
            at += 17 + sum(counts)

    def _entry(self, kind: int, number: int, plain: bool = False) -> list[int]:
        """The step for each possible next 16 bits, by the code they begin with; plain: (length, symbol) instead."""
        key = kind, number, plain
        if key not in self.entries:
            if (kind, number) not in self.codes:
                raise _Damaged("a table of codes is missing")
            table = [_BAD << _STEP | 1] * 65536
            for start, (length, symbol) in self.codes[kind, number].items():
                if plain:
                    step = length << 8 | symbol
                else:
                    step = _ac_step(length, symbol) if kind else _dc_step(length, symbol)
                table[start : start + (1 << 16 - length)] = [step] * (1 << 16 - length)
            self.entries[key] = table
        return self.entries[key]

    def _scan(self, header: bytes, coded: bytes) -> None:
        count = header[0] if header else 0
        if len(header) < 4 + 2 * count or not count:
            raise _Damaged("the header of a scan makes no sense")
        chosen = [(self.components.get(header[i]), header[i + 1]) for i in range(1, 1 + 2 * count, 2)]
        if any(component is None for component, _ in chosen):
            raise _Damaged("the header of a scan makes no sense")
        first, last, bits = header[1 + 2 * count : 4 + 2 * count]
        alone = chosen[0][0] if count == 1 else None
        mcus = alone.across * alone.down if alone else self.mcus
        if not self.progressive:
            walk = _Sequential(
                [
                    (self._entry(0, tables >> 4), self._entry(1, tables & 15))
                    for component, tables in chosen
                    for _ in range(_blocks(component, alone))
                ]
            )
            for component, _ in chosen:
                component.dc_done = True
        else:
            walk = self._progressive_walk(chosen, alone, first, last, bits)
        parts = _RESTART.split(coded) if self.interval else [coded]
        for number, done in enumerate(range(0, mcus, self.interval or mcus)):
            if 2 * number >= len(parts):
                raise _Damaged(_SHORT)
            if number and parts[2 * number - 1][0] != 0xD0 + (number - 1) % 8:
                raise _Damaged("restart markers are missing")
            walk.part(parts[2 * number].replace(b"\xff\x00", b"\xff"), done, min(self.interval or mcus, mcus - done))
        if self.interval and len(parts) // 2 + 1 > math.ceil(mcus / self.interval) + 1:
            raise _Damaged(_EXCESS)

    def _progressive_walk(self, chosen, alone: _Component | None, first: int, last: int, bits: int):
        refining, low = bits >> 4, bits & 15
        if not first:
            for component, _ in chosen:
                component.dc_done = True
                component.left = component.left & ~1 | bool(low)
            if refining:
                return _Bits(sum(_blocks(component, alone) for component, _ in chosen))
            return _First(
                [self._entry(0, tables >> 4) for component, tables in chosen for _ in range(_blocks(component, alone))]
            )
        if alone is None or not first <= last < 64:
            raise _Damaged("the header of a scan makes no sense")
        band = (1 << last + 1) - (1 << first)
        alone.left = alone.left & ~band | (band if low else 0)
        if alone.nonzero is None:
            alone.nonzero = [0] * (alone.across * alone.down)
        table = self._entry(1, chosen[0][1] & 15, plain=True)
        return (_Refining if refining else _Band)(table, alone.nonzero, first, last)


def _blocks(component: _Component, alone: _Component | None) -> int:
    return 1 if alone else component.horizontal * component.vertical


def _dc_step(length: int, size: int) -> int:
    return (_BAD << _STEP if size > _MOST_DC else 0) | length + min(size, _MOST_DC)


def _ac_step(length: int, symbol: int) -> int:
    run, size = symbol >> 4, symbol & 15
    if size:
        return (_BAD if size > _MOST_AC else run + 1) << _STEP | length + min(size, _MOST_AC)
    return (16 if run == 15 else _EOB if run == 0 else _BAD) << _STEP | length


def _ended(position: int, coded: bytes) -> None:
    """Checks what is left after the last block: the rest of a byte, or padding."""
    rest = coded[(position + 7) // 8 :]
    if len(rest) > _SLACK and rest.strip(rest[:1]):
        raise _Damaged(_EXCESS)


def _overran(bits: int, last: bool) -> None:
    """More bits are needed than exist: no damage in the last MCU if they are as few as some encoders omit."""
    if not last or bits > 8 * _SLACK:
        raise _Damaged(_SHORT)


@dataclass
class _Sequential:
    """Blocks of a sequential scan; tables: (DC, AC) of each block of an MCU."""

    tables: list[tuple[list[int], list[int]]]

    def part(self, coded: bytes, done: int, mcus: int) -> None:
        d, at, end, tables = coded + _PAD, 0, 8 * len(coded), self.tables
        for mcu in range(mcus):
            for dc, ac in tables:
                i = at >> 3
                e = dc[(d[i] << 16 | d[i + 1] << 8 | d[i + 2]) >> 8 - (at & 7) & 65535]
                at += e & 31
                k = 1 + (e >> 5)
                while k < 64:
                    i = at >> 3
                    e = ac[(d[i] << 16 | d[i + 1] << 8 | d[i + 2]) >> 8 - (at & 7) & 65535]
                    at += e & 31
                    k += e >> 5
                if k > 64 and (k < 128 or k > 192):
                    raise _Damaged(_NO_CODE if at <= end else _SHORT)
            if at > end:
                return _overran(at - end, mcu == mcus - 1)
        _ended(at, coded)


@dataclass
class _First:
    """First DC scan of a progressive file; tables: of each block of an MCU."""

    tables: list[list[int]]

    def part(self, coded: bytes, done: int, mcus: int) -> None:
        d, at, end = coded + _PAD, 0, 8 * len(coded)
        for mcu in range(mcus):
            for dc in self.tables:
                i = at >> 3
                e = dc[(d[i] << 16 | d[i + 1] << 8 | d[i + 2]) >> 8 - (at & 7) & 65535]
                at += e & 31
                if e > 31:
                    raise _Damaged(_NO_CODE if at <= end else _SHORT)
            if at > end:
                return _overran(at - end, mcu == mcus - 1)
        _ended(at, coded)


@dataclass
class _Bits:
    """Refining DC scan: a bit for each of `blocks` of an MCU."""

    blocks: int

    def part(self, coded: bytes, done: int, mcus: int) -> None:
        if 8 * len(coded) < self.blocks * (mcus - 1):
            raise _Damaged(_SHORT)
        _ended(self.blocks * mcus, coded)


@dataclass
class _Band:
    """First scan of the coefficients `first` to `last` of one component; records the nonzero ones."""

    table: list[int]
    nonzero: list[int]
    first: int
    last: int

    def part(self, coded: bytes, done: int, mcus: int) -> None:
        d, at, end = coded + _PAD, 0, 8 * len(coded)
        table, nonzero, last = self.table, self.nonzero, self.last
        skip = 0  # blocks left of an end-of-band run
        for block in range(done, done + mcus):
            if skip:
                skip -= 1
                continue
            if at > end:
                raise _Damaged(_SHORT)
            k = self.first
            while k <= last:
                i = at >> 3
                e = table[(d[i] << 16 | d[i + 1] << 8 | d[i + 2]) >> 8 - (at & 7) & 65535]
                at += e >> 8
                run, size = e >> 4 & 15, e & 15
                if size:
                    k += run
                    at += size
                    if k > last or size > _MOST_AC or e > 0x10FF:
                        raise _Damaged(_NO_CODE if at <= end else _SHORT)
                    nonzero[block] |= 1 << k
                    k += 1
                elif run == 15:
                    k += 16
                else:
                    skip = (1 << run) - 1 + _value(d, at, run)
                    at += run
                    break
        if at <= end:
            _ended(at, coded)


class _Refining(_Band):
    """A later scan of the coefficients: a bit for each nonzero one, and new ones."""

    def part(self, coded: bytes, done: int, mcus: int) -> None:
        d, at, end = coded + _PAD, 0, 8 * len(coded)
        table, nonzero, last = self.table, self.nonzero, self.last
        band = (1 << last + 1) - 1
        skip = 0
        for block in range(done, done + mcus):
            known, k = nonzero[block], self.first
            if at > end:
                raise _Damaged(_SHORT)
            while not skip and k <= last:
                i = at >> 3
                e = table[(d[i] << 16 | d[i + 1] << 8 | d[i + 2]) >> 8 - (at & 7) & 65535]
                at += e >> 8
                run, size = e >> 4 & 15, e & 15
                if size > 1 or e > 0x10FF:
                    raise _Damaged(_NO_CODE if at <= end else _SHORT)
                if not size and run < 15:
                    skip = (1 << run) + _value(d, at, run)
                    at += run
                    break
                at += size
                while k <= last:
                    if known >> k & 1:
                        at += 1
                    elif run:
                        run -= 1
                    else:
                        break
                    k += 1
                if size:
                    if k > last:
                        raise _Damaged(_NO_CODE if at <= end else _SHORT)
                    nonzero[block] |= 1 << k
                k += 1
            if skip:
                at += (known & band).bit_count() if k == 0 else ((known & band) >> k).bit_count()
                skip -= 1
        if at <= end:
            _ended(at, coded)


def _value(d: bytes, at: int, bits: int) -> int:
    i = at >> 3
    return (d[i] << 16 | d[i + 1] << 8 | d[i + 2]) >> 24 - (at & 7) - bits & (1 << bits) - 1


def lost_inside(data: bytes) -> str | None:
    """The damage inside a JPEG that Pillow reads, such as "data is lost in a scan"; None if there is none, or it is not
    judged."""
    return None if _last_bytes_decide(data) else broken(data)


def broken(data: bytes) -> str | None:
    """`lost_inside` by the walk alone."""
    try:
        return _Scanner(data).run()
    except _Damaged as found:
        return str(found)
    except IndexError:
        return _SHORT


def _last_bytes_decide(data: bytes) -> bool:
    """Whether the last bytes of a JPEG with a single scan decide its last pixels, and only those, as in a whole file.

    Decoding twice is tens of times as fast as the walk and needs no interpreter lock.
    """
    start, stop = _single_scan(data)
    if stop - start < _SMALL or _ZEROS in data[start:stop]:
        return False  # overwritten with zeros, which may happen to code as many blocks as were lost
    last = bytes(byte if byte in (0x00, 0xAA, 0xFF) else byte ^ 0x55 for byte in data[stop - 2 : stop])
    changed = data[: stop - 2] + last + b"\x55\xaa" * 32 + data[stop:]
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(changed)) as other:
        box = ImageChops.difference(image, other).getbbox(alpha_only=False)
        # The last two units of 16 x 16, and what smoothed chroma adds.
        return box is not None and box[0] >= image.width - 34 and box[1] >= image.height - 18


def _single_scan(data: bytes) -> tuple[int, int]:
    """Start and end of the coded data of a sequential JPEG without restart markers; (0, 0) for any other."""
    at, sequential = 2, False
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        code, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        sequential |= code in _SEQUENTIAL
        if code in (_INTERVAL, _PROGRESSIVE, _END) or code in OTHER_FRAMES:
            break
        if code == _SCAN:
            found = _END_OF_SCAN.search(data, end)
            if not sequential or found is None or data[found.start() + 1] != _END:
                break
            return end, end + len(data[end : found.start()].rstrip(b"\xff"))
        at = end
    return 0, 0
