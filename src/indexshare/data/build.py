"""`indexshare data build`: from files to tokens for training, without what should not be learned from.

    against     whole      n-grams of evaluation sets                               in order
    read        parts      filter, describe, cut into pieces (stages.read_stage)    in parallel
    compare     whole      duplicates; which side a document is on                  in order, signatures only
    ngrams      pieces     n-grams of what is held out                              in parallel
    overlap     pieces     which documents hold such n-grams                        in parallel
    tokens      pieces     tokenise                                                 in parallel
    write       whole      repositories together, shards, the report                in order

A stage leaves files in OUTPUT/work; one that was killed goes on with what is missing. The shards are a function
of the sources and options alone, whatever the number of processes and the interruptions.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import msgspec
import numpy as np
from numpy.typing import NDArray

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data import plan as planning
from indexshare.data import stages
from indexshare.data.documents import read_texts
from indexshare.data.files import source_files
from indexshare.data.layout import Survey, survey, write_split
from indexshare.data.licenses import COPYLEFT, PERMISSIVE, unfamiliar
from indexshare.data.plan import Plan, make_plan
from indexshare.data.quality import REASONS
from indexshare.data.report import Amount, BuildReport, Reason, Source, Split, to_html, why_nothing_is_left
from indexshare.data.shards import fingerprint, incomplete, remove_directory, verify, write_file
from indexshare.data.similarity import NearDuplicates, ngrams
from indexshare.data.stages import CONTAMINATED, EXACT, HELD_OUT, NEAR, TRAIN, Dropped, Filters, Work, save_array
from indexshare.errors import ConfigError, TrainingError

RULES_VERSION = 2  # to be raised when the same sources and options would give other shards
MAX_DOCUMENT_BYTES = 8 * 1024 * 1024  # the tokenizer takes no more in one line
COMMON = 10  # a held-out n-gram in more training documents than this is a notice or an idiom, not a leak
_STATE, _LOCK = "build.json", ".lock"
_FATE_REASONS = {EXACT: "exact-duplicate", NEAR: "near-duplicate", CONTAMINATED: "contaminated"}

Progress = Callable[[str, str], AbstractContextManager[stages.Report]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build. tokenizer: the directory of a model.

    licenses: "any", or SPDX names, "unknown" and "permissive" with commas between. min_bytes, max_bytes: of a document.
    near_duplicates: share of common five-word sequences from which the later document goes; 1 keeps them. held_out: the
    share of documents kept for evaluation. against: evaluation sets that no training document may share `ngram` words
    in a row with.
    """

    sources: tuple[str, ...]
    output: Path
    tokenizer: Path
    licenses: str = "any"
    min_bytes: int = 100
    max_bytes: int = MAX_DOCUMENT_BYTES
    near_duplicates: float = 0.8
    held_out: float = 0.01
    against: tuple[str, ...] = ()
    ngram: int = 13
    workers: int = 1

    def __post_init__(self) -> None:
        for holds, message in (
            (bool(self.sources), "give at least one source"),
            (1 <= self.min_bytes <= self.max_bytes, "--min-bytes must be from 1 to --max-bytes"),
            (self.max_bytes <= MAX_DOCUMENT_BYTES, f"--max-bytes must be at most {MAX_DOCUMENT_BYTES:,}"),
            (0 < self.near_duplicates <= 1, "--near-duplicates must be above 0 and at most 1"),
            (0 <= self.held_out < 1, "--held-out must be from 0 to below 1"),
            (self.ngram >= 5, "--ngram must be at least 5: fewer words are in every text"),
            (self.workers >= 1, "--workers must be at least 1"),
        ):
            if not holds:
                raise ConfigError(message)

    def filters(self) -> Filters:
        """What `read_stage` needs."""
        names = self.licenses.split(",")
        allowed = (each for name in names for each in (sorted(PERMISSIVE) if name == "permissive" else [name]))
        return Filters(
            licenses=None if "any" in names else tuple(allowed),
            min_bytes=self.min_bytes,
            max_bytes=self.max_bytes,
            has_signatures=self.near_duplicates < 1,
        )


@contextmanager
def _silent(what: str, unit: str) -> Generator[stages.Report]:
    yield lambda done, total: None


