"""The page pool: nothing is lost, nothing is counted twice, and only what is exactly the same is shared."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexshare.engine.pages import PagePool, root_key
from indexshare.errors import MemoryLimitError

PAGE = 4


def fill(pool: PagePool, tokens: list[int], tenant: str = "") -> list[int]:
    """Compute a whole sequence, make its pages known and give them back; the pages it used."""
    match = pool.match(tokens, tenant)
    for cached in match.pages:
        pool.share(cached)
    pages = [cached.page for cached in match.pages]
    pages += pool.allocate(-(-(len(tokens) - 1) // PAGE) - len(pages))
    parent = root_key(tenant)
    for index, page in enumerate(pages):
        known = pool.register(page, parent, tokens[index * PAGE : (index + 1) * PAGE + 1], tenant)
        pages[index], parent = known.page, known.key
    pool.release(pages)
    return pages


def reused(pool: PagePool, tokens: list[int], tenant: str = "") -> int:
    match = pool.match(tokens, tenant)
    return len(match.pages) * PAGE + match.num_partial


def test_a_prefix_is_found_up_to_the_token_before_the_difference() -> None:
    pool = PagePool(16, PAGE)
    tokens = list(range(100, 114))
    fill(pool, tokens)
    assert reused(pool, tokens) == len(tokens) - 1  # the last token is always read again
    for common in range(len(tokens)):
        other = [*tokens[:common], 7, 7, 7, 7, 7]
        assert reused(pool, other) == max(0, common - 1)


def test_a_page_is_shared_only_when_the_token_after_it_is_the_same() -> None:
    pool = PagePool(16, PAGE)
    fill(pool, [1, 2, 3, 4, 5, 6])
    assert len(pool.match([1, 2, 3, 4, 5, 9, 9], "").pages) == 1
    match = pool.match([1, 2, 3, 4, 9, 9, 9], "")
    assert match.pages == () and match.num_partial == 3


def test_tenants_share_nothing() -> None:
    pool = PagePool(16, PAGE)
    tokens = list(range(12))
    fill(pool, tokens, "one")
    assert reused(pool, tokens, "one") == 11
    assert reused(pool, tokens, "two") == 0
    assert not set(fill(pool, tokens, "two")) & set(fill(pool, tokens, "one"))


def test_the_longest_partial_page_is_chosen() -> None:
    pool = PagePool(32, PAGE)
    for last in range(5):
        fill(pool, [1, 2, 3, 4, 5, *range(10, 10 + last), 99])
    match = pool.match([1, 2, 3, 4, 5, 10, 11, 12, 50, 51], "")
    assert len(match.pages) == 1 and match.num_partial == 3


def test_cached_pages_are_evicted_when_needed_the_end_of_a_chain_first() -> None:
    pool = PagePool(4, PAGE)
    fill(pool, list(range(17)))
    assert (pool.num_free, pool.num_cached, pool.num_live) == (0, 4, 0)
    pages = pool.allocate(2)
    assert pool.num_evicted == 2
    assert reused(pool, list(range(17))) == 8  # the first two pages are still there
    pool.release(pages)
    pool.check_conservation()


def test_a_tenant_that_floods_the_cache_evicts_its_own_pages() -> None:
    pool = PagePool(8, PAGE)
    modest = list(range(9))
    fill(pool, modest, "modest")
    for flood in range(20):
        fill(pool, [1000 + flood] * 13, "flood")
        assert reused(pool, modest, "modest") == 8
    pool.check_conservation()


def test_what_is_read_is_never_evicted() -> None:
    pool = PagePool(4, PAGE)
    tokens = list(range(9))
    fill(pool, tokens)
    for cached in pool.match(tokens, "").pages:
        pool.share(cached)
    pool.allocate(2)
    with pytest.raises(MemoryLimitError, match="1 cache pages are needed, but 0 of 4 are free"):
        pool.allocate(1)
    assert reused(pool, tokens) == 8


def test_the_same_rows_computed_twice_are_kept_once() -> None:
    pool = PagePool(8, PAGE)
    first, second = pool.allocate(1), pool.allocate(1)
    one = pool.register(first[0], root_key(""), [1, 2, 3, 4, 5], "")
    two = pool.register(second[0], root_key(""), [1, 2, 3, 4, 5], "")
    assert one is two and pool.num_live == 1 and pool.num_free == 7
    pool.release([one.page])
    pool.release([two.page])
    assert pool.num_cached == 1
    pool.check_conservation()


def test_freeing_a_page_twice_is_found() -> None:
    pool = PagePool(4, PAGE)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="not live"):
        pool.release(pages)


@given(st.integers(0, 10**6))
def test_pages_are_conserved_whatever_happens(seed: int) -> None:
    """Random sequences over few tokens begin, grow and end on a small pool; what they share has the same content."""
    rng = random.Random(seed)
    pool = PagePool(rng.randint(3, 12), PAGE)
    content: dict[int, list[int]] = {}  # what the rows of each page would hold
    running: list[tuple[list[int], list[int], str]] = []
    for _ in range(40):
        if running and rng.random() < 0.5:
            tokens, pages, tenant = running.pop(rng.randrange(len(running)))
            parent = root_key(tenant)
            for index in range(len(pages)):
                known = pool.register(pages[index], parent, tokens[index * PAGE : (index + 1) * PAGE + 1], tenant)
                pages[index], parent = known.page, known.key
            pool.release(pages)
        else:
            tenant = rng.choice(["a", "b"])
            tokens = [rng.randint(0, 1) for _ in range(rng.randint(2, 14))]
            match = pool.match(tokens, tenant)
            assert len(match.pages) * PAGE + match.num_partial < len(tokens)
            for index, cached in enumerate(match.pages):
                assert content[cached.page] == [ord(tenant), *tokens[: (index + 1) * PAGE + 1]]
            if match.partial is not None:
                rows = len(match.pages) * PAGE + match.num_partial
                assert content[match.partial.page][: rows + 2] == [ord(tenant), *tokens[: rows + 1]]
            needed = -(-(len(tokens) - 1) // PAGE) - len(match.pages)
            if needed + len(match.pages) > pool.num_available:
                continue
            for cached in match.pages:
                pool.share(cached)
            new = pool.allocate(needed)
            for index, page in enumerate(new, start=len(match.pages)):
                content[page] = [ord(tenant), *tokens[: (index + 1) * PAGE + 1]]
            running.append((tokens, [cached.page for cached in match.pages] + new, tenant))
        pool.check_conservation()
