"""GLM-5.2 with IndexShare, in Python. Importing this imports nothing but the standard library.

import indexshare
llm = indexshare.load("nano")
print(llm.generate("def main() -> None:", max_new_tokens=64))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from indexshare.errors import (
    CheckpointError,
    ConfigError,
    IndexShareError,
    KernelError,
    MemoryLimitError,
    OverloadedError,
    RequestError,
    TemplateError,
    TrainingError,
)

if TYPE_CHECKING:
    from indexshare.engine.llm import LLM, load

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "ConfigError",
    "IndexShareError",
    "KernelError",
    "MemoryLimitError",
    "OverloadedError",
    "RequestError",
    "TemplateError",
    "TrainingError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name in ("LLM", "load"):
        from indexshare.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'indexshare' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
