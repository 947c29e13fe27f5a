"""Rewards of reinforcement learning: right answers, wrong ones, and code that would rather not be tested."""

from functools import partial

import pytest

from indexshare.errors import ConfigError, TrainingError
from indexshare.train import rewards
from indexshare.train.rewards import exact_match, reward_named, unit_tests
from indexshare.train.sandbox import Limits, require_sandbox, run_python

TASK = {"tests": "assert add(2, 3) == 5\nassert add(-1, 1) == 0"}


@pytest.fixture
def working_sandbox() -> None:
    try:
        require_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("completion", "worth"), [("42", 1.0), (" 42\n", 1.0), ("42.", 0.0), ("The answer is 42", 0.0), ("", 0.0)]
)
def test_exact_match(completion: str, worth: float) -> None:
    assert exact_match("6 * 7?", completion, {"answer": "42"}) == worth


@pytest.mark.usefixtures("working_sandbox")
@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ("def add(a, b):\n    return a + b\n", 1.0),
        ("Here you are:\n```python\ndef add(a, b):\n    return a + b\n```\nAs you see, it adds.", 1.0),
        ("```\nadd = 1\n```\nNo:\n```py\ndef add(a, b): return a + b\n```", 1.0),
        ("def add(a, b):\n    return a - b\n", 0.0),
        ("def add(a, b:\n", 0.0),
        ("I cannot write code.", 0.0),
        ("", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("def add(a, b):\n    raise SystemExit(0)", 0.0),
        ("def add(a, b):\n    import os\n    print('all tests passed', flush=True)\n    os._exit(0)", 0.0),
        ("def add(a, b):\n    while True: pass", 0.0),
    ],
)
def test_unit_tests(completion: str, worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "run_python", partial(run_python, limits=Limits(seconds=2.0)))  # for the endless one
    assert unit_tests("Add two numbers.", completion, TASK) == worth


@pytest.mark.usefixtures("working_sandbox")
def test_the_tests_cannot_be_read_as_a_file() -> None:
    """Looking for the tests is the first thing that a model learns (facts of GLM-5.2's training)."""
    search = """
import os, sys
found = [os.path.join(place, name) for place, _, names in os.walk("/sandbox") for name in names]
assert found == ["/sandbox/candidate.py"], found
assert sys.stdin.read() == ""
def add(a, b):
    return a + b
"""
    assert unit_tests("", search, TASK) == 1.0


def test_a_task_without_its_field_is_an_error() -> None:
    for reward, name in ((exact_match, "answer"), (unit_tests, "tests")):
        for task in ({}, {name: 3}):
            with pytest.raises(TrainingError, match=f"needs a text '{name}'"):
                reward("", "", task)


def test_an_unknown_reward_names_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="no reward 'taste'; there are exact_match, unit_tests"):
        reward_named("taste")
