"""`indexshare data build`: from files to tokens for training, without what should not be learned from.

    read        parts      filter, describe (stages.read_stage)         in parallel, one file a part
    compare     whole      duplicates; which side a document is on      in order, signatures only
    ngrams      parts      n-grams of what is held out                  in parallel
    overlap     parts      which documents hold such n-grams            in parallel
    tokens      parts      tokenise                                     in parallel
    write       whole      repositories together, shards, the report    in order

A stage leaves files in OUTPUT/work; one that was killed goes on with the parts that are missing. The shards are a
function of the sources and options alone, whatever the number of processes and the interruptions.
"""

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import msgspec
import numpy as np
from numpy.typing import NDArray

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data import stages
from indexshare.data.documents import read_texts
from indexshare.data.files import source_files
from indexshare.data.layout import Survey, survey, write_split
from indexshare.data.licenses import PERMISSIVE
from indexshare.data.plan import Plan, make_plan
from indexshare.data.quality import REASONS
from indexshare.data.report import Amount, BuildReport, Reason, Source, Split, to_html
from indexshare.data.shards import fingerprint, remove_directory, write_file
from indexshare.data.similarity import NearDuplicates, ngrams
from indexshare.data.stages import CONTAMINATED, EXACT, HELD_OUT, NEAR, TRAIN, Dropped, Filters, Work, save_array
from indexshare.errors import ConfigError, TrainingError

RULES_VERSION = 1  # to be raised when the same sources and options would give other shards
MAX_DOCUMENT_BYTES = 8 * 1024 * 1024  # the tokenizer takes no more in one line
COMMON = 10  # a held-out n-gram in more training documents than this is a notice or an idiom, not a leak
_LOCK = ".lock"
_FATE_REASONS = {EXACT: "exact-duplicate", NEAR: "near-duplicate", CONTAMINATED: "contaminated"}

