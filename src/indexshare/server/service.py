"""The engine behind the dialects: neutral requests to token ids and guides, drawn tokens to pieces of a reply.

Rendering, tokenizing and compiling grammars run in worker threads with limits on time and size; the engine runs in a
thread of its own and hands its outputs to the event loop once a step.
"""

import asyncio
import contextlib
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from indexshare.chat.parser import EventParser
from indexshare.chat.types import Error, Event, Start, Usage
from indexshare.engine.engine import Engine, EngineOptions
from indexshare.engine.grammar import GuideCompiler
from indexshare.engine.guide import Guide
from indexshare.engine.llm import LLM
from indexshare.engine.reply import ChatPrompt, ReplyDecoder, chat_prompt
from indexshare.engine.sampler import SampledToken, SamplingParams
from indexshare.engine.sequence import Generation, Output
from indexshare.errors import OverloadedError, RequestError
from indexshare.server.constraints import compile_format, compile_request
from indexshare.server.http import ApiError
from indexshare.server.reading import ReadingReport
from indexshare.server.system_prompt import stable
from indexshare.server.types import ChatRequest, CompletionRequest, Piece

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 4096
MAX_PREPARING = 8  # requests that are rendered and tokenized at once; more wait
MAX_WAITING_TO_PREPARE = 256
MAX_PROMPT_LOGPROBS = 400_000
MAX_REPORTED_RANGES = 20_000_000  # of what was selected, in one reply


