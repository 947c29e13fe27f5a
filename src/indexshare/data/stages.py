"""What is done to one part of the sources, in any process and in any order: read, compare, tokenise.

Reading cuts a part into pieces that fit in memory, however much text one file holds; the other stages take these. Each
stage writes files named after its part or piece below the work directory; the one that is written last says that it is
done, so that a build that was killed goes on with what is missing.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from hashlib import blake2b
from io import BytesIO
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.documents import Document, Part, Rejected, read_part
from indexshare.data.licenses import is_allowed
from indexshare.data.quality import LOCK_FILES, judge
from indexshare.data.shards import token_type, write_file
from indexshare.data.similarity import content_hash, ngrams, signature
from indexshare.errors import TrainingError

TRAIN, HELD_OUT, EXACT, NEAR, CONTAMINATED = range(5)  # the fate of a document that was read and found good
NUM_EXAMPLES = 5
_MAX_DOCUMENTS = 8192  # of a piece; a document costs about 1 KiB beside its text, mostly its signature

Report = Callable[[int, int], None]


class Kept(msgspec.Struct, frozen=True):
    """A document that passed the filters. begin, end: its bytes in the piece's text file; side: 16 bytes that decide
    between training and held out."""

    source: str
    group: str
    license: str
    begin: int
    end: int
    content: bytes
    signature: bytes
    side: bytes


class Dropped(msgspec.Struct):
    """How many documents and bytes went for one reason, and the names of a few."""

    documents: int = 0
    num_bytes: int = 0
    examples: list[str] = []  # msgspec copies it for each one

    def add(self, source: str, num_bytes: int) -> None:
        """Count one document."""
        self.documents += 1
        self.num_bytes += num_bytes
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(source)

    def merge(self, other: "Dropped") -> None:
        """Add the counts of another piece; the first examples stay."""
        self.documents += other.documents
        self.num_bytes += other.num_bytes
        self.examples.extend(other.examples[: NUM_EXAMPLES - len(self.examples)])


class Piece(msgspec.Struct, frozen=True):
    """What was read of a part until it was enough for once. num_items: documents, with those that were dropped."""

    kept: list[Kept]
    dropped: dict[str, Dropped]
    num_items: int


class Filters(msgspec.Struct, frozen=True):
    """Which documents may pass. licenses: None for any. max_bytes: of UTF-8, in one document. has_signatures: whether
    near-duplicates will be looked for."""

    licenses: tuple[str, ...] | None
    min_bytes: int
    max_bytes: int
    has_signatures: bool


class Work:
    """The files of a build that is under way."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def file(self, stage: str, name: str, suffix: str) -> Path:
        """The file of a stage of one part or piece."""
        return self.directory / f"{stage}-{name}.{suffix}"

    def pieces(self, part: str) -> list[str]:
        """The names of the pieces of a part that was read."""
        count = int(self.file("read", part, "count").read_bytes())
        return [piece_name(part, number) for number in range(count)]

    def read(self, piece: str) -> Piece:
        """What `read_stage` left."""
        return msgspec.msgpack.decode(self.file("read", piece, "msgpack").read_bytes(), type=Piece)

    def texts(self, piece: str, kept: Sequence[Kept]) -> Iterator[str]:
        """The texts of documents of one piece."""
        content = self.file("read", piece, "txt").read_bytes()
        for document in kept:
            yield content[document.begin : document.end].decode()

    def fates(self) -> NDArray[np.uint8]:
        """What becomes of each document, memory-mapped."""
        return np.load(self.directory / "fates.npy", mmap_mode="r")


def piece_name(part: str, number: int) -> str:
    """The name of a piece of a part."""
    return f"{part}-{number}"


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an .npy file whole or not at all."""
    buffer = BytesIO()
    np.save(buffer, array)
    write_file(path, buffer.getvalue())


def read_stage(directory: Path, name: str, parts: tuple[Part, ...], filters: Filters, piece_bytes: int) -> None:
    """Read, filter and describe the documents of a part, in pieces of at most about `piece_bytes` of text.

    A piece has a file of texts, one after another, and one of what is known about each. What is in pieces that a killed
    build left is read over, not examined again.
    """
    work = Work(directory)
    items = ((part, item) for part in parts for item in read_part(part, max_bytes=filters.max_bytes))
    number = 0
    while work.file("read", piece_name(name, number), "msgpack").exists():
        done = work.read(piece_name(name, number)).num_items
        next(islice(items, done, done), None)
        number += 1
    while True:
        piece, texts = _read_piece(items, filters, piece_bytes)
        if not piece.num_items:
            break
        write_file(work.file("read", piece_name(name, number), "txt"), texts)
        write_file(work.file("read", piece_name(name, number), "msgpack"), msgspec.msgpack.encode(piece))
        number += 1
    write_file(work.file("read", name, "count"), str(number).encode())


def _read_piece(
    items: Iterator[tuple[Part, Document | Rejected]], filters: Filters, piece_bytes: int
) -> tuple[Piece, bytes]:
    kept: list[Kept] = []
    dropped: dict[str, Dropped] = {}
    texts: list[bytes] = []
    num_items = offset = 0
    for part, item in items:
        num_items += 1
        content = item.text.encode() if isinstance(item, Document) else b""
        reason = _reason(item, len(content), filters)
        if isinstance(item, Rejected) or reason is not None:
            size = item.num_bytes if isinstance(item, Rejected) else len(content)
            dropped.setdefault(str(reason), Dropped()).add(printable(item.source), size)
            continue
        kept.append(_describe(item, part, offset, offset + len(content), has_signature=filters.has_signatures))
        texts.append(content)
        offset += len(content)
        if offset >= piece_bytes or len(kept) == _MAX_DOCUMENTS:
            break
    return Piece(kept=kept, dropped=dropped, num_items=num_items), b"".join(texts)


def printable(name: str) -> str:
    """A name as text: the bytes of a file's name that are not UTF-8 become \\xff and the like."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _reason(item: Document | Rejected, num_bytes: int, filters: Filters) -> str | None:
    """Why an item is dropped: exactly one reason, the first that holds."""
    if isinstance(item, Rejected):
        return item.reason
    if num_bytes < filters.min_bytes or not item.text.strip():
        return "too-small"
    if num_bytes > filters.max_bytes:
        return "too-large"
    if filters.licenses is not None and not is_allowed(item.license, filters.licenses):
        return "license"
    if os.path.basename(item.source) in LOCK_FILES:
        return "generated"
    return judge(item.text, is_code=item.is_code)


