"""One registry of operations and their twins: what can run, what was chosen and why, how often and for how long.

An operation is a plain function on tensors. Its pure-torch body is the specification and always runs. A twin has the
same signature and says in `supports` why it cannot take a call. An explicit choice works or raises; an automatic one
may fall back to the next twin, and `describe` says so. An exception is never a reason to fall back.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from indexshare.errors import KernelError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SPECIFICATION = "torch"
hits: Counter[tuple[str, str]] = Counter()
seconds: defaultdict[str, float] = defaultdict(float)
_explanations: dict[str, str] = {}
_operations: dict[str, "Operation[..., Any]"] = {}
_watchers: list[Callable[["Call"], Any]] = []
_timing_depth = 0
_without_twins = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A faster implementation of an operation.

    supports(*call) returns None when it can take the call, else a sentence that says why not. note: what it is for.
    """

    name: str
    devices: tuple[str, ...]
    function: Callable[..., Any]
    supports: Callable[..., str | None]
    note: str = "fastest twin for this device"


class Operation(Generic[Arguments, Result]):
    """A specification with its twins; calling it runs the best one that can take the call."""

    def __init__(self, specification: Callable[Arguments, Result], *, composite: bool = False) -> None:
        self.composite = composite
        self.name = specification.__name__
        self.specification = specification
        self.twins: list[Twin] = []
        self.chosen: str | None = None
        self.__doc__ = specification.__doc__
        self.__wrapped__ = specification

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if self.composite and _watchers:
            return self.specification(*args, **kwargs)
        name, function = self._choose(args, kwargs)
        hits[self.name, name] += 1
        if _watchers:
            return _watchers[-1](Call(operation=self, twin=name, function=function, args=args, kwargs=kwargs))
        if not _timing_depth or self.composite:
            return function(*args, **kwargs)
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[self.name] += time.perf_counter() - begin
        return result

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Callable[..., Result]]:
        if self.chosen == SPECIFICATION or _without_twins:
            return SPECIFICATION, self.specification
        for twin in self.twins:
            if self.chosen is not None and twin.name != self.chosen:
                continue
            reason = twin.supports(*args, **kwargs)
            if reason is None:
                return twin.name, twin.function
            if self.chosen is not None:
                raise KernelError(f"{self.name}: the twin '{twin.name}' was asked for but cannot run: {reason}")
        return SPECIFICATION, self.specification


def operation(specification: Callable[Arguments, Result]) -> Operation[Arguments, Result]:
    """Decorator: registers a pure-torch function as the specification of an operation of its name."""
    created = Operation(specification)
    assert created.name not in _operations, f"operation {created.name} is registered twice"
    _operations[created.name] = created
    return created


def composite(specification: Callable[Arguments, Result]) -> Operation[Arguments, Result]:
    """Decorator: an operation made of other operations. Who watches or times operations sees those."""
    created = Operation(specification, composite=True)
    _operations[created.name] = created
    return created


def add_seconds(spent: dict[str, float]) -> None:
    """What the twin of a composite operation counted for the operations in it."""
    for name, value in spent.items():
        seconds[name] += value


def is_timing() -> bool:
    """Whether somebody wants to know the seconds."""
    return _timing_depth > 0


def register(operation_name: str, twin: Twin) -> None:
    """Adds a twin; later twins are asked first. The operation must have a specification."""
    target = get(operation_name)
    if twin.name == SPECIFICATION or any(known.name == twin.name for known in target.twins):
        raise KernelError(f"{operation_name}: a twin named '{twin.name}' exists already")
    target.twins.insert(0, twin)


def explain(device: str, reason: str) -> None:
    """Says why a device has no faster twins; `describe` repeats it."""
    _explanations[device] = reason


def unregister(operation_name: str, twin_name: str) -> None:
    """Removes a twin; nothing happens when there is none of that name."""
    target = get(operation_name)
    target.twins = [twin for twin in target.twins if twin.name != twin_name]


def get(name: str) -> Operation[..., Any]:
    """The operation of that name. Raises KernelError, with the names there are."""
    if name not in _operations:
        raise KernelError(f"no operation '{name}'; there are: {', '.join(sorted(_operations))}")
    return _operations[name]


def num_calls(name: str) -> int:
    """Calls of an operation so far, by any twin."""
    return sum(count for (called, _), count in hits.items() if called == name)


def names() -> tuple[str, ...]:
    """All operations that are not made of others, sorted."""
    return tuple(sorted(name for name, known in _operations.items() if not known.composite))


@contextmanager
def use(operation_name: str, twin_name: str) -> Generator[None]:
    """Runs a block with an explicit twin of one operation; KernelError when it cannot take a call."""
    target = get(operation_name)
    choices = [SPECIFICATION, *(twin.name for twin in target.twins)]
    if twin_name not in choices:
        raise KernelError(f"{operation_name} has no twin '{twin_name}'; choose one of: {', '.join(choices)}")
    before, target.chosen = target.chosen, twin_name
    try:
        yield
    finally:
        target.chosen = before


@contextmanager
def specifications() -> Generator[None]:
    """Runs a block without twins: to compare with them, or for what must not depend on a machine's kernels."""
    global _without_twins
    _without_twins += 1
    try:
        yield
    finally:
        _without_twins -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of an operation on its way to the twin that was chosen for it."""

    operation: Operation[..., Any]
    twin: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def run_specification(self) -> Any:
        return self.operation.specification(*self.args, **self.kwargs)


@contextmanager
def watch(watcher: Callable[[Call], Any]) -> Generator[None]:
    """Hands every call inside the block to `watcher`, whose result is the call's; the innermost block decides."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.pop()


@contextmanager
def timing() -> Generator[dict[str, float]]:
    """Counts wall seconds per operation inside the block (accelerators: until the launch returns)."""
    global _timing_depth
    before = dict(seconds)
    spent: dict[str, float] = {}
    _timing_depth += 1
    try:
        yield spent
    finally:
        _timing_depth -= 1
        spent.update(
            {name: value - before.get(name, 0.0) for name, value in seconds.items() if value != before.get(name)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One line of `indexshare kernels`."""

    operation: str
    device: str
    twin: str
    reason: str


def describe(devices: tuple[str, ...]) -> list[Choice]:
    """Operation x device x twin that an automatic choice tries first, and why."""
    lines: list[Choice] = []
    for name, known in sorted(_operations.items()):
        for device in devices:
            first = next((twin for twin in known.twins if device in twin.devices), None)
            if known.chosen is not None:
                twin, reason = known.chosen, "chosen explicitly"
            elif first is not None:
                twin, reason = first.name, first.note
            else:
                why = _explanations.get(device, "no faster twin")
                twin, reason = SPECIFICATION, f"the specification; {why}"
            lines.append(Choice(operation=name, device=device, twin=twin, reason=reason))
    return lines