class EngineService:
    """A model behind the dialects (`server.types.Service`). `load` is called by `start`, in a thread.

    default_max_tokens: new tokens of a chat that names no number. shares_prefixes: among all tenants.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        options: EngineOptions,
        *,
        model_names: tuple[str, ...],
        default_max_tokens: int = DEFAULT_MAX_TOKENS,
        shares_prefixes: bool = False,
    ) -> None:
        self.model_names = model_names
        self.created = int(time.time())
        self.context_length = 0
        self._load = load
        self._options = options
        self._default_max_tokens = default_max_tokens
        self._shares_prefixes = shares_prefixes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._llm: LLM | None = None
        self._engine: Engine | None = None
        self._compiler: GuideCompiler | None = None
        # Weak, so that a reply that nobody ever reads is cancelled like one that is not read to its end.
        self._replies: WeakValueDictionary[Generation, EngineReply] = WeakValueDictionary()
        self._workers = ThreadPoolExecutor(MAX_PREPARING, thread_name_prefix="prepare")
        self._num_preparing = 0
        self._num_reported = 1  # tokens that a reply with what was selected may have
        self._not_ready: str | None = "the model is loading"

    @property
    def not_ready(self) -> str | None:
        """Why requests cannot be served now, or None."""
        if self._engine is not None and self._engine.failure is not None:
            return self._engine.failure
        return self._not_ready

    async def start(self) -> None:
        """Load the model, build its kernels and generate a first token; then it is ready. Errors as for `load`."""
        self._loop = asyncio.get_running_loop()
        llm = await asyncio.to_thread(self._load)
        self._compiler = compiler = GuideCompiler(llm.tokenizer, llm.config.vocab_size)
        self._llm = llm
        self._engine = engine = await asyncio.to_thread(Engine, llm, self._options, deliver=self._deliver)
        if llm.tokenizer.stop_ids:
            await asyncio.to_thread(compiler.json_object)  # the first grammar prepares the vocabulary
        self.context_length = engine.context_length
        num_ranges = len(llm.config.full_layers) * llm.config.index_topk  # none without indexers
        self._num_reported = max(1, MAX_REPORTED_RANGES // max(1, num_ranges))
        engine.start()
        warm_up = Generation(
            prompt_ids=tuple(llm.tokenizer.encode("Hello")), params=SamplingParams(max_new_tokens=2), scope="\0warm-up"
        )
        self._not_ready = "the first token is being generated"
        async for piece in self._submit(warm_up, None, None).pieces():
            if isinstance(error := piece.events[-1], Error):
                raise RequestError(f"the model cannot generate: {error.message}")
        self._not_ready = None

    async def close(self, *, drain_seconds: float) -> None:
        """Accept nothing more, let running replies finish for so long, end the rest."""
        self._not_ready = "the server is shutting down"
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close, drain_seconds=drain_seconds)
        self._workers.shutdown(wait=False, cancel_futures=True)

    def stats(self) -> Mapping[str, Any]:
        """`Engine.stats`, empty while the model is loading."""
        return {} if self._engine is None else self._engine.stats()

    async def chat(self, request: ChatRequest, *, tenant: str) -> "EngineReply":
        """See `server.types.Service`."""
        llm, _ = self._ready()
        prompt, guide, report = await self._prepare(lambda: self._prepare_chat(llm, request))
        params = self._params(request.sampling, llm.generation.sampling, len(prompt.token_ids), report is not None)
        generation = Generation(
            prompt_ids=tuple(prompt.token_ids),
            params=params,
            stop_ids=llm.chat_stop_ids,
            tenant=tenant,
            scope=self._scope(tenant),
            guide=guide,
            drafts=_may_draft(params, request.sampling),
            wants_selection=request.wants_selection,
        )
        reply = self._submit(generation, prompt.parser, report)
        if prompt.is_thinking:
            reply.think_end = llm.tokenizer.control_ids.get("</think>")
        return reply

    async def complete(self, request: CompletionRequest, *, tenant: str) -> "EngineReply":
        """See `server.types.Service`."""
        llm, compiler = self._ready()
        sampling = dict(request.sampling)
        draws_nothing = request.echo and sampling.get("max_new_tokens") == 0
        if draws_nothing:
            del sampling["max_new_tokens"]

        def prepare() -> tuple[tuple[int, ...], Guide | None, ReadingReport | None]:
            prompt = request.prompt
            if isinstance(prompt, str):
                token_ids = llm.tokenizer.encode(prompt)
            else:
                token_ids = list(prompt)
                check_token_ids(token_ids, llm.tokenizer.vocab_size)
            compiled = compile_format(compiler, request.output_format)
            report = ReadingReport(llm.config, llm.tokenizer, token_ids) if request.wants_selection else None
            return tuple(token_ids), None if compiled is None else compiled.guide(llm.stop_ids), report

        token_ids, guide, report = await self._prepare(prepare)
        params = self._params(sampling, {}, len(token_ids), report is not None)
        if request.echo and (params.logprobs or 0) * len(token_ids) > MAX_PROMPT_LOGPROBS:
            raise RequestError(
                f"echo reports at most {MAX_PROMPT_LOGPROBS:,} log-probabilities: ask for fewer, or a shorter prompt"
            )
        generation = Generation(
            prompt_ids=token_ids,
            params=params,
            stop_ids=llm.stop_ids,
            tenant=tenant,
            scope=self._scope(tenant),
            guide=guide,
            drafts=_may_draft(params, sampling),
            scores_prompt=request.echo and params.logprobs is not None,
            draws_nothing=draws_nothing,
            wants_selection=request.wants_selection,
        )
        return self._submit(generation, None, report)

    async def encode_chat(self, request: ChatRequest) -> list[int]:
        """The prompt that `chat` would read."""
        llm, _ = self._ready()
        return (await self._prepare(lambda: self._render(llm, request))).token_ids

    async def tokenize(self, text: str) -> list[int]:
        """Token ids; control tokens written in the text are plain text."""
        llm, _ = self._ready()
        return await self._prepare(lambda: llm.tokenizer.encode(text))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        llm, _ = self._ready()
        check_token_ids(token_ids, llm.tokenizer.vocab_size)
        return llm.tokenizer.decode(token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        return self._ready()[0].tokenizer.token_bytes(token_id)

    def _scope(self, tenant: str) -> str:
        return "" if self._shares_prefixes else tenant

    def _ready(self) -> tuple[LLM, GuideCompiler]:
        if (reason := self.not_ready) is not None:
            raise ApiError(503, reason, code="not_ready", retry_after=5.0)
        assert self._llm is not None and self._compiler is not None
        return self._llm, self._compiler

    async def _prepare(self, work: Callable[[], T]) -> T:
        """Run the preparation of a request in a worker thread; it takes its place there until it has ended."""
        if self._num_preparing >= MAX_WAITING_TO_PREPARE:
            raise OverloadedError("too many requests are being read already", retry_after=2.0)
        self._num_preparing += 1
        future = self._workers.submit(work)
        future.add_done_callback(self._prepared)
        return await asyncio.wrap_future(future)

    def _prepared(self, _: Future[Any]) -> None:
        """Called in the worker's thread, or in the loop's when the client left while it waited."""
        with contextlib.suppress(RuntimeError):
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._count_down)

    def _count_down(self) -> None:
        self._num_preparing -= 1

    def _render(self, llm: LLM, request: ChatRequest) -> ChatPrompt:
        if not request.messages:
            raise RequestError("messages is empty: send at least one message")
        return chat_prompt(
            llm.tokenizer,
            llm.template,
            stable(request.messages),
            tools=request.tools or None,
            reasoning_effort=request.reasoning_effort,
            enable_thinking=request.enable_thinking is not False,
            clear_thinking=request.clear_thinking is not False,
        )

    def _prepare_chat(self, llm: LLM, request: ChatRequest) -> tuple[ChatPrompt, Guide | None, ReadingReport | None]:
        prompt = self._render(llm, request)
        assert self._compiler is not None
        report = None
        if request.wants_selection:
            report = ReadingReport(llm.config, llm.tokenizer, prompt.token_ids, request.messages)
        compiled = compile_request(self._compiler, request)
        if compiled is None and (request.thinking_budget is None or not prompt.is_thinking):
            return prompt, None, report
        guide = (compiled or self._compiler.free()).guide(
            llm.chat_stop_ids,
            thinking=prompt.is_thinking,
            thinking_budget=request.thinking_budget if prompt.is_thinking else None,
        )
        return prompt, guide, report

    def _params(
        self, given: Mapping[str, Any], defaults: Mapping[str, Any], num_prompt: int, is_reported: bool
    ) -> SamplingParams:
        most = max(1, self.context_length - num_prompt)
        if is_reported:
            most = min(most, self._num_reported)
        options = {"max_new_tokens": min(self._default_max_tokens, most), **defaults, **given}
        options.setdefault("seed", secrets.randbelow(2**62))
        params = SamplingParams.of(options)
        if is_reported and params.max_new_tokens > self._num_reported:
            raise RequestError(
                f"with what was selected at most {self._num_reported:,} tokens can be drawn: ask for fewer tokens"
            )
        return params

    def _submit(
        self, generation: Generation, parser: EventParser | None, report: ReadingReport | None
    ) -> "EngineReply":
        assert self._engine is not None and self._llm is not None
        decoder = ReplyDecoder(self._llm.tokenizer, parser, generation.params.stop)
        reply = EngineReply(service=self, generation=generation, decoder=decoder, report=report)
        self._engine.submit(generation)
        self._replies[generation] = reply  # in time: outputs are dispatched by this thread
        reply.when_dropped = weakref.finalize(reply, self._engine.cancel, generation)
        return reply

    def forget(self, reply: "EngineReply") -> None:
        """A reply has been read to its end, or will not be."""
        self._replies.pop(reply.generation, None)
        if reply.when_dropped is not None and reply.when_dropped.detach() and not reply.has_ended:
            assert self._engine is not None
            self._engine.cancel(reply.generation)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        """Called in the engine's thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if (reply := self._replies.get(output.generation)) is not None:
                reply.outputs.put_nowait(output)


