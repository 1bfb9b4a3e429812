"""Checkpoints on the disk that are whole or an error: written beside, synced, renamed; with a digest behind the data.

The file is torch's, with 32 bytes of SHA-256 of all before and `MARK` at its end, which `torch.load` passes over.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

MARK = b"automagic-bnb sha256\n"
DIGEST_BYTES = hashlib.sha256().digest_size
CHUNK = 2**22
"""Bytes that are read at once."""


def save_checkpoint(path: str | Path, contents: Any) -> Path:
    """Save what `torch.save` takes so that a file of this name is at any time the old one, whole, or the new one.

    A process that is killed while saving leaves the old file, and beside it a part of the new one, ending in ".part",
    which may be deleted. Of a link, what it points to is replaced.

    Args:
        path: in a folder that exists.
        contents: for example {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}.

    Returns:
        The path.

    Raises:
        OSError: the disk is full, or the folder cannot be written to. The old file is then as it was.

    Example:
        >>> save_checkpoint("checkpoint.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    """
    with replacing(path) as file:
        hashing = _Hashing(file)
        torch.save(contents, cast(Any, hashing))
        file.write(hashing.digest() + MARK)
    return Path(path)


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> Any:
    """What `save_checkpoint` saved, if the file is that to the last bit. Tensors and plain values only: no code runs.

    Args:
        map_location: as `torch.load`'s.

    Raises:
        FileNotFoundError: there is none.
        ValueError: bytes are missing or have changed; or `save_checkpoint` did not write the file.
        pickle.UnpicklingError: it holds something else than tensors, numbers, text, and containers of these.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - DIGEST_BYTES - len(MARK)
        if size < 0:
            raise ValueError(f"{path} is no file of save_checkpoint, or was cut short; use an earlier checkpoint")
        file.seek(size)
        expected, mark = file.read(DIGEST_BYTES), file.read()
        if mark != MARK:
            raise ValueError(
                f"{path} does not end in the digest of save_checkpoint: the file was cut short, so use an earlier "
                "checkpoint; or it was written by torch.save, so use torch.load(path, weights_only=True)"
            )
        if _digest(file, size) != expected:
            raise ValueError(f"{path} is damaged: its bytes are not those that were saved; use an earlier checkpoint")
        file.seek(0)
        return torch.load(file, map_location=map_location, weights_only=True)


def check_no_link(path: Path, what: str) -> None:
    """Raise ValueError where what is written there would go to what a link points to.

    Args:
        what: is about to be written.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link: {what} would overwrite what it points to; choose another file")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of the one at `path` when it is on the disk; after an error it is deleted."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk; where folders cannot be opened (Windows) that is not to be had."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Hashing:
    """A file to write to, of which the digest is known."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


def _digest(file: BinaryIO, size: int) -> bytes:
    """Of the first `size` bytes."""
    found = hashlib.sha256()
    file.seek(0)
    while size and (data := file.read(min(size, CHUNK))):
        found.update(data)
        size -= len(data)
    return found.digest()
