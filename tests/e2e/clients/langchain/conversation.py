"""python conversation.py URL openai|anthropic: a conversation through LangChain, its outcome as JSON.

Runs in an environment of its own, without indexshare.
"""

import json
import sys
from typing import Any, Literal

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Mood(BaseModel):
    """What the answer must be."""

    mood: Literal["good", "bad"]
    sure: bool


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return json.dumps({"city": city, "celsius": 7})


def model(url: str, kind: str) -> Any:
    options: dict[str, Any] = {"model": "nano", "api_key": "none", "max_retries": 0, "timeout": 60, "temperature": 0}
    if kind == "anthropic":
        return ChatAnthropic(base_url=url, max_tokens=800, **options)
    return ChatOpenAI(base_url=f"{url}/v1", max_completion_tokens=800, use_responses_api=kind == "responses", **options)


def main(url: str, kind: str) -> dict[str, Any]:
    llm = model(url, kind)
    hello = [HumanMessage("Hello, who are you?")]
    whole = llm.invoke(hello)
    chunks = list(llm.stream(hello))
    streamed = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    question = [HumanMessage("What is the weather in Oslo?")]
    call = llm.bind_tools([get_weather], tool_choice="any").invoke(question)
    results = [ToolMessage(get_weather.invoke(item["args"]), tool_call_id=item["id"]) for item in call.tool_calls]
    last = llm.invoke([*question, call, *results])
    structured = llm.with_structured_output(Mood, method="json_schema").invoke(hello)
    return {
        "whole": whole.text,
        "usage": whole.usage_metadata,
        "streamed": streamed.text,
        "chunks": len(chunks),
        "calls": call.tool_calls,
        "last": last.text,
        "structured": structured.model_dump(),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
