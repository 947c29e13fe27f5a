"""What a person sees while a command runs: tables, the bar while a prompt is read, the conversation of `chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from indexshare.chat.types import Done, Error, Event, Reasoning, Start, Text, ToolCallEvent, Warning, reply_message
from indexshare.errors import IndexShareError, MemoryLimitError, RequestError

if TYPE_CHECKING:
    from indexshare.engine.llm import LLM
    from indexshare.engine.session import Session

MIN_BAR_TOKENS = 2048  # less is read before a bar can be seen
EFFORTS = ("high", "max", "off")
MORE_ROOM = "start with a larger --context or a smaller --max-new-tokens"
HELP = "/reset forgets, /save FILE writes the conversation as JSON, /effort high|max|off, /quit ends"


def read_text(file: str) -> str:
    """The UTF-8 text of a file; - is standard input. Raises RequestError."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {file}: {error}") from error


def read_token_ids(file: str) -> list[int]:
    """A JSON array of at least two token ids from a file; - is standard input. Raises RequestError."""
    try:
        token_ids = msgspec.json.decode(read_text(file), type=list[int])
    except msgspec.DecodeError as error:
        raise RequestError(f"{file} must hold a JSON array of token ids: {error}") from error
    if len(token_ids) < 2:
        raise RequestError(f"{file} holds {len(token_ids)} token ids; a score needs at least 2")
    return token_ids


def show(result: object, picture: RenderableType, as_json: bool) -> None:
    """Print a result as a picture for a person, or as one line of JSON for a program."""
    if as_json:
        print_json(result)
    else:
        Console().print(picture)


def print_json(result: object) -> None:
    """Print one line of JSON; dataclasses become objects."""
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts."""
    picture = Table(*columns)
    for row in rows:
        picture.add_row(*row)
    return picture


def write_stream(pieces: Iterator[str], file: TextIO | None = None) -> None:
    """Write pieces of a model's text as they come, and a line end; to standard output by default."""
    file = file or sys.stdout
    for piece in pieces:
        file.write(printable(piece) if file.isatty() else piece)
        file.flush()
    file.write("\n")


def printable(text: str) -> str:
    """Text in which a model's output cannot command the terminal: control characters become visible signs."""
    signs = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return text.translate(signs | dict.fromkeys(range(127, 160), "\N{REPLACEMENT CHARACTER}"))


@contextmanager
def progress_bar(what: str) -> Generator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal's standard error; gives report(done, total), ends when they are equal."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("tokens,"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=None)

    def stop() -> None:
        if bar.live.is_started:
            bar.stop()

    def report(done: int, total: int) -> None:
        if console.is_terminal and total >= MIN_BAR_TOKENS:
            bar.start()
            bar.update(task, completed=done, total=total)
        if done >= total:
            stop()

    try:
        yield report
    finally:
        stop()


class Conversation:
    """The loop of `indexshare chat`: reads lines, streams replies, keeps the messages.

    context: tokens that the session has room for, if known. Raises RequestError when no answer fits in there.
    """

    def __init__(
        self,
        llm: LLM,
        session: Session,
        *,
        system: str | None,
        effort: str,
        sampling: Mapping[str, Any],
        context: int | None = None,
        console: Console | None = None,
    ) -> None:
        from indexshare.engine.llm import CHAT_MAX_NEW_TOKENS

        max_new_tokens = sampling.get("max_new_tokens", CHAT_MAX_NEW_TOKENS)
        if context is not None and context <= max_new_tokens:
            raise RequestError(
                f"a context of {context:,} tokens cannot hold a question and an answer of up to {max_new_tokens:,}: "
                f"{MORE_ROOM}"
            )
        self._llm = llm
        self._session = session  # kept between turns, so that only what is new is read
        self._sampling = dict(sampling)
        self._console = console or Console(highlight=False)
        self._first: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.effort = effort
        self.messages = list(self._first)

    def run(self) -> None:
        """Until /quit or the end of the input. Ctrl-C stops a reply; at the prompt it ends the conversation."""
        self._say(HELP)
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line == "/quit":
                return
            if not line:
                continue
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                else:
                    self._reply(line)
            except IndexShareError as error:
                self._say(f"error: {error}")

    def _command(self, name: str, argument: str = "") -> None:
        match name:
            case "/reset":
                self.messages = list(self._first)
                self._say("forgotten")
            case "/save" if argument:
                try:
                    Path(argument).write_bytes(msgspec.json.format(msgspec.json.encode(self.messages)))
                except OSError as error:
                    raise RequestError(f"cannot write {argument}: {error}") from error
                self._say(f"{len(self.messages)} messages in {argument}")
            case "/effort" if argument in EFFORTS:
                self.effort = argument
                self._say(f"effort: {argument}")
            case "/help" | "/?":
                self._say(HELP)
            case _:
                given = f"{name} {argument}".strip()
                self._say(f"{given} is not understood: {HELP}")

    def _reply(self, text: str) -> None:
        """Ask and stream the answer. A reply that failed or was stopped leaves the conversation as it was before."""
        messages = [*self.messages, {"role": "user", "content": text}]
        thinking: dict[str, Any] = (
            {"enable_thinking": False} if self.effort == "off" else {"reasoning_effort": self.effort}
        )
        events: list[Event] = []
        try:
            with progress_bar("reading") as progress:
                options = {**thinking, **self._sampling}
                for event in self._llm.chat(messages, stream=True, session=self._session, progress=progress, **options):
                    if isinstance(event, Text) and events and isinstance(events[-1], Reasoning):
                        self._console.print()  # the answer begins on a line of its own
                    events.append(event)
                    self._show(event)
        except KeyboardInterrupt:
            self._console.print()
            self._say("stopped; the question and this answer are not part of the conversation")
            return
        except MemoryLimitError:  # of an open session: it has too few pages, and nothing was computed
            is_first = self.messages == self._first
            full = "the question is too long: shorten it" if is_first else "the conversation is full: /reset"
            self._say(f"error: {full}, or {MORE_ROOM}")
            return
        self._console.print()
        if not any(isinstance(event, Error) for event in events):
            self.messages = [*messages, reply_message(events).to_dict()]

    def _show(self, event: Event) -> None:
        match event:
            case Text(text):
                self._write(text)
            case Reasoning(text):
                self._write(text, style="dim")
            case ToolCallEvent():
                self._write(f"\n[calls {event.name} {dict(event.arguments)}]\n", style="dim")
            case Warning(message):
                self._say(f"warning: {message}")
            case Error(message):
                self._say(f"error: {message}")
            case Done("length"):
                self._say("\n(the limit of new tokens is reached; --max-new-tokens allows more)")
            case Start() | Done():
                pass

    def _write(self, text: str, style: str | None = None) -> None:
        self._console.print(printable(text), end="", style=style, markup=False, highlight=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        self._write(f"{text}\n", style="italic")
