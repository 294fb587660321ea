"""The symbols of Mach-O files, read from their symbol tables; macOS has no tools on Linux."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC_64 = 0xFEEDFACF
LC_SYMTAB = 0x2
N_STAB, N_PEXT, N_TYPE, N_EXT = 0xE0, 0x10, 0x0E, 0x01
CPU_ARM64 = 0x0100000C
FILE_TYPES = {1: "object", 6: "dylib", 8: "bundle"}


@dataclass
class Symbols:
    """External names of one file."""

    kind: str
    defined: set[str]
    undefined: set[str]


def symbols(path: Path) -> Symbols:
    """External symbols of a thin arm64 Mach-O file."""
    data = path.read_bytes()
    magic, cpu, _, kind, commands = struct.unpack_from("<5I", data)
    if magic != MAGIC_64 or cpu != CPU_ARM64:
        raise ValueError(f"{path} is no arm64 Mach-O file")
    found = Symbols(FILE_TYPES.get(kind, str(kind)), set(), set())
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command == LC_SYMTAB:
            table, count, strings, _ = struct.unpack_from("<4I", data, at + 8)
            for i in range(count):
                name_at, kind_byte = struct.unpack_from("<IB", data, table + 16 * i)
                if kind_byte & N_STAB or not kind_byte & N_EXT:
                    continue
                begin = strings + name_at
                name = data[begin : data.index(b"\0", begin)].decode()
                if kind_byte & N_TYPE:
                    if not kind_byte & N_PEXT:
                        found.defined.add(name)
                else:
                    found.undefined.add(name)
        at += size
    return found
