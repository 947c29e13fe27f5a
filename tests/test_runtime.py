import subprocess
import sys

import pytest
import torch

from indexshare import runtime
from indexshare.errors import ConfigError


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch: pytest.MonkeyPatch) -> object:
    for name in runtime.Settings.__dataclass_fields__:
        monkeypatch.delenv(runtime.PREFIX + name.upper(), raising=False)
    runtime.settings.cache_clear()
    yield None
    runtime.settings.cache_clear()


def test_settings_have_defaults_and_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.settings() == runtime.Settings()
    assert runtime.settings().workspace_bytes == 256 * 2**20
    monkeypatch.setenv("INDEXSHARE_WORKSPACE_MIB", "64")
    monkeypatch.setenv("INDEXSHARE_THREADS", "3")
    runtime.settings.cache_clear()
    assert runtime.settings() == runtime.Settings(threads=3, workspace_mib=64)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("INDEXSHARE_THREADS", "many", "positive whole number, not 'many'"),
        ("INDEXSHARE_THREADS", "0", "positive whole number"),
        ("INDEXSHARE_WORKSPACE_MIB", "-1", "positive whole number"),
        ("INDEXSHARE_THREDS", "2", "unknown environment variable INDEXSHARE_THREDS"),
        ("INDEXSHARE_FOO", "1", "known: INDEXSHARE_CACHE, INDEXSHARE_DEVICE, INDEXSHARE_ISA, "),
    ],
)
def test_a_wrong_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        runtime.settings()


def test_devices_are_checked() -> None:
    assert runtime.resolve_device("cpu") == torch.device("cpu")
    assert runtime.resolve_device().type in ("cpu", "cuda")
    for name in ("nonsense", "cuda:99", "cpu:x"):
        with pytest.raises(ConfigError, match="cannot be used here"):
            runtime.resolve_device(name)


def test_auto_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDEXSHARE_DEVICE", "cpu")
    assert runtime.resolve_device("auto") == torch.device("cpu")


def test_dtypes_have_short_names() -> None:
    assert runtime.resolve_dtype("bf16") is runtime.resolve_dtype("bfloat16") is torch.bfloat16
    assert runtime.resolve_dtype("fp32") is torch.float32
    with pytest.raises(ConfigError, match="'int8' is not supported"):
        runtime.resolve_dtype("int8")


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        assert runtime.set_threads(1) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_processes_of_torchrun_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(runtime, "num_usable_cpus", lambda: 9)
    try:
        for processes, threads in (("1", 9), ("4", 2), ("16", 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
            assert runtime.set_threads() == torch.get_num_threads() == threads
        assert runtime.set_threads(3) == 3, "what is asked for is taken"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_threads_is_checked(number: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ConfigError, match=f"at least 1, not {number}"):
        runtime.set_threads(number)
    assert torch.get_num_threads() == before


def test_a_seed_repeats_all_generators() -> None:
    import random

    import numpy

    def draw() -> tuple[float, ...]:
        runtime.seed_everything(7)
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    assert draw() == draw()


def test_memory_figures_are_plausible() -> None:
    assert 2**20 < runtime.available_memory_bytes() < 2**50
    assert 2**24 < runtime.peak_memory_bytes() < 2**40


def test_peak_memory_notices_an_allocation_and_can_start_anew() -> None:
    """In a fresh process, whose peak does not depend on the tests that ran before."""
    program = """
from indexshare import runtime
before = runtime.peak_memory_bytes()
block = b"x" * (256 * runtime.MIB)
assert runtime.peak_memory_bytes() > before + 200 * runtime.MIB
del block
if runtime.reset_peak_memory():
    assert runtime.peak_memory_bytes() < before + 100 * runtime.MIB
"""
    subprocess.run([sys.executable, "-c", program], check=True)
