"""The serving engine: many requests at once on one model. schedule -> run -> commit, step after step.

    engine = Engine(llm, deliver=print)
    engine.submit(Generation(prompt_ids=..., params=SamplingParams()))
    while engine.step(): ...

`start` does the stepping in a thread of its own, the only one that touches the model. The same request gives the same
tokens whatever else is being served (`engine.session` is the simple loop that it must agree with).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from indexshare import __version__, runtime
from indexshare.engine.cache import DEFAULT_PAGE_SIZE, PagedCache, bytes_per_token, num_pages_for, required_bytes
from indexshare.engine.draft_length import DraftLength
from indexshare.engine.llm import LLM
from indexshare.engine.pages import root_key
from indexshare.engine.prefix_store import PrefixStore
from indexshare.engine.runner import Result, Runner
from indexshare.engine.sampler import check_integer
from indexshare.engine.scheduler import MIN_MIXED_TOKENS, Limits, Plan, Scheduler
from indexshare.engine.sequence import Ended, Generation, Output, Sequence
from indexshare.engine.speculative import DEFAULT_NUM_DRAFT_TOKENS, MAX_DRAFT_TOKENS
from indexshare.errors import IndexShareError, MemoryLimitError, OverloadedError, RequestError
from indexshare.model.config import GlmConfig
from indexshare.model.glm import weights_of

logger = logging.getLogger(__name__)

FAILURES = (IndexShareError, RuntimeError, MemoryError)  # of one step; anything else ends the engine
RESTORED_BYTES = 64 * 2**20  # of pages that are read from the disk before one step
DEFAULT_CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """cache_tokens: tokens that the cache holds; 0: one full length or 4 GiB, but at most half of the free memory.

    num_drafts: how many tokens the MTP layer guesses at most, 0 for none, None: 3 if the model has one. adapts_drafts:
    fewer when more do not pay.
    step_seconds: how long a step should take at most while somebody waits for the next token behind a prompt.
    prefix_store: a directory for prefixes that outlive the process, of at most prefix_store_bytes.
    """

    limits: Limits = field(default_factory=Limits)
    cache_tokens: int = 0
    num_drafts: int | None = 0
    adapts_drafts: bool = True
    step_seconds: float = 0.25
    page_size: int = DEFAULT_PAGE_SIZE
    prefix_store: Path | None = None
    prefix_store_bytes: int = 10 * 2**30


class Engine:
    """deliver(outputs) is called after each step, in the thread that stepped; it must not block."""

    def __init__(
        self, llm: LLM, options: EngineOptions | None = None, *, deliver: Callable[[Items[Output]], None]
    ) -> None:
        options = options or EngineOptions()
        config = llm.config
        num_drafts = _num_drafts(options.num_drafts, config)
        with_mtp = num_drafts > 0
        check_integer("cache_tokens", options.cache_tokens, 0, 2**40)
        num_tokens = options.cache_tokens or _affordable_tokens(llm, with_mtp)
        self.options = options
        self.num_pages = num_pages_for(num_tokens, options.page_size)
        needed = required_bytes(
            config, num_tokens, llm.dtype, page_size=options.page_size, with_mtp=with_mtp, formats=llm.caches
        )
        available = runtime.available_memory_bytes(str(llm.device)) - runtime.settings().workspace_bytes
        if needed > available:
            raise MemoryLimitError(
                f"a cache of {num_tokens:,} tokens needs {needed:,} bytes, but {max(available, 0):,} are "
                "available: use a smaller --cache-tokens"
            )
        cache = PagedCache(
            config,
            num_pages=self.num_pages,
            page_size=options.page_size,
            dtype=llm.dtype,
            device=llm.device,
            with_mtp=with_mtp,
            formats=llm.caches,
        )
        self.cache = cache
        self.pool = cache.pages
        self._bytes_per_token = bytes_per_token(config, llm.dtype, with_mtp=with_mtp, formats=llm.caches)
        self.context_length = min(self.num_pages * options.page_size, config.max_position_embeddings)
        self._runner = Runner(llm.model, cache, with_mtp=with_mtp)
        self._scheduler = Scheduler(self.pool, options.limits, copy_rows=cache.copy_rows, restore=self._restore)
        self._draft_length = DraftLength(num_drafts, is_fixed=not options.adapts_drafts)
        self._store: PrefixStore | None = None
        if options.prefix_store is not None:
            fingerprint = _fingerprint(llm, options.page_size, with_mtp)
            self._store = PrefixStore(options.prefix_store, fingerprint, max_bytes=options.prefix_store_bytes)
        self._deliver = deliver
        self._sequences: dict[Generation, Sequence] = {}
        self._inbox: deque[tuple[Generation, bool]] = deque()  # (request, whether it is cancelled)
        self._num_submitted = 0  # requests in the inbox
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._deadline = 0.0  # when what still runs is cancelled, once it is closing
        self.failure: str | None = None
        self._num_arrived = 0
        self._rate = 0.0  # tokens per second, of steps that read prompts
        self._waiting_tokens = 0
        self._totals: dict[str, float] = dict.fromkeys(
            ("steps", "prompt_tokens", "cached_tokens", "drawn_tokens", "requests", "step_seconds"), 0.0
        )
        self._drafted = [0] * num_drafts
        self._accepted = [0] * num_drafts

    def submit(self, generation: Generation) -> None:
        """Ask for a request to be served; its outputs are delivered. Any thread may call this.

        Raises MemoryLimitError when it will never fit, OverloadedError when too many wait, RequestError for no tokens.
        """
        if not generation.prompt_ids:
            raise RequestError("the prompt is empty: give at least one token")
        num_new = 0 if generation.draws_nothing else generation.params.max_new_tokens
        num_tokens = len(generation.prompt_ids) + num_new
        if num_tokens > self.context_length:
            raise MemoryLimitError(
                f"{len(generation.prompt_ids):,} prompt tokens and {num_new:,} new ones are {num_tokens:,} tokens "
                f"({num_tokens * self._bytes_per_token:,} bytes of cache); a request may have {self.context_length:,} "
                "here: send a shorter prompt or ask for fewer tokens"
            )
        with self._changed:
            if self._closing or self.failure is not None:
                raise OverloadedError("the server is shutting down", retry_after=30.0)
            if self._scheduler.num_waiting + self._num_submitted >= self.options.limits.max_waiting:
                raise OverloadedError(
                    f"{self.options.limits.max_waiting} requests are waiting already", retry_after=self._retry_after()
                )
            self._num_submitted += 1
            self._inbox.append((generation, False))
            self._changed.notify()

    def cancel(self, generation: Generation) -> None:
        """End a request before its next step; harmless when it has ended. Any thread may call this."""
        with self._changed:
            self._inbox.append((generation, True))
            self._changed.notify()

    def step(self) -> bool:
        """Serve one step; False when there was nothing to do."""
        outputs = self._take_inbox()
        num_decoding = sum(sequence.num_unread == 1 for sequence in self._scheduler.running)
        plan = self._scheduler.schedule(self._draft_length.choose(num_decoding))
        if plan.work:
            outputs += self._run(plan)
        if outputs:
            self._deliver(outputs)
        self._waiting_tokens = self._scheduler.num_waiting_tokens
        self.pool.check_counts()
        assert self._sequences or self.pool.num_live == 0, "pages are live although nothing runs"
        return bool(plan.work or outputs)

    def start(self) -> None:
        """Step in a thread of its own until `close`."""
        assert self._thread is None, "it has been started"
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Accept nothing more, let what runs go on for so long, then end it; waits until the thread has ended."""
        with self._changed:
            self._deadline = time.monotonic() + drain_seconds
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.step():
                pass
        self.pool.check_conservation()
        store, self._store = self._store, None  # a second signal may call this beside the first
        if store is not None:
            store.close()

    def stats(self) -> Mapping[str, Any]:
        """Figures for a monitor: counts now and totals since the start; "drafted" and "accepted" are by position."""
        return {
            "waiting": self._scheduler.num_waiting,
            "running": len(self._scheduler.running),
            "pages": self.num_pages,
            "free_pages": self.pool.num_free,
            "live_pages": self.pool.num_live,
            "cached_pages": self.pool.num_cached,
            "evicted_pages": self.pool.num_evicted,
            "preempted": self._scheduler.num_preempted,
            "cache_bytes": self.cache.num_bytes,
            "mixed_tokens": self._scheduler.mixed_tokens,
            "expert_tokens": self._runner.expert_tokens(),
            "drafted": tuple(self._drafted),
            "accepted": tuple(self._accepted),
            **self._totals,
        }

    def _loop(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._inbox or self._sequences or self._closing):
                        self._changed.wait()
                    if self._closing and not self._inbox and not self._sequences:
                        return
                self.step()
        except BaseException as error:
            logger.exception("the engine has stopped")
            with self._changed:
                self.failure = f"the engine has stopped: {type(error).__name__}"
                left = {generation for generation, is_cancelled in self._inbox if not is_cancelled}
                self._inbox.clear()
            self._deliver([_ended(generation, "error", self.failure) for generation in {*self._sequences, *left}])
            self._sequences.clear()
            raise

    def _take_inbox(self) -> list[Output]:
        outputs = []
        with self._changed:
            inbox, self._inbox, self._num_submitted = self._inbox, deque(), 0
            is_over = self._closing and time.monotonic() >= self._deadline
        for generation, is_cancelled in inbox:
            if not is_cancelled:
                self._sequences[generation] = sequence = Sequence.of(generation, self._num_arrived)
                self._num_arrived += 1
                self._scheduler.add(sequence)
            elif (found := self._sequences.get(generation)) is not None:
                self._end(found)
                outputs.append(_ended(generation, "cancelled"))
        for sequence in list(self._sequences.values()) if is_over else ():
            self._end(sequence)
            outputs.append(_ended(sequence.generation, "cancelled"))
        return outputs

    def _run(self, plan: Plan) -> list[Output]:
        begun = time.perf_counter()
        try:
            results = self._runner.run(plan)
        except FAILURES as error:
            # Nothing says which request it was: all of this step end, and the engine goes on.
            logger.exception("a step failed")
            results = [Result(work=item, error=_describe(error)) for item in plan.work]
        else:
            self._measure(plan, results, time.perf_counter() - begun)
        return [output for result in results if (output := self._commit(result)) is not None]

    def _commit(self, result: Result) -> Output | None:
        sequence, generation = result.work.sequence, result.work.sequence.generation
        ended: Ended | None = None
        if result.error is not None:
            self._distrust(sequence)
            ended = "error"
        elif result.tokens and result.tokens[-1].token_id in generation.stop_ids:
            ended = "stop"
        elif sequence.num_left == 0 or (generation.draws_nothing and sequence.num_unread == 0):
            ended = "length"
        if ended in ("stop", "length"):
            try:
                self._runner.complete(sequence)
            except FAILURES:  # the answer is complete; only what others could reuse is not
                logger.exception("a step failed")
                self._distrust(sequence)
        if ended is None:
            self._scheduler.commit(sequence)
        else:
            self._end(sequence)
        if not result.tokens and not result.prompt_tokens and ended is None:
            return None
        return Output(
            generation=generation,
            tokens=result.tokens,
            ended=ended,
            num_cached_tokens=sequence.num_cached,
            prompt_tokens=result.prompt_tokens,
            selections=result.selections,
            error=result.error,
        )

    def _distrust(self, sequence: Sequence) -> None:
        """Of its rows only those in pages that are known already are used again."""
        sequence.num_valid = min(sequence.num_valid, (len(sequence.keys) - 1) * self.options.page_size)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.generation]
        self._keep(sequence)
        self._scheduler.finish(sequence)
        self._totals["requests"] += 1
        self._totals["cached_tokens"] += sequence.num_cached

    def _restore(self, sequence: Sequence) -> bool:
        """Bring pages of its prompt back from the disk, as far as there is room; whether there may be more of them."""
        if self._store is None:
            return False
        size, scope, token_ids = self.options.page_size, sequence.generation.scope, sequence.token_ids
        known = self.pool.match(token_ids, scope, sequence.prompt_keys).pages
        for cached in known:
            self.pool.share(cached)  # so that they are not evicted for the ones behind them
        pages, parent = [cached.page for cached in known], known[-1].key if known else root_key(scope)
        num_left = max(1, RESTORED_BYTES // self.cache.page_bytes)
        while num_left > 0 and self.pool.num_available > 0 and (key := sequence.prompt_key(len(pages), size)):
            rows = self._store.get(scope, key, self.cache.page_bytes)
            if rows is None:
                break
            page = self.pool.allocate(1)[0]
            self.cache.write_page(page, rows)
            begin = len(pages) * size
            pages.append(self.pool.register(page, parent, token_ids[begin : begin + size + 1], scope).page)
            parent = key
            num_left -= 1
        self.pool.release(pages)
        return num_left == 0

    def _keep(self, sequence: Sequence) -> None:
        """Hand the full pages of a sequence that ends to the store."""
        if self._store is None or sequence not in self._scheduler.running:
            return
        self._scheduler.commit(sequence)
        scope = sequence.generation.scope
        for key, page in zip(sequence.keys[1:], sequence.pages, strict=False):
            if (scope, key) in self._store:
                continue
            if not self._store.put(scope, key, self.cache.read_page(page)):
                break  # the disk does not keep up

    def _measure(self, plan: Plan, results: Items[Result], seconds: float) -> None:
        totals = self._totals
        num_drawn = sum(len(result.tokens) for result in results)
        totals["steps"] += 1
        totals["step_seconds"] += seconds
        totals["drawn_tokens"] += num_drawn
        totals["prompt_tokens"] += sum(item.num_tokens for item in plan.work if item.num_tokens > 1)
        for result in results:
            for position in range(result.num_drafted):
                self._drafted[position] += 1
                self._accepted[position] += position < result.num_accepted
        if plan.is_decode:
            self._draft_length.observe(len(plan.work), max(item.num_drafts for item in plan.work), num_drawn, seconds)
        else:
            rate = plan.num_tokens / max(seconds, 1e-9)
            self._rate = rate if self._rate == 0.0 else self._rate + 0.3 * (rate - self._rate)
            tokens = int(self._rate * self.options.step_seconds)
            self._scheduler.mixed_tokens = max(MIN_MIXED_TOKENS, min(tokens, self.options.limits.max_step_tokens))

    def _retry_after(self) -> float:
        """Seconds until about half of what waits should be done."""
        return min(60.0, max(1.0, self._waiting_tokens / 2 / self._rate if self._rate else 1.0))


def _num_drafts(wanted: int | None, config: GlmConfig) -> int:
    has_mtp = config.num_nextn_predict_layers > 0
    if wanted is None:
        return DEFAULT_NUM_DRAFT_TOKENS if has_mtp else 0
    check_integer("draft", wanted, 0, MAX_DRAFT_TOKENS)
    if wanted > 0 and not has_mtp:
        raise RequestError("this model has no MTP layer to draft with: serve it without drafts (--draft 0)")
    return wanted


def _affordable_tokens(llm: LLM, with_mtp: bool) -> int:
    available = runtime.available_memory_bytes(str(llm.device)) - runtime.settings().workspace_bytes
    size = bytes_per_token(llm.config, llm.dtype, with_mtp=with_mtp, formats=llm.caches)
    wanted = max(DEFAULT_CACHE_BYTES // size, llm.config.max_position_embeddings)
    return max(DEFAULT_PAGE_SIZE, min(available // 2 // size, wanted))


def _fingerprint(llm: LLM, page_size: int, with_mtp: bool) -> str:
    """What decides the bytes of a page: the weights and how they are held, kernels, formats, the page."""
    files = [] if llm.load_report is None else sorted(llm.directory.glob("*.safetensors"))
    stored = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    held = [
        (name, type(weight).__name__, tuple(weight.shape), str(getattr(weight, "dtype", "")), _format(weight))
        for name, weight in sorted(weights_of(llm.model).items())
    ]
    is_packed = llm.model.stack.packed is not None
    return repr((__version__, llm.config, llm.device.type, is_packed, llm.caches, page_size, with_mtp, stored, held))


def _format(weight: object) -> str:
    return f"{getattr(weight, 'format', '')} {getattr(weight, 'group_size', '')}"


def _ended(generation: Generation, how: Ended, error: str | None = None) -> Output:
    return Output(generation=generation, ended=how, error=error)


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, IndexShareError) else "the step failed; the server's log says why"
