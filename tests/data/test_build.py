"""`data build`: what is dropped and why, the same bytes however it ran, nothing shared between the sides."""

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.corpus import MIT, code, hash_of, prose

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data import build as building
from indexshare.data import plan, stages
from indexshare.data.build import BuildOptions, build
from indexshare.data.licenses import PERMISSIVE
from indexshare.data.report import BuildReport, render, to_html
from indexshare.data.rows import open_rows
from indexshare.data.shards import TokenFile, verify
from indexshare.engine.resolve import packaged_model
from indexshare.errors import ConfigError, TrainingError


def options(corpus: Path, output: Path, **given: Any) -> BuildOptions:
    return replace(
        BuildOptions(sources=(str(corpus),), output=output, tokenizer=packaged_model(), held_out=0.2), **given
    )


def shards(output: Path) -> dict[str, bytes]:
    """Everything that was written but the report, which has the seconds."""
    return {
        str(file.relative_to(output)): file.read_bytes()
        for side in ("train", "held_out")
        for file in sorted((output / side).iterdir())
    }


def sources(output: Path, side: str) -> list[str]:
    files = sorted((output / side).glob("tokens-*.json"))
    return [name for file in files for name in json.loads(file.read_text())["sources"]]


def reasons(report: BuildReport) -> dict[str, list[str]]:
    return {row.reason: [Path(name).name for name in row.examples] for row in report.dropped}


def texts(output: Path, side: str, tokenizer: Tokenizer) -> list[str]:
    tokens = TokenFile(output / side)
    bounds = [*tokens.starts.tolist(), len(tokens)]
    return [tokenizer.decode(tokens[begin : end - 1].tolist()) for begin, end in itertools.pairwise(bounds)]


def test_every_document_is_kept_or_dropped_for_one_reason(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = build(options(corpus, tmp_path / "out"))
    found = reasons(report)
    assert found == {
        "unreadable": ["lines.jsonl:21"],
        "binary": ["picture.png"],
        "not-utf-8": ["latin.txt"],
        "too-small": ["short.txt"],
        "generated": ["made.py"],
        "long-lines": ["wide.js"],
        "few-letters": ["signs.txt"],
        "data": ["table.txt"],
        "repeated-lines": ["refrain.txt"],
        "exact-duplicate": ["again.txt"],
        "near-duplicate": ["long.txt"] if "almost.txt" not in found["near-duplicate"] else ["almost.txt"],
    }
    read, *_, kept = (amount.documents for _, amount in report.funnel)
    assert read == kept + sum(row.documents for row in report.dropped) == 8 + 30 + 21 + 1 + 10 + 1
    assert kept == report.train.documents + report.held_out.documents and report.held_out.documents > 0
    written = sources(tmp_path / "out", "train") + sources(tmp_path / "out", "held_out")
    assert len(written) == len(set(written)) == kept and not any("node_modules" in name for name in written)
    everything = texts(tmp_path / "out", "train", tokenizer) + texts(tmp_path / "out", "held_out", tokenizer)
    assert sorted(everything) == sorted(map(text_of, written))
    assert sum(split.tokens for split in (report.train, report.held_out)) == sum(row.tokens for row in report.sources)
    page = to_html(replace(report, output="<b>"))
    assert "&lt;b&gt;" in page and "near-duplicate" in page and "<script" not in page and render(report)
    verify(tmp_path / "out" / "train")


def text_of(source: str) -> str:
    """What a document's name stands for, read anew."""
    name, _, number = source.partition(":")
    if number and name.endswith(".gz"):
        return prose(200)
    return (
        json.loads(Path(name).read_text().splitlines()[int(number) - 1])["text"] if number else Path(name).read_text()
    )


def test_the_result_does_not_depend_on_the_number_of_processes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 8192)
    build(options(corpus, tmp_path / "one"))
    seen: list[tuple[str, int]] = []
    build(options(corpus, tmp_path / "two", workers=2), progress=noting(seen))
    assert dict(seen)["read"] > 6  # parts
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert not (tmp_path / "two" / "work").exists()


def noting(seen: list[tuple[str, int]], stop_at: tuple[str, int] | None = None) -> building.Progress:
    """A progress that notes (stage, done), and raises when it comes to `stop_at`."""

    @contextmanager
    def progress(what: str, unit: str) -> Any:
        def report(done: int, total: int) -> None:
            seen.append((what, done))
            if (what, done) == stop_at:
                raise KeyboardInterrupt

        yield report

    return progress


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from indexshare.data import plan, stages
from indexshare.data.build import BuildOptions, build
from indexshare.engine.resolve import packaged_model

