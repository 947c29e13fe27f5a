"""Coding agents as people start them, but non-interactive, in a home of their own, and told to call nobody else."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.clients.environments import node_packages

AGENT_SECONDS = 110.0
MAX_TOKENS = 400
MAX_TURNS = 4

CODEX_CONFIG = """
model = "nano"
model_provider = "indexshare"
sandbox_mode = "read-only"
approval_policy = "never"
check_for_update_on_startup = false

[model_providers.indexshare]
name = "indexshare"
base_url = "{url}/v1"
wire_api = "responses"

[analytics]
enabled = false
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where an agent runs: an empty home, and a working folder in it.

    may_run_commands: without asking anybody. Only for a scripted model: nobody knows what nano would run.
    """

    home: Path
    url: str
    may_run_commands: bool = False

    @property
    def folder(self) -> Path:
        return self.home / "work"

    def run(self, command: Sequence[str], **variables: str) -> list[dict[str, Any]]:
        """Run a command that prints JSON lines: those, of which there must be some."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "NO_PROXY": "127.0.0.1,localhost",
            **variables,
        }
        result = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=AGENT_SECONDS,
        )
        events = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        assert events, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        return events


def claude_code(place: Workplace, prompt: str, *, again: bool = False, thinking: bool = False) -> str:
    """Claude Code: the text of its answer. again: go on with the last conversation."""
    binary = next(node_packages("agents").glob("node_modules/@anthropic-ai/claude-code-*/claude"))
    events = place.run(
        [
            str(binary),
            *("--print", prompt, "--model", "nano", "--output-format", "stream-json", "--verbose"),
            *("--max-turns", str(MAX_TURNS)),
            *(["--allowed-tools", "Bash"] if place.may_run_commands else []),
            *(["--continue"] if again else []),
        ],
        ANTHROPIC_BASE_URL=place.url,
        ANTHROPIC_AUTH_TOKEN="none",
        CLAUDE_CODE_MAX_OUTPUT_TOKENS=str(MAX_TOKENS),
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_TELEMETRY="1",
        DISABLE_ERROR_REPORTING="1",
        DISABLE_AUTOUPDATER="1",
        **({"MAX_THINKING_TOKENS": "1024"} if thinking else {}),
    )
    result = events[-1]
    # nano may repeat itself or call tools without end, and that it was cut off is an error to Claude Code.
    is_cut_off = result["subtype"] == "error_max_turns" or result.get("api_error") == "max_output_tokens"
    assert is_cut_off or not result["is_error"], result
    return result.get("result", "cut off")


def codex(place: Workplace, prompt: str, *, again: bool = False, thinking: bool = False) -> str:
    """Codex: the text of its last message. again: go on with the last conversation."""
    config = place.home / ".codex" / "config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(CODEX_CONFIG.format(url=place.url))
    binary = node_packages("agents") / "node_modules" / ".bin" / "codex"
    events = place.run(
        [
            str(binary),
            "exec",
            *(["resume", "--last"] if again else []),
            # Its sandbox lets nothing be written, and needs what containers do not always give.
            *(["--dangerously-bypass-approvals-and-sandbox"] if place.may_run_commands else []),
            *("--skip-git-repo-check", "--json"),
            *(["-c", 'model_reasoning_effort="high"'] if thinking else []),
            prompt,
        ]
    )
    assert events[-1]["type"] == "turn.completed", events[-3:]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == "agent_message"][-1]


def opencode(place: Workplace, prompt: str, *, again: bool = False, thinking: bool = False) -> str:
    """opencode: the text of its last message. again: go on with the last conversation."""
    place.folder.mkdir(parents=True, exist_ok=True)
    model = {
        "name": "nano",
        "limit": {"context": 200_000, "output": MAX_TOKENS},
        "reasoning": True,
        "tool_call": True,
        **({"options": {"reasoningEffort": "high"}} if thinking else {}),
    }
    permission = "allow" if place.may_run_commands else "deny"
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "indexshare",
        "options": {"baseURL": f"{place.url}/v1", "apiKey": "none"},
        "models": {"nano": model},
    }
    config = {
        "model": "indexshare/nano",
        "small_model": "indexshare/nano",
        "autoupdate": False,
        "share": "disabled",
        "agent": {"build": {"steps": MAX_TURNS}},
        "permission": {"bash": permission, "edit": permission, "webfetch": "deny"},
        "provider": {"indexshare": provider},
    }
    (place.folder / "opencode.json").write_text(json.dumps(config))
    binary = next(node_packages("agents").glob("node_modules/opencode-*/bin/opencode"))
    events = place.run(
        [str(binary), "run", "--format", "json", *(["--continue"] if again else []), prompt],
        OPENCODE_DISABLE_MODELS_FETCH="1",
        OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1",
        OPENCODE_DISABLE_DEFAULT_PLUGINS="1",
        OPENCODE_DISABLE_SHARE="1",
    )
    return [event["part"]["text"] for event in events if event["type"] == "text"][-1]


AGENTS: dict[str, Callable[..., str]] = {"claude_code": claude_code, "codex": codex, "opencode": opencode}
