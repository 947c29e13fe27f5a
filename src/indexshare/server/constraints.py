"""What a request's tools and formats allow the model to say, compiled."""

from collections.abc import Mapping, Sequence
from typing import Any

from indexshare.engine.grammar import CompiledGuide, GuideCompiler
from indexshare.errors import RequestError
from indexshare.server.types import ChatRequest, OutputFormat


def compile_request(compiler: GuideCompiler, request: ChatRequest) -> CompiledGuide | None:
    """The guide's program for a request's tools and format, None when anything may be said."""
    choice, tools, wanted = request.tool_choice, request.tools, request.output_format
    if not tools or choice.mode == "none":
        if choice.mode == "required":
            raise RequestError("tool_choice asks for a tool call, but the request has no tools")
        return compile_format(compiler, wanted) or (compiler.free(may_call=False) if tools else None)
    if choice.mode == "required":
        if wanted is not None:
            raise RequestError("a response format does not go with enforced tool calls: leave one of them out")
        return compiler.tool_calls(tools, required=True, name=choice.name, parallel=choice.parallel)
    if wanted is not None:
        if wanted.kind not in ("json_object", "json_schema"):
            raise RequestError("with tools the response format can be JSON only: leave the tools or the format out")
        schema = wanted.definition if wanted.kind == "json_schema" else {"type": "object"}
        return compiler.tool_calls(tools, required=False, parallel=choice.parallel, answer=schema)
    if _has_strict(tools) or not choice.parallel:
        return compiler.tool_calls(tools, required=False, parallel=choice.parallel)
    return None


def compile_format(compiler: GuideCompiler, wanted: OutputFormat | None) -> CompiledGuide | None:
    """The program for a format alone, None without one."""
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