def build(options: BuildOptions, *, progress: Progress = _silent) -> BuildReport:
    """Build, or go on with a build that was stopped; one that is finished is checked and reported.

    Warns of licences that no text is recognised as. Raises TrainingError for sources, for an output of other options or
    sources, for shards that are damaged, and when nothing is left to train on.
    """
    if names := unfamiliar(options.filters().licenses or ()):
        warnings.warn(
            f"--licenses {','.join(names)}: no text is recognised as that, it only lets pass what states it. Names that"
            f" are: any, permissive, unknown, {', '.join(sorted(PERMISSIVE | COPYLEFT))}",
            stacklevel=2,
        )
    try:
        plan = make_plan(options.sources, options.output)
        options.output.mkdir(parents=True, exist_ok=True)
        with _only_one(options.output):
            tokenizer = Tokenizer.from_directory(options.tokenizer)
            _claim(options.output, _identity(options, plan, fingerprint(tokenizer)))
            report = _finished(options.output) or _Build(options, plan, tokenizer, progress).run()
            remove_directory(options.output / "work")
    except OSError as error:
        raise TrainingError(f"the build stopped: {error}. Once that is solved the same command goes on") from error
    if not report.train.documents:
        raise TrainingError(why_nothing_is_left(report))
    return report


@contextmanager
def _only_one(output: Path) -> Generator[None]:
    lock = filelock.FileLock(output / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise TrainingError(f"another build is writing {output}: wait for it, or choose another --output") from error
    try:
        yield
    finally:
        lock.release()


def _identity(options: BuildOptions, plan: Plan, tokenizer: str) -> str:
    """Of everything that the result depends on."""
    against = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for name in options.against
        for file in source_files(name)
    ]
    values = [RULES_VERSION, tokenizer, plan.identity, against, options.sources, options.filters()]
    values += [options.near_duplicates, options.held_out, options.against, options.ngram]
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _claim(output: Path, identity: str) -> None:
    """Make `output` that of this build. Raises TrainingError where it is not empty, nor of the same build."""
    state, content = output / _STATE, msgspec.json.encode({"identity": identity})
    if not state.exists():
        ours = (_LOCK, incomplete(state).name)
        if strangers := sorted(entry.name for entry in output.iterdir() if entry.name not in ours):
            raise TrainingError(f"{output} holds other files, such as {strangers[0]}: choose a new --output")
        write_file(state, content)
    elif state.read_bytes() != content:
        raise TrainingError(
            f"{output} holds data of other sources, files or options, or of another version of indexshare: choose "
            "another --output, or delete it first"
        )


def _finished(output: Path) -> BuildReport | None:
    """The report of a build that is done, whose shards are then checked; None for one to begin or to go on with."""
    report = output / "report.json"
    if not report.exists():
        return None
    for side in ("train", "held_out"):
        verify(output / side)
    return msgspec.json.decode(report.read_bytes(), type=BuildReport)


