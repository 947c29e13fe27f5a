"""The Python API: load a model, complete text, talk, score.

llm = indexshare.load("nano")
llm.generate("def main() -> None:", max_new_tokens=64).text
for event in llm.chat([{"role": "user", "content": "..."}], stream=True): ...
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from torch import Tensor

from indexshare import runtime
from indexshare.chat.template import ChatTemplate, Conversation
from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.cache import (
    DEFAULT_PAGE_SIZE,
    PagedCache,
    check_memory,
    expanded_bytes,
    num_pages_for,
    required_bytes,
)
from indexshare.engine.generation_config import GenerationConfig, read_generation_config
from indexshare.engine.output import ChatStream, Completion, Reply, Request, TextStream
from indexshare.engine.reply import chat_prompt
from indexshare.engine.resolve import resolve_model
from indexshare.engine.sampler import SamplingOptions, SamplingParams, check_integer
from indexshare.engine.session import DEFAULT_CHUNK_SIZE, Progress, Session
from indexshare.engine.speculative import MAX_DRAFT_TOKENS, SpeculativeSession
from indexshare.errors import CheckpointError, RequestError
from indexshare.kernels import native
from indexshare.kernels.cache_formats import PLAIN, CacheFormat, CacheFormats
from indexshare.model.checkpoint_files import check_text_files
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.native import pack_model
from indexshare.model.opening import LoadReport, Quant
from indexshare.model.weights import load_checkpoint

CHAT_MAX_NEW_TOKENS = 1024


def load(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "bfloat16",
    index_pattern: str | None = None,
    latent_norm_eps: float | None = None,
    quant: Quant | None = None,
    latent_cache: CacheFormat | None = None,
    index_cache: CacheFormat | None = None,
    threads: int | None = None,
    strict: bool = True,
) -> "LLM":
    """Load a model: a directory, "nano", or a hub id (fetched first).

    device: "auto", "cpu", "cuda", ...; dtype: "bfloat16", "float16" or "float32", for weights and caches.
    index_pattern: which layers run an indexer, e.g. "FFSF...", instead of what the checkpoint says.
    latent_norm_eps: 1e-6 matches transformers; the default is what the model was trained with.
    quant: "int8" or "int4" quantises the weights while they are read; "none" widens a quantised checkpoint to dtype. By
    default weights stay as they are stored: FP8, int8 and int4 checkpoints run from their own bytes.
    latent_cache, index_cache: "int8" holds cached latents or index keys in 8 bits; by default they have `dtype`.
    threads: CPU threads, default all that may be used.
    strict=False turns unknown config keys and tensors into warnings.
    Warns of unused tensors and a missing MTP layer (`LLM.load_report` has the names), and where C++ cannot run it.
    Raises ConfigError, CheckpointError or MemoryLimitError, before or while reading; nothing stays half loaded.
    """
    caches = CacheFormats(latents=latent_cache, index_keys=index_cache)
    runtime.set_threads(threads)
    torch_device, torch_dtype = runtime.resolve_device(device), runtime.resolve_dtype(dtype)
    check_text_files(directory := resolve_model(model))
    generation = read_generation_config(directory)
    weights, report = load_checkpoint(
        directory,
        dtype=torch_dtype,
        device=torch_device,
        index_pattern=index_pattern,
        latent_norm_eps=latent_norm_eps,
        quant=quant,
        strict=strict,
    )
    if torch_device.type == "cpu":
        if (reason := pack_model(weights)) is not None and native.enable() is None:
            warnings.warn(f"{directory}: runs in torch, without the C++ kernels: {reason}", stacklevel=2)
        runtime.return_freed_memory()
    for remark in report.remarks():
        warnings.warn(f"{directory}: {remark}", stacklevel=2)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    return LLM(
        weights,
        tokenizer=Tokenizer.from_directory(directory) if has_tokenizer else None,
        template=ChatTemplate.from_directory(directory) if has_tokenizer else None,
        generation=generation,
        directory=directory,
        load_report=report,
        caches=caches,
    )


class LLM:
    """A loaded model with its tokenizer and chat template; without a tokenizer it can still score token ids.

    Each request has a cache of its own size, so that what it needs is known before it starts.
    load_report: what loading skipped or converted; None for a model made in memory.
    """

    def __init__(
        self,
        model: GlmForCausalLM,
        *,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        generation: GenerationConfig | None = None,
        directory: Path | None = None,
        load_report: LoadReport | None = None,
        caches: CacheFormats = PLAIN,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the model {model.config.vocab_size}: "
                "tokenizer.json is not this model's"
            )
        self._tokenizer = tokenizer
        self._template = template
        self._directory = directory
        self.generation = generation or GenerationConfig()
        self.load_report = load_report
        self.caches = caches
        weight = model.model.embed_tokens.weight  # never quantised
        self.device, self.dtype = weight.device, weight.dtype

    @property
    def config(self) -> GlmConfig:
        return self.model.config

    @property
    def directory(self) -> Path:
        """Where the model was loaded from. Raises RequestError when it was made in memory."""
        if self._directory is None:
            raise RequestError("this model was not loaded from a directory: save it and load it from there")
        return self._directory

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises RequestError when the model directory has none."""
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer.json: it can score token ids, but not read or write text")
        return self._tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The chat template that came with the tokenizer. Raises RequestError when there is none."""
        if self._template is None:
            raise RequestError("this model has no chat template, since it has no tokenizer.json")
        return self._template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return tuple(dict.fromkeys((*(self.config.eos_token_id or self.tokenizer.stop_ids), *self.generation.stop_ids)))

    @property
    def chat_stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        return tuple(dict.fromkeys((*self.config.eos_token_id, *self.tokenizer.stop_ids, *self.generation.stop_ids)))

    def open_session(
        self,
        max_tokens: int,
        *,
        attention: Literal["sparse", "dense"] = "sparse",
        page_size: int = DEFAULT_PAGE_SIZE,
        num_draft_tokens: int = 0,
    ) -> Session:
        """A session with room for `max_tokens` tokens: read once, ask many times.

        num_draft_tokens: how many tokens the MTP layer guesses for each forward pass; 0 is plain decoding.
        Raises RequestError when the model has fewer positions and MemoryLimitError when the cache, or what dense
        attention needs beside it, does not fit.
        """
        config = self.config
        check_integer("max_tokens (prompt and answer together)", max_tokens, 1, config.max_position_embeddings)
        check_integer("page_size", page_size, 1, 65_536)
        check_integer("num_draft_tokens", num_draft_tokens, 0, MAX_DRAFT_TOKENS)
        with_mtp = num_draft_tokens > 0
        needed = required_bytes(
            config, max_tokens, self.dtype, page_size=page_size, with_mtp=with_mtp, formats=self.caches
        )
        check_memory(
            needed,
            runtime.available_memory_bytes(str(self.device)),
            num_tokens=max_tokens,
            workspace=runtime.settings().workspace_bytes,
            expanded=expanded_bytes(config, max_tokens, self.dtype) if attention == "dense" else 0,
        )
        cache = PagedCache(
            config,
            num_pages=num_pages_for(max_tokens, page_size),
            page_size=page_size,
            dtype=self.dtype,
            device=self.device,
            with_mtp=with_mtp,
            formats=self.caches,
        )
        if with_mtp:
            return SpeculativeSession(self.model, cache, attention=attention, num_draft_tokens=num_draft_tokens)
        return Session(self.model, cache, attention=attention)

    def logprobs(
        self,
        token_ids: Sequence[int] | Tensor,
        *,
        attention: Literal["sparse", "dense"] = "sparse",
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        progress: Progress | None = None,
    ) -> Tensor:
        """log p(token | tokens before it) for tokens 1 .. T-1 of the given T: float32 [T-1] on the CPU."""
        try:
            num_tokens = len(token_ids)
        except TypeError as error:
            raise RequestError(f"logprobs takes a list or a tensor of token ids: {error}") from None
        with self.open_session(max(num_tokens, 1), attention=attention) as session:
            return session.logprobs(token_ids, chunk_size=chunk_size, progress=progress)

    @overload
    def generate(
        self,
        text: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        num_draft_tokens: int = 0,
        session: Session | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        text: str | Sequence[int],
        *,
        stream: Literal[True],
        num_draft_tokens: int = 0,
        session: Session | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> TextStream: ...

    def generate(
        self,
        text: str | Sequence[int],
        *,
        stream: bool = False,
        num_draft_tokens: int = 0,
        session: Session | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion | TextStream:
        """Continue a text (or token ids). Greedy, 64 tokens at most, unless the sampling arguments say otherwise.

        Control tokens written in the text are read as ordinary text. stream=True returns an iterator of pieces.
        num_draft_tokens: as in `open_session`; greedy tokens stay the same (up to near ties in bfloat16),
        drawn ones keep their distribution.
        session: read only what its cache does not hold already, and keep it open afterwards.
        progress(tokens read, tokens to read) is called while the prompt is read.
        Raises RequestError (which names the argument) or MemoryLimitError before anything is computed.
        """
        params = SamplingParams.of(sampling)
        if isinstance(text, str):
            token_ids = self.tokenizer.encode(text)
        else:
            try:
                token_ids = list(text)
            except TypeError as error:
                raise RequestError(f"the prompt must be a text or a list of token ids: {error}") from None
        pieces = TextStream(self._request(token_ids, params, session, progress, self.stop_ids, num_draft_tokens))
        if stream:
            return pieces
        with pieces:
            for _ in pieces:
                pass
        return pieces.completion

    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        enable_thinking: bool = True,
        clear_thinking: bool = True,
        session: Session | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Reply: ...

    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        enable_thinking: bool = True,
        clear_thinking: bool = True,
        session: Session | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> ChatStream: ...

    def chat(
        self,
        messages: Conversation,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        enable_thinking: bool = True,
        clear_thinking: bool = True,
        session: Session | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Reply | ChatStream:
        """Answer a conversation through the model's chat template; at most 1,024 new tokens by default.

        messages, tools: OpenAI-style dictionaries. reasoning_effort: "high" or "max" (the default), and the names that
        `chat.template.resolve_effort` maps to them; enable_thinking=False answers at once; clear_thinking=False keeps
        the reasoning of earlier turns in the prompt. Sampling defaults come from the model's generation_config.json,
        else greedy; every stop token of config, generation_config and tokenizer ends the reply. stream=True returns an
        iterator of events (chat/types.py). session, progress and errors as in `generate`, and TemplateError.
        """
        params = SamplingParams.of({"max_new_tokens": CHAT_MAX_NEW_TOKENS, **self.generation.sampling, **sampling})
        if not isinstance(messages, Sequence):
            raise RequestError(f"messages must be a list, not {type(messages).__name__}")
        if not isinstance(reasoning_effort, str | None):
            raise RequestError(f"reasoning_effort must be a word such as 'high', not {reasoning_effort!r:.200}")
        prompt = chat_prompt(
            self.tokenizer,
            self.template,
            messages,
            tools=tools,
            reasoning_effort=reasoning_effort,
            enable_thinking=enable_thinking,
            clear_thinking=clear_thinking,
        )
        request = self._request(prompt.token_ids, params, session, progress, self.chat_stop_ids)
        events = ChatStream(request, parser=prompt.parser)
        if stream:
            return events
        with events:
            for _ in events:
                pass
        return events.reply

    def _request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        session: Session | None,
        progress: Progress | None,
        stop_ids: tuple[int, ...],
        num_draft_tokens: int = 0,
    ) -> Request:
        if not token_ids:
            raise RequestError("the prompt is empty: give at least one token")
        keeps_session = session is not None
        if keeps_session and num_draft_tokens != 0:
            raise RequestError("this session drafts as it was opened: give num_draft_tokens to open_session")
        max_tokens = len(token_ids) + params.max_new_tokens - 1
        return Request(
            session=session or self.open_session(max_tokens, num_draft_tokens=num_draft_tokens),
            prompt_ids=token_ids,
            params=params,
            stop_ids=stop_ids,
            tokenizer=self.tokenizer,
            keeps_session=keeps_session,
            progress=progress,
        )
