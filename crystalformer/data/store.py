"""Arrays that took time to make, kept in a folder under the content that they were made from."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import storage
from ..common.words import one_line

log = logging.getLogger("crystalformer.data")

Item = dict[str, Tensor]
KEY_BYTES = 16
KEYS = "keys"


def digest(*parts: bytes | str) -> bytes:
    """A key of KEY_BYTES for the content of the parts."""
    h = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        # With their lengths: ("ab", "c") is not ("a", "bc").
        h.update(len(data).to_bytes(8, "little") + data)
    return h.digest()


class Store:
    """A folder of shards, each a safetensors file with the arrays of some thousand items, found by key.

    Many processes may use a folder at once: a shard is written beside its place and moved there, is not changed
    afterwards, and holds a checksum of everything in it. One that is torn, altered or not of these settings is reported
    (logger "crystalformer.data"), removed, and made again. What is read stays in the file, mapped into memory.

    Args:
        folder: made when something is written.
        kind: what the items are, the beginning of the files' names.
        settings: what they depend on besides their keys.
    """

    def __init__(self, folder: str | Path, kind: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.kind = Path(folder), kind
        self.settings = json.dumps(dict(settings), sort_keys=True)
        self.prefix = f"{kind}-{digest(self.settings).hex()[:12]}-"

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Item]:
        """The items of those keys that are there."""
        wanted, found = set(keys), dict[bytes, Item]()
        for path in sorted(self.folder.glob(f"{self.prefix}*.safetensors")):
            if len(found) == len(wanted):
                break
            try:
                tensors = self._read(path)
                found |= {key: item for key, item in _items(tensors) if key in wanted and key not in found}
            except FileNotFoundError:  # another process removed it
                continue
            except OSError as error:
                log.warning("%s cannot be read, so its content is made again: %s", path, error)
            # Whatever a torn or foreign file makes of the parser: it must not stop the work.
            except Exception as error:
                reason = one_line(error).removeprefix(f"{path}: ")
                log.warning("%s is damaged, so its content is made again: %s", path, reason)
                with contextlib.suppress(OSError):
                    path.unlink()
        return found

    def put(self, keys: Sequence[bytes], items: Sequence[Item]) -> None:
        """Writes one shard. Where the disk is full or read-only, it warns and writes nothing, and the work goes on."""
        tensors = {KEYS: torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)}
        for name in items[0]:
            tensors[name] = torch.cat([item[name] for item in items])
            tensors[f"{name}.sizes"] = torch.tensor([len(item[name]) for item in items])
        path = self.folder / f"{self.prefix}{digest(*keys).hex()[:12]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            storage.write_tensors(path, tensors, {"settings": self.settings})
        except OSError as error:
            log.warning("%s cannot be written, so its content is made again next time: %s", path, error)

    def _read(self, path: Path) -> dict[str, Tensor]:
        tensors, about = storage.read_tensors(path)
        if about is None or about.get("settings") != self.settings:
            raise ValueError("it was made with other settings")
        return tensors


def _items(tensors: Mapping[str, Tensor]) -> list[tuple[bytes, Item]]:
    data = tensors[KEYS].numpy().tobytes()
    keys = [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]
    names = [name for name in tensors if f"{name}.sizes" in tensors]
    columns = [tensors[name].split(tensors[f"{name}.sizes"].tolist()) for name in names]
    return [(key, dict(zip(names, row, strict=True))) for key, *row in zip(keys, *columns, strict=True)]
