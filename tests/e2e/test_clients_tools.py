"""Tools that people point at such a server: LangChain, lm-eval, mini-swe-agent. `make test-e2e` installs them."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from e2e.clients.environments import HERE, python
from e2e.clients.servers import INDEXSHARE, ServerProcess, nano_server, refused, scripted_server
from server.dialects import reply_of

import indexshare
from indexshare.chat.types import Text, ToolCallEvent
from indexshare.server.types import ChatRequest, CompletionRequest, Piece

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CAPITALS = [("Question: What imports the module os? Answer:", ["import os", "while True"]), ("def main(", ["):", "]]"])]
NANO = Path(indexshare.__file__).parent / "models" / "nano"
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with nano_server() as server:
        yield server


def run(command: Sequence[object], folder: Path, **variables: str) -> str:
    """What a command prints; its home is `folder`, and it is told that there is no internet."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        **variables,
    }
    arguments = [str(argument) for argument in command]
    result = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture
def langchain() -> Path:
    return python("langchain")


@pytest.mark.parametrize("kind", ["openai", "responses", "anthropic"])
def test_langchain(langchain: Path, server: ServerProcess, tmp_path: Path, kind: str) -> None:
    start = len(server.log)
    seen = json.loads(run([langchain, HERE / "langchain" / "conversation.py", server.url, kind], tmp_path))
    assert seen["whole"] == seen["streamed"] == "I am nano, a small model that ships with indexshare."
    assert seen["chunks"] > 5
    assert seen["usage"]["input_tokens"] > 5 and seen["usage"]["output_tokens"] > 5
    assert [call["name"] for call in seen["calls"]] == ["get_weather"]
    assert seen["last"].strip()
    assert set(seen["structured"]) == {"mood", "sure"}
    assert not refused(server.requests(start))


@pytest.fixture
def lm_eval() -> Path:
    return python("lm_eval")


def test_lm_eval_scores_as_indexshare_does(lm_eval: Path, server: ServerProcess, tmp_path: Path) -> None:
    rows = [{"question": context, "choices": choices, "answer": 0} for context, choices in CAPITALS]
    write_task(
        tmp_path,
        rows,
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}],
    )
    samples = evaluate(lm_eval, tmp_path, "local-completions", f"{server.url}/v1/completions")
    assert not refused(server.requests())
    for (context, choices), sample in zip(CAPITALS, samples, strict=True):
        for choice, response in zip(choices, sample["resps"], strict=True):
            logprob, is_greedy = response[0]
            expected = score(server.url, tmp_path / "tokens.json", context, f" {choice}")
            assert float(logprob) == pytest.approx(expected, abs=0.02)
            assert str(is_greedy) in ("True", "False")


def score(url: str, file: Path, context: str, continuation: str) -> float:
    """The log-probability of a continuation by `indexshare score`, with lm-eval's split into tokens."""
    start = len(tokens(url, context))
    file.write_text(json.dumps(tokens(url, context + continuation)))
    command = [str(INDEXSHARE), "score", "nano", "--tokens", str(file), "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    return sum(json.loads(printed)[start - 1 :])


def tokens(url: str, text: str) -> list[int]:
    return httpx2.post(f"{url}/tokenize", json={"prompt": text}).json()["tokens"]


def test_lm_eval_generates(lm_eval: Path, server: ServerProcess, tmp_path: Path) -> None:
    write_task(
        tmp_path,
        [{"question": "Hello, who are you?", "answer": "nano"}],
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 60},
        metric_list=[{"metric": "exact_match"}],
    )
    url = f"{server.url}/v1/chat/completions"
    samples = evaluate(lm_eval, tmp_path, "local-chat-completions", url, "--apply_chat_template")
    assert samples[0]["resps"] == [["I am nano, a small model that ships with indexshare."]]
    assert not refused(server.requests())


def write_task(folder: Path, rows: Sequence[Mapping[str, Any]], **fields: Any) -> None:
    """A task `local` in `folder`, with the rows as its test set."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "question",
        **fields,
    }
    (folder / "local.yaml").write_text(json.dumps(task))  # JSON is YAML


def evaluate(interpreter: Path, folder: Path, model: str, url: str, *options: str) -> list[dict[str, Any]]:
    """Run lm-eval on the task in `folder`: its samples."""
    arguments = f"model=nano,base_url={url},tokenizer={NANO},num_concurrent=2,max_retries=1"
    command = [interpreter, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "local"]
    outputs = ["--include_path", folder, "--output_path", folder / "out", "--log_samples", *options]
    run([*command, *outputs], folder, OPENAI_API_KEY="none")
    (file,) = (folder / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def use_the_shell(request: ChatRequest | CompletionRequest) -> Sequence[Piece]:
    """A model that writes a file and then says that it is done."""
    assert isinstance(request, ChatRequest)
    is_done = any(message["role"] == "tool" for message in request.messages)
    call = ToolCallEvent("call_1", "bash", {"command": SUBMIT if is_done else "echo seen > proof.txt"})
    return reply_of(Text("I use the shell."), call, reason="tool_calls")


@pytest.fixture
def mini() -> Path:
    return python("mini_swe_agent").with_name("mini")


def test_mini_swe_agent(mini: Path, tmp_path: Path) -> None:
    with scripted_server(use_the_shell) as (url, service):
        settings = [f"model.model_kwargs.api_base={url}/v1", "model.cost_tracking=ignore_errors"]
        options = [option for setting in ("mini.yaml", *settings) for option in ("-c", setting)]
        command = [mini, "-m", "openai/nano", "-t", "Write a file.", "--yolo", "--exit-immediately", *options]
        run(
            command,
            tmp_path,
            OPENAI_API_KEY="none",
            MSWEA_CONFIGURED="1",
            MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT="1",
            MSWEA_SILENT_STARTUP="1",
            LITELLM_LOCAL_MODEL_COST_MAP="True",
        )
    assert (tmp_path / "proof.txt").read_text() == "seen\n"
    assert [len(request.tools) for request in service.seen if isinstance(request, ChatRequest)] == [1, 1]