plan.PART_BYTES = 8192

@contextmanager
def progress(what, unit):
    def report(done, total):
        if what == sys.argv[3] and done == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    yield report

build(BuildOptions(sources=(sys.argv[1],), output=Path(sys.argv[2]), tokenizer=packaged_model(), held_out=0.2),
      progress=progress)
"""


def test_a_killed_build_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 8192)
    build(options(corpus, tmp_path / "whole"))
    for stage in ("read", "tokens"):
        output = tmp_path / stage
        arguments = [sys.executable, "-c", KILLED, str(corpus), str(output), stage]
        assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
        assert (output / "work").exists() and not (output / "train").exists()
        seen: list[tuple[str, int]] = []
        build(options(corpus, output), progress=noting(seen))
        assert min(done for what, done in seen if what == stage) == 4  # what was done is not done again
        assert shards(output) == shards(tmp_path / "whole")


def test_a_build_stopped_while_it_writes_goes_on(corpus: Path, tmp_path: Path) -> None:
    for place in (("write train", 0), ("write held_out", 0)):
        with pytest.raises(KeyboardInterrupt):
            build(options(corpus, tmp_path / "out"), progress=noting([], place))
    build(options(corpus, tmp_path / "out"))
    build(options(corpus, tmp_path / "whole"))
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_no_process_stays_behind_a_killed_build(corpus: Path, tmp_path: Path) -> None:
    program = (
        KILLED.replace("done == 4", "False")
        .replace("held_out=0.2", "held_out=0.2, workers=2")
        .replace("\nbuild(", "\nif __name__ == '__main__':\n  build(")
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    parent = subprocess.Popen([sys.executable, str(script), str(corpus), str(tmp_path / "out"), "-"])
    try:
        workers = wait_for(lambda: [child for child in psutil.Process(parent.pid).children() if is_worker(child)])
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(is_worker(worker) for worker in workers))


def test_ctrl_c_stops_a_build_in_one_line(corpus: Path, tmp_path: Path) -> None:
    for number in range(20):  # a part of its own for each, so that it does not end before it is stopped
        (corpus / "texts" / f"big{number}.txt").write_text(prose(50_000 + number, 20_000))
    (tmp_path / "few.py").write_text(
        "from indexshare.data import plan; plan.PART_BYTES = 8192\n"
        "if __name__ == '__main__':\n    from indexshare.cli import main; main()\n"
    )
    arguments = ["data", "build", str(corpus), "--output", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "few.py"), *arguments],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: [child for child in psutil.Process(process.pid).children() if is_worker(child)])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too, which are just starting
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


def is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def grams(text: str, size: int = 13) -> set[tuple[str, ...]]:
    """Words in a row, without any hashing."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[begin : begin + size]) for begin in range(len(words) - size + 1)}


