"""Paged caches: one latent pool for each layer, one pool of index keys for each layer that owns an indexer.

A page is `page_size` consecutive rows of every pool; page p begins at row p * page_size, so one page table serves all
layers. A shared layer has no index keys: that is the memory IndexShare saves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from indexshare import runtime
from indexshare.engine.pages import PagePool
from indexshare.errors import MemoryLimitError
from indexshare.kernels.cache_formats import LATENT_GROUP, PLAIN, CacheFormats
from indexshare.kernels.pool import Pool, QuantizedPool
from indexshare.model.batch import CacheView
from indexshare.model.config import GlmConfig
from indexshare.model.inspect import cache_bytes_per_token

DEFAULT_PAGE_SIZE = 64


def bytes_per_token(
    config: GlmConfig, dtype: torch.dtype, *, with_mtp: bool = True, formats: CacheFormats = PLAIN
) -> int:
    """Bytes of cache for one token; GLM-5.2 in BF16 without MTP: 89,856 of latents and 5,376 of index keys."""
    latents, index_keys, mtp = cache_bytes_per_token(config, dtype.itemsize, formats)
    return latents + index_keys + (mtp if with_mtp else 0)


def num_pages_for(num_tokens: int, page_size: int = DEFAULT_PAGE_SIZE) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


def required_bytes(
    config: GlmConfig,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    page_size: int = DEFAULT_PAGE_SIZE,
    with_mtp: bool = True,
    formats: CacheFormats = PLAIN,
) -> int:
    """Bytes of cache for a request of `num_tokens` tokens in all, whole pages."""
    num_rows = num_pages_for(num_tokens, page_size) * page_size
    return num_rows * bytes_per_token(config, dtype, with_mtp=with_mtp, formats=formats)


def expanded_bytes(config: GlmConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that dense attention takes for a while in one layer: keys and values of the whole context, head by head.

    For each token and head, as in `ops.mla_expanded`: the projection (nope + value) and the keys made from it (nope +
    rope); where values have another width, once more that of the keys, for padded values or for a copy inside torch.
    """
    key_dim, value_dim = config.qk_head_dim, config.v_head_dim
    width = config.qk_nope_head_dim + value_dim + key_dim + (key_dim if value_dim != key_dim else 0)
    return num_tokens * config.num_attention_heads * width * dtype.itemsize


def check_memory(needed: int, available: int, *, num_tokens: int, workspace: int = 0, expanded: int = 0) -> None:
    """Refuse a request whose caches, workspace and expanded keys do not fit; before any of it is allocated.

    needed (the caches), available, workspace, expanded (`expanded_bytes`, dense attention only): bytes.
    Raises MemoryLimitError with the numbers and the length that would fit.
    """
    if needed + expanded + workspace <= available:
        return
    fitting = max(0, (available - workspace) * num_tokens // max(needed + expanded, 1))
    dense = f", {expanded:,} bytes of keys and values for dense attention" if expanded else ""
    raise MemoryLimitError(
        f"a context of {num_tokens:,} tokens needs {needed:,} bytes of cache{dense} and {workspace:,} bytes of "
        f"workspace, but only {available:,} bytes are available: use at most about {fitting:,} tokens or free some "
        "memory"
    )


class PagedCache:
    """The pools of all layers and the list of free pages.

    latents[layer]: [num_pages * page_size, latent_dim]; index_keys[layer]: [num_pages * page_size, index_head_dim], or
    None for a shared layer; in `dtype`, or rounded as `formats` says. With `with_mtp` the MTP layer is the last one.
    Rows are uninitialised until written; on a CPU the operating system gives them memory only then.
    """

    def __init__(
        self,
        config: GlmConfig,
        *,
        num_pages: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        with_mtp: bool = True,
        formats: CacheFormats = PLAIN,
    ) -> None:
        self.pages = PagePool(num_pages, page_size)
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = torch.device(device)
        num_rows = num_pages * page_size

        def plain(width: int) -> Tensor:
            if self.device.type != "cpu":
                return torch.empty(num_rows, width, dtype=dtype, device=device)
            return runtime.empty_bytes(num_rows * width * dtype.itemsize).view(dtype).view(num_rows, width)

        def latents() -> Pool:
            if formats.latents is None:
                return plain(config.latent_dim)
            return QuantizedPool.empty(num_rows, config.kv_lora_rank, config.qk_rope_head_dim, LATENT_GROUP, device)

        def index_keys() -> Pool:
            if formats.index_keys is None:
                return plain(config.index_head_dim)
            return QuantizedPool.empty(num_rows, config.index_head_dim, 0, config.index_head_dim, device)

        layers = range(config.num_layers_with_mtp if with_mtp else config.num_hidden_layers)
        self._view = CacheView(
            latents=tuple(latents() for _ in layers),
            index_keys=tuple(index_keys() if config.is_full(layer) else None for layer in layers),
        )
        self.num_bytes = num_rows * bytes_per_token(config, dtype, with_mtp=with_mtp, formats=formats)

    @property
    def num_free_pages(self) -> int:
        return self.pages.num_free

    def view(self) -> CacheView:
        """The pools, as the model takes them."""
        return self._view

    def allocate(self, num_tokens: int) -> list[int]:
        """Pages for `num_tokens` tokens. Raises MemoryLimitError, and takes none, when too few are free."""
        try:
            return self.pages.allocate(num_pages_for(num_tokens, self.page_size))
        except MemoryLimitError as error:
            raise MemoryLimitError(
                f"{num_tokens:,} more tokens do not fit: {error}: open the session with a larger max_tokens"
            ) from None

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back; each must be live (freeing one twice is a bug of the caller)."""
        self.pages.release(pages)

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """The first rows of page `source`, in every pool, into page `target`."""
        for rows in self._storage:
            first, to = source * self.page_size, target * self.page_size
            rows[to : to + num_rows] = rows[first : first + num_rows]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all pools."""
        return self.num_bytes // self.num_pages

    def read_page(self, page: int) -> bytes:
        """The rows of a page in every pool, one after the other."""
        return b"".join(rows.cpu().numpy().tobytes() for rows in self._rows_of(page))

    def write_page(self, page: int, content: bytes) -> None:
        """The inverse of `read_page`."""
        assert len(content) == self.page_bytes
        data, start = torch.frombuffer(bytearray(content), dtype=torch.uint8), 0
        for rows in self._rows_of(page):
            rows.copy_(data[start : start + rows.numel()].view(rows.shape))
            start += rows.numel()

    def _rows_of(self, page: int) -> list[Tensor]:
        first = page * self.page_size
        return [rows[first : first + self.page_size].view(torch.uint8) for rows in self._storage]

    @property
    def _storage(self) -> list[Tensor]:
        pools = [pool for pool in (*self._view.latents, *self._view.index_keys) if pool is not None]
        return [pool.data if isinstance(pool, QuantizedPool) else pool for pool in pools]

    def check_conservation(self) -> None:
        """As `PagePool.check_conservation`."""
        self.pages.check_conservation()
