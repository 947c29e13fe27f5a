"""What every test starts from: one thread, poisoned uninitialised memory, a fixed seed, no deadlines."""

import os
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start. The variable for cuBLAS is what torch
# asks for in its deterministic mode.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("INDEXSHARE_THREADS", "1")
os.environ.setdefault("INDEXSHARE_CACHE", str(Path(__file__).parents[1] / ".kernels_cache"))  # built once, not in $HOME
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import warnings

import pytest
import torch
from hypothesis import HealthCheck, settings

from indexshare.model import native

# The default suite is repeatable; `make test-slow` tries more examples, drawn at random.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def compiled_kernels() -> None:
    """The C++ twins from the first test on, not from the first that happens to load a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a compiler the specifications are tested
        native.enable()


@pytest.fixture(autouse=True)
def reproducible_torch() -> None:
    """Seed torch, use one thread, fill what `torch.empty` and its kin return with NaN (integers: the largest value).

    Code that reads memory before writing it then fails visibly instead of now and then. torch ties the filling to
    its deterministic mode; operations without a deterministic form only warn, and pyproject.toml ignores that warning.
    """
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms does the same and imports the compiler
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    torch.set_num_threads(1)