def test_training_documents_share_nothing_with_what_evaluates(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    quoted = " - ".join(" ".join(prose(number).split()[30:48]) for number in range(10, 14))
    question = tmp_path / "questions.jsonl"
    question.write_text(json.dumps({"question": "Continue: " + quoted, "answers": ["yes", "no"], "id": 3}) + "\n")
    for number in range(20, 24):  # a passage of one text in four others; some are held out
        file = corpus / "texts" / f"{number:03}.txt"
        file.write_text(file.read_text() + prose(20).split("\n", 1)[0] + "\n" + prose(20).split("\n")[1])
    for number in range(30):  # a notice in all
        file = corpus / "texts" / f"{number:03}.txt"
        file.write_text(file.read_text() + "this notice of fifteen words stands at the end of every one of the files\n")
    report = build(options(corpus, tmp_path / "out", against=(str(question),), held_out=0.3))
    gone = {name for name in reasons(report)["contaminated"] if "010" <= name <= "014"}
    assert gone and not {Path(name).name for name in sources(tmp_path / "out", "train")} & {
        f"01{n}.txt" for n in range(4)
    }
    assert report.evaluation_texts == 1 and report.common_ngrams > 0
    held_out = set().union(*map(grams, texts(tmp_path / "out", "held_out", tokenizer)))
    training = [grams(text) for text in texts(tmp_path / "out", "train", tokenizer)]
    shared = {gram: sum(gram in own for own in training) for gram in held_out}
    assert all(count == 0 or count > building.COMMON for count in shared.values()) and any(shared.values())
    assert not any(own & grams(quoted) for own in training)


def test_sides_are_stable_and_repositories_whole(corpus: Path, tmp_path: Path) -> None:
    for number in range(12):
        (corpus / f"project{number}").mkdir()
        (corpus / f"project{number}" / "package.json").write_text(json.dumps({"name": prose(number + 300)}))
        for name in ("a.py", "b.py"):
            (corpus / f"project{number}" / name).write_text(code(hash_of(name) + 1000 * number))
    build(options(corpus, tmp_path / "before", held_out=0.4, near_duplicates=1))
    (corpus / "project3" / "more.py").write_text(code(99))
    (corpus / "aaa.txt").write_text(prose(77_777))
    build(options(corpus, tmp_path / "after", held_out=0.4, near_duplicates=1))
    sides = {name: {s: set(sources(tmp_path / name, s)) for s in ("train", "held_out")} for name in ("before", "after")}
    assert sides["before"]["train"] <= sides["after"]["train"]
    assert sides["before"]["held_out"] <= sides["after"]["held_out"]
    homes = {side: {Path(n).parent.name for n in names if "project" in n} for side, names in sides["after"].items()}
    assert homes["train"] and homes["held_out"] and not homes["train"] & homes["held_out"]


def test_repositories_are_packed_together_with_the_readme_first(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = [{"text": prose(800 + n), "repo": "one" if n % 2 else "two"} for n in range(6)]
    (corpus / "texts" / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build(options(corpus, tmp_path / "out", held_out=0))
    names = [os.path.relpath(name, corpus) for name in sources(tmp_path / "out", "train")]
    assert names[:4] == ["alpha/README.md", "alpha/LICENSE", "alpha/source/main.py", "alpha/zeta.py"]
    mixed = [int(name.split(":")[1]) for name in names if "mixed" in name]
    assert mixed == [1, 3, 5, 2, 4, 6]
    tokens = TokenFile(tmp_path / "out" / "train")
    assert tokens.segments.tolist()[:3] == [0, tokens.starts[4], tokens.starts[8]]
    rows = open_rows([tmp_path / "out"], tokenizer, length=int(tokens.starts[4]) + 5)
    first = next(batch for batch in (rows.batch(step, 1) for step in range(rows.num_rows)) if is_begin(batch, tokens))
    assert first.segment_starts == (0, int(tokens.starts[4]), rows.length)
    assert first.positions[0, : tokens.starts[4]].tolist() == list(range(int(tokens.starts[4])))
    assert np.flatnonzero(first.targets[0] < 0).tolist() == (tokens.starts[1:5] - 1).tolist()


def is_begin(batch: Any, tokens: TokenFile) -> bool:
    return np.array_equal(batch.token_ids[0], tokens[0 : batch.token_ids.shape[1]])


def test_licences_and_sizes(corpus: Path, tmp_path: Path) -> None:
    report = build(options(corpus, tmp_path / "out", licenses="permissive", held_out=0))
    names = {os.path.relpath(name, corpus) for name in sources(tmp_path / "out", "train")}
    assert names == {"alpha/LICENSE", "alpha/README.md", "alpha/source/main.py", "alpha/zeta.py"} | {
        "texts/more.jsonl.gz:1"
    }
    assert dict(report.licenses) == {"MIT": 5}
    report = build(options(corpus, tmp_path / "gpl", licenses="GPL-3.0-only,unknown", max_bytes=700, held_out=0))
    kept = sources(tmp_path / "gpl", "train")
    assert not any("alpha" in name for name in kept) and "too-large" in reasons(report)
    assert all(len(text_of(name).encode()) <= 700 for name in kept)
    filters = options(corpus, tmp_path / "out", licenses="permissive,unknown").filters()
    assert filters.licenses == (*sorted(PERMISSIVE), "unknown")


def test_a_misspelt_licence_is_not_silent(corpus: Path, tmp_path: Path) -> None:
    wrong = options(corpus, tmp_path / "out", licenses="permisive")
    for _ in range(2):  # a build that is finished says the same
        with (
            pytest.warns(UserWarning, match=r"--licenses permisive: no text is recognised as that.*permissive,"),
            pytest.raises(TrainingError, match=r"nothing is left to train on.* dropped \(license: .*another --output"),
        ):
            build(wrong)
    with pytest.warns(UserWarning, match="--licenses EPL-2.0: "):
        build(options(corpus, tmp_path / "list", licenses="MIT,EPL-2.0", held_out=0))


def test_nothing_to_train_on_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": prose(1)}]}) + "\n")
    (tmp_path / "one.txt").write_text(prose(1))
    for name, given, why in (
        ("blank.jsonl", {}, "documents: none"),
        ("chats.jsonl", {}, r"1 dropped \(unreadable: .*conversations go to recipes as they are"),
        ("one.txt", {"held_out": 1 - 1e-9}, "1 held out"),
    ):
        with pytest.raises(TrainingError, match=rf"nothing is left to train on; .*{why}.*report.html"):
            build(options(tmp_path / name, tmp_path / f"out-{name}", **given))


def test_a_finished_build_is_only_reported_and_another_one_refused(corpus: Path, tmp_path: Path) -> None:
    report = build(options(corpus, tmp_path / "out"))
    seen: list[tuple[str, int]] = []
    assert build(options(corpus, tmp_path / "out", workers=3), progress=noting(seen)) == report and not seen
    with pytest.raises(TrainingError, match="other sources, files or options"):
        build(options(corpus, tmp_path / "out", held_out=0.3))
    (corpus / "texts" / "000.txt").write_text(prose(9999))
    with pytest.raises(TrainingError, match="other sources, files or options"):
        build(options(corpus, tmp_path / "out"))
    with building._only_one(tmp_path / "out"), pytest.raises(TrainingError, match="another build"):
        build(options(corpus, tmp_path / "out"))


def test_wrong_options_are_named(corpus: Path, tmp_path: Path) -> None:
    for given, message in (({"held_out": 1.0}, "--held-out"), ({"ngram": 2}, "--ngram"), ({"sources": ()}, "source")):
        with pytest.raises(ConfigError, match=message):
            options(corpus, tmp_path, **given)
    with pytest.raises(TrainingError, match="lies in the source"):
        build(options(corpus, corpus / "out"))
    with pytest.raises(TrainingError, match="does not exist"):
        build(options(corpus / "nothing", tmp_path / "out"))
    with pytest.raises(TrainingError, match="are the same"):
        build(options(corpus, tmp_path / "out", sources=(str(corpus), f"{corpus}/")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train").mkdir()
    with pytest.raises(TrainingError, match="holds other files, such as train"):
        build(options(corpus, tmp_path / "mine"))
    (tmp_path / "tiny.txt").write_text("two words")
    seen: list[tuple[str, int]] = []
    with pytest.raises(TrainingError, match="no text in --against"):
        build(options(corpus, tmp_path / "out", against=(str(tmp_path / "tiny.txt"),)), progress=noting(seen))
    assert seen == [("against", 1)]  # before anything that takes long


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 32 * 1024)

    def peaks(name: str, num_documents: int) -> dict[str, int]:
        """Of each stage, beyond what it found."""
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name / f"a.{suffix}", (prose(number, 500) for number in range(num_documents)))
        found: dict[str, int] = {}

        @contextmanager
        def progress(what: str, unit: str) -> Generator[Callable[[int, int], None]]:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            yield lambda done, total: None
            found[what] = tracemalloc.get_traced_memory()[1] - before

        tracemalloc.start()
        build(options(tmp_path / name, tmp_path / f"{name}-out", held_out=0), progress=progress)
        tracemalloc.stop()
        return found

    peaks("first", 4)  # what stays in memory from then on, such as the tokenizer
    small, large = peaks("small", 20), peaks("large", 80)
    assert {"read", "compare", "tokens", "write train"} <= set(small) == set(large)
    for stage in small:
        assert large[stage] < small[stage] + 60 * 1500, "a document may cost its signature, not its text"


def write_texts(file: Path, texts: Iterable[str]) -> None:
    """One file that holds the texts, by its suffix."""
    if file.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}), file)
        return
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def test_a_file_that_cannot_be_cut_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 8192)
    tokens: dict[str, bytes] = {}
    for suffix in ("jsonl", "jsonl.gz", "parquet"):
        file, output, seen = tmp_path / f"a.{suffix}", tmp_path / suffix, []
        write_texts(file, (*map(prose, range(40)), "short", prose(3), prose(7)))
        report = build(options(file, output, near_duplicates=1, held_out=0.3), progress=noting(seen))
        most = {stage: max(done for what, done in seen if what == stage) for stage in ("read", "tokens")}
        assert most["tokens"] >= 5 and (most["read"] == 1) == (suffix != "jsonl")
        assert {row.reason: row.documents for row in report.dropped} == {"too-small": 1, "exact-duplicate": 2}
        for side in ("train", "held_out"):
            found = TokenFile(output / side)
            content = found[0 : len(found)].tobytes() + found.starts.tobytes() + found.segments.tobytes()
            assert len(found.starts) > 5 and tokens.setdefault(side, content) == content


