"""YaRN: rotary frequencies stretched for contexts longer than those of pre-training (arXiv 2309.00071), as in DeepSeek.

No torch: the configuration holds a `RopeScaling`, `model/glm.py` makes the table from it.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from indexshare.errors import ConfigError

YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
TYPE_KEYS = ("rope_type", "type")  # transformers' name and that of the DeepSeek files


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN with the parameters of config.json.

    `factor` is the new over the old context length. Dimensions that turn more than `beta_fast` times in the old context
    keep their frequency, those below `beta_slow` are slowed by `factor`, a ramp lies between. `mscale` and
    `mscale_all_dim` (both or neither) correct the length of rotated vectors and the scale of the softmax.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"rope_parameters.{name} must be greater than 0, not {getattr(self, name)}")
        # The DeepSeek files' own code and transformers read a lone one differently.
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ConfigError("rope_parameters: mscale and mscale_all_dim are supported together only")
        if self.mscale is not None and not (0 < self.mscale < math.inf and 0 < (self.mscale_all_dim or 0) < math.inf):
            raise ConfigError("rope_parameters: mscale and mscale_all_dim must be greater than 0")

    @property
    def table_scale(self) -> float:
        """What cos and sin are multiplied with."""
        return self._magnitude(self.mscale or 1.0) / (self._magnitude(self.mscale_all_dim or 0.0))

    @property
    def softmax_scale(self) -> float:
        """What the scale of attention scores is multiplied with."""
        return self._magnitude(self.mscale_all_dim or 0.0) ** 2

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def frequencies(self, rope_dim: int, theta: float) -> tuple[float, ...]:
        """Radians per position of the rope_dim / 2 pairs."""
        return _frequencies(self, rope_dim, theta)


@functools.lru_cache(maxsize=64)
def _frequencies(scaling: RopeScaling, rope_dim: int, theta: float) -> tuple[float, ...]:
    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return rope_dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), rope_dim - 1)
    width = high - low or 0.001  # the ramp of a single step
    found = []
    for pair in range(rope_dim // 2):
        frequency = theta ** (-2 * pair / rope_dim)
        slowed = min(max((pair - low) / width, 0.0), 1.0)
        found.append(frequency * (1 - slowed) + frequency / scaling.factor * slowed)
    return tuple(found)


def read_rope(values: Mapping[str, object]) -> tuple[object, dict[str, object] | None]:
    """rope_theta and the content of a RopeScaling (types unchecked), from rope_parameters or the older pair of keys.

    Raises ConfigError for other types of RoPE and for parameters that this one does not have.
    """
    parameters, scaling = values.get("rope_parameters"), values.get("rope_scaling")
    name = "rope_parameters"
    if parameters is None:
        if "rope_theta" not in values:
            raise ConfigError("config.json lacks rope_parameters (or, in older files, rope_theta)")
        name = "rope_scaling"
        parameters = {"rope_theta": values["rope_theta"]} if scaling is None else scaling
        if isinstance(parameters, Mapping):
            parameters = {**parameters, "rope_theta": values["rope_theta"]}
    elif scaling is not None and scaling not in ({"rope_type": "default"}, parameters):
        raise ConfigError("rope_scaling is not supported beside rope_parameters; give one of them")
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"{name} must be an object, not {parameters!r}")
    kinds = {str(parameters[key]) for key in TYPE_KEYS if key in parameters} or {"default"}
    kind = kinds.pop()
    if kinds or kind not in ("default", "yarn"):
        kind = " and ".join(sorted({kind, *kinds}))
        raise ConfigError(f"{name}.rope_type is {kind!r}; only 'default' and 'yarn' are supported")
    allowed = ("rope_theta", *TYPE_KEYS, *(YARN_KEYS if kind == "yarn" else ()))
    if set(parameters) - set(allowed):
        raise ConfigError(f"{name} may hold {', '.join(allowed)} only for type {kind!r}, not {dict(parameters)!r}")
    if "rope_theta" not in parameters:
        raise ConfigError(f"{name} lacks rope_theta")
    content = {key: parameters[key] for key in YARN_KEYS if parameters.get(key) is not None}
    if kind == "yarn" and (missing := [key for key in YARN_KEYS[:2] if key not in content]):
        raise ConfigError(f"{name}.rope_type is 'yarn', which needs {' and '.join(missing)}")
    return parameters["rope_theta"], content or None


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, object]:
    """The `rope_parameters` that `read_rope` and transformers read."""
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    content = {key: value for key, value in asdict(scaling).items() if value is not None}
    return {"rope_theta": theta, "rope_type": "yarn", **content}
