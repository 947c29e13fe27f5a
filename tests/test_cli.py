import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch import Tensor

import indexshare
from indexshare import __version__, cli, runtime
from indexshare.engine.resolve import storage_of
from indexshare.errors import CheckpointError, RecipeChangedError, RequestError
from indexshare.kernels import ops, registry
from indexshare.model.recipes import tiny

COMMANDS = {
    "chat",
    "data",
    "demo",
    "doctor",
    "eval",
    "generate",
    "inspect",
    "kernels",
    "plan",
    "purge",
    "quantize",
    "serve",
    "score",
    "share",
    "train",
}

EXACT = ("--dtype", "float32", "--threads", "1")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    code = cli.run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_json_dict()))
    return tmp_path


def test_help_comes_fast_and_names_every_command() -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "indexshare.cli", "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert set(COMMANDS) <= set(done.stdout.replace("│", " ").split())
        assert all(f"INDEXSHARE_{name}" in done.stdout for name in ("DEVICE", "THREADS", "WORKSPACE_MIB"))
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"indexshare {command}" in out.split("Example", 1)[1]


def test_commands_are_frozen() -> None:
    names = {name for name in cli.app if not name.startswith("-")}
    assert names == COMMANDS, "a command is a promise: add it here, in the README and in CHANGELOG.md on purpose"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"{__version__}\n", "")


def test_inspect_prints_the_numbers_of_glm_5_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", "glm-5.2")
    assert code == 0
    for text in (
        "753,329,921,024",
        "743,377,000,704",
        "40,297,758,720",
        "21 full, 57 shared",
        "89,856",
        "52,416 + 2,856",
    ):
        assert text in out


def test_inspect_reads_a_directory_and_takes_a_pattern(
    capsys: pytest.CaptureFixture[str], model_directory: Path
) -> None:
    code, out, _ = run(capsys, "inspect", str(model_directory), "--json", "--index-pattern", "FSSSSS")
    assert code == 0
    assert json.loads(out)["full_layers"] == [0]


def test_plan_gives_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "glm-5.2", "--context", "1048576")
    assert code == 0 and "verdict:" in out
    code, out, _ = run(capsys, "plan", "tiny", "--context", "4096", "--json")
    assert code == 0 and json.loads(out)["context"] == 4096


@pytest.fixture
def nonsense_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INDEXSHARE_DEVICE", "nonsense")
    runtime.settings.cache_clear()
    yield None
    monkeypatch.undo()
    runtime.settings.cache_clear()


@pytest.mark.parametrize("command", [("plan", "tiny", "--device", "auto"), ("kernels", "--device", "auto")])
def test_auto_is_what_the_environment_says(
    capsys: pytest.CaptureFixture[str], nonsense_in_the_environment: None, command: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "") and "'nonsense'" in err


def test_plan_counts_no_disk_for_a_model_that_is_there(
    capsys: pytest.CaptureFixture[str], written_model: Path, model_directory: Path
) -> None:
    code, out, _ = run(capsys, "plan", str(written_model), "--context", "64")
    assert code == 0 and out.count("on disk") == 5
    code, out, _ = run(capsys, "plan", str(written_model), "--context", "64", "--json")
    assert code == 0 and json.loads(out)["on_disk"] is True
    for without_weights in (str(model_directory), "tiny"):
        code, out, _ = run(capsys, "plan", without_weights, "--context", "64", "--json")
        assert code == 0 and json.loads(out)["on_disk"] is False


def test_a_model_of_the_hub_goes_to_the_cache_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert storage_of("owner/name") == (tmp_path / "cache", False)


