"""The paged cache: bytes as published, pages conserved, too large a request refused with the numbers."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from indexshare.engine.cache import (
    PagedCache,
    bytes_per_token,
    check_memory,
    expanded_bytes,
    num_pages_for,
    required_bytes,
)
from indexshare.errors import MemoryLimitError
from indexshare.kernels import ops
from indexshare.kernels.cache_formats import CacheFormats
from indexshare.kernels.layout import KeyLayout
from indexshare.model import recipes


def test_bytes_per_token_of_the_released_model() -> None:
    config = recipes.glm_5_2()
    assert bytes_per_token(config, torch.bfloat16, with_mtp=False) == 89_856 + 5_376
    assert bytes_per_token(config, torch.bfloat16) == 89_856 + 1_152 + 5_376 + 256


def test_bytes_per_token_with_int8_caches() -> None:
    config, formats = recipes.glm_5_2(), CacheFormats(latents="int8", index_keys="int8")
    row, key = 512 + 4 * 8 + 2 * 64, 128 + 8
    assert bytes_per_token(config, torch.bfloat16, with_mtp=False, formats=formats) == 78 * row + 21 * key
    assert bytes_per_token(config, torch.float32, formats=formats) == 79 * row + 22 * key
    keys_alone = CacheFormats(index_keys="int8")
    assert bytes_per_token(config, torch.bfloat16, with_mtp=False, formats=keys_alone) == 89_856 + 21 * key


def test_an_indexer_in_every_layer_costs_more() -> None:
    config = recipes.tiny()
    every_layer = bytes_per_token(recipes.tiny(index_topk_pattern="FFFFFF"), torch.float32)
    assert every_layer - bytes_per_token(config, torch.float32) == 3 * 4 * config.index_head_dim


@pytest.mark.parametrize(
    "formats", [CacheFormats(), CacheFormats(index_keys="int8"), CacheFormats(latents="int8")], ids=str
)
@pytest.mark.parametrize("with_mtp", [False, True])
@pytest.mark.parametrize("page_size", [4, 64])
def test_pools_hold_what_was_computed(page_size: int, with_mtp: bool, formats: CacheFormats) -> None:
    config = recipes.tiny()
    cache = PagedCache(
        config,
        num_pages=num_pages_for(100, page_size),
        page_size=page_size,
        dtype=torch.float32,
        with_mtp=with_mtp,
        formats=formats,
    )
    view = cache.view()
    pools = [*view.latents, *(keys for keys in view.index_keys if keys is not None)]
    needed = required_bytes(config, 100, torch.float32, page_size=page_size, with_mtp=with_mtp, formats=formats)
    assert sum(pool.nbytes for pool in pools) == cache.num_bytes == needed
    assert [keys is not None for keys in view.index_keys] == [config.is_full(i) for i in range(len(view.latents))]
    assert len(view.latents) == (7 if with_mtp else 6)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=40))
def test_pages_are_conserved(steps: list[tuple[bool, int]]) -> None:
    """Any order of allocations and frees: no page is lost or handed out twice, and a refusal takes nothing."""
    cache = PagedCache(recipes.tiny(), num_pages=12, page_size=4, dtype=torch.float32)
    live: list[list[int]] = []
    for is_allocation, number in steps:
        if is_allocation and num_pages_for(number, 4) > cache.num_free_pages:
            before = cache.num_free_pages
            with pytest.raises(MemoryLimitError):
                cache.allocate(number)
            assert cache.num_free_pages == before
        elif is_allocation:
            live.append(cache.allocate(number))
        elif live:
            cache.free(live.pop(number % len(live)))
        cache.check_conservation()
        pages = [page for request in live for page in request]
        assert len(set(pages)) == len(pages) == 12 - cache.num_free_pages


def test_freeing_twice_is_an_error() -> None:
    cache = PagedCache(recipes.tiny(), num_pages=4, page_size=4, dtype=torch.float32)
    pages = cache.allocate(8)
    cache.free(pages)
    with pytest.raises(AssertionError, match="not live"):
        cache.free(pages)


def test_a_request_that_does_not_fit_is_refused_with_the_numbers() -> None:
    check_memory(1000, 1500, num_tokens=10, workspace=500)
    with pytest.raises(MemoryLimitError, match=r"10 tokens needs 1,000 bytes .* 1,499 bytes .* about 9 tokens"):
        check_memory(1000, 1499, num_tokens=10, workspace=500)
    with pytest.raises(MemoryLimitError, match="about 0 tokens"):
        check_memory(1000, 100, num_tokens=10, workspace=500)
    check_memory(1000, 1800, num_tokens=10, workspace=500, expanded=300)
    with pytest.raises(MemoryLimitError, match=r"cache, 300 bytes of keys and values for dense .* about 9 tokens"):
        check_memory(1000, 1799, num_tokens=10, workspace=500, expanded=300)


@pytest.mark.parametrize("value_dim", [8, 24, 40])
def test_expanded_keys_and_values_take_what_was_computed(value_dim: int) -> None:
    """Every tensor with all keys of all heads that `mla_expanded` makes is counted once, with its bytes."""
    config = recipes.tiny(v_head_dim=value_dim)
    num_keys, heads, nope, latent = 200, config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    made: dict[int, torch.Tensor] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= num_keys * heads * 4 * 16:
                made[result.untyped_storage().data_ptr()] = result  # held, so that no address is used again
            return result

    query = torch.randn(2, heads, config.qk_head_dim)
    pool = torch.randn(num_keys, config.latent_dim)
    kv_b = torch.randn(heads, nope + value_dim, latent)
    layout = KeyLayout(
        sequence_starts=(0, 2), context_lengths=(num_keys,), page_table=torch.arange(num_keys)[None], page_size=1
    )
    with Watch():
        ops.mla_expanded(query, pool, kv_b, layout, 1.0)
    found = sum(tensor.untyped_storage().nbytes() for tensor in made.values())
    assert found == expanded_bytes(config, num_keys, torch.float32)
