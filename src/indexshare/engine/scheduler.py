"""Which tokens of which requests the next forward pass reads. Policy only: no torch, no time.

Every running sequence that decodes takes part in every step; prompts fill what is left of the step's token budget, in
chunks, and while others decode only `mixed_tokens`, so that nobody waits long for a token behind somebody's prompt.
Waiting requests are admitted when their prompt fits the free pages, from the tenant that has been served least; while
several tenants have something to do, none runs more than its share of the sequences. When pages run out, the youngest
running request gives its own back and waits; what it had is cached, and read again. A request whose next page is just
being computed for another one waits for it, and lets others pass.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

from indexshare.engine.pages import PagePool, PrefixMatch
from indexshare.engine.sampler import check_integer
from indexshare.engine.sequence import Sequence

MIN_MIXED_TOKENS = 16  # of prompts that are read in a step, however many decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one engine holds and what one step does.

    max_sequences: running at once. max_waiting: requests that wait. max_step_tokens: tokens that a step should read.
    Raises RequestError when one is out of range.
    """

    max_sequences: int = 64
    max_waiting: int = 256
    max_step_tokens: int = 512

    def __post_init__(self) -> None:
        check_integer("max_sequences", self.max_sequences, 1, 4096)
        check_integer("max_waiting", self.max_waiting, 1, 1_000_000)
        check_integer("step_tokens", self.max_step_tokens, 1, 65_536)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step does for one sequence: read `num_tokens` of its tokens, then verify up to `num_drafts` guesses."""

    sequence: Sequence
    num_tokens: int
    num_drafts: int = 0

    @property
    def draws(self) -> bool:
        """Whether a token is drawn after it."""
        return self.num_tokens == self.sequence.num_unread


@dataclass(slots=True, kw_only=True)
class Plan:
    """A step."""

    work: list[Work] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens + item.num_drafts for item in self.work)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence only decodes."""
        return all(item.num_tokens == 1 and item.draws for item in self.work)