def test_kernels_lists_the_operations(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "kernels", "--device", "cpu", "--json")
    assert code == 0
    assert {"index_select", "mla_sparse", "rms_norm"} <= {line["operation"] for line in json.loads(out)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "no-such-model"), "error: no model at 'no-such-model'"),
        (("doctor", "tiny"), "error: tiny is a recipe without weights"),
        (("generate", "nano"), "error: give the text as --prompt TEXT or as --prompt-file FILE, one of them"),
        (("plan", "tiny", "--context", "0"), "error: context must be between 1 and 1,048,576"),
        (("generate", "nano"), "error: give the text as --prompt TEXT or as --prompt-file FILE"),
        (("plan", "tiny", "--device", "bogus"), "error: device 'bogus' cannot be used here"),
        (("plan", "tiny", "--device", "cuda:99"), "error: device 'cuda:99' cannot be used here"),
        (("plan", "tiny", "--device", "meta"), "error: no memory figure is known for device 'meta'"),
        (("kernels", "--device", "bogus"), "error: device 'bogus' cannot be used here"),
        (("generate", "nano", "--prompt", "x", "--threads", "-1"), "error: threads must be at least 1, not -1"),
        (("generate", "nano", "--prompt", "x", "--threads", "0"), "error: threads must be at least 1, not 0"),
        (("generate", "nano", "--prompt", "x", "--logprobs", "2"), "error: --logprobs is part of the JSON answer"),
        (("generate", "nano", "--prompt-file", "/no/file"), "error: cannot read /no/file"),
        (("score", "nano", "--tokens", "/no/file"), "error: cannot read /no/file"),
    ],
)
def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "tiny", "--bogus"), ("nonsense",)])
def test_wrong_arguments_are_errors(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, _, _ = run(capsys, *arguments)
    assert code == 2


def test_unknown_keys_in_config_are_an_error_or_a_warning(
    capsys: pytest.CaptureFixture[str], model_directory: Path
) -> None:
    (model_directory / "config.json").write_text(json.dumps(tiny().to_json_dict() | {"novelty": 1}))
    code, _, err = run(capsys, "inspect", str(model_directory))
    assert code == 2 and "novelty" in err
    command = [sys.executable, "-m", "indexshare.cli", "inspect", str(model_directory), "--no-strict"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "warning: unknown keys in config.json: novelty\n"


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (CheckpointError("a shard is missing"), 2, "error: a shard is missing\n"),
    ],
)
def test_what_a_command_raises_becomes_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    shown: str,
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr("indexshare.engine.resolve.resolve_config", fail)
    assert run(capsys, "inspect", "tiny") == (code, "", shown)


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m indexshare.cli inspect glm-5.2 | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def written_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model with the tokenizer of the shipped model."""
    from indexshare.engine.resolve import packaged_model
    from indexshare.model.glm import GlmForCausalLM
    from indexshare.model.weights import save_model

    directory = tmp_path_factory.mktemp("model")
    model = GlmForCausalLM(tiny(vocab_size=4096, eos_token_id=[4095]))
    model.init_weights(0)
    save_model(model, directory)
    for file in packaged_model().glob("tokenizer*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_a_dash_is_standard_input(
    capsys: pytest.CaptureFixture[str], written_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("[5, 17, 301]"))
    code, out, err = run(capsys, "score", str(written_model), "--tokens", "-", "--json", *EXACT)
    assert code == 0 and len(json.loads(out)) == 2, err


def test_score_is_the_api_in_json(capsys: pytest.CaptureFixture[str], written_model: Path, tmp_path: Path) -> None:
    token_ids = [5, 17, 301, 12, 12, 9, 4000, 8, 1, 2, 3]
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(token_ids))
    code, out, _ = run(capsys, "score", str(written_model), "--tokens", str(file), "--json", *EXACT)
    assert code == 0
    expected = indexshare.load(written_model, dtype="float32", threads=1).logprobs(token_ids)
    assert json.loads(out) == expected.tolist()
    assert len(expected) == len(token_ids) - 1
    code, out, _ = run(capsys, "score", str(written_model), "--tokens", str(file), *EXACT)
    assert code == 0 and out.count("\n") == len(token_ids) and "nats over 10 tokens" in out


def test_generate_streams_what_the_api_gives(capsys: pytest.CaptureFixture[str], written_model: Path) -> None:
    arguments = ("generate", str(written_model), "--prompt", "import os", "--max-new-tokens", "9", *EXACT)
    code, streamed, _ = run(capsys, *arguments)
    assert code == 0
    llm = indexshare.load(written_model, dtype="float32", threads=1)
    assert streamed == llm.generate("import os", max_new_tokens=9).text + "\n"
    code, out, _ = run(capsys, *arguments, "--json", "--temperature", "1.5", "--seed", "4")
    answer = json.loads(out)
    assert (code, answer["finish_reason"], answer["usage"]["num_completion_tokens"]) == (0, "length", 9)
    assert answer["text"] == llm.generate("import os", max_new_tokens=9, temperature=1.5, seed=4).text


def test_generate_takes_penalties_and_gives_logprobs(capsys: pytest.CaptureFixture[str], written_model: Path) -> None:
    arguments = ("generate", str(written_model), "--prompt", "import os", "--max-new-tokens", "9", "--json", *EXACT)
    penalties = ("--repetition-penalty", "1.5", "--presence-penalty", "1", "--frequency-penalty", "2")
    code, out, _ = run(capsys, *arguments, *penalties, "--logprobs", "2")
    assert code == 0
    llm = indexshare.load(written_model, dtype="float32", threads=1)
    expected = llm.generate(
        "import os", max_new_tokens=9, repetition_penalty=1.5, presence_penalty=1, frequency_penalty=2, logprobs=2
    )
    assert out == msgspec.json.encode(expected).decode() + "\n"
    assert [len(entry["top_logprobs"]) for entry in json.loads(out)["logprobs"]] == [2] * 9
    code, out, _ = run(capsys, *arguments, "--frequency-penalty", "3")
    assert code == 2  # out of range: it has arrived


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_options_of_sampling_are_in_the_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    words = run(capsys, command, "--help")[1].split()
    assert {"--repetition-penalty", "--presence-penalty", "--frequency-penalty"} <= set(words)
    assert "Seed of the draws; 0 by default" in " ".join(words)


@pytest.mark.parametrize("command", ["generate", "chat", "score", "eval"])
def test_commands_that_load_a_model_can_check_it_first(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "--check" in run(capsys, command, "--help")[1].split()


def test_a_model_that_fails_its_check_is_not_used(
    capsys: pytest.CaptureFixture[str], written_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokens.json").write_text("[5, 17, 301]")
    command = ("score", str(written_model), "--tokens", str(tmp_path / "tokens.json"), "--check", *EXACT)
    code, out, _ = run(capsys, *command)
    assert code == 0 and "nats over 2 tokens" in out

    def wrong_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return ops.rope.specification(x, cos, sin, not interleaved)

    twin = registry.Twin(name="broken", devices=("cpu",), function=wrong_rope, supports=lambda *_, **__: None)
    registry.register("rope", twin)
    try:
        code, out, err = run(capsys, *command)
    finally:
        registry.unregister("rope", "broken")
    assert (code, out) == (1, "")
    assert err.startswith("error: wrong results on cpu in float32: rope;") and err.count("\n") == 1


def test_train_and_demo_hand_on_their_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, written_model: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def stop(*arguments: object, **options: object) -> None:
        given.update(options)
        raise RequestError("far enough")

    monkeypatch.setattr("indexshare.train.recipes.run", stop)
    assert run(capsys, "train", "tiny", "--output", str(tmp_path))[0] == 2
    assert given["accept_recipe_change"] is False
    assert run(capsys, "train", "tiny", "--output", str(tmp_path), "--accept-recipe-change")[0] == 2
    assert given["accept_recipe_change"] is True

    def changed(*_: object, **__: object) -> None:
        raise RecipeChangedError("another recipe. Name another output")

    monkeypatch.setattr("indexshare.train.recipes.run", changed)
    code, _, err = run(capsys, "train", "tiny", "--output", str(tmp_path))
    assert code == 2 and "Name another output, or accept the change with --accept-recipe-change" in err
    monkeypatch.setattr("indexshare.eval.demo.run_demo", stop)
    assert run(capsys, "demo", str(written_model), "--pictures", str(tmp_path), *EXACT)[0] == 2
    assert given["pictures"] == tmp_path


def test_chat_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, written_model: Path, tmp_path: Path
) -> None:
    lines = iter(["hello", "and again", f"/save {tmp_path / 'talk.json'}", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, _, err = run(capsys, "chat", str(written_model), "--max-new-tokens", "5", "--context", "256", *EXACT)
    assert (code, err) == (0, "")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2


def test_sampling_options_are_checked(capsys: pytest.CaptureFixture[str], written_model: Path) -> None:
    code, _, err = run(capsys, "generate", str(written_model), "--prompt", "x", "--top-p", "2", *EXACT)
    assert code == 2 and err.startswith("error: top_p")


def test_an_interrupt_while_torch_is_imported_ends_the_process() -> None:
    """What is raised then is caught inside torch, which goes on with half of numpy."""
    code = (
        "import os, signal, sys, types, importlib.machinery\n"
        "from indexshare import runtime\n"
        "signal.signal(signal.SIGINT, runtime.interrupt)\n"
        "torch = types.ModuleType('torch')\n"
        "torch.__spec__ = importlib.machinery.ModuleSpec('torch', None)\n"
        "torch.__spec__._initializing = True\n"
        "sys.modules['torch'] = torch\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('swallowed')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")
