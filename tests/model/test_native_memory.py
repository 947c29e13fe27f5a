"""The C++ path and memory: what it keeps is bounded, and running out of it is an error. In processes of their own."""

import subprocess
import sys

import pytest

from indexshare.kernels import native

pytestmark = pytest.mark.skipif(native.enable() is not None, reason="there is no C++ compiler")

SETUP = """
import resource, torch
torch.set_num_threads(2)
from indexshare.engine.llm import LLM
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.native import pack_model
from indexshare.model.recipes import tiny

def memory(field):
    return int(open("/proc/self/statm").read().split()[field]) * 4096

model = GlmForCausalLM(tiny(hidden_size=2048)).requires_grad_(False)
for parameter in model.parameters():
    parameter.normal_(0, parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.fill_(1)
assert pack_model(model) is None
session = LLM(model).open_session(16_000)
token_ids = [1 + i % 250 for i in range(16_000)]
"""


def run(program: str) -> str:
    command = [sys.executable, "-c", SETUP + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prompts_of_many_lengths_take_no_more_than_the_longest() -> None:
    grown = run("""
def read(num_tokens):
    session.prefill(token_ids[:num_tokens], chunk_size=2000)
    session.truncate(0)
    return memory(1)

first = read(1000)
print(max(read(num_tokens) for num_tokens in range(1001, 1300, 6)) - first)
""")
    assert int(grown) < 200 * 2**20, "one block for each new length would be gigabytes"


@pytest.mark.parametrize("mebibytes", [200, 450])
def test_running_out_of_memory_is_an_error_and_no_hang(mebibytes: int) -> None:
    """Outside of the threads' common work (200) and in the middle of it (450)."""
    said = run(f"""
session.prefill(token_ids[:100])
session.truncate(0)
resource.setrlimit(resource.RLIMIT_AS, (memory(0) + {mebibytes} * 2**20,) * 2)
try:
    session.prefill(token_ids, chunk_size=16_000)
except (MemoryError, RuntimeError) as error:
    print("raised", session.context_length)
""")
    assert said == "raised 0\n"
