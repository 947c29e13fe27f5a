"""transformers as an engine of the benchmark, with its own cache, scaled dot product attention and grouped experts."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from workers import CHUNK_SIZE, Progress, serve, token_ids

sys.path = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
import transformers  # noqa: E402 - it looks for a package named kernels, which is not the kernels.py beside this file


class TransformersEngine:
    def __init__(self, *, directory: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self._cache = transformers.DynamicCache(config=self._model.config)
        self._depth = 0
        self.vocab_size = self._model.config.vocab_size

    def set_depth(self, num_tokens: int, progress: Progress) -> None:
        self._depth = min(self._depth, num_tokens)
        self.forget()
        for start in range(self._depth, num_tokens, CHUNK_SIZE):
            self.read(token_ids(self.vocab_size, start, min(start + CHUNK_SIZE, num_tokens)))
            progress(start, num_tokens)
        self._depth = num_tokens

    def read(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        logits = np.empty(0, dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(token_ids), CHUNK_SIZE):
                ids = torch.tensor([token_ids[start : start + CHUNK_SIZE]])
                output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
                logits = output.logits[0, -1].float().numpy()
        return logits

    def forget(self) -> None:
        self._cache.crop(self._depth - self._cache.get_seq_length())

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(TransformersEngine)
