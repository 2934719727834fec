"""Files of users: only regular ones are read, and only up to a size that memory can hold."""

import bz2
import gzip
import io
import json
import lzma
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LIMIT = "CRYSTALFORMER_MAX_BYTES"
MAX_BYTES = 2 << 30
# Structures as text pack to a tenth, seldom to a fiftieth; zeros, as in a bomb, to a thousandth and less.
MAX_RATIO, ANY_RATIO_BYTES = 200, 64 << 20
# Characters of a line in a file that is read line by line: a structure of 100,000 atoms in JSON has fewer.
MAX_LINE = 64 << 20
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def read_bytes(path: str | Path) -> bytes:
    """What is in a file, unpacked if it is gzip, bzip2, xz or a zip of one file, whatever its name.

    At most MAX_BYTES, and unpacked at most MAX_RATIO times the file's size where that is more than ANY_RATIO_BYTES;
    the environment's CRYSTALFORMER_MAX_BYTES takes the place of both bounds.

    Raises:
        OSError: if it cannot be read.
        ValueError: for more than that, or anything but a regular file: a pipe might never end.
    """
    size, given = _size_and_limit(path)
    limit = MAX_BYTES if given is None else given
    if size > limit:
        raise ValueError(f"its {size:,} bytes are more than the {limit:,} that {LIMIT} allows")
    data = Path(path).read_bytes()
    unpack = _unpacking(data)
    if unpack is None:
        return data
    most = limit if given is not None else min(limit, _most_unpacked(size))
    result = bytearray()
    with _errors_of_packed_files(), unpack(io.BytesIO(data)) as stream:
        while chunk := stream.read(1 << 20):
            result += chunk
            _check_unpacked(size, len(result), most)
    return bytes(result)


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text in UTF-8, each with its end, while the file is read; unpacked as by `read_bytes`.

    The file may be larger than memory: MAX_LINE bounds each line, CRYSTALFORMER_MAX_BYTES the file, if it is set.

    Raises:
        OSError, ValueError: as `read_text`, and for a line that is too long; behind the lines that are good.
    """
    size, given = _size_and_limit(path)
    if given is not None and size > given:
        raise ValueError(f"its {size:,} bytes are more than the {given:,} that {LIMIT} allows")
    most = _most_unpacked(size) if given is None else given
    read = 0
    with _errors_of_packed_files(), open(path, "rb") as file:
        unpack = _unpacking(file.peek(len(max(_UNPACKING, key=len))))
        with io.TextIOWrapper(unpack(file) if unpack else file, "utf-8-sig", newline="") as text:
            while line := text.readline(MAX_LINE + 1):
                read += len(line)
                if unpack:
                    _check_unpacked(size, read, most)
                if len(line) > MAX_LINE:
                    raise ValueError(f"a line has more than {MAX_LINE:,} characters")
                if "\0" in line:
                    raise ValueError("not a text in UTF-8: it has zero bytes")
                yield line


def _size_and_limit(path: str | Path) -> tuple[int, int | None]:
    """Of a regular file, and what the environment allows, None where it says nothing."""
    check_regular(path)
    given = os.environ.get(LIMIT, "")
    if given and not (given.isascii() and given.isdecimal()):
        raise ValueError(f"the environment's {LIMIT} must be a number of bytes, not {given!r}")
    return os.stat(path).st_size, int(given) if given else None


def _unpacking(start: bytes) -> Callable[[IO[bytes]], Any] | None:
    """What unpacks a file that begins so."""
    return next((x for magic, x in _UNPACKING.items() if start.startswith(magic)), None)


def _most_unpacked(size: int) -> int:
    return max(ANY_RATIO_BYTES, MAX_RATIO * size)


def _check_unpacked(size: int, unpacked: int, most: int) -> None:
    if unpacked > most:
        raise ValueError(f"its {size:,} bytes unpack to more than {most:,}: {LIMIT} must allow that")


@contextmanager
def _errors_of_packed_files() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text in UTF-8: {error.reason}") from error
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # each of the formats has errors of its own
        raise ValueError(f"cannot be unpacked: {type(error).__name__}: {error}") from error


def check_regular(path: str | Path) -> None:
    """Raises OSError if there is no such file, ValueError if it is not a regular file."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"must be a file, not {KINDS.get(kind, 'a socket')}")


def read_text(path: str | Path, errors: str = "strict") -> str:
    """The text in a file, in UTF-8.

    Raises:
        OSError, ValueError: as `read_bytes`, and for bytes that are not text.
    """
    data = read_bytes(path)
    if b"\0" in data:
        raise ValueError("not a text in UTF-8: it has zero bytes")
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text in UTF-8: byte {error.start} cannot be decoded") from error


def parse_json(text: str) -> Any:
    """`json.loads`, of which every failure is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _only_member(source: IO[bytes]) -> IO[bytes]:
    file = zipfile.ZipFile(source)
    names = [x for x in file.namelist() if not x.endswith("/")]
    if len(names) != 1:
        raise ValueError(f"a zip must hold one file, not {len(names)}")
    return file.open(names[0])


_UNPACKING: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"PK\x03\x04": _only_member,
}
