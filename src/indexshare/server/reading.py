"""What sparse attention read, as byte ranges of text: the extension "indexshare": {"selected": true}.

Positions of tokens become half-open ranges of UTF-8 bytes, counted through the rendered prompt and on into the reply.
"""

import codecs
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from indexshare.chat.tokenizer import Tokenizer
from indexshare.model.config import GlmConfig
from indexshare.server.system_prompt import stable

# What opens the part of the prompt that a message stands in.
_OPENERS = {
    "system": "<|system|>",
    "developer": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "tool": "<|observation|>",
}
_MAX_SKIPPED = 3  # parts that the template puts in front: effort, tools


def layer_groups(config: GlmConfig) -> list[dict[str, Any]]:
    """Layers that share a choice: that of the first one, which owns the indexer. None in a model without indexers."""
    groups: list[dict[str, Any]] = []
    for layer in range(config.num_hidden_layers):
        if config.is_full(layer):
            groups.append({"indexer": layer, "layers": []})
        if groups:
            groups[-1]["layers"].append(layer)
    return groups


class ReadingReport:
    """Turns the selections of one reply into ranges. messages: as sent, to say where in the prompt each one lies.

    `header` is sent once: the prompt as the model reads it, where the messages are in it, and the groups of layers.
    """

    def __init__(
        self,
        config: GlmConfig,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._groups = layer_groups(config)
        self._tokenizer = tokenizer
        pieces = [tokenizer.token_bytes(token) for token in prompt_ids]
        self._starts = np.fromiter(accumulate(map(len, pieces), initial=0), dtype=np.int64)  # byte at which each starts
        self._num_tokens, self._num_drawn = len(pieces), 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
        prompt = b"".join(pieces)
        self.header: dict[str, Any] = {
            "prompt": {
                "text": prompt.decode("utf-8", "replace"),
                "bytes": len(prompt),
                "messages": _places(prompt, self._parts(prompt_ids), messages),
            },
            "layer_groups": self._groups,
        }

    def token(self, token_id: int, selection: Mapping[int, Tensor | None]) -> dict[str, Any]:
        """The next drawn token and what was read when it was predicted: one list of ranges for each group."""
        piece = self._tokenizer.token_bytes(token_id)
        ranges = [self._ranges(selection.get(group["indexer"])) for group in self._groups]
        if self._num_tokens + 1 == len(self._starts):
            self._starts = np.resize(self._starts, 2 * len(self._starts) + 64)
        self._num_tokens += 1
        self._starts[self._num_tokens] = self._starts[self._num_tokens - 1] + len(piece)
        self._num_drawn += 1
        return {"index": self._num_drawn - 1, "text": self._decoder.decode(piece), "ranges": ranges}

    def _ranges(self, positions: Tensor | None) -> list[list[int]] | None:
        """Of ascending positions [k]."""
        if positions is None:
            return None
        starts, ends = self._starts[positions.numpy()], self._starts[positions.numpy() + 1]
        gaps = np.flatnonzero(starts[1:] != ends[:-1])
        return np.stack((starts[np.r_[0, gaps + 1]], ends[np.r_[gaps, -1]]), axis=1).tolist()

    def _parts(self, prompt_ids: Sequence[int]) -> list[tuple[str, int, int]]:
        """(control token, first byte behind it, end) of the parts of the prompt that begin with a role's token."""
        names = {self._tokenizer.control_ids.get(name): name for name in _OPENERS.values()}
        found = [(names[token], index) for index, token in enumerate(prompt_ids) if token in names]
        ends = [*(int(self._starts[index]) for _, index in found[1:]), int(self._starts[len(prompt_ids)])][: len(found)]
        return [(name, int(self._starts[index + 1]), end) for (name, index), end in zip(found, ends, strict=True)]


def _places(
    prompt: bytes, parts: Sequence[tuple[str, int, int]], messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Where the text of each message stands; a message that the template changed or left out is not listed."""
    rendered = stable(messages)
    places: list[dict[str, Any]] = []
    part = offset = 0  # the part in which the last message was found, and the byte behind it
    for index, message in enumerate(rendered, start=len(messages) - len(rendered)):
        content, role = message.get("content"), str(message.get("role"))
        if not isinstance(content, str) or not content:
            continue
        fitting = (number for number in range(part, len(parts)) if parts[number][0] == _OPENERS.get(role))
        for number, _ in zip(fitting, range(_MAX_SKIPPED), strict=False):
            _, begin, end = parts[number]
            found = prompt.find(content.encode(), max(begin, offset), end)
            if found >= 0:
                part, offset = number, found + len(content.encode())
                places.append({"index": index, "role": role, "start": found, "end": offset})
                break
    return places