def _describe(document: Document, part: Part, begin: int, end: int, *, has_signature: bool) -> Kept:
    content = content_hash(document.text)
    # A repository goes wholly to one side; one that is the whole source goes file by file, or a side would be empty.
    side = content
    if document.group and not document.is_root:
        is_folder = Path(document.group).is_relative_to(part.root)
        name = os.path.relpath(document.group, part.root) if is_folder else document.group
        side = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return Kept(
        source=printable(document.source),
        group=printable(document.group),
        license=document.license,
        begin=begin,
        end=end,
        content=content,
        signature=signature(document.text) if has_signature else b"",
        side=side,
    )


def ngram_stage(directory: Path, piece: str, first: int, size: int) -> None:
    """The distinct n-grams of the held-out documents of a piece. first: the number of its first document."""
    work = Work(directory)
    kept = work.read(piece).kept
    fates = work.fates()[first : first + len(kept)]
    texts = work.texts(piece, [document for document, fate in zip(kept, fates, strict=True) if fate == HELD_OUT])
    found = [np.empty(0, np.uint64), *(ngrams(text, size) for text in texts)]
    save_array(work.file("ngrams", piece, "npy"), np.unique(np.concatenate(found)))


def overlap_stage(directory: Path, piece: str, first: int, size: int) -> None:
    """Which documents of a piece share which of the n-grams in ngrams.npy: int64 [hits, 2] of places in both."""
    work = Work(directory)
    kept = work.read(piece).kept
    fates = work.fates()[first : first + len(kept)]
    wanted = np.load(work.directory / "ngrams.npy", mmap_mode="r")
    places = [place for place, fate in enumerate(fates) if fate == TRAIN]
    hits = [np.empty((0, 2), np.int64)]
    for place, text in zip(places, work.texts(piece, [kept[place] for place in places]), strict=True):
        own = np.unique(ngrams(text, size))
        where = np.minimum(np.searchsorted(wanted, own), len(wanted) - 1)
        shared = where[wanted[where] == own]
        hits.append(np.column_stack((np.full(len(shared), place), shared)))
    save_array(work.file("overlap", piece, "npy"), np.concatenate(hits))


def token_stage(directory: Path, piece: str, first: int, tokenizer_directory: Path) -> None:
    """Tokenise the documents of a piece that stay; each ends with <|endoftext|>. Lengths are 0 for the others."""
    work, tokenizer = Work(directory), _tokenizer(tokenizer_directory)
    kept = work.read(piece).kept
    fates = work.fates()[first : first + len(kept)]
    end, dtype = tokenizer.control_id("<|endoftext|>"), token_type(tokenizer.vocab_size)
    lengths = np.zeros(len(kept), np.int64)
    tokens: list[bytes] = []
    for place, text in enumerate(work.texts(piece, kept)):
        if fates[place] in (TRAIN, HELD_OUT):
            token_ids = [*tokenizer.encode(text), end]
            lengths[place] = len(token_ids)
            tokens.append(np.asarray(token_ids, dtype).tobytes())
    write_file(work.file("tokens", piece, "bin"), b"".join(tokens))
    save_array(work.file("tokens", piece, "npy"), lengths)


@lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


def run_stage(
    stage: Callable[..., None], tasks: Sequence[tuple[Any, ...]], *, num_tasks: int, workers: int, report: Report
) -> None:
    """Call `stage(*task)` for every task, in this process or in others, and count what is done.

    num_tasks: of the whole build, with those that an earlier run has done. Raises what a stage raises, and
    TrainingError when a process died.
    """
    done = num_tasks - len(tasks)
    report(done, num_tasks)
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            stage(*task)
            done += 1
            report(done, num_tasks)
        return
    context = get_context("spawn")  # a fork would copy locks that other threads hold
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_begin_worker)
    try:
        for future in as_completed(_submit(pool, stage, tasks)):
            future.result()
            done += 1
            report(done, num_tasks)
    except BrokenProcessPool as error:
        raise TrainingError(
            "a worker process died, most likely for lack of memory: try fewer --workers; the same command goes on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, stage: Callable[..., None], tasks: Sequence[tuple[Any, ...]]
) -> list[Future[None]]:
    """Hand all tasks over. The workers are started here, and inherit that Ctrl-C is not for them but for the build.

    For the build it waits until they are started: one that is cut off halfway would end with a traceback.
    """
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # Python runs handlers there only
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number)) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [pool.submit(stage, *task) for task in tasks]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = parent_process()
    assert parent is not None

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)  # a build that was killed leaves no process behind

    threading.Thread(target=leave, daemon=True).start()
