"""indexshare as an engine of the benchmark. Its context is read for real, whatever the depth."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from workers import CHUNK_SIZE, Progress, serve, token_ids

import indexshare


class OurEngine:
    def __init__(self, *, directory: str, dtype: str, quant: str | None, max_tokens: int, threads: int) -> None:
        os.environ.pop("INDEXSHARE_PEERS", None)  # the benchmark's own variable; indexshare refuses unknown ones
        options: dict[str, Any] = {} if quant is None else {"quant": quant}
        self._llm = indexshare.load(directory, dtype=dtype, threads=threads, device="cpu", **options)
        self._session = self._llm.open_session(max_tokens)
        self._depth = 0
        self.vocab_size = self._llm.config.vocab_size

    def set_depth(self, num_tokens: int, progress: Progress) -> None:
        self._depth = min(self._depth, num_tokens)
        self.forget()
        if num_tokens > self._depth:
            tokens = token_ids(self.vocab_size, self._depth, num_tokens)
            self._session.prefill(tokens, chunk_size=CHUNK_SIZE, progress=progress)
        self._depth = num_tokens

    def read(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return self._session.prefill(token_ids, chunk_size=CHUNK_SIZE).numpy()

    def forget(self) -> None:
        self._session.truncate(self._depth)

    def versions(self) -> dict[str, str]:
        return {"indexshare": indexshare.__version__, "torch": str(torch.__version__)}


if __name__ == "__main__":
    serve(OurEngine)
