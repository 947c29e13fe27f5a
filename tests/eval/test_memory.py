"""Peak memory while nano reads a long context: weights, caches and a bounded rest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MIB = 2**20
ALLOWED_EXTRA = 600 * MIB  # torch included
ALLOWED_DIFFERENCE = 100 * MIB
SHORT, LONG = 32_768, 131_072

PROGRAM = """
import json, sys, torch
import indexshare
from indexshare import runtime
from indexshare.engine.cache import required_bytes
from indexshare.model.glm import weights_of

num_tokens = int(sys.argv[1])
llm = indexshare.load("nano")
token_ids = torch.randint(0, llm.config.vocab_size, (num_tokens,))
with llm.open_session(num_tokens) as session:
    session.prefill(token_ids)
weights = sum(weight.nbytes for weight in weights_of(llm.model).values())
caches = required_bytes(llm.config, num_tokens, llm.dtype, with_mtp=False)
print(json.dumps({"peak": runtime.peak_memory_bytes(), "weights": weights, "caches": caches}))
"""


def extra_bytes(num_tokens: int) -> int:
    """What a process of its own needs beyond weights and caches, torch and Python included."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(num_tokens)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return found["peak"] - found["weights"] - found["caches"]


def test_memory_beyond_the_cache_is_bounded() -> None:
    """The same at lengths of the default suite: 2,048 and 8,192 tokens."""
    short, long = extra_bytes(2048), extra_bytes(8192)
    assert long <= ALLOWED_EXTRA
    assert long - short <= ALLOWED_DIFFERENCE


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_of_a_long_context() -> None:
    short, long = extra_bytes(SHORT), extra_bytes(LONG)
    print(f"beyond weights and caches: {short / MIB:.0f} MiB at {SHORT:,}, {long / MIB:.0f} MiB at {LONG:,} tokens")
    assert long <= ALLOWED_EXTRA
    assert long - short <= ALLOWED_DIFFERENCE
