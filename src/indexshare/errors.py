"""Exceptions of `indexshare`. Every message names what was wrong and what to do about it.

IndexShareError
├── ConfigError         a config.json, recipe or option that cannot describe a model
│   └── RecipeChangedError   a directory with a run of another recipe
├── CheckpointError     weights that are missing, malformed or unsafe
├── RequestError        an argument of one request that cannot be served
├── MemoryLimitError    a request that does not fit; the message carries the number of bytes
├── OverloadedError     a request that would fit, but not now; try again later
├── TemplateError       a chat template that fails or exceeds its limits
├── KernelError         an explicitly chosen operation that cannot take the call
└── TrainingError       a training run that must stop (NaN, loss spike, unusable data)
"""


class IndexShareError(Exception):
    """Base of all errors a user can cause or meet."""


class ConfigError(IndexShareError):
    """A model configuration or recipe is wrong."""


class RecipeChangedError(ConfigError):
    """A directory holds a training run of another recipe or other data."""


class CheckpointError(IndexShareError):
    """A checkpoint is incomplete, malformed or unsafe to read."""


class RequestError(IndexShareError):
    """A request asks for something that cannot be served."""


class MemoryLimitError(IndexShareError):
    """A request needs more memory than there is; raised before any work starts."""


class OverloadedError(IndexShareError):
    """The server has as much work as it may hold. `retry_after`: seconds after which to try again."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TemplateError(IndexShareError):
    """A chat template failed or exceeded its limits."""


class KernelError(IndexShareError):
    """An explicitly chosen implementation cannot take this call."""


class TrainingError(IndexShareError):
    """A training run stopped; the message says at which step and why."""
