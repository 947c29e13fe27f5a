"""What a model is made of, from its configuration alone: parameters, cache bytes, work per token. No torch.

All numbers are exact counts. The work counts a multiply-add as 2 FLOP and leaves out norms, softmax and top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from indexshare.kernels.cache_formats import LATENT_GROUP, PLAIN, CacheFormats, rounded_row_bytes
from indexshare.model.config import GlmConfig
from indexshare.quant.policy import GROUP_SIZES, IntegerFormat, fitting_group

if TYPE_CHECKING:
    from rich.console import RenderableType

CONTEXTS = (4096, 16_384, 65_536, 131_072, 262_144, 524_288, 1_048_576)
PARTS = (
    "routed experts",
    "attention",
    "shared experts",
    "embedding and head",
    "dense feed-forward",
    "indexers",
    "routers",
    "MTP projection",
    "norms",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Equal matrices: how many there are, how many of them lie in the MTP layer, how many multiply one token.

    `in_fp8`: whether the FP8 checkpoints hold them in 8 bits (the source is the headers of GLM-5.2-FP8). `integer`: the
    smallest format that quantising gives them (see `quant.policy`), None when they stay.
    """

    part: str
    rows: int
    columns: int
    copies: int
    mtp_copies: int = 0
    read_copies: int
    in_fp8: bool = False
    integer: IntegerFormat | None = None

    @property
    def size(self) -> int:
        """Parameters of one matrix."""
        return self.rows * self.columns

    def num_bytes(self, weight_format: str) -> int:
        """Bytes of all copies as "float32", "bfloat16", "fp8", "int8" or "int4" in memory, scales in 32 bits.

        FP8: as in the released files; of these, kv_b_proj is widened in memory.
        """
        if weight_format == "fp8" and self.in_fp8:
            scales = -(-self.rows // 128) * -(-self.columns // 128)
            return self.copies * (self.size + 4 * scales)
        if weight_format in ("int8", "int4") and self.integer is not None:
            int8 = self.size + 4 * self.rows
            if "int8" in (weight_format, self.integer):
                return self.copies * int8
            num_groups = -(-self.columns // fitting_group(self.columns, GROUP_SIZES[0]))
            int4 = self.rows * (-(-self.columns // 2) + 4 * num_groups)
            return (self.copies - self.mtp_copies) * int4 + self.mtp_copies * int8
        return self.copies * self.size * (4 if weight_format == "float32" else 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCount:
    """Parameters of one part: in all (with the MTP layer), and those that multiply one token (without it)."""

    name: str
    parameters: int
    activated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWork:
    """FLOP to decode one token with `context` tokens visible, main model; and what the alternatives would cost.

    Without indexers sparse_attention is dense_attention.
    """

    context: int
    weights: int
    indexer: int
    sparse_attention: int
    indexer_in_every_layer: int
    dense_attention: int

    @property
    def total(self) -> int:
        """FLOP with IndexShare."""
        return self.weights + self.indexer + self.sparse_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything `indexshare inspect` prints. int8_cache_bytes_per_token: latents, index keys and the MTP layer's."""

    model: str
    num_layers: int
    full_layers: tuple[int, ...]
    num_shared_layers: int
    num_mtp_layers: int
    parameters: int
    parameters_without_mtp: int
    activated_parameters: int
    parts: tuple[PartCount, ...]
    latent_cache_bytes_per_token: int
    index_cache_bytes_per_token: int
    mtp_cache_bytes_per_token: int
    int8_cache_bytes_per_token: tuple[int, int, int]
    work: tuple[TokenWork, ...]


def weight_groups(config: GlmConfig) -> tuple[WeightGroup, ...]:
    """All matrices and vectors of the checkpoint, MTP layer included; the router's bias buffers are not parameters."""
    hidden, main, mtp = config.hidden_size, config.num_hidden_layers, config.num_nextn_predict_layers
    heads, queries, latent = config.num_attention_heads, config.q_lora_rank or 0, config.kv_lora_rank
    full, sparse = len(config.full_layers), config.mlp_layer_types.count("sparse")
    groups: list[WeightGroup] = []

    def add(
        part: str, rows: int, columns: int, per_layer: int, layers: int, in_mtp: int, in_fp8: bool, kept: bool = False
    ) -> None:
        multiplied = {"routed experts": config.num_experts_per_tok, "norms": 0}.get(part, per_layer)
        groups.append(
            WeightGroup(
                part=part,
                rows=rows,
                columns=columns,
                copies=per_layer * (layers + in_mtp),
                mtp_copies=per_layer * in_mtp,
                read_copies=multiplied * layers,
                in_fp8=in_fp8,
                integer="int4" if in_fp8 and not kept else None,
            )
        )

    vocabulary = WeightGroup(part="embedding and head", rows=config.vocab_size, columns=hidden, copies=1, read_copies=0)
    # of the embedding one row is looked up; a tied head is read all the same
    head = replace(vocabulary, copies=0 if config.tie_word_embeddings else 1, read_copies=1, integer="int8")
    groups += [vocabulary, head]
    for rows, columns in (
        *([(queries, hidden)] if queries else []),
        (heads * config.qk_head_dim, queries or hidden),
        (config.latent_dim, hidden),
        (hidden, heads * config.v_head_dim),
    ):
        add("attention", rows, columns, 1, main, mtp, True)
    if config.attention_bias:
        for rows in (*([queries] if queries else []), config.latent_dim, hidden):
            add("attention", rows, 1, 1, main, mtp, False)
    add("attention", heads * (config.qk_nope_head_dim + config.v_head_dim), latent, 1, main, mtp, True, kept=True)
    if config.has_indexers:
        add("indexers", config.index_n_heads * config.index_head_dim, queries, 1, full, mtp, True)
        add("indexers", config.index_head_dim, hidden, 1, full, mtp, True)
        add("indexers", config.index_n_heads, hidden, 1, full, mtp, False)
        add("norms", config.index_head_dim, 1, 2, full, mtp, False)  # k_norm has a weight and a bias
    for width, part, per_layer, layers, in_mtp in (
        (config.intermediate_size, "dense feed-forward", 1, main - sparse, 0),
        (config.moe_intermediate_size, "routed experts", config.n_routed_experts, sparse, mtp),
        (config.moe_intermediate_size * config.n_shared_experts, "shared experts", 1, sparse, mtp),
    ):
        add(part, width, hidden, per_layer, layers, in_mtp, True)  # gate
        add(part, width, hidden, per_layer, layers, in_mtp, True)  # up
        add(part, hidden, width, per_layer, layers, in_mtp, True)  # down
    add("routers", config.n_routed_experts, hidden, 1, sparse, mtp, False)
    add("norms", hidden, 1, 2, main, mtp, False)
    if queries:
        add("norms", queries, 1, 1, main, mtp, False)
    add("norms", latent, 1, 1, main, mtp, False)
    add("norms", hidden, 1, 1, 1, 0, False)  # model.norm
    add("norms", hidden, 1, 3, 0, mtp, False)  # enorm, hnorm, shared_head.norm
    add("MTP projection", hidden, 2 * hidden, 1, 0, mtp, False)
    return tuple(groups)


def weight_bytes(config: GlmConfig, weight_format: str) -> int:
    """Bytes of the checkpoint's tensors in a format (see `WeightGroup.num_bytes`), fp32 router biases included."""
    num_routers = config.mlp_layer_types.count("sparse") + config.num_nextn_predict_layers
    biases = 4 * num_routers * config.n_routed_experts if config.topk_method == "noaux_tc" else 0
    return biases + sum(group.num_bytes(weight_format) for group in weight_groups(config))


def cache_bytes_per_token(
    config: GlmConfig, bytes_per_number: int = 2, formats: CacheFormats = PLAIN
) -> tuple[int, int, int]:
    """Bytes cached for one token: latents of the main model, its index keys (full layers), both of the MTP layer."""
    latent = config.latent_dim * bytes_per_number
    index_key = config.index_head_dim * bytes_per_number
    if formats.latents is not None:
        latent = rounded_row_bytes(config.kv_lora_rank, config.qk_rope_head_dim, LATENT_GROUP)
    if formats.index_keys is not None and config.has_indexers:
        index_key = rounded_row_bytes(config.index_head_dim, 0, config.index_head_dim)
    num_mtp = config.num_nextn_predict_layers
    return config.num_hidden_layers * latent, len(config.full_layers) * index_key, num_mtp * (latent + index_key)


def activated_parameters(config: GlmConfig) -> int:
    """Parameters that multiply one token: main model with the head; no norms, embedding lookup or MTP layer."""
    return sum(group.size * group.read_copies for group in weight_groups(config))


def token_work(config: GlmConfig, context: int) -> TokenWork:
    """FLOP of one decoded token with `context` tokens visible; MLA in absorbed form (latent_dim numbers a key)."""
    layers = config.num_hidden_layers
    scores = 2 * config.index_n_heads * config.index_head_dim * context
    attend_one_key = 2 * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
    return TokenWork(
        context=context,
        weights=2 * activated_parameters(config),
        indexer=len(config.full_layers) * scores,
        sparse_attention=layers * attend_one_key * config.num_attended(context),
        indexer_in_every_layer=layers * scores,
        dense_attention=layers * attend_one_key * context,
    )


def inspect_model(config: GlmConfig, name: str, contexts: Sequence[int] = CONTEXTS) -> Inspection:
    """Count everything for one model; work for the given context lengths up to the model's limit."""
    groups = weight_groups(config)
    parts = []
    for part in PARTS:
        members = [group for group in groups if group.part == part]
        parts.append(
            PartCount(
                name=part,
                parameters=sum(group.size * group.copies for group in members),
                activated=sum(group.size * group.read_copies for group in members),
            )
        )
    total = sum(part.parameters for part in parts)
    latent, index, mtp = cache_bytes_per_token(config)
    return Inspection(
        model=name,
        num_layers=config.num_hidden_layers,
        full_layers=config.full_layers,
        num_shared_layers=config.indexer_types.count("shared"),
        num_mtp_layers=config.num_nextn_predict_layers,
        parameters=total,
        parameters_without_mtp=total - sum(group.size * group.mtp_copies for group in groups),
        activated_parameters=sum(part.activated for part in parts),
        parts=tuple(parts),
        latent_cache_bytes_per_token=latent,
        index_cache_bytes_per_token=index,
        mtp_cache_bytes_per_token=mtp,
        int8_cache_bytes_per_token=cache_bytes_per_token(
            config, formats=CacheFormats(latents="int8", index_keys="int8")
        ),
        work=tuple(token_work(config, n) for n in contexts if n <= config.max_position_embeddings),
    )


def render(inspection: Inspection) -> RenderableType:
    """The inspection as rich tables."""
    from rich.console import Group
    from rich.table import Table

    parts = Table(title=f"{inspection.model}: parameters", title_justify="left")
    parts.add_column("part")
    parts.add_column("in all", justify="right")
    parts.add_column("read per token", justify="right")
    for part in inspection.parts:
        parts.add_row(part.name, f"{part.parameters:,}", f"{part.activated:,}")
    parts.add_section()
    parts.add_row("total", f"{inspection.parameters:,}", f"{inspection.activated_parameters:,}")
    parts.add_row("without the MTP layer", f"{inspection.parameters_without_mtp:,}", "")

    full = inspection.full_layers
    title = "GFLOP to decode one token" + ("; right, what is saved" if full else "")
    columns = ("indexer", "sparse", "total", "all indexers", "dense") if full else ("dense", "total")
    work = Table(title=title, title_justify="left")
    for column in ("context", "weights", *columns):
        work.add_column(column, justify="right", no_wrap=True)
    for row in inspection.work:
        numbers: tuple[int, ...] = (row.dense_attention, row.total)
        if full:
            alternatives = (row.indexer_in_every_layer, row.dense_attention)
            numbers = (row.indexer, row.sparse_attention, row.total, *alternatives)
        work.add_row(f"{row.context:,}", *(_giga(number) for number in (row.weights, *numbers)))

    kinds = f"{len(full)} full, {inspection.num_shared_layers} shared" if full else "dense attention"
    lines = [
        f"{inspection.num_layers} layers: {kinds}, and {inspection.num_mtp_layers} MTP",
        f"full layers: {', '.join(map(str, full))}" if full else "no indexers: every layer attends to all tokens",
        f"cache per token in BF16: {inspection.latent_cache_bytes_per_token:,} bytes of latents + "
        f"{inspection.index_cache_bytes_per_token:,} bytes of index keys "
        f"(the MTP layer adds {inspection.mtp_cache_bytes_per_token:,})",
        "with int8 caches: {:,} + {:,} (the MTP layer adds {:,})".format(*inspection.int8_cache_bytes_per_token),
    ]
    return Group(parts, *lines, work)


def _giga(number: int) -> str:
    billions = number / 1e9
    return f"{billions:,.0f}" if billions >= 1000 else f"{billions:.3g}"
