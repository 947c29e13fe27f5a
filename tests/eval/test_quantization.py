"""`indexshare quantize`: a whole directory or none, sizes that add up, a report beside them."""

import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from indexshare import cli
from indexshare.engine.llm import load
from indexshare.errors import CheckpointError, ConfigError, IndexShareError, RequestError
from indexshare.eval import quality
from indexshare.eval.quantization import REPORT_FILE, quantize_model, render
from indexshare.model.weights import load_model
from indexshare.quant.policy import Policy

INT4 = Policy(format="int4", keep=("*.o_proj.weight",))


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small file in place of half a megabyte."""
    monkeypatch.setattr(quality.corpus, "HELD_OUT", ("chunk.py", "signal.py"))


def test_a_model_is_written_and_measured(model_directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "small"
    result = quantize_model(str(model_directory), INT4, output=output, max_tokens=500, num_documents=0, threads=1)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", REPORT_FILE}
    assert {path.name for path in output.iterdir()} == names
    assert list(output.parent.iterdir()) == [output]  # nothing is left beside it
    assert json.loads((output / REPORT_FILE).read_text()) == json.loads(msgspec.json.encode(result))
    for directory, total in ((model_directory, result.before), (output, result.after)):
        header = (directory / "model.safetensors").read_bytes()[:8]
        size = (directory / "model.safetensors").stat().st_size - 8 - int.from_bytes(header, "little")
        assert size == total
    parts = {part.part: part for part in result.parts}
    assert parts["embedding"].after == parts["embedding"].before
    assert parts["norms"].after == parts["norms"].before
    assert parts["routed experts"].after < 0.25 * parts["routed experts"].before  # of float32
    assert 0.25 < parts["MTP layer"].after / parts["MTP layer"].before < 0.6
    assert result.quality is not None and result.quality.text.kl_mean > 0
    assert load(output, device="cpu", threads=1).config == load(model_directory, device="cpu", threads=1).config
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(result))
    assert all(text in capture.get() for text in ("routed experts", "KL", "bits per byte", str(output.name)))


def test_nothing_is_overwritten(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(RequestError, match="exists and is not overwritten"):
            quantize_model(str(model_directory), INT4, output=output)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("indexshare.eval.quantization.save_model", fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt), match=r"no space left|^$"):
        quantize_model(str(model_directory), INT4, output=tmp_path / "small", with_report=False)
    assert not list(tmp_path.iterdir())


def test_the_report_is_refused_before_the_work(tmp_path: Path, model_directory: Path) -> None:
    """A model without a tokenizer cannot be asked; it can be quantised."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model_directory / name).read_bytes())
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        quantize_model(str(bare), INT4, output=tmp_path / "small", threads=1)
    assert not (tmp_path / "small").exists()
    result = quantize_model(str(bare), INT4, output=tmp_path / "small", with_report=False, threads=1)
    assert result.quality is None
    with pytest.raises(ConfigError, match="already"):
        quantize_model(str(tmp_path / "small"), INT4, output=tmp_path / "again", with_report=False, threads=1)


def test_the_command(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("quantize", str(model_directory), "--format", "int8", "--threads", "1")
    keep = ("--keep", "lm_head.weight", "--keep", "*.wk.weight")
    assert cli.run((*arguments, *keep, "--no-report", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["keep"] == ["lm_head.weight", "*.wk.weight"]
    assert printed["quality"] is None
    output = tmp_path / f"{model_directory.name}-int8"
    assert printed["output"] == output.name
    assert not hasattr(load_model(output).lm_head.weight, "format")
    assert cli.run((*arguments, "--keep", "typo", "--output", "x", "--no-report")) == 2
    assert "matches no weight" in capsys.readouterr().err


def test_loading_options_take_quant(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", str(model_directory), "--prompt", "x = 1", "--max-new-tokens", "4", "--threads", "1")
    outputs = []
    for quant in ((), ("--quant", "int8"), ("--quant", "none"), ("--quant", "int8", "--check")):
        assert cli.run((*arguments, *quant)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[2]
    assert outputs[1] == outputs[3]


def test_errors_are_ours() -> None:
    with pytest.raises(IndexShareError):
        quantize_model("no/such-model-here/at-all", INT4, with_report=False)