class Scheduler:
    """Decides, admits, preempts; owns who runs and who waits, and their pages.

    copy_rows(page, page, n): copies the first n rows of a page to another. restore(sequence): brings known pages of its
    prompt back from elsewhere, some of them, and says whether there are more.
    """

    def __init__(
        self,
        pool: PagePool,
        limits: Limits,
        *,
        copy_rows: Callable[[int, int, int], None],
        restore: Callable[[Sequence], bool] = lambda _: False,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self._copy_rows = copy_rows
        self._restore = restore
        self.mixed_tokens = limits.max_step_tokens
        self.running: list[Sequence] = []  # in order of arrival
        self.num_preempted = 0
        self._waiting: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}  # tokens read and drawn for each tenant that has something to do

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that the waiting requests may still read and draw."""
        waiting = (sequence for queue in self._waiting.values() for sequence in queue)
        return sum(len(sequence.token_ids) + sequence.num_left for sequence in waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a new request wait for its turn."""
        tenant = sequence.generation.tenant
        if tenant not in self._served:
            # It has not been here: it starts as the least served one, not with the credit of its absence.
            self._served[tenant] = min(self._served.values(), default=0)
        self._waiting.setdefault(tenant, deque()).append(sequence)

    def schedule(self, num_drafts: int = 0) -> Plan:
        """The next step; no work when nothing runs or waits."""
        plan = Plan()
        self._admit()
        self._decode(plan, num_drafts)
        self._read_prompts(plan)
        plan.work = [item for item in plan.work if item.sequence in self.running]  # not those preempted since
        for item in plan.work:
            self._served[item.sequence.generation.tenant] += item.num_tokens + item.num_drafts
        return plan

    def commit(self, sequence: Sequence) -> None:
        """Make the pages known that the last step completed."""
        size = self.pool.page_size
        while (index := len(sequence.keys) - 1) < sequence.num_valid // size:
            if (index + 1) * size >= len(sequence.token_ids):
                break  # the token after them is not known
            self._register(sequence, index)

    def finish(self, sequence: Sequence) -> None:
        """A request has ended, in whatever way: keep what it computed for others, give its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self._leave_queue(sequence)
        tenant = sequence.generation.tenant
        if tenant not in self._waiting and not any(other.generation.tenant == tenant for other in self.running):
            del self._served[tenant]

    def _decode(self, plan: Plan, num_drafts: int) -> None:
        decoding = [sequence for sequence in self.running if sequence.num_unread == 1]
        # Guesses leave something of the step to prompts, and nobody gives way for one.
        spare = max(0, self.limits.max_step_tokens * 7 // 8 - len(decoding))
        num_drafts = min(num_drafts, spare // max(1, len(decoding)))
        for sequence in decoding:
            if sequence not in self.running:
                continue
            # The first guess comes from the MTP row of the last token read, which must be one of this run.
            can_draft = sequence.generation.drafts and sequence.num_valid < sequence.num_computed
            room = (len(sequence.pages) + self.pool.num_available) * self.pool.page_size - sequence.num_computed - 1
            drafts = max(0, min(num_drafts if can_draft else 0, sequence.num_left - 1, room))
            if self._make_room(sequence, sequence.num_computed + 1 + drafts):
                plan.work.append(Work(sequence=sequence, num_tokens=1, num_drafts=drafts))

    def _read_prompts(self, plan: Plan) -> None:
        """The oldest prompt gets at least half of the budget; short ones go before long ones with the rest."""
        reading = [sequence for sequence in self.running if sequence.num_unread > 1]
        budget = self.limits.max_step_tokens - plan.num_tokens
        if plan.work:
            budget = max(min(budget, self.mixed_tokens), MIN_MIXED_TOKENS)
        shares = {}
        if reading:
            shares[reading[0].arrival] = min(reading[0].num_unread, -(-budget // 2))
            budget -= shares[reading[0].arrival]
        for sequence in sorted(reading, key=lambda sequence: sequence.num_unread):
            more = min(sequence.num_unread - shares.get(sequence.arrival, 0), budget)
            shares[sequence.arrival] = shares.get(sequence.arrival, 0) + more
            budget -= more
        for sequence in reading:
            count = shares[sequence.arrival]
            is_running = sequence in self.running
            if count > 0 and is_running and self._make_room(sequence, sequence.num_computed + count):
                plan.work.append(Work(sequence=sequence, num_tokens=count))

    def _admit(self) -> None:
        if not self._waiting:
            return
        num_running = Counter(sequence.generation.tenant for sequence in self.running)
        share = -(-self.limits.max_sequences // len(num_running.keys() | self._waiting.keys()))
        is_restoring = False
        for sequence in self._candidates():
            tenant = sequence.generation.tenant
            if num_running[tenant] >= share or self._is_being_read(sequence):
                continue
            if len(self.running) >= self.limits.max_sequences:
                if (victim := self._youngest_above(share, num_running)) is None:
                    return
                self._preempt(victim)
                num_running[victim.generation.tenant] -= 1
            match = PrefixMatch()
            if not sequence.generation.scores_prompt:
                if not is_restoring and self._restore(sequence):
                    is_restoring = True  # more of it is on the disk: it is looked at again in the next step
                    continue
                match = self.pool.match(sequence.token_ids, sequence.generation.scope, sequence.prompt_keys)
                if self._is_being_read(sequence, len(match.pages)):
                    continue
            if not self._fits(sequence, match):
                return
            self._leave_queue(sequence)
            self._begin(sequence, match)
            num_running[tenant] += 1

    def _candidates(self) -> list[Sequence]:
        """Who waits: one of each tenant in turn, whoever was served least first."""
        tenants = sorted(self._waiting, key=lambda name: self._served[name])
        rounds = zip_longest(*(self._waiting[tenant] for tenant in tenants))
        return [sequence for turn in rounds for sequence in turn if sequence is not None]

    def _youngest_above(self, share: int, num_running: Counter[str]) -> Sequence | None:
        """The youngest request of the tenant that runs most, if these are more than its share."""
        tenant, count = num_running.most_common(1)[0]
        if count <= share:
            return None
        return next(sequence for sequence in reversed(self.running) if sequence.generation.tenant == tenant)

    def _leave_queue(self, sequence: Sequence) -> None:
        queue = self._waiting[sequence.generation.tenant]
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.generation.tenant]

    def _is_being_read(self, sequence: Sequence, num_known: int | None = None) -> bool:
        """Whether its next page, behind `num_known` known ones, is just being computed for another one; remembered."""
        if num_known is None:  # is it still, since it was asked last?
            num_known = sequence.awaited_page
        if num_known is None or num_known >= len(sequence.prompt_keys):
            return False
        key, size = sequence.prompt_keys[num_known], self.pool.page_size
        is_read = not self.pool.knows(key) and any(
            other.num_unread > 1
            and other.num_valid <= (num_known + 1) * size
            and other.prompt_key(num_known, size) == key
            for other in self.running
        )
        sequence.awaited_page = num_known if is_read else None
        return is_read

    def _fits(self, sequence: Sequence, match: PrefixMatch) -> bool:
        """Whether a whole prompt and a token more find pages, with one to spare for each sequence that runs."""
        num_new = -(-(len(sequence.token_ids) + 1) // self.pool.page_size) - len(match.pages)
        cached = [*match.pages, *([match.partial] if match.partial is not None else [])]
        num_taken = sum(not self.pool.is_live(known.page) for known in cached)
        return not self.running or num_new + len(self.running) + num_taken <= self.pool.num_available

    def _begin(self, sequence: Sequence, match: PrefixMatch) -> None:
        for cached in match.pages:
            self.pool.share(cached)
        sequence.begin(match, self.pool.page_size)
        if match.partial is not None:
            self.pool.share(match.partial)  # so that it is not evicted for the page it is copied to
            if self.pool.num_available > 0:
                pages = self.pool.allocate(1)
                sequence.pages += pages
                self._copy_rows(match.partial.page, pages[0], match.num_partial)
            else:
                sequence.num_computed = sequence.num_valid = len(match.pages) * self.pool.page_size
            self.pool.release([match.partial.page])
        if sequence.num_preempted == 0:
            sequence.num_cached = sequence.num_computed
        self.running.append(sequence)
        self.running.sort(key=lambda running: running.arrival)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens` tokens of a running sequence, if need be those of younger ones; or it waits itself."""
        missing = -(-num_tokens // self.pool.page_size) - len(sequence.pages)
        while missing > self.pool.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages += self.pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_preempted += 1
        self.num_preempted += 1
        self._waiting.setdefault(sequence.generation.tenant, deque()).appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Make its last page known too, although it is not full, and release all of them."""
        self.commit(sequence)
        index = len(sequence.keys) - 1
        if index * self.pool.page_size < sequence.num_valid < len(sequence.token_ids):
            self._register(sequence, index)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.keys = [], sequence.keys[:1]
        sequence.num_computed = sequence.num_valid = 0

    def _register(self, sequence: Sequence, index: int) -> None:
        tokens = sequence.tokens_of_page(index, self.pool.page_size)
        known = self.pool.register(sequence.pages[index], sequence.keys[-1], tokens, sequence.generation.scope)
        sequence.pages[index] = known.page
        sequence.keys.append(known.key)
