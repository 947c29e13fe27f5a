"""A service that plays a script, so that dialects are tested without a model."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from indexshare.engine.sampler import SampledToken
from indexshare.server.types import ChatRequest, CompletionRequest, Piece

Script = Callable[[ChatRequest | CompletionRequest], Sequence[Piece]]


@dataclass
class ScriptedReply:
    script: Sequence[Piece]
    num_prompt_tokens: int = 7
    num_cached_tokens: int = 3
    prompt_tokens: Sequence[SampledToken] = ()
    closed: bool = False

    async def pieces(self) -> AsyncIterator[Piece]:
        try:
            for piece in self.script:
                yield piece
        finally:
            self.closed = True


@dataclass
class ScriptedService:
    """`script` makes the pieces of a reply; an exception in it is raised as the service would. `seen`: the requests."""

    script: Script
    model_names: tuple[str, ...] = ("scripted",)
    context_length: int = 1000
    created: int = 1_700_000_000
    seen: list[ChatRequest | CompletionRequest] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    replies: list[ScriptedReply] = field(default_factory=list)
    prompt_tokens: Sequence[SampledToken] = ()

    async def chat(self, request: ChatRequest, *, tenant: str) -> ScriptedReply:
        return self._reply(request, tenant)

    async def complete(self, request: CompletionRequest, *, tenant: str) -> ScriptedReply:
        return self._reply(request, tenant)

    def _reply(self, request: ChatRequest | CompletionRequest, tenant: str) -> ScriptedReply:
        self.seen.append(request)
        self.tenants.append(tenant)
        reply = ScriptedReply(self.script(request), prompt_tokens=self.prompt_tokens)
        self.replies.append(reply)
        return reply

    async def encode_chat(self, request: ChatRequest) -> list[int]:
        self.seen.append(request)
        return list(range(42))

    async def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id % 256])
