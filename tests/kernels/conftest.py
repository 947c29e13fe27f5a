"""Tiles so small that every operation cuts even a small test into many; each twin that this processor can run."""

import pytest

from indexshare.kernels import native, ops, registry

INSTRUCTION_SETS = native.runnable()


@pytest.fixture(params=["torch", *INSTRUCTION_SETS])
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the specification, and with the C++ twins of each instruction set alone."""
    for name in native.TWINS:
        monkeypatch.setattr(registry.get(name), "twins", [])
    if request.param != "torch":
        native.register(request.param)
    return request.param


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key tiles of 5, and as few queries at a time as the operation allows."""
    monkeypatch.setattr(ops, "KEY_TILE", 5)
    monkeypatch.setattr(ops, "_workspace_bytes", lambda: 4096)
