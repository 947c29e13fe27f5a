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
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from indexshare.chat.template import resolve_effort
from indexshare.chat.types import Done, Error, Event, Message, Start, Usage
from indexshare.engine.engine import Engine, EngineOptions
from indexshare.engine.grammar import CompiledGuide, GuideCompiler
from indexshare.engine.guide import Guide
from indexshare.engine.llm import LLM
from indexshare.engine.reply import ChatPrompt, ReplyDecoder, chat_prompt
from indexshare.engine.sampler import SampledToken, SamplingParams
from indexshare.engine.sequence import Generation, Output
from indexshare.errors import OverloadedError, RequestError
from indexshare.server.http import ApiError
from indexshare.server.reading import ReadingReport
from indexshare.server.system_prompt import stable
from indexshare.server.types import ChatRequest, CompletionRequest, OutputFormat, Piece

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 4096
MAX_PREPARING = 8  # requests that are rendered and tokenized at once; more wait
MAX_WAITING_TO_PREPARE = 256


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
        self._preparing = asyncio.Semaphore(MAX_PREPARING)
        self._num_preparing = 0
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
        llm.tokenizer.stop_ids  # noqa: B018  # a model that can be served has a tokenizer
        self._llm = llm
        self._engine = engine = await asyncio.to_thread(Engine, llm, self._options, deliver=self._deliver)
        self._compiler = compiler = GuideCompiler(llm.tokenizer, llm.config.vocab_size)
        await asyncio.to_thread(compiler.json_object)  # the first grammar prepares the vocabulary
        self.context_length = engine.context_length
        engine.start()
        self._not_ready = "the first token is being generated"
        warm_up = Generation(
            prompt_ids=tuple(llm.tokenizer.encode("Hello")), params=SamplingParams(max_new_tokens=2), scope="\0warm-up"
        )
        async for piece in self._reply(warm_up, None, None).pieces():
            if isinstance(error := piece.events[-1], Error):
                raise RequestError(f"the model cannot generate: {error.message}")
        self._not_ready = None

    async def close(self, *, drain_seconds: float) -> None:
        """Accept nothing more, let running replies finish for so long, end the rest."""
        self._not_ready = "the server is shutting down"
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close, drain_seconds=drain_seconds)

    def stats(self) -> Mapping[str, Any]:
        """`Engine.stats`, empty while the model is loading."""
        return {} if self._engine is None else self._engine.stats()

    async def chat(self, request: ChatRequest, *, tenant: str) -> "EngineReply":
        """See `server.types.Service`."""
        llm, _ = self._ready()
        prompt, guide = await self._prepare(lambda: self._prepare_chat(llm, request))
        params = self._params(request.sampling, llm.generation.sampling, len(prompt.token_ids))
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
        messages = (
            [Message.from_dict(message).to_dict() for message in request.messages] if request.wants_selection else []
        )
        return self._submit(generation, prompt, messages)

    async def complete(self, request: CompletionRequest, *, tenant: str) -> "EngineReply":
        """See `server.types.Service`."""
        llm, compiler = self._ready()
        sampling = dict(request.sampling)
        draws_nothing = request.echo and sampling.get("max_new_tokens") == 0
        if draws_nothing:
            del sampling["max_new_tokens"]

        def prepare() -> tuple[tuple[int, ...], Guide | None]:
            prompt = request.prompt
            if isinstance(prompt, str):
                token_ids = llm.tokenizer.encode(prompt)
            else:
                token_ids = list(prompt)
                check_token_ids(token_ids, llm.tokenizer.vocab_size)
            compiled = _compile_format(compiler, request.output_format)
            return tuple(token_ids), None if compiled is None else compiled.guide(llm.stop_ids)

        token_ids, guide = await self._prepare(prepare)
        params = self._params(sampling, {}, len(token_ids))
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
        return self._submit(generation, None, [])

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
        """Run the preparation of a request in a worker thread."""
        if self._num_preparing >= MAX_WAITING_TO_PREPARE:
            raise OverloadedError("too many requests are being read already", retry_after=2.0)
        self._num_preparing += 1
        try:
            async with self._preparing:
                return await asyncio.to_thread(work)
        finally:
            self._num_preparing -= 1

    def _render(self, llm: LLM, request: ChatRequest) -> ChatPrompt:
        if not request.messages:
            raise RequestError("messages is empty: send at least one message")
        effort, thinking = resolve_effort(
            request.reasoning_effort, request.enable_thinking is not False, llm.template.source
        )
        return chat_prompt(
            llm.tokenizer,
            llm.template,
            stable(request.messages),
            tools=request.tools or None,
            reasoning_effort=effort,
            enable_thinking=thinking,
            clear_thinking=request.clear_thinking is not False,
        )

    def _prepare_chat(self, llm: LLM, request: ChatRequest) -> tuple[ChatPrompt, Guide | None]:
        prompt = self._render(llm, request)
        assert self._compiler is not None
        compiled = compile_request(self._compiler, request)
        if compiled is None and (request.thinking_budget is None or not prompt.is_thinking):
            return prompt, None
        compiled = compiled or self._compiler.free()
        guide = compiled.guide(
            llm.chat_stop_ids,
            thinking=prompt.is_thinking,
            thinking_budget=request.thinking_budget if prompt.is_thinking else None,
        )
        return prompt, guide

    def _params(self, given: Mapping[str, Any], defaults: Mapping[str, Any], num_prompt: int) -> SamplingParams:
        room = max(1, self.context_length - num_prompt)
        options = {"max_new_tokens": min(self._default_max_tokens, room), **defaults, **given}
        options.setdefault("seed", secrets.randbelow(2**62))
        return SamplingParams.of(options)

    def _submit(
        self, generation: Generation, prompt: ChatPrompt | None, messages: Sequence[Mapping[str, Any]]
    ) -> "EngineReply":
        llm, _ = self._ready()
        report = None
        if generation.wants_selection:
            report = ReadingReport(llm.config, llm.tokenizer, generation.prompt_ids, messages)
        return self._reply(generation, prompt, report)

    def _reply(self, generation: Generation, prompt: ChatPrompt | None, report: ReadingReport | None) -> "EngineReply":
        assert self._engine is not None and self._llm is not None
        decoder = ReplyDecoder(self._llm.tokenizer, None if prompt is None else prompt.parser, generation.params.stop)
        reply = EngineReply(service=self, generation=generation, decoder=decoder, report=report)
        self._engine.submit(generation)
        self._replies[generation] = reply  # in time: outputs are dispatched by this thread
        weakref.finalize(reply, self._engine.cancel, generation)
        return reply

    def forget(self, generation: Generation) -> None:
        """A reply has been read to its end, or will not be."""
        if self._replies.pop(generation, None) is not None and self._engine is not None:
            self._engine.cancel(generation)

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

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.generation.prompt_ids)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Once; closing it early cancels the request."""
        events: list[Event] = [Start(self.num_prompt_tokens)]
        selection = {} if self.report is None else self.report.header()
        try:
            while True:
                output = await self.outputs.get()
                self.num_cached_tokens = output.num_cached_tokens
                self.prompt_tokens += output.prompt_tokens
                if not output.tokens and output.ended is None:
                    continue
                is_last = self._add(output, events)
                if self.report is not None:
                    pairs = zip(output.tokens, output.selections, strict=False)
                    selection["tokens"] = [self.report.token(token.token_id, chosen) for token, chosen in pairs]
                yield Piece(events=tuple(events), tokens=output.tokens, selection=selection or None)
                if is_last:
                    return
                events, selection = [], {}
        finally:
            self.service.forget(self.generation)

    def _add(self, output: Output, events: list[Event]) -> bool:
        """The events of one output; whether they are the last."""
        self.num_drawn += len(output.tokens)
        usage = Usage(
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=self.num_drawn,
            num_cached_tokens=self.num_cached_tokens,
        )
        if output.ended == "error":
            events.append(Error(output.error or "generation failed"))
            return True
        token_ids = [token.token_id for token in output.tokens]
        events += self.decoder.push(*(token_ids[:-1] if output.ended == "stop" else token_ids))
        if output.ended is None and not self.decoder.stopped:
            return False
        events += self.decoder.finish(output.ended or "stop", usage)
        assert isinstance(events[-1], Done)
        return True


def compile_request(compiler: GuideCompiler, request: ChatRequest) -> CompiledGuide | None:
    """The guide's program for a request's tools and format, None when anything may be said."""
    choice, tools = request.tool_choice, request.tools
    if choice.mode == "required" and not tools:
        raise RequestError("tool_choice asks for a tool call, but the request has no tools")
    if request.output_format is not None and (choice.mode == "required" or _has_strict(tools)):
        raise RequestError("a response format and enforced tool calls cannot be combined: leave one of them out")
    if not tools or (choice.mode == "auto" and choice.parallel and not _has_strict(tools)):
        return _compile_format(compiler, request.output_format)
    if choice.mode == "none":
        return _compile_format(compiler, request.output_format) or compiler.free(may_call=False)
    return compiler.tool_calls(tools, required=choice.mode == "required", name=choice.name, parallel=choice.parallel)


def _compile_format(compiler: GuideCompiler, wanted: OutputFormat | None) -> CompiledGuide | None:
    if wanted is None:
        return None
    match wanted.kind:
        case "json_object":
            return compiler.json_object()
        case "json_schema":
            return compiler.json_schema(wanted.definition)
        case "regex":
            return compiler.regex(wanted.definition)
        case "grammar":
            return compiler.grammar(wanted.definition)


def _has_strict(tools: Sequence[Mapping[str, Any]]) -> bool:
    return any(tool.get("strict") or tool.get("function", {}).get("strict") for tool in tools)


def _may_draft(params: SamplingParams, given: Mapping[str, Any]) -> bool:
    """A request that draws from a seed of its own is drawn as plain decoding draws it."""
    return params.temperature == 0.0 or "seed" not in given


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Refuse what is no token id."""
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise RequestError(f"{token_id!r:.40} is not a token id: use integers from 0 to {vocab_size - 1:,}")
