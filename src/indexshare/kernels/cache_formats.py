"""How caches hold their rows: in the model's type, or rounded to int8. No torch: `inspect` and `plan` count with it.

A rounded row has C numbers in int8, with one scale for each G of them, and P numbers in bfloat16:

    [C x int8, padded to 8] [ceil(C / G) x (scale float32, sum of the int8 numbers int32)] [P x bfloat16, padded to 8]

Latents: C is kv_lora_rank in groups of 128, P the rotary part. Index keys: C is the whole key in one group, P is 0.
"""

from dataclasses import dataclass, fields
from typing import Literal

from indexshare.errors import ConfigError

CacheFormat = Literal["int8"]
LATENT_GROUP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFormats:
    """What the caches of latents and of index keys hold; None is the model's type. Raises ConfigError for others."""

    latents: CacheFormat | None = None
    index_keys: CacheFormat | None = None

    def __post_init__(self) -> None:
        for cache in fields(self):
            value = getattr(self, cache.name)
            if value not in (None, "int8"):
                raise ConfigError(
                    f'the cache of {cache.name.replace("_", " ")} can hold "int8", or with None the model\'s type; '
                    f"not {value!r:.50}"
                )


PLAIN = CacheFormats()


def scales_at(rounded_dim: int) -> int:
    """Where in a row the scales begin, in bytes."""
    return -(-rounded_dim // 8) * 8


def plain_at(rounded_dim: int, group_size: int) -> int:
    """Where the bfloat16 numbers begin."""
    return scales_at(rounded_dim) + 8 * -(-rounded_dim // group_size)


def rounded_row_bytes(rounded_dim: int, plain_dim: int, group_size: int) -> int:
    """Bytes of a row of C = rounded_dim and P = plain_dim numbers."""
    return plain_at(rounded_dim, group_size) + -(-2 * plain_dim // 8) * 8
