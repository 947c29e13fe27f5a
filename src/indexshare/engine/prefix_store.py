"""Cached prefixes on disk, so that a conversation goes on after a restart without being read again. Off by default.

One file holds the rows of one page: a magic word, a digest of the rest, the rows. Its name is the page's key, which
hashes all tokens up to it; it lies in a directory for the model and one for the tenant. What a file holds tells what
was asked: directories are 0700 and files 0600, and `purge` removes them. A damaged file counts as absent.
"""

import contextlib
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path

from indexshare.errors import ConfigError

logger = logging.getLogger(__name__)

MAGIC = b"IXSPAGE1"
DIGEST_BYTES = 32
QUEUED_BYTES = 256 * 2**20  # of pages that wait to be written; more are not kept
_DIRECTORY = re.compile(r"(model|tenant)-[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{32}\.page(\.part)?")


class PrefixStore:
    """Pages of one model under `directory`, at most `max_bytes` of them; the least recently used ones go first.

    fingerprint: of everything that decides what rows hold: weights, formats, page size. Writing happens in a thread of
    its own, reading in the caller's. Raises ConfigError when the directory cannot be used.
    """

    def __init__(self, directory: Path, fingerprint: str, *, max_bytes: int) -> None:
        self._root = directory / f"model-{_hash(fingerprint)}"
        self._max_bytes = max_bytes
        self.num_written = self.num_read = self.num_damaged = 0
        self._lock = threading.Lock()
        self._sizes: OrderedDict[Path, int] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            files = [(file.stat(), file) for file in self._root.glob("tenant-*/*.page")]
            for part in self._root.glob("tenant-*/*.part"):  # of a process that ended while it wrote
                if part.stat().st_mtime < time.time() - 3600:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {directory} for prefixes: {error.strerror}") from error
        for status, file in sorted(files, key=lambda found: found[0].st_mtime):
            self._sizes[file] = status.st_size
            self._num_bytes += status.st_size
        self._queue: queue.Queue[tuple[Path, bytes] | None] = queue.Queue()
        self._num_queued_bytes = 0
        self._writer = threading.Thread(target=self._write_all, name="prefixes", daemon=True)
        self._writer.start()

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return self._num_bytes

    def __contains__(self, page: tuple[str, bytes]) -> bool:
        with self._lock:
            return self._file(*page) in self._sizes

    def put(self, tenant: str, key: bytes, rows: bytes) -> bool:
        """Keep a page, soon; False when the disk does not keep up, and the page is not kept."""
        with self._lock:
            if self._num_queued_bytes > QUEUED_BYTES:
                return False
            self._num_queued_bytes += len(rows)
        self._queue.put((self._file(tenant, key), rows))
        return True

    def get(self, tenant: str, key: bytes, num_bytes: int) -> bytes | None:
        """The rows of a page, or None when they are not there or damaged."""
        file = self._file(tenant, key)
        with self._lock:
            if file not in self._sizes:
                return None
            self._sizes.move_to_end(file)
        try:
            content = file.read_bytes()
            with contextlib.suppress(OSError):  # only its place in the order
                os.utime(file)
        except OSError:
            self._remove(file)
            return None
        begin = len(MAGIC) + DIGEST_BYTES
        digest, rows = content[len(MAGIC) : begin], content[begin:]
        if not content.startswith(MAGIC) or len(rows) != num_bytes or digest != _digest(rows):
            logger.warning("a damaged page was removed: %s", file.name)
            self.num_damaged += 1
            self._remove(file)
            return None
        self.num_read += 1
        return rows

    def close(self) -> None:
        """Write what waits, then stop."""
        self._queue.put(None)
        self._writer.join()

    def _file(self, tenant: str, key: bytes) -> Path:
        return self._root / f"tenant-{_hash(tenant)}" / f"{key.hex()}.page"

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:  # no space, no permission: serving goes on
                logger.warning("a page could not be kept: %s", error.strerror)
            with self._lock:
                self._num_queued_bytes -= len(item[1])

    def _write(self, file: Path, rows: bytes) -> None:
        with self._lock:
            if file in self._sizes:
                return
        for directory in (self._root, file.parent):  # `purge` may have removed them
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        try:
            with open(part, "wb", opener=_private) as stream:
                stream.write(MAGIC + _digest(rows) + rows)
            os.replace(part, file)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        with self._lock:
            self._sizes[file] = len(MAGIC) + DIGEST_BYTES + len(rows)
            self._num_bytes += self._sizes[file]
            surplus = self._num_bytes - self._max_bytes
            oldest = []
            for other, size in self._sizes.items():
                if surplus <= 0:
                    break
                oldest.append(other)
                surplus -= size
        self.num_written += 1
        for other in oldest:
            self._remove(other)

    def _remove(self, file: Path) -> None:
        with self._lock:
            self._num_bytes -= self._sizes.pop(file, 0)
        with contextlib.suppress(OSError):  # something else is there, or it is not ours: then it stays
            file.unlink(missing_ok=True)


def purge(directory: Path) -> int:
    """Remove all pages that stores have left under `directory`, and nothing else; how many."""
    removed = 0
    if not (models := _directories(directory)):
        raise ConfigError(f"{directory} holds no prefixes")
    for model in models:
        for tenant in _directories(model):
            for file in tenant.iterdir():
                if _FILE.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                    file.unlink()
                    removed += 1
            _remove_empty(tenant)
        _remove_empty(model)
    return removed


def _directories(parent: Path) -> list[Path]:
    try:
        found = [entry for entry in parent.iterdir() if _DIRECTORY.fullmatch(entry.name)]
    except OSError as error:
        raise ConfigError(f"cannot read {parent}: {error.strerror}") from error
    return [entry for entry in found if entry.is_dir() and not entry.is_symlink()]


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # somebody keeps other files there
        directory.rmdir()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(rows: bytes) -> bytes:
    return hashlib.blake2b(rows, digest_size=DIGEST_BYTES).digest()
