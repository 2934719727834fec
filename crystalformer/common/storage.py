"""Files that are written whole or not at all, and read as they were written or not at all.

Files that are read again carry the SHA-256 of their content: if a bit has changed since, reading is an error that names
the file, and never gives another number. A file without a checksum, from an older version or from elsewhere, is read as
it is.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .user_files import parse_json, read_text
from .words import one_line

if TYPE_CHECKING:
    from torch import Tensor

# The key of the checksum in JSON and in the metadata of tensors, and what it follows at the end of other files.
SHA256 = "sha256"
TRAILER = b"\nsha256:"
# One key for all metadata: safetensors writes several in a random order, so equal models would be different files.
METADATA = "crystalformer"
# The names of files while they are written; one stays only behind a kill.
UNFINISHED = ".*.tmp"
# Of a SHA-256 in hexadecimal.
DIGITS = 64


def write(path: str | Path, content: bytes | str, keep: Path | None = None) -> None:
    """Writes a file so that at any moment, power cuts included, it is the one before or the new one, whole.

    A link stays one: the file that it points to is replaced. Devices and pipes are written into.

    Args:
        content: text is written in UTF-8.
        keep: where the file goes that `path` is now; None to lose it. Then `path` or `keep` is whole at any moment.

    Raises:
        OSError: if it cannot be written; the file is as it was.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if (path.exists() and not path.is_file()) or path.parent in (Path("/dev"), Path("/dev/fd")):
        with path.open("ab") as file:
            file.write(data)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:32]}.{uuid.uuid4().hex}.tmp")  # a name may be as long as names can be
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
            if keep is not None:
                os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # which names the temporary file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    with contextlib.suppress(OSError):  # not every system can open or sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def holds(path: Path, file: Path) -> bool:
    """Whether a file is there and is `path`, or in the folder `path`: under any name, links included."""
    if not file.exists():
        return False
    mine = file.stat()
    found = itertools.chain([path], path.rglob("*") if path.is_dir() else ())
    return any(os.path.samestat(mine, x.stat()) for x in found if x.exists())


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


# Bytes ----------------------------------------------------------------------------------------------------------------


def write_sealed(path: str | Path, data: bytes, keep: Path | None = None) -> None:
    """`write`, with a checksum after the data. ZIP and formats that are read from their beginning ignore it."""
    write(path, data + TRAILER + hashlib.sha256(data).hexdigest().encode(), keep)


def read_sealed(path: str | Path) -> bytes:
    """What `write_sealed` wrote.

    Raises:
        ValueError: if the checksum is wrong.
    """
    data = Path(path).read_bytes()
    content, mark, digest = data[: -DIGITS - len(TRAILER)], data[-DIGITS - len(TRAILER) : -DIGITS], data[-DIGITS:]
    if mark != TRAILER:
        return data
    _compare(path, hashlib.sha256(content).hexdigest(), digest.decode("latin-1"))
    return content


# JSON -----------------------------------------------------------------------------------------------------------------


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a JSON file with the checksum of them behind them."""
    return {**values, SHA256: sha256(values)}


def read_json(path: str | Path) -> Any:
    """The values of a JSON file.

    Raises:
        ValueError: if it is not JSON, or its checksum is wrong.
    """
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    return unsealed(path, values)


def unsealed(path: str | Path, values: Any) -> Any:
    """What `sealed` was given, of what the JSON file at `path` holds.

    Raises:
        ValueError: if the checksum is wrong.
    """
    if not isinstance(values, dict) or SHA256 not in values:
        return values
    content = {name: x for name, x in values.items() if name != SHA256}
    _compare(path, sha256(content), values[SHA256])
    return content


# Tensors --------------------------------------------------------------------------------------------------------------


def write_tensors(path: str | Path, tensors: Mapping[str, "Tensor"], about: Mapping[str, Any]) -> None:
    """Writes a safetensors file with a checksum of the tensors, their names, types and shapes, and of `about`.

    Args:
        about: JSON values to keep with the tensors.
    """
    from safetensors.torch import save

    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {**about, SHA256: sha256(about, tensors)}
    write(path, save(tensors, {METADATA: json.dumps(metadata)}))


def read_tensors(path: str | Path) -> tuple[dict[str, "Tensor"], dict[str, Any] | None]:
    """The tensors of a safetensors file, mapped into memory, and `about`; None if it has no checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no safetensors file.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
        about = None if text is None else json.loads(text)
    except OSError:
        raise
    except Exception as error:  # whatever a torn or foreign file makes of the parser
        raise ValueError(f"{path}: damaged, or no safetensors file: {one_line(error)}") from error
    if not isinstance(about, dict) or SHA256 not in about:
        return tensors, None
    written = about.pop(SHA256)
    _compare(path, sha256(about, tensors), written)
    return tensors, about


def sha256(values: Mapping[str, Any], tensors: "Mapping[str, Tensor] | None" = None) -> str:
    """Of JSON values and tensors."""
    from torch import uint8

    state = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, x in sorted((tensors or {}).items()):
        state.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        state.update(x.contiguous().view(-1).view(uint8).numpy().data)
    return state.hexdigest()


def _compare(path: str | Path, computed: str, written: object) -> None:
    if computed != written:
        raise ValueError(f"{path}: damaged: its SHA-256 is {computed[:12]}..., not {str(written)[:12]}... as written")
