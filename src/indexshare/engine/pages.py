"""Which page of the cache belongs to whom, and which pages hold a prefix that somebody may ask for again.

A page is live (a sequence reads it), cached (nobody does, but its tokens are known) or free, and nothing else.
A cached prefix is a chain: a page's key is a hash of its parent's key, its own tokens and the token after them; the
first parent is the tenant, so that tenants never share (a hit can be timed). The token after is part of the key because
the MTP layer's row of a token reads the next token too: pages that agree on it hold the same rows, to the last bit.
So of a common prefix of n tokens, n - 1 can be reused, and a prompt always has a token left to read. No torch here.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from indexshare.errors import MemoryLimitError

MAX_CANDIDATES = 64  # children that are compared for a partial match


@dataclass(frozen=True, slots=True, eq=False)
class CachedPage:
    """A page whose rows are known. tokens: those of its rows, which it may not all use, and the one after them."""

    key: bytes
    parent: bytes
    tokens: tuple[int, ...]
    page: int
    tenant: str

    @property
    def num_rows(self) -> int:
        return len(self.tokens) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixMatch:
    """What is cached of a sequence: whole pages to share, then the first `num_partial` rows of one page to copy."""

    pages: tuple[CachedPage, ...] = ()
    partial: CachedPage | None = None
    num_partial: int = 0


def root_key(tenant: str) -> bytes:
    """The parent of a tenant's first pages."""
    return hashlib.blake2b(tenant.encode(), digest_size=16, person=b"tenant").digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page of tokens (with the one after them) behind `parent`."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16, person=b"page").digest()


class PagePool:
    """Accounts for `num_pages` pages of `page_size` rows; which rows these are is the caller's business."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0, "a cache has pages"
        assert page_size > 0, "a page has rows"
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_evicted = 0
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the lowest page is handed out first
        self._num_users: dict[int, int] = {}  # of live pages
        self._known: dict[bytes, CachedPage] = {}
        self._known_at: dict[int, CachedPage] = {}
        self._children: dict[bytes, dict[bytes, CachedPage]] = {}
        self._idle: dict[str, OrderedDict[bytes, CachedPage]] = {}  # by tenant, least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_live(self) -> int:
        return len(self._num_users)

    @property
    def num_cached(self) -> int:
        return sum(map(len, self._idle.values()))

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free ones, and cached ones that nobody reads."""
        return self.num_free + self.num_cached

    def knows(self, key: bytes) -> bool:
        """Whether the page with this key is known."""
        return key in self._known

    def is_live(self, page: int) -> bool:
        """Whether a sequence reads it."""
        return page in self._num_users

    def allocate(self, count: int) -> list[int]:
        """Live pages, free ones first, then the ones that were cached longest ago.

        The tenant that has most cached pages loses them first, so that nobody can flood out the others. Raises
        MemoryLimitError, and takes none, when too few are available.
        """
        if count > self.num_available:
            raise MemoryLimitError(
                f"{count:,} cache pages are needed, but {self.num_available:,} of {self.num_pages:,} are free"
            )
        while len(self._free) < count:
            self._evict(next(iter(max(self._idle.values(), key=len).values())))
        pages = [self._free.pop() for _ in range(count)]
        self._num_users.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, cached: CachedPage) -> None:
        """One more sequence reads a known page."""
        users = self._num_users.get(cached.page, 0)
        if users == 0:
            self._remove_idle(cached)
        self._num_users[cached.page] = users + 1

    def release(self, pages: Sequence[int]) -> None:
        """One sequence reads these pages no more; they are in its order, so that its last page is evicted first."""
        for page in reversed(pages):
            users = self._num_users.get(page, 0)
            assert users > 0, "a page was freed that is not live"
            if users > 1:
                self._num_users[page] = users - 1
                continue
            del self._num_users[page]
            if (cached := self._known_at.get(page)) is None:
                self._free.append(page)
            else:
                self._idle.setdefault(cached.tenant, OrderedDict())[cached.key] = cached

    def match(self, token_ids: Sequence[int], tenant: str, keys: list[bytes] | None = None) -> PrefixMatch:
        """The longest cached prefix of a sequence that leaves at least its last token to be read.

        keys: remembers the keys of its pages for the next time the same sequence is looked up.
        """
        size, key = self.page_size, root_key(tenant)
        found: list[CachedPage] = []
        keys = [] if keys is None else keys
        while (end := (len(found) + 1) * size + 1) <= len(token_ids):
            if len(keys) == len(found):
                keys.append(page_key(key, token_ids[end - size - 1 : end]))
            if (cached := self._known.get(keys[len(found)])) is None:
                break
            found.append(cached)
            key = cached.key
        rest = token_ids[len(found) * size : (len(found) + 1) * size + 1]
        candidates = list(self._children.get(key, {}).values())[-MAX_CANDIDATES:]
        best = max(candidates, key=lambda cached: _num_common(cached.tokens, rest), default=None)
        num_partial = 0 if best is None else _num_common(best.tokens, rest) - 1
        return PrefixMatch(
            pages=tuple(found), partial=best if num_partial > 0 else None, num_partial=max(num_partial, 0)
        )

    def register(self, page: int, parent: bytes, tokens: Sequence[int], tenant: str) -> CachedPage:
        """Make the rows of a live page known: those of `tokens`, the last of which is only the one after them.

        When the same rows are known already, the caller's page is released and it reads the known one instead.
        """
        assert self._num_users.get(page, 0) > 0, "only a live page can become known"
        key = page_key(parent, tokens)
        known = self._known.get(key)
        if known is None:
            known = CachedPage(key, parent, tuple(tokens), page, tenant)
            self._known[key] = self._known_at[page] = known
            self._children.setdefault(parent, {})[key] = known
        elif known.page != page:
            self.share(known)
            self.release([page])
        return known

    def check_counts(self) -> None:
        """Assert that free + live + cached = all; cheap enough for every step."""
        assert self.num_free + self.num_live + self.num_cached == self.num_pages, "pages were lost"

    def check_conservation(self) -> None:
        """Assert that every page is free, live or cached, and only one of these; looks at every page."""
        idle = [cached.page for pages in self._idle.values() for cached in pages.values()]
        kinds = [*self._free, *self._num_users, *idle]
        self.check_counts()
        assert set(kinds) == set(range(self.num_pages)), "a page is counted twice"
        assert all(users > 0 for users in self._num_users.values()), "a live page has no user"
        assert {cached.page for cached in self._known.values()} == set(self._known_at), "a known page has no entry"
        assert not set(self._free) & set(self._known_at), "a free page is known"
        assert sum(map(len, self._children.values())) == len(self._known), "a known page has no parent"

    def _evict(self, cached: CachedPage) -> None:
        self._remove_idle(cached)
        del self._known[cached.key], self._known_at[cached.page]
        siblings = self._children[cached.parent]
        del siblings[cached.key]
        if not siblings:
            del self._children[cached.parent]
        self._free.append(cached.page)
        self.num_evicted += 1

    def _remove_idle(self, cached: CachedPage) -> None:
        pages = self._idle[cached.tenant]
        del pages[cached.key]
        if not pages:
            del self._idle[cached.tenant]


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