@dataclass(kw_only=True, eq=False)
class EngineReply:
    """An accepted request (`server.types.Reply`)."""

    service: EngineService
    generation: Generation
    decoder: ReplyDecoder
    report: ReadingReport | None
    outputs: "asyncio.Queue[Output]" = field(default_factory=asyncio.Queue)
    num_cached_tokens: int = 0
    prompt_tokens: list[SampledToken] = field(default_factory=list)
    num_drawn: int = 0
    num_reasoning: int = 0
    think_end: int | None = None  # the token that ends the reasoning, while that lasts
    has_ended: bool = False
    when_dropped: "weakref.finalize[..., EngineReply] | None" = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.generation.prompt_ids)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Once; closing it early cancels the request."""
        events: list[Event] = [Start(self.num_prompt_tokens)]
        selection: dict[str, Any] = {} if self.report is None else dict(self.report.header)
        try:
            while True:
                output = await self.outputs.get()
                self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
                self.has_ended = output.ended is not None
                self.prompt_tokens += output.prompt_tokens
                if not output.tokens and output.ended is None:
                    continue
                tokens, is_last = self._add(output, events)
                if self.report is not None:
                    pairs = zip(tokens, output.selections, strict=False)
                    selection["tokens"] = [self.report.token(token.token_id, chosen) for token, chosen in pairs]
                yield Piece(events=tuple(events), tokens=tokens, selection=selection or None)
                if is_last:
                    return
                events, selection = [], {}
        finally:
            self.service.forget(self)

    def _add(self, output: Output, events: list[Event]) -> tuple[tuple[SampledToken, ...], bool]:
        """Add the events of one output. Returns its tokens, up to a stop text, and whether this was the end."""
        ended, tokens = output.ended, output.tokens
        for index, token in enumerate(tokens):
            if ended == "stop" and index + 1 == len(tokens):
                break  # the stop token
            if self.think_end is not None:
                self.num_reasoning += token.token_id != self.think_end
                self.think_end = None if token.token_id == self.think_end else self.think_end
            events += self.decoder.push(token.token_id)
            if self.decoder.stopped:
                tokens, ended = tokens[: index + 1], "stop"
                break
        self.num_drawn += len(tokens)
        if ended == "error":
            events.append(Error(output.error or "generation failed"))
        elif ended is not None:
            usage = Usage(
                num_prompt_tokens=self.num_prompt_tokens,
                num_completion_tokens=self.num_drawn,
                num_cached_tokens=self.num_cached_tokens,
                num_reasoning_tokens=self.num_reasoning,
            )
            events += self.decoder.finish(ended, usage)
        return tokens, ended is not None


def _may_draft(params: SamplingParams, given: Mapping[str, Any]) -> bool:
    """A request that draws from a seed of its own is drawn as plain decoding draws it."""
    return params.temperature == 0.0 or "seed" not in given


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Refuse what is no token id."""
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise RequestError(f"{token_id!r:.40} is not a token id: use integers from 0 to {vocab_size - 1:,}")