def test_many_small_documents_are_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_MAX_DOCUMENTS", 10)
    write_texts(tmp_path / "a.jsonl", map(prose, range(45)))
    seen: list[tuple[str, int]] = []
    report = build(options(tmp_path / "a.jsonl", tmp_path / "out"), progress=noting(seen))
    assert max(done for what, done in seen if what == "tokens") == 5
    assert report.train.documents + report.held_out.documents == 45


def test_a_killed_build_goes_on_inside_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 8192)
    write_texts(tmp_path / "a.jsonl.gz", map(prose, range(40)))
    build(options(tmp_path / "a.jsonl.gz", tmp_path / "whole"))
    seen: list[str] = []
    describe = stages._describe

    def noted(document: Any, *arguments: Any, **given: Any) -> Any:
        seen.append(document.source)
        if len(seen) == 30:
            raise KeyboardInterrupt
        return describe(document, *arguments, **given)

    monkeypatch.setattr(stages, "_describe", noted)
    with pytest.raises(KeyboardInterrupt):
        build(options(tmp_path / "a.jsonl.gz", tmp_path / "out"))
    first, seen[:] = seen[:-1], ["-"] * 30
    build(options(tmp_path / "a.jsonl.gz", tmp_path / "out"))
    again = set(first) & set(seen)
    assert len(set(first) | set(seen) - {"-"}) == 40 and len(again) < 9  # no more than was in the open piece
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_a_build_killed_after_every_step_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 8192)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes long, and no machine stops here
    write_texts(tmp_path / "a.jsonl.gz", map(prose, range(16)))
    wanted = options(tmp_path / "a.jsonl.gz", tmp_path / "whole", held_out=0.4)
    build(wanted)
    again = replace(wanted, output=tmp_path / "out")
    kills = sum(1 for _ in itertools.takewhile(bool, (stopped_after(steps, again) for steps in range(100))))
    assert 12 < kills < 100
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def stopped_after(steps: int, wanted: BuildOptions) -> bool:
    """Build until so many files were renamed or removed; -> whether there was more to do."""
    count = itertools.count()

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(count) == steps:
                raise KeyboardInterrupt
            return change(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        try:
            build(wanted)
        except KeyboardInterrupt:
            return True
    return False


def test_a_finished_build_is_checked(corpus: Path, tmp_path: Path) -> None:
    build(options(corpus, tmp_path / "out"))
    for name, place in (("train/tokens-00000.bin", 0), ("held_out/tokens-00000.json", -6)):
        file = tmp_path / "out" / name
        good = bytearray(file.read_bytes())
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place:][1:])
        with pytest.raises(TrainingError, match=rf"{name} is damaged: delete"):
            build(options(corpus, tmp_path / "out"))
        file.write_bytes(good)
    assert build(options(corpus, tmp_path / "out")).train.documents