Progress = Callable[[str, str], AbstractContextManager[stages.Report]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build. tokenizer: the directory of a model.

    licenses: "any", "permissive" or SPDX names with commas between. min_bytes, max_bytes: of a document.
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
        names = None if self.licenses == "any" else tuple(self.licenses.split(","))
        allowed = tuple(sorted(PERMISSIVE)) if self.licenses == "permissive" else names
        return Filters(
            licenses=allowed,
            min_bytes=self.min_bytes,
            max_bytes=self.max_bytes,
            has_signatures=self.near_duplicates < 1,
        )


@contextmanager
def _silent(what: str, unit: str) -> Generator[stages.Report]:
    yield lambda done, total: None


def build(options: BuildOptions, *, progress: Progress = _silent) -> BuildReport:
    """Build, or go on with a build that was stopped; one that is finished is only reported.

    Raises ConfigError for options, TrainingError for sources, and for an output of other options or sources.
    """
    plan = make_plan(options.sources, options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    with _only_one(options.output):
        tokenizer = Tokenizer.from_directory(options.tokenizer)
        identity = _identity(options, plan, fingerprint(tokenizer))
        if (report := _finished(options.output, identity)) is not None:
            return report
        try:
            return _Build(options, plan, tokenizer, progress).run(identity)
        except OSError as error:
            raise TrainingError(f"the build stopped: {error}. Once that is solved the same command goes on") from error


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
    return hashlib.sha256(msgspec.json.encode(values)).hexdigest()


def _finished(output: Path, identity: str) -> BuildReport | None:
    """The report of a build that is done; None for one to begin or to go on with."""
    state = output / "build.json"
    if not state.exists():
        if strangers := sorted(entry.name for entry in output.iterdir() if entry.name != _LOCK):
            raise TrainingError(f"{output} holds other files, such as {strangers[0]}: choose a new --output")
        write_file(state, json.dumps({"identity": identity}).encode())
    elif json.loads(state.read_bytes()).get("identity") != identity:
        raise TrainingError(
            f"{output} holds data of other sources, files or options, or of another version of indexshare: choose "
            "another --output, or delete it first"
        )
    report = output / "report.json"
    return msgspec.json.decode(report.read_bytes(), type=BuildReport) if report.exists() else None


class _Build:
    """One run over the stages."""

    def __init__(self, options: BuildOptions, plan: Plan, tokenizer: Tokenizer, progress: Progress) -> None:
        self._options, self._plan, self._tokenizer, self._progress = options, plan, tokenizer, progress
        self._work = Work(options.output / "work")
        self._firsts: list[int] = []  # the number of the first document of each part
        self._seconds: dict[str, float] = {}
        self._num_texts = self._num_ngrams = self._num_common = 0

    def run(self, identity: str) -> BuildReport:
        """All stages; each takes up what is there."""
        work = self._work.directory
        work.mkdir(exist_ok=True)
        numbers = range(len(self._plan.parts))
        filters = self._options.filters()
        self._stage("read", "msgpack", stages.read_stage, [(n, self._plan.parts[n], filters) for n in numbers])
        with self._timed("compare"):
            fates = self._compare()
        size = self._options.ngram
        if self._options.held_out or self._options.against:
            tasks = [(n, self._firsts[n], size) for n in numbers]
            self._stage("ngrams", "npy", stages.ngram_stage, tasks)
            with self._timed("against"):
                strict = self._wanted_ngrams()
            if len(strict):
                self._stage("overlap", "npy", stages.overlap_stage, tasks)
                fates = self._decontaminate(fates, strict)
        tasks = [(n, self._firsts[n], self._options.tokenizer.resolve()) for n in numbers]
        self._stage("tokens", "npy", stages.token_stage, tasks)
        with self._timed("write"):
            report = self._write(fates)
        report = replace(report, seconds=tuple(self._seconds.items()))
        write_file(self._options.output / "report.html", to_html(report).encode())
        write_file(self._options.output / "report.json", msgspec.json.format(msgspec.json.encode(report)))
        remove_directory(work)
        return report

    def _stage(
        self, name: str, suffix: str, function: Callable[..., None], tasks: Iterable[tuple[object, ...]]
    ) -> None:
        tasks = [(self._work.directory, *task) for task in tasks]
        missing = [task for number, task in enumerate(tasks) if not self._work.file(name, number, suffix).exists()]
        with self._timed(name), self._progress(name, "parts") as report:
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
        with self._progress("compare", "parts") as report:
            for number in range(len(self._plan.parts)):
                self._firsts.append(len(fates))
                for document in self._work.read(number).kept:
                    if document.content in exact:
                        fates.append(EXACT)
                    elif near is not None and not near.is_new(len(fates), document.signature):
                        fates.append(NEAR)
                    else:
                        fates.append(HELD_OUT if int.from_bytes(document.side[:8], "big") < border else TRAIN)
                    exact.add(document.content)
                report(number + 1, len(self._plan.parts))
        result = np.asarray(fates, np.uint8)
        save_array(self._work.directory / "fates.npy", result)
        return result

    def _wanted_ngrams(self) -> NDArray[np.bool_]:
        """Write ngrams.npy, all n-grams to look for in order; -> which of them count however common they are."""
        size = self._options.ngram
        found = [np.load(self._work.file("ngrams", number, "npy")) for number in range(len(self._plan.parts))]
        held_out = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
        against = np.empty(0, np.uint64)
        for name in self._options.against:
            for file in source_files(name):
                found = [ngrams(text, size) for text in read_texts(file)]
                self._num_texts += len(found)
                against = np.unique(np.concatenate([against, *found]))
        if self._options.against and not len(against):
            raise TrainingError(f"no text in --against has {size} words: give the files of evaluation sets")
        wanted = np.union1d(held_out, against)
        self._num_ngrams = len(wanted)
        save_array(self._work.directory / "ngrams.npy", wanted)
        return np.isin(wanted, against, assume_unique=True)

    def _decontaminate(self, fates: NDArray[np.uint8], strict: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Drop training documents with an n-gram of an evaluation set, or with a held-out one that few others have."""
        counts = np.zeros(len(strict), np.int64)
        parts = range(len(self._plan.parts))
        for number in parts:
            counts += np.bincount(np.load(self._work.file("overlap", number, "npy"))[:, 1], minlength=len(strict))
        counted = strict | (counts <= COMMON)
        self._num_common = int(np.sum(~counted))
        fates = fates.copy()
        for number in parts:
            hits = np.load(self._work.file("overlap", number, "npy"))
            fates[self._firsts[number] + hits[counted[hits[:, 1]], 0]] = CONTAMINATED
        save_array(self._work.directory / "fates.npy", fates)
        return fates

    def _write(self, fates: NDArray[np.uint8]) -> BuildReport:
        found = survey(self._work, self._plan.source, len(self._options.sources))
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
            output=str(self._options.output),
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
                names = [self._source_of(found, int(number)) for number in gone[: stages.NUM_EXAMPLES]]
                total[reason] = Dropped(len(gone), int(found.sizes[gone].sum()), names)
        return tuple(
            Reason(reason=reason, documents=row.documents, bytes=row.num_bytes, examples=tuple(row.examples))
            for reason in REASONS
            if (row := total.get(reason)) is not None
        )

    def _source_of(self, found: Survey, number: int) -> str:
        part = int(np.searchsorted(found.firsts, number, side="right")) - 1
        return self._work.read(part).kept[number - int(found.firsts[part])].source

    def _sources(self, found: Survey, fates: NDArray[np.uint8]) -> tuple[Source, ...]:
        part_source = np.repeat(np.asarray(self._plan.source, np.int64), np.diff(found.firsts))
        rows = []
        for number, name in enumerate(self._options.sources):
            here = part_source == number
            kept = here & (fates <= HELD_OUT)
            good, dropped = _amount(found, here), found.dropped[number].values()
            read = Amount(
                documents=good.documents + sum(row.documents for row in dropped),
                bytes=good.bytes + sum(row.num_bytes for row in dropped),
            )
            tokens = int(found.tokens[kept].sum())
            rows.append(Source(name=name, read=read, kept=_amount(found, kept), tokens=tokens))
        return tuple(rows)


def _amount(found: Survey, chosen: NDArray[np.bool_]) -> Amount:
    return Amount(documents=int(chosen.sum()), bytes=int(found.sizes[chosen].sum()))
