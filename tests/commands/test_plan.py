"""`indexshare plan train` as a person types it."""

import json
import math

import pytest

from indexshare.cli import run


@pytest.mark.parametrize(("devices", "ep"), [(1, 1), (6, 2), (64, 8)])
def test_experts_are_divided_as_far_as_devices_allow(devices: int, ep: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "train", "nano", "--devices", str(devices), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["mesh"]["ep"] == ep == math.gcd(devices, 8)
    assert math.prod(plan["mesh"].values()) == devices


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--devices 0", "devices must be at least 1, not 0"),
        ("--devices -4", "devices must be at least 1, not -4"),
        ("--rows 0", "rows must be at least 1, not 0"),
        ("--length 0", "length must be at least 1, not 0"),
        ("--memory-gib 0", "must be above 0, not 0 GiB"),
        ("--memory-gib -1", "must be above 0, not -1 GiB"),
        ("--memory-gib nan", "must be above 0, not nan GiB"),
        ("--devices 6 --ep 3", "ep 3 does not divide the 16 experts of a layer: give one of their divisors"),
        ("--devices 6 --cp 3", "cp 3 does not divide the 4,096 tokens of 1 x 4,096: give a length that is"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["plan", "train", "nano", *options.split()])
    shown, err = capsys.readouterr()
    assert (code, shown, said in err, err.count("\n")) == (2, "", True, 1), err


def test_the_memory_of_a_device_decides(capsys: pytest.CaptureFixture[str]) -> None:
    for gib, fits in (("64", True), ("0.001", False), ("1e-12", False)):
        assert run(["plan", "train", "nano", "--devices", "1", "--memory-gib", gib, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["fits"] is fits


def test_small_models_are_shown_in_small_units(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "train", "nano", "--devices", "1"])
    shown = capsys.readouterr().out
    assert "MiB" in shown and "nano on 1 device:" in shown
    assert "sent by each" not in shown  # nothing is sent
