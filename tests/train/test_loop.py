"""The training loop: exact resume after kills at random moments, stops with a message, the log, phases."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_training import (
    DENSE,
    INDEXER,
    LENGTH,
    RECIPE,
    SPARSE,
    checkpoint_bytes,
    environment,
    new_model,
    read_log,
    run,
    step_loss,
    without_time,
)
from torch import Tensor, nn

from indexshare.errors import ConfigError, TrainingError
from indexshare.train import checkpoint, losses, monitor
from indexshare.train.loop import Phase
from indexshare.train.optim import named_tensors


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert run(directory).stopped == "finished"
    return directory


def test_log_has_every_step_and_phase(whole_run: Path) -> None:
    records = read_log(whole_run)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["phase"] for record in records] == ["dense"] * 4 + ["indexer"] * 3 + ["sparse"] * 5
    assert records[-1]["tokens"] == 12 * 2 * (LENGTH - 1)
    assert all(math.isfinite(record["gradient_norm"]) and record["gradient_norm"] > 0 for record in records)


# Forks a run again and again, so that torch is imported once. The kernel kills each after a random time of computing,
# wherever it is: SIGPROF without a handler ends a process as SIGKILL does, and its clock stands still while other
# processes have the processor. The last one, in a directory of its own, is told to stop in its fifth step.
KILLER = """
import os, random, signal, sys
from pathlib import Path
import torch
from indexshare.model import native
from small_training import run, step_loss

def stopped(model, batch, phase):
    if phase.name == "indexer":
        os.kill(os.getpid(), signal.SIGTERM)
    return step_loss(model, batch, phase)

