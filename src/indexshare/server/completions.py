"""`/v1/completions`: OpenAI's older API, which continues a text or token ids; evaluation tools score with it.

Fields beyond OpenAI's: top_k, min_p, repetition_penalty, structured_outputs, indexshare. logprobs (0 to 20) is in the
older form and has an entry for every drawn token, the one that ends the reply included; with echo those of the prompt
come first, the very first without a value. text_offset counts characters of the choice's text.
"""

import codecs
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.chat.types import Done, Event, Text
from indexshare.engine.sampler import SampledToken
from indexshare.server.http import ApiError, documented, read_json
from indexshare.server.openai_replies import Answer, Exchange, FinishReason, Fold, token_text, wire_logprob
from indexshare.server.openai_types import CompletionBody
from indexshare.server.types import CompletionRequest, Reply, Service

MAX_PROMPTS = 64
_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class LegacyLogprobs(msgspec.Struct):
    """Lists of equal length, an entry for each token. A token that is no text by itself is written "bytes:\\x..."."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    """A choice, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None = None
    finish_reason: FinishReason | None = None


def routes(service: Service) -> list[Route]:
    """The endpoint over `service`."""

    @documented(summary="Continue texts", body=CompletionBody, response=Answer[TextChoice], stream=True)
    async def completions(request: Request) -> Response:
        body = await read_json(request, CompletionBody)
        exchange: Exchange[CompletionRequest, TextChoice] = Exchange(
            request, service, body, kind="text_completion", chunk_kind="text_completion"
        )
        tenant = getattr(request.state, "tenant", "")
        requests = completion_requests(body)
        return await exchange.respond(
            requests,
            lambda neutral: service.complete(neutral, tenant=tenant),
            lambda index, reply: TextFold(index, reply, service, body, requests[index].prompt),
        )

    return [Route("/v1/completions", completions, methods=["POST"])]


def completion_requests(body: CompletionBody) -> list[CompletionRequest]:
    """A neutral request for each prompt and each of its n choices. Raises ApiError for what cannot be honoured."""
    body.check()
    prompts = _prompts(body.prompt)
    if len(prompts) * body.num_choices > MAX_PROMPTS:
        raise ApiError(400, f"prompts times n must be at most {MAX_PROMPTS}; send several requests", param="prompt")
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    output_format = body.structured_outputs.output_format() if body.structured_outputs else None
    return [
        CompletionRequest(
            prompt=prompt,
            echo=bool(body.echo) and (body.logprobs is not None or max_tokens == 0),  # else echo is only text
            output_format=output_format,
            sampling=sampling,
            wants_selection=body.wants_selection,
        )
        for prompt in prompts
        for sampling in body.sampling(max_tokens, body.logprobs)
    ]


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        message = (
            "prompt must be a text, token ids, a list of texts or a list of lists of token ids; not empty, not mixed"
        )
        raise ApiError(400, message, param="prompt")
    return [prompt] if kinds == {int} else prompt


class TextFold(Fold[TextChoice]):
    """The texts of one choice."""

    def __init__(
        self, index: int, reply: Reply, service: Service, body: CompletionBody, prompt: str | Sequence[int]
    ) -> None:
        super().__init__(index, reply, wants_logprobs=body.logprobs is not None)
        self._service = service
        self._echo: str | None = None
        if body.echo:
            self._echo = prompt if isinstance(prompt, str) else service.detokenize(prompt)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def opening(self) -> TextChoice | None:
        if self._echo is None:
            return None
        logprobs = self.logprobs(self.reply.prompt_tokens) if self.wants_logprobs else None
        return TextChoice(self.index, self._echo, logprobs)

    def empty(self) -> TextChoice:
        return TextChoice(self.index, "")

    def translate(self, event: Event) -> TextChoice | None:
        match event:
            case Text(text) if text:
                return TextChoice(self.index, text)
            case Done():
                return TextChoice(self.index, "", finish_reason=self.finish_reason(event))
            case _:
                return None

    def logprobs(self, tokens: Sequence[SampledToken]) -> LegacyLogprobs:
        logprobs = LegacyLogprobs([], [], [], [])
        for token in tokens:
            data = self._service.token_bytes(token.token_id)
            logprobs.tokens.append(token_text(data, "bytes:"))
            logprobs.token_logprobs.append(None if token.logprob is None else wire_logprob(token.logprob))
            logprobs.top_logprobs.append(self._top(token))
            logprobs.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(data))
        return logprobs

    def whole(self, parts: Sequence[TextChoice]) -> TextChoice:
        reasons = [part.finish_reason for part in parts if part.finish_reason is not None]
        choice = TextChoice(self.index, "".join(part.text for part in parts), None, reasons[0] if reasons else None)
        if self.wants_logprobs:
            choice.logprobs = LegacyLogprobs([], [], [], [])
            for logprobs in (part.logprobs for part in parts if part.logprobs is not None):
                for name in LegacyLogprobs.__struct_fields__:
                    getattr(choice.logprobs, name).extend(getattr(logprobs, name))
        return choice

    def _top(self, token: SampledToken) -> dict[str, float] | None:
        """The most probable tokens and the drawn one; of tokens with the same text the most probable counts."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*(token.top_logprobs or ()), (token.token_id, token.logprob)):
            text = token_text(self._service.token_bytes(token_id), "bytes:")
            top.setdefault(text, wire_logprob(logprob))
        return top