class _Build:
    """One run over the stages."""

    def __init__(self, options: BuildOptions, plan: Plan, tokenizer: Tokenizer, progress: Progress) -> None:
        self._options, self._plan, self._tokenizer, self._progress = options, plan, tokenizer, progress
        self._work = Work(options.output / "work")
        self._pieces: list[str] = []
        self._source_of: list[int] = []  # the number of the source of each piece
        self._firsts: list[int] = []  # the number of the first document of each piece
        self._seconds: dict[str, float] = {}
        self._num_texts = self._num_ngrams = self._num_common = 0

    def run(self) -> BuildReport:
        """All stages; each takes up what is there."""
        self._work.directory.mkdir(exist_ok=True)
        with self._timed("against"):  # first, so that a set that cannot be read is known at once
            against = self._against_ngrams()
        self._read()
        with self._timed("compare"):
            fates = self._compare()
        size = self._options.ngram
        if self._options.held_out or self._options.against:
            tasks = [(piece, first, size) for piece, first in zip(self._pieces, self._firsts, strict=True)]
            self._stage("ngrams", "npy", stages.ngram_stage, tasks)
            with self._timed("against"):
                strict = self._wanted_ngrams(against)
            if len(strict):
                self._stage("overlap", "npy", stages.overlap_stage, tasks)
                fates = self._decontaminate(fates, strict)
        tokenizer = self._options.tokenizer.resolve()
        tasks = [(piece, first, tokenizer) for piece, first in zip(self._pieces, self._firsts, strict=True)]
        self._stage("tokens", "npy", stages.token_stage, tasks)
        with self._timed("write"):
            report = self._write(fates)
        report = replace(report, seconds=tuple(self._seconds.items()))
        write_file(self._options.output / "report.html", to_html(report).encode())
        write_file(self._options.output / "report.json", msgspec.json.format(msgspec.json.encode(report)))
        return report

    def _read(self) -> None:
        names = [f"{number:06d}" for number in range(len(self._plan.parts))]
        filters = self._options.filters()
        tasks = [
            (name, parts, filters, planning.PART_BYTES) for name, parts in zip(names, self._plan.parts, strict=True)
        ]
        self._stage("read", "count", stages.read_stage, tasks, unit="parts")
        for name, source in zip(names, self._plan.source, strict=True):
            pieces = self._work.pieces(name)
            self._pieces += pieces
            self._source_of += [source] * len(pieces)

    def _stage(
        self,
        name: str,
        suffix: str,
        function: Callable[..., None],
        tasks: Sequence[tuple[Any, ...]],
        *,
        unit: str = "pieces",
    ) -> None:
        """tasks: the arguments of `function` after the directory; the first names the part or piece."""
        missing = [
            (self._work.directory, *task) for task in tasks if not self._work.file(name, task[0], suffix).exists()
        ]
        with self._timed(name), self._progress(name, unit) as report:
            stages.run_stage(function, missing, num_tasks=len(tasks), workers=self._options.workers, report=report)

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        begun = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begun

    def _compare(self) -> NDArray[np.uint8]:
        """The fate of each document but for contamination: duplicates of earlier ones, held out, or for training."""
        threshold = self._options.near_duplicates
        exact: set[bytes] = set()
        near = NearDuplicates(threshold) if threshold < 1 else None
        border = int(self._options.held_out * 2**64)
        fates: list[int] = []
        with self._progress("compare", "pieces") as report:
            for number, piece in enumerate(self._pieces):
                self._firsts.append(len(fates))
                for document in self._work.read(piece).kept:
                    if document.content in exact:
                        fates.append(EXACT)
                    elif near is not None and not near.is_new(len(fates), document.signature):
                        fates.append(NEAR)
                    else:
                        fates.append(HELD_OUT if int.from_bytes(document.side[:8], "big") < border else TRAIN)
                    exact.add(document.content)
                report(number + 1, len(self._pieces))
        result = np.asarray(fates, np.uint8)
        save_array(self._work.directory / "fates.npy", result)
        return result

    def _against_ngrams(self) -> NDArray[np.uint64]:
        """The distinct n-grams of the evaluation sets, in order."""
        size, nothing = self._options.ngram, np.empty(0, np.uint64)
        files = [file for name in self._options.against for file in source_files(name)]
        of_files = [nothing]
        with self._progress("against", "files") as report:
            for number, file in enumerate(files):
                of_texts = [ngrams(text, size) for text in read_texts(file)]
                self._num_texts += len(of_texts)
                of_files.append(np.unique(np.concatenate([nothing, *of_texts])))
                report(number + 1, len(files))
        found = np.unique(np.concatenate(of_files))
        if self._options.against and not len(found):
            raise TrainingError(f"no text in --against has {size} words: give the files of evaluation sets")
        return found

    def _wanted_ngrams(self, against: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Write ngrams.npy, all n-grams to look for in order; -> which of them count however common they are."""
        found = [np.load(self._work.file("ngrams", piece, "npy")) for piece in self._pieces]
        wanted = np.unique(np.concatenate([against, *found]))
        self._num_ngrams = len(wanted)
        save_array(self._work.directory / "ngrams.npy", wanted)
        return np.isin(wanted, against, assume_unique=True)

    def _decontaminate(self, fates: NDArray[np.uint8], strict: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Drop training documents with an n-gram of an evaluation set, or with a held-out one that few others have."""
        counts = np.zeros(len(strict), np.int64)
        for piece in self._pieces:
            np.add.at(counts, np.load(self._work.file("overlap", piece, "npy"))[:, 1], 1)
        counted = strict | (counts <= COMMON)
        self._num_common = int(np.sum(~counted))
        fates = fates.copy()
        for first, piece in zip(self._firsts, self._pieces, strict=True):
            hits = np.load(self._work.file("overlap", piece, "npy"))
            fates[first + hits[counted[hits[:, 1]], 0]] = CONTAMINATED
        save_array(self._work.directory / "fates.npy", fates)
        return fates

    def _write(self, fates: NDArray[np.uint8]) -> BuildReport:
        found = survey(self._work, self._pieces, self._source_of, len(self._options.sources))
        splits = {}
        for name, fate in (("train", TRAIN), ("held_out", HELD_OUT)):
            chosen = fates == fate
            with self._progress(f"write {name}", "documents") as report:
                num_segments, num_shards = write_split(
                    self._options.output / name,
                    self._work,
                    found,
                    chosen,
                    vocab_size=self._tokenizer.vocab_size,
                    tokenizer_fingerprint=fingerprint(self._tokenizer),
                    report=report,
                )
            splits[name] = Split(
                documents=int(chosen.sum()),
                segments=num_segments,
                tokens=int(found.tokens[chosen].sum()),
                shards=num_shards,
            )
        return BuildReport(
            output=stages.printable(str(self._options.output)),
            funnel=self._funnel(found, fates),
            dropped=self._reasons(found, fates),
            sources=self._sources(found, fates),
            licenses=tuple(found.licenses.most_common()),
            train=splits["train"],
            held_out=splits["held_out"],
            evaluation_texts=self._num_texts,
            evaluation_ngrams=self._num_ngrams,
            common_ngrams=self._num_common,
            seconds=(),
        )

    def _funnel(self, found: Survey, fates: NDArray[np.uint8]) -> tuple[tuple[str, Amount], ...]:
        dropped = [amount for reasons in found.dropped for amount in reasons.values()]
        good = Amount(documents=len(fates), bytes=int(found.sizes.sum()))
        read = Amount(
            documents=good.documents + sum(amount.documents for amount in dropped),
            bytes=good.bytes + sum(amount.num_bytes for amount in dropped),
        )
        steps = [("read", read), ("filters", good)]
        for name, gone in (("duplicates", (EXACT, NEAR)), ("decontamination", (EXACT, NEAR, CONTAMINATED))):
            steps.append((name, _amount(found, ~np.isin(fates, gone))))
        return tuple(steps)

    def _reasons(self, found: Survey, fates: NDArray[np.uint8]) -> tuple[Reason, ...]:
        total: dict[str, Dropped] = {}
        for reasons in found.dropped:
            for reason, amount in reasons.items():
                total.setdefault(reason, Dropped()).merge(amount)
        for fate, reason in _FATE_REASONS.items():
            gone = np.flatnonzero(fates == fate)
            if len(gone):
                names = [found.names[number] for number in gone[: stages.NUM_EXAMPLES]]
                total[reason] = Dropped(len(gone), int(found.sizes[gone].sum()), names)
        return tuple(
            Reason(reason=reason, documents=row.documents, bytes=row.num_bytes, examples=tuple(row.examples))
            for reason in REASONS
            if (row := total.get(reason)) is not None
        )

    def _sources(self, found: Survey, fates: NDArray[np.uint8]) -> tuple[Source, ...]:
        source_of = np.repeat(np.asarray(self._source_of, np.int64), np.diff(found.firsts))
        rows = []
        for number, name in enumerate(self._options.sources):
            here = source_of == number
            kept = here & (fates <= HELD_OUT)
            good, dropped = _amount(found, here), found.dropped[number].values()
            read = Amount(
                documents=good.documents + sum(row.documents for row in dropped),
                bytes=good.bytes + sum(row.num_bytes for row in dropped),
            )
            tokens = int(found.tokens[kept].sum())
            rows.append(Source(name=stages.printable(name), read=read, kept=_amount(found, kept), tokens=tokens))
        return tuple(rows)


def _amount(found: Survey, chosen: NDArray[np.bool_]) -> Amount:
    return Amount(documents=int(chosen.sum()), bytes=int(found.sizes[chosen].sum()))
