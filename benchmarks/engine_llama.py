"""llama.cpp as an engine of the benchmark, through the low-level bindings of the same source package.

Reading 64K tokens takes it hours, so beyond GROWN_FROM tokens a context is not read but grown: the saved state of a
sequence is enlarged with mixtures of its real rows and loaded. Reading and decoding from there is ordinary.
"""

import ctypes
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

import llama_build
import numpy as np
from numpy.typing import NDArray
from workers import CHUNK_SIZE, Progress, serve, token_ids

GROWN_FROM = 2048
HEADER_BYTES = 8  # magic number and sequence
CELL = np.dtype([("position", "<i4"), ("num_sequences", "<u4"), ("sequence", "<i4")])
GGML_F32, GGML_F16 = 0, 1
ROW_TYPES = {GGML_F32: np.dtype("<f4"), GGML_F16: np.dtype("<f2")}


def grow_state(state: NDArray[np.uint8], num_tokens: int, seed: int = 2) -> NDArray[np.uint8]:
    """A saved sequence of T tokens as one of `num_tokens`: each further row is a cos + b sin of two real rows.

    Mixed so, rows keep the scale of the real ones, and index scores have no ties as they would between copies.
    The format is that of `llama_kv_cache::state_write`, once for the latents and once for the index keys: number of
    streams and cells, (position, 1, sequence) for each cell, whether values are transposed, number of layers, and for
    each layer the type, the bytes of a row and the rows of its keys. These caches hold no values.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    parts = [state[:HEADER_BYTES]]
    at = HEADER_BYTES
    while at < len(state):
        streams, num_cells = state[at : at + 8].view("<u4")
        assert streams == 1, "one sequence"
        cells_end = at + 8 + num_cells * CELL.itemsize
        values_transposed, num_layers = state[cells_end : cells_end + 8].view("<u4")
        assert values_transposed in (0, 1) and num_layers < 1000, "not the format this was written for"
        cells = np.zeros(num_tokens, dtype=CELL)
        cells["position"], cells["num_sequences"] = np.arange(num_tokens), 1
        counts = np.array([1, num_tokens], dtype="<u4")
        parts += [counts.view(np.uint8), cells.view(np.uint8), state[cells_end : cells_end + 8]]
        at = cells_end + 8
        first, second = generator.integers(0, num_cells, size=(2, num_tokens - num_cells))
        angle = generator.uniform(0.2, 1.3, size=(num_tokens - num_cells, 1)).astype(np.float32)
        for _ in range(num_layers):
            row_type, row_bytes = int(state[at : at + 4].view("<i4")[0]), int(state[at + 4 : at + 12].view("<u8")[0])
            rows_end = at + 12 + int(num_cells) * row_bytes
            rows = state[at + 12 : rows_end].view(ROW_TYPES[row_type]).reshape(num_cells, -1)
            more = np.cos(angle) * rows[first].astype(np.float32) + np.sin(angle) * rows[second].astype(np.float32)
            parts += [state[at:rows_end], more.astype(rows.dtype).reshape(-1).view(np.uint8)]
            at = rows_end
    return np.concatenate(parts)


def _bindings() -> Any:
    """The module llama_cpp.llama_cpp of the source package, without what the package itself imports."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(llama_build.library_directory())
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(llama_build.source_directory() / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    from llama_cpp import llama_cpp

    return llama_cpp


class LlamaEngine:
    """grows=False reads every context for real: what growing is compared with."""

    def __init__(
        self, *, path: str, flash_attention: bool, threads: int, f32_cache: bool = False, grows: bool = True
    ) -> None:
        self._llama = _bindings()
        self._llama.llama_backend_init()
        self._model = self._llama.llama_model_load_from_file(path.encode(), self._llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab_size = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self._flash_attention, self._threads, self._f32_cache = flash_attention, threads, f32_cache
        self._grows = grows
        self._context: Any = None
        self._base: NDArray[np.uint8] | None = None
        self._depth = 0

    def set_depth(self, num_tokens: int, progress: Progress) -> None:
        if not self._grows or num_tokens <= GROWN_FROM:
            self._open(num_tokens)
            self._depth = num_tokens
            for start in range(0, num_tokens, CHUNK_SIZE):
                self.read(token_ids(self.vocab_size, start, min(start + CHUNK_SIZE, num_tokens)))
                progress(start, num_tokens)
            return
        if self._base is None:
            self.set_depth(GROWN_FROM, progress)
            self._base = np.empty(self._llama.llama_state_seq_get_size(self._context, 0), dtype=np.uint8)
            self._llama.llama_state_seq_get_data(self._context, _pointer(self._base), self._base.nbytes, 0)
        self._open(num_tokens)
        self._depth = num_tokens
        state = grow_state(self._base, num_tokens)
        if not self._llama.llama_state_seq_set_data(self._context, _pointer(state), state.nbytes, 0):
            raise RuntimeError("llama.cpp refused the grown state")

    def _open(self, num_tokens: int) -> None:
        """A new context with room for `num_tokens` tokens and what is read after them."""
        if self._context is not None:
            self._llama.llama_free(self._context)
        params = self._llama.llama_context_default_params()
        params.n_ctx = num_tokens + 4 * CHUNK_SIZE
        params.n_batch = params.n_ubatch = CHUNK_SIZE
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = GGML_F32 if self._f32_cache else GGML_F16
        params.flash_attn_type = int(self._flash_attention)
        self._context = self._llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot open a context of {params.n_ctx:,} tokens")

    def read(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        for start in range(0, len(token_ids), CHUNK_SIZE):
            chunk = token_ids[start : start + CHUNK_SIZE]
            tokens = (self._llama.llama_token * len(chunk))(*chunk)
            if status := self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, len(chunk))):
                raise RuntimeError(f"llama_decode returned {status}")
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).copy()

    def forget(self) -> None:
        memory = self._llama.llama_get_memory(self._context)
        if not self._llama.llama_memory_seq_rm(memory, 0, self._depth, -1):
            raise RuntimeError("llama.cpp cannot forget the last tokens")

    def versions(self) -> dict[str, str]:
        features = self._llama.llama_print_system_info().decode()
        return llama_build.describe() | {"llama.cpp features": features.strip(" |\n")}


def _pointer(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


if __name__ == "__main__":
    serve(LlamaEngine)