def test_names_that_are_not_utf_8(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/corpus/caf\xe9"))
    folder.mkdir(parents=True)
    (folder / "LICENSE").write_text(MIT)
    for number in range(20):
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff%d.txt" % number)).write_text(prose(number))
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.bin")).write_bytes(b"\0")
    for source in (folder, folder.parent):
        output = folder.parent.parent / f"out-{source.name}"
        report = build(options(source, output, held_out=0, against=(str(folder / "LICENSE"),)))
        assert reasons(report)["binary"] == ["\\xff.bin"] and report.train.documents == 20
        assert sources(output, "train")[0].endswith("caf\\xe9/\\xff0.txt") and to_html(report).encode()
        assert texts(output, "train", tokenizer)[0] == prose(0)


def test_sources_and_outputs_that_cannot_be(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    (tmp_path / "empty" / ".git" / "config").write_text("words")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("mine")
    for source, output, message in (
        ("empty", "out", "empty holds no files to read"),
        ("loop", "out", "loop does not exist"),
        ("corpus", "file", "the build stopped: .*File exists"),
    ):
        with pytest.raises(TrainingError, match=message):
            build(options(tmp_path / source, tmp_path / output))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "build.json").write_text("not ours")
    with pytest.raises(TrainingError, match="delete it first"):
        build(options(corpus, tmp_path / "theirs"))
