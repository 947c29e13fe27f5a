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


def test_small_models_are_shown_in_small_units(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "train", "nano", "--devices", "1"])
    shown = capsys.readouterr().out
    assert "MiB" in shown and "nano on 1 device:" in shown
    assert "sent by each" not in shown  # nothing is sent
