"""Files are written whole or not at all, and what is read is what was written, or an error names the file."""

import errno
import json
import os
import stat
from fnmatch import fnmatch

import pytest
import torch

from crystalformer.common import storage
from crystalformer.data import read_split, write_split


def test_the_file_before_is_kept(tmp_path):
    path, before = tmp_path / "a", tmp_path / "b"
    storage.write(path, b"1", before)
    assert not before.exists()
    storage.write(path, "2", before)
    assert (path.read_bytes(), before.read_bytes()) == (b"2", b"1")


@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, name, error):
    path = tmp_path / "a"
    storage.write(path, "old")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(type(error)):
            storage.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="nowhere/a"):  # not a name of the file that is written first
        storage.write(tmp_path / "nowhere" / "a", "new")


def test_a_file_that_is_being_written_can_be_told(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "fsync", lambda _: names.append([path.name for path in tmp_path.iterdir()]))
    storage.write(tmp_path / ("a" * 255), "new")
    assert fnmatch(names[0][0], storage.UNFINISHED)
    assert names[0][0].startswith(".aaa")
    assert (tmp_path / ("a" * 255)).read_text() == "new"


def test_links_and_permissions_stay(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    storage.write(path, "old")
    path.chmod(0o640)
    link.symlink_to(path)
    storage.write(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_devices_and_pipes_are_written_into(tmp_path):
    storage.write("/dev/null", "lost")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.write(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


def test_what_holds_a_file(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "folder" / "a"
    folder.mkdir()
    assert not storage.holds(folder, file)
    file.touch()
    (tmp_path / "other").touch()
    (tmp_path / "soft").symlink_to(file)
    os.link(file, tmp_path / "hard")
    (folder / "broken").symlink_to("nowhere")
    for out in (file, tmp_path / "soft", tmp_path / "hard", folder / ".." / "folder" / "a"):
        assert storage.holds(file, out)
        assert storage.holds(folder, out)
    assert not storage.holds(folder, tmp_path / "other")


def test_a_flipped_bit_in_json(tmp_path):
    path, split = tmp_path / "split.json", {"train": ["a", "ü", "1"], "val": ["b"], "test": []}
    write_split(path, split)
    data = path.read_bytes()
    for place in range(0, 8 * len(data), 5):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        for read in (read_split, lambda path: {name: storage.read_json(path)[name] for name in split}):
            try:
                assert read(path) == split
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017, either outcome is right
    path.write_text(json.dumps(split | {"val": ["c"], "sha256": json.loads(data)["sha256"]}))
    with pytest.raises(ValueError, match=r"split\.json: damaged: its SHA-256 is \w{12}\.\.\., not .* as written"):
        read_split(path)


def test_tensors_of_all_kinds(tmp_path):
    pytest.importorskip("safetensors", reason="tensors are kept in safetensors files")
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    kinds = {str(x): torch.arange(6).view(2, 3).to(x) for x in dtypes}
    kinds |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    kinds["strided"] = torch.arange(6.0).view(2, 3).T
    about = {"ü": [1, {"a": None}], "x": 0.1}
    storage.write_tensors(tmp_path / "a", kinds, about)
    tensors, read = storage.read_tensors(tmp_path / "a")
    assert read == about
    assert tensors.keys() == kinds.keys()
    for name, x in kinds.items():
        assert (tensors[name].dtype, tensors[name].shape) == (x.dtype, x.shape)
        assert torch.equal(tensors[name], x)
    storage.write_tensors(tmp_path / "b", dict(reversed(kinds.items())), dict(reversed(about.items())))
    assert storage.read_tensors(tmp_path / "b")[1] == about
