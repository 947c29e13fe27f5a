"""`indexshare share` from the command line: a model and texts in, tables, files and pictures out."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from indexshare import cli
from indexshare.data.rows import Batch, TokenRows
from indexshare.engine.resolve import packaged_model
from indexshare.model import recipes
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import save_model

PNG = b"\x89PNG\r\n\x1a\n"
EXACT = ("--dtype", "float32", "--threads", "1", "--device", "cpu")
ROWS = ("--rows", "2", "--length", "48")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(packaged_model() / name, directory)
    model = GlmForCausalLM(recipes.tiny(vocab_size=4096, index_topk_pattern="FFFFSF", initializer_range=0.2))
    model.init_weights(seed=3)
    save_model(model, directory)
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        (folder / f"{number}.py").write_text("".join(f"def f{n}_{number}(x): return x * {n}\n" for n in range(20)))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_overlap_prints_a_matrix_and_writes_a_heat_map(
    capsys: pytest.CaptureFixture[str], directory: Path, texts: Path, tmp_path: Path
) -> None:
    options = ("--data", texts, *ROWS, *EXACT)
    code, out, _ = run(capsys, "share", "overlap", directory, *options, "--output", tmp_path)
    assert (code, "1.00" in out, "top 8 keys" in out) == (0, True, True)
    assert (tmp_path / "overlap.png").read_bytes().startswith(PNG)
    code, out, _ = run(capsys, "share", "overlap", directory, *options, "--json")
    assert json.loads(out) == json.loads((tmp_path / "overlap.json").read_text())
    assert json.loads(out)["layers"] == [0, 1, 2, 3, 5]


def test_search_prints_the_pattern_and_goes_on_where_it_was(
    capsys: pytest.CaptureFixture[str], directory: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ("share", "search", directory, "--data", texts, *ROWS, *EXACT, "--output", tmp_path, "--keep", "1/3")
    code, out, _ = run(capsys, *arguments, "--method", "lazy")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (code, result["pattern"] in out, result["pattern"].count("F")) == (0, True, 2)
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    code, out, _ = run(capsys, *arguments, "--method", "lazy", "--json")
    again = json.loads(out)
    assert (code, again) == (0, result)
    code, _, err = run(capsys, *arguments, "--method", "greedy")
    assert (code, "another value of method: name another directory with --output" in err) == (2, True)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--keep", "9"), "for example 1/4"),
        (("--length", "8"), "longer than index_topk"),
        (("--length", "100000"), "do not fill one row"),
        (("--blocks", "0"), "from 1 to 5"),
        (("--rows", "0"), "take one row at least"),
        (("--seed", "-1"), "a seed from 0 on"),
    ],
)
def test_what_cannot_be_searched_is_an_error_in_a_line(
    capsys: pytest.CaptureFixture[str], directory: Path, texts: Path, tmp_path: Path, extra: tuple[str, str], said: str
) -> None:
    arguments = ("share", "search", directory, "--data", texts, *EXACT, "--output", tmp_path / "new" / "search")
    rows = () if "--rows" in extra else ("--rows", "2")
    code, _, err = run(capsys, *arguments, *rows, *extra)
    assert (code, said in err, err.count("\n")) == (2, True, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["overlap", "search"])
@pytest.mark.parametrize("option", ["--latent-cache", "--index-cache"])
def test_options_of_a_cache_are_refused(
    capsys: pytest.CaptureFixture[str], directory: Path, texts: Path, tmp_path: Path, command: str, option: str
) -> None:
    arguments = ("share", command, directory, "--data", texts, *ROWS, *EXACT, "--output", tmp_path / "out")
    code, _, err = run(capsys, *arguments, option, "int8")
    assert code == 2 and f"Unknown option: {option}" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["overlap", "search", "distill", "convert"])
def test_an_output_that_cannot_be_written_is_said_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    directory: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("indexshare.engine.llm.load", None)
    monkeypatch.setattr("indexshare.share.distill.load_model", None)
    monkeypatch.setattr("indexshare.share.convert.load_model", None)
    options = ("--freq", "4") if command == "distill" else ()
    arguments = ("share", command, directory, "--data", texts, "--output", tmp_path / "file" / "out", *options)
    code, _, err = run(capsys, *arguments)
    assert (code, err.count("\n"), "cannot write" in err, "name another output directory" in err) == (2, 1, True, True)


def test_a_full_disk_is_said_in_a_sentence(
    capsys: pytest.CaptureFixture[str], directory: Path, texts: Path, tmp_path: Path
) -> None:
    """A limit on the size of files, which fails as a full disk does: later than the first probe."""
    arguments = ("share", "search", directory, "--data", texts, *ROWS, *EXACT, "--output", tmp_path, "--keep", "1/3")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        code, _, err = run(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err.count("\n")) == (2, 1)
    assert f"cannot write {tmp_path / 'search.json'}: File too large. Make room" in err


def test_models_of_one_name_have_directories_of_their_own(
    capsys: pytest.CaptureFixture[str],
    directory: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("sft", "rl"):
        shutil.copytree(directory, tmp_path / kind / "model")
        arguments = ("share", "search", f"{kind}/model", "--data", texts, *ROWS, *EXACT, "--keep", "2/3")
        assert run(capsys, *arguments)[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["search-rl-model", "search-sft-model"]


@pytest.mark.parametrize("command", ["distill", "convert"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_ends_with_a_sentence_and_code_0_as_train_does(
    capsys: pytest.CaptureFixture[str],
    directory: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    as_json: bool,
) -> None:
    batch = TokenRows.batch

    def terminating(self: TokenRows, step: int, batch_size: int) -> Batch:
        if (step, batch_size) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, batch_size)

    monkeypatch.setattr(TokenRows, "batch", terminating)
    options = ("--freq", "4") if command == "distill" else ("--keep", "1/3", "--rows", "1")
    options += ("--length", "48", "--batch-size", "2", "--warmup-steps", "4", "--held-out-rows", "1", "--device", "cpu")
    arguments = ("share", command, directory, "--data", texts, "--output", tmp_path / "out", *options)
    code, out, err = run(capsys, *arguments, *(("--json",) if as_json else ()))
    said = json.loads(out)["stopped"] if as_json else out
    assert (code, "error" in err) == (0, False)
    assert "stopped (signal) at step 2 of 4 of the warm-up stage" in said and "the same command goes on" in said


@pytest.mark.parametrize("command", ["overlap", "search"])
def test_each_command_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, "share", command, "--help")
    assert code == 0
    assert f"indexshare share {command}" in out.split("Example", 1)[1]