def fork(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def killed():
    signal.setitimer(signal.ITIMER_PROF, seconds)
    run(Path(sys.argv[1]))

torch.set_deterministic_debug_mode("warn")
native.enable()  # as the tests' own process has it
times = random.Random(3)
statuses = []
while len(statuses) < 6 and 0 not in statuses:
    seconds = times.uniform(0.02, 0.3)
    statuses.append(fork(killed))
print(*statuses, flush=True)
print(fork(lambda: print(run(Path(sys.argv[2]), loss=stopped), flush=True)))
"""


def test_killed_and_stopped_processes_resume_bit_identically(whole_run: Path, tmp_path: Path) -> None:
    """Killed six times at random moments, between steps, inside them and while they write; and ended by SIGTERM.

    What is left must repeat the uninterrupted losses and weights exactly.
    """
    arguments = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "killed"), str(tmp_path / "stopped")]
    done = subprocess.run(arguments, env=environment(), capture_output=True, check=True, timeout=100, encoding="utf-8")
    statuses, result, exit_code = done.stdout.splitlines()
    assert statuses.split()[0] == str(-signal.SIGPROF)
    assert (result.startswith("TrainResult(stopped='signal', step=5,"), exit_code) == (True, "0")
    assert done.stderr == "stopping after this step, with a checkpoint (once more to stop at once)\n"
    assert checkpoint.list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1].name == "step-00000005"

    for directory in (tmp_path / "killed", tmp_path / "stopped"):
        last = run(directory)
        assert last.stopped == "finished"
        assert without_time(read_log(directory)) == without_time(read_log(whole_run))
        assert checkpoint_bytes(last.checkpoint) == checkpoint_bytes(whole_run / "checkpoints" / last.checkpoint.name)


@pytest.mark.parametrize("cut", [1, 4, 5, 7, 11])
def test_max_steps_then_resume_is_the_same_run(whole_run: Path, tmp_path: Path, cut: int) -> None:
    assert run(tmp_path, max_steps=cut).stopped == "max_steps"
    torch.manual_seed(123)  # resume must restore the generator, not inherit this
    run(tmp_path)
    assert without_time(read_log(tmp_path)) == without_time(read_log(whole_run))


def test_loss_goes_down(tmp_path: Path) -> None:
    phase = dataclasses.replace(SPARSE, num_steps=40)
    result = run(tmp_path, dataclasses.replace(RECIPE, phases=(phase,), checkpoint_every=100))
    records = read_log(tmp_path)
    assert records[0]["lm"] > 3.5
    assert result.lm_loss < 1.0
    assert records[-1]["mtp"] < 0.5 * records[0]["mtp"]


def test_bf16_autocast_keeps_fp32_weights(tmp_path: Path) -> None:
    model = new_model()
    run(tmp_path, dataclasses.replace(RECIPE, phases=(DENSE,), precision="bf16"), model=model)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert read_log(tmp_path)[-1]["lm"] < read_log(tmp_path)[0]["lm"]


def test_phase_freezes_what_it_does_not_train(tmp_path: Path) -> None:
    model = new_model()
    run(tmp_path, max_steps=DENSE.num_steps, model=model)
    before = {name: tensor.clone() for name, tensor in named_tensors(model)}
    run(tmp_path, max_steps=DENSE.num_steps + INDEXER.num_steps, model=model)
    changed = {name for name, tensor in named_tensors(model) if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".indexer." in name}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(name.endswith("e_score_correction_bias") for name in frozen)


def test_signal_leaves_a_checkpoint(tmp_path: Path) -> None:
    def interrupted(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        if phase.name == "indexer":
            os.kill(os.getpid(), signal.SIGTERM)
        return step_loss(model, batch, phase)

    handler = signal.getsignal(signal.SIGTERM)
    result = run(tmp_path, loss=interrupted)
    assert (result.stopped, result.step, result.checkpoint.name) == ("signal", 5, "step-00000005")
    assert signal.getsignal(signal.SIGTERM) is handler


def test_wall_clock_limit_leaves_a_checkpoint(tmp_path: Path) -> None:
    result = run(tmp_path, max_minutes=0.0)
    assert (result.stopped, result.step) == ("max_minutes", 0)
    assert run(tmp_path).stopped == "finished"


def test_a_finished_run_has_the_loss_of_its_last_step(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, phases=(DENSE,), log_every=3)
    first = run(tmp_path, recipe)
    again = run(tmp_path, recipe)
    assert math.isfinite(first.lm_loss)
    assert (again.stopped, again.step, again.lm_loss) == ("finished", 4, first.lm_loss)
    assert math.isnan(run(tmp_path / "other", recipe, max_steps=0).lm_loss)


def test_a_run_that_ends_with_a_frozen_model_has_the_loss_of_what_it_trained(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, phases=(DENSE, INDEXER))
    first = run(tmp_path, recipe)
    last = read_log(tmp_path)[-1]
    assert last["lm"] == 0.0 and first.lm_loss == last["loss"] > 0.0
    assert run(tmp_path, recipe).lm_loss == first.lm_loss, "a finished run reads it from the log"


def test_other_recipe_is_refused_unless_accepted(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    other = dataclasses.replace(RECIPE, learning_rate_muon=0.001, log_every=5)
    with pytest.raises(ConfigError, match=r"changed: learning_rate_muon\. Name another output"):
        run(tmp_path, other)
    elsewhere = dataclasses.replace(RECIPE, data={"sources": "texts"})
    with pytest.raises(
        ConfigError, match=r"another recipe or other data; changed: data\.sources\. Name another output"
    ):
        run(tmp_path, elsewhere)
    assert run(tmp_path, other, accept_recipe_change=True).stopped == "finished"
    with pytest.raises(TrainingError, match="holds a run already"):
        run(tmp_path, resume=False)


def test_log_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    monitor.keep_log_until(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_without_a_terminal_progress_is_a_line_soon_and_then_each_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"step": 4, "phase": "dense", "lm": 2.5, "tokens_per_second": 1500.0}
    phases = (dataclasses.replace(DENSE, num_steps=10),)
    with monitor.Monitor(tmp_path / "log.jsonl", phases, 0, progress=True) as reporter:
        reporter.report(record, log=True)
        assert capsys.readouterr().err == ""
    monkeypatch.setattr(monitor, "SECONDS_TO_FIRST_LINE", 0.0)
    with monitor.Monitor(tmp_path / "log.jsonl", phases, 0, progress=True) as reporter:
        reporter.report(record, log=False)
        reporter.report(record, log=False)
    assert capsys.readouterr().err == "dense step 4/10  loss 2.500  1,500 tokens/s  0:00:00 left\n"
    assert read_log(tmp_path) == [record]


def test_the_time_left_weighs_steps_by_their_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten steps of 100 tokens, then two of 10,000; resumed after the second."""
    short = dataclasses.replace(DENSE, num_steps=10, sequence_length=50, batch_size=2)
    phases = (short, dataclasses.replace(short, name="long", num_steps=2, sequence_length=5000))
    clock = [0.0]
    monkeypatch.setattr(monitor, "SECONDS_TO_FIRST_LINE", 0.0)
    monkeypatch.setattr(monitor, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with monitor.Monitor(tmp_path / "log.jsonl", phases, 2, progress=True) as reporter:
        for step, clock[0] in ((3, 1.0), (4, 3.0), (10, 15.0), (11, 65.0)):
            record = {"step": step, "phase": phases[step > 10].name, "lm": 2.5, "tokens_per_second": 100.0}
            reporter.report(record, log=False)
        reporter.rewind(10)
        clock[0] = 75.0
        reporter.report(record, log=False)
    lines = capsys.readouterr().err.splitlines()
    # 700 + 20,000 tokens at 1 s for 100; then 600 + 20,000 at 1.5; 20,000 at 1.875; the last at the pace of its phase
    assert [line.split("  ")[-1] for line in lines] == [
        "0:03:27 left",
        "0:05:09 left",
        "0:06:15 left",
        "0:00:50 left",
        "0:00:10 left",
    ]


def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = (dataclasses.replace(DENSE, num_steps=10),)
    for first_step in (10, 9):
        with monitor.Monitor(tmp_path / "log.jsonl", phases, first_step, progress=True):
            pass
    with monitor.Monitor(tmp_path / "log.jsonl", phases, 10, progress=False):
        pass
    assert capsys.readouterr().err == "this run finished at step 10; name another output directory to train again\n"
