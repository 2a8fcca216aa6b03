"""Scalars in TensorBoard's event files, written without TensorBoard or its relatives.

tensorboardX and torch.utils.tensorboard import torch wherever it is installed, which costs a
training process seconds and memory; a scalar needs the few fields written here.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_CASTAGNOLI = 0x82F63B78  # reversed polynomial of CRC-32C, RFC 3720 appendix B.4
_MASK = 0xA282EAD8  # kMaskDelta, tensorflow/core/lib/hash/crc32c.h
_START = 1  # SessionLog.START, tensorflow/core/util/event.proto


class ScalarWriter:
    """Appends scalars to one new event file in a folder."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        """Creates the folder and the file.

        purge_step: TensorBoard forgets what earlier files say of this step and later ones, which a
        resumed run does again. Raises OSError if the file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._write(_text(3, "brain.Event:2"))
        self._write(_integer(2, purge_step) + _message(7, _integer(1, _START)))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Writes one event with all scalars, and hands it to the system. Raises OSError."""
        values = b"".join(
            _message(1, _text(1, tag) + _key(2, 5) + struct.pack("<f", _single(value)))
            for tag, value in scalars.items()
        )
        self._write(_integer(2, step) + _message(5, values))
        self._file.flush()

    def close(self) -> None:
        """Closes the file; harmless when repeated."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        """Writes one Event as a TFRecord: length, its checksum, content, its checksum."""
        event = _key(1, 1) + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _single(value: float) -> float:
    """Keeps a double that no float32 holds from being an error: it becomes infinite."""
    try:
        struct.pack("<f", value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return value


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _integer(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value)


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Encodes a non-negative integer in base 128 (protobuf.dev/programming-guides/encoding)."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _checksum(content: bytes) -> bytes:
    """Returns the masked CRC-32C of a TFRecord (tensorflow/core/lib/io/record_writer.h)."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_CASTAGNOLI if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _crc_table()
