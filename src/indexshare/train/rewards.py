"""Rewards of reinforcement learning: plain functions of the prompt, the completion's text and the task.

A task is a JSON object; each reward says which of its fields it reads. A field that is missing or of the wrong type is
a TrainingError, because a reward that is silently 0 looks like a model that does not learn.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from indexshare.errors import ConfigError, TrainingError
from indexshare.train.sandbox import WORK, require_sandbox, run_python

Reward = Callable[[str, str, Mapping[str, Any]], float]
"""reward(prompt, completion, task): what the completion is worth, as a rule from 0 to 1."""

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_TESTS = """import sys
sys.path.insert(0, {work!r})
from candidate import *
{tests}
print({word!r})
"""


def exact_match(prompt: str, completion: str, task: Mapping[str, Any]) -> float:
    """1 when the completion is the task's `answer`, but for white space around it, else 0."""
    return float(completion.strip() == _text(task, "answer").strip())


def unit_tests(prompt: str, completion: str, task: Mapping[str, Any]) -> float:
    """1 when the Python code of the completion passes the task's `tests`, else 0.

    The code is the last fenced block, or all of the completion; `tests` are statements that may use all its public
    names. Both run in the sandbox. A run counts only when it prints, after the last test, a word that it was not told:
    leaving early is no success. The code shares a process with the tests, so it could still search the interpreter for
    that word; look at rollouts before you trust a reward.
    """
    tests = _text(task, "tests")
    blocks = _FENCED.findall(completion)
    word = secrets.token_hex(16)
    program = _TESTS.format(work=WORK, tests=tests, word=word)
    outcome = run_python(program, files={"candidate.py": blocks[-1] if blocks else completion})
    passed = outcome.ended == "exit" and outcome.exit_code == 0 and outcome.output.rstrip().endswith(word)
    return float(passed)


REWARDS: dict[str, Reward] = {"exact_match": exact_match, "unit_tests": unit_tests}


def reward_named(name: str) -> Reward:
    """Raises ConfigError with the known names, and when `unit_tests` cannot run on this machine."""
    if name not in REWARDS:
        raise ConfigError(f"no reward {name!r}; there are {', '.join(REWARDS)}")
    if name == "unit_tests":
        require_sandbox()
    return REWARDS[name]


def _text(task: Mapping[str, Any], name: str) -> str:
    value = task.get(name)
    if not isinstance(value, str):
        raise TrainingError(f"this reward needs a text {name!r} in every task, found {value!r:.100}")
    return value
