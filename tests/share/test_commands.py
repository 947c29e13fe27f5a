"""`indexshare share` from the command line: a model and texts in, tables, files and pictures out."""

import json
import shutil
from pathlib import Path

import pytest

from indexshare import cli
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
    assert (code, "another directory with --output" in err) == (2, True)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--keep", "9"), "for example 1/4"),
        (("--length", "8"), "longer than index_topk"),
        (("--length", "100000"), "do not fill one row"),
        (("--blocks", "0"), "from 1 to 6"),
    ],
)
def test_what_cannot_be_searched_is_an_error_in_a_line(
    capsys: pytest.CaptureFixture[str], directory: Path, texts: Path, tmp_path: Path, extra: tuple[str, str], said: str
) -> None:
    arguments = ("share", "search", directory, "--data", texts, "--rows", "2", *EXACT, "--output", tmp_path)
    code, _, err = run(capsys, *arguments, *extra)
    assert (code, said in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("command", ["overlap", "search"])
def test_each_command_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, "share", command, "--help")
    assert code == 0
    assert f"indexshare share {command}" in out.split("Example", 1)[1]
