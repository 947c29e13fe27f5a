"""What sparse attention read, as byte ranges of text: the extension "indexshare": {"selected": true}.

Positions of tokens become half-open ranges of UTF-8 bytes, counted through the rendered prompt and on into the reply.
"""

import codecs
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from indexshare.chat.tokenizer import Tokenizer
from indexshare.model.config import GlmConfig


def layer_groups(config: GlmConfig) -> list[dict[str, Any]]:
    """Layers that share a choice: that of the first one, which owns the indexer."""
    groups: list[dict[str, Any]] = []
    for layer in range(config.num_hidden_layers):
        if config.is_full(layer):
            groups.append({"indexer": layer, "layers": []})
        groups[-1]["layers"].append(layer)
    return groups


class ReadingReport:
    """Turns the selections of one reply into ranges. messages: as sent, to say where in the prompt each one lies."""

    def __init__(
        self, config: GlmConfig, tokenizer: Tokenizer, prompt_ids: Sequence[int], messages: Sequence[Mapping[str, Any]]
    ) -> None:
        self._groups = layer_groups(config)
        self._tokenizer = tokenizer
        pieces = [tokenizer.token_bytes(token) for token in prompt_ids]
        self._starts = [0, *accumulate(map(len, pieces))]  # byte at which each token starts
        self._prompt = b"".join(pieces)
        self._num_prompt = len(prompt_ids)
        self._messages = messages
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character

    def header(self) -> dict[str, Any]:
        """Sent once: the prompt as the model reads it, where the messages are in it, and the groups of layers."""
        return {
            "prompt": {
                "text": self._prompt.decode("utf-8", "replace"),
                "bytes": len(self._prompt),
                "messages": self._places(),
            },
            "layer_groups": self._groups,
        }

    def token(self, token_id: int, selection: Mapping[int, Sequence[int] | None]) -> dict[str, Any]:
        """The next drawn token and what was read when it was predicted: one list of ranges for each group."""
        piece = self._tokenizer.token_bytes(token_id)
        index = len(self._starts) - 1 - self._num_prompt
        ranges = [self._ranges(selection.get(group["indexer"])) for group in self._groups]
        self._starts.append(self._starts[-1] + len(piece))
        return {"index": index, "text": self._decoder.decode(piece), "ranges": ranges}

    def _ranges(self, positions: Sequence[int] | None) -> list[list[int]] | None:
        if positions is None:
            return None
        merged: list[list[int]] = []
        for position in sorted(positions):
            start, end = self._starts[position], self._starts[position + 1]
            if merged and merged[-1][1] == start:
                merged[-1][1] = end
            else:
                merged.append([start, end])
        return merged

    def _places(self) -> list[dict[str, Any]]:
        """Where the text of each message stands; a message that the template changed or left out is not listed."""
        places, begin = [], 0
        for index, message in enumerate(self._messages):
            content = message.get("content")
            wanted = content.encode() if isinstance(content, str) else b""
            found = self._prompt.find(wanted, begin) if wanted else -1
            if found >= 0:
                begin = found + len(wanted)
                places.append({"index": index, "role": message.get("role"), "start": found, "end": begin})
        return places
