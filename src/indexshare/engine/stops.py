"""Stop texts, found across the borders of tokens."""

from collections.abc import Sequence


class StopFilter:
    """Passes text on and holds back whatever may become a stop text.

    The stop text that is complete first ends the output (of two that end together, the longer one); neither it nor
    anything after it is passed on. The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self.found is not None

    def push(self, text: str) -> str:
        """The part of the text so far that can be passed on now and has not been."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        found = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in self._stops if stop in text]
        if found:
            _, begin, self.found = min(found)
            self._held = ""
            return text[:begin]
        num_held = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a true beginning of `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next(size for size in range(longest, -1, -1) if text.endswith(stop[:size]))
