"""What training costs on several devices: memory of each, and what it sends in a step. From configuration alone.

The figures follow what `parallel.py` and `sharded_muon.py` do, and tests hold them against counted bytes of small runs.
Activations are an estimate, times are bounds from bytes and FLOP under the stated speeds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from indexshare import runtime
from indexshare.errors import ConfigError
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.inspect import token_work
from indexshare.train.distributed import Mesh
from indexshare.train.optim import is_muon
from indexshare.train.pipeline import stage_layers, stage_of

if TYPE_CHECKING:
    from rich.console import RenderableType

MIB, GIB = 2**20, 2**30
FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal devices. Bytes; bytes/s that one sends, to its node and beyond; FLOP/s in BF16, and what is reached."""

    description: str
    memory_bytes: int
    devices_per_node: int
    inside_node: float
    between_nodes: float
    compute: float
    utilisation: float = 0.4


CLUSTERS = {
    "a100": Cluster(
        description="A100 80 GB, 8 a node, NVLink 300 GB/s, network 25 GB/s a device, 312 TFLOP/s",
        memory_bytes=80 * 10**9,
        devices_per_node=8,
        inside_node=300e9,
        between_nodes=25e9,
        compute=312e12,
    ),
    "h100": Cluster(
        description="H100 80 GB, 8 a node, NVLink 450 GB/s, network 50 GB/s a device, 989 TFLOP/s",
        memory_bytes=80 * 10**9,
        devices_per_node=8,
        inside_node=450e9,
        between_nodes=50e9,
        compute=989e12,
    ),
    "h200": Cluster(
        description="H200 141 GB, 8 a node, NVLink 450 GB/s, network 50 GB/s a device, 989 TFLOP/s",
        memory_bytes=141 * 10**9,
        devices_per_node=8,
        inside_node=450e9,
        between_nodes=50e9,
        compute=989e12,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """One kind of collective in a step. payload_bytes: what it assembles, scatters or exchanges on each device, its own
    part included; ranks: how many take part; sent_bytes leave the device; seconds at the speed of its slowest link."""

    name: str
    ranks: int
    payload_bytes: int
    sent_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """The answer to `indexshare plan train`. memory: bytes on each device, by use."""

    model: str
    cluster: Cluster
    mesh: Mesh
    length: int
    rows: int
    tokens_per_step: int
    memory: dict[str, int]
    volumes: tuple[Volume, ...]
    compute_seconds: float
    fits: bool

    @property
    def needed_bytes(self) -> int:
        """Of memory on each device."""
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """What the ranks of one stage hold. layers: without the MTP layer; units: parameters by what `parallelize` gathers
    at once, ("experts", layer), ("layer", layer) and ("root", -1); muon, adamw: numbers that they update, experts among
    them."""

    layers: range
    is_last: bool
    units: Counter[tuple[str, int]]
    muon: int
    adamw: int

    @classmethod
    def all_of(cls, config: GlmConfig, num_stages: int) -> tuple[_Stage, ...]:
        with torch.device("meta"):
            model = GlmForCausalLM(config)
        units: list[Counter[tuple[str, int]]] = [Counter() for _ in range(num_stages)]
        numbers: list[Counter[bool]] = [Counter() for _ in range(num_stages)]
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):
                continue  # a copy on each rank
            stage = stage_of(name, config, num_stages)
            numbers[stage][is_muon(name, parameter)] += parameter.numel()
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
            if ".mlp.experts." in name:
                units[stage]["experts", layer] += parameter.numel()
            elif layer == -1 or (layer == config.num_hidden_layers and ".self_attn." not in name):
                units[stage]["root", -1] += parameter.numel()
            else:
                units[stage]["layer", layer] += parameter.numel()
        stages = zip(stage_layers(config, num_stages), units, numbers, strict=True)
        return tuple(
            cls(
                layers=layers,
                is_last=layers.stop == config.num_hidden_layers,
                units=held,
                muon=by[True],
                adamw=by[False],
            )
            for layers, held, by in stages
        )

    def num_mtp(self, config: GlmConfig) -> int:
        """MTP layers here."""
        return config.num_nextn_predict_layers * self.is_last


def make_train_plan(
    config: GlmConfig,
    name: str,
    mesh: Mesh,
    cluster: Cluster,
    *,
    length: int,
    rows: int = 1,
    precision: Literal["fp32", "bf16"] = "bf16",
    recompute: bool = True,
    memory_bytes: float | None = None,
) -> TrainPlan:
    """Of one step with `rows` rows of `length` tokens for each group of cp ranks.

    recompute: as in a phase; memory is that with it. memory_bytes: of a device, in place of the cluster's. Raises
    ConfigError for numbers that cannot be, and for ep and cp that do not divide experts and tokens.
    """
    memory_bytes = cluster.memory_bytes if memory_bytes is None else memory_bytes
    for what, number in (("devices", mesh.num_ranks), ("rows", rows), ("length", length)):
        if number < 1:
            raise ConfigError(f"{what} must be at least 1, not {number:,}")
    if not memory_bytes > 0:
        raise ConfigError(f"the memory of a device must be above 0, not {memory_bytes / GIB:g} GiB")
    if config.n_routed_experts % mesh.ep:
        raise ConfigError(
            f"ep {mesh.ep} does not divide the {config.n_routed_experts} experts of a layer: give one of their divisors"
        )
    if (rows * length) % mesh.cp:
        raise ConfigError(
            f"cp {mesh.cp} does not divide the {rows * length:,} tokens of {rows:,} x {length:,}: give a length that is"
            f" a multiple of {mesh.cp}, or another cp"
        )
    tokens = rows * length // mesh.cp  # of one rank
    narrow = 2 if precision == "bf16" else FP32
    stages = _Stage.all_of(config, mesh.pp)
    # stages run one row after the other
    running = tokens if mesh.pp == 1 else length // mesh.cp
    memories = [_memory(config, stage, mesh, tokens, running, narrow) for stage in stages]
    memory = max(memories, key=lambda found: sum(found.values()))
    volumes = [_volumes(config, stage, mesh, cluster, tokens, narrow, recompute) for stage in stages]
    context = length / 2  # keys that a token sees on average
    work = token_work(config, max(1, int(context)))
    longest = max(len(stage.layers) for stage in stages) / config.num_hidden_layers
    waiting = (rows + mesh.pp - 1) / rows  # the first stage begins before the last one has anything to do
    return TrainPlan(
        model=name,
        cluster=cluster,
        mesh=mesh,
        length=length,
        rows=rows,
        tokens_per_step=tokens * mesh.num_ranks // mesh.pp,
        memory=memory,
        volumes=tuple(max(volumes, key=lambda found: sum(volume.seconds for volume in found))),
        # forward, twice as much backward, and the forward pass again
        compute_seconds=4 * work.total * longest * waiting * tokens / (cluster.compute * cluster.utilisation),
        fits=sum(memory.values()) <= memory_bytes,
    )


def _memory(config: GlmConfig, stage: _Stage, mesh: Mesh, tokens: int, running: int, narrow: int) -> dict[str, int]:
    units, num_mtp = stage.units, stage.num_mtp(config)
    shard, muon, adamw = (-(-numbers // mesh.stage_ranks) for numbers in (sum(units.values()), stage.muon, stage.adamw))
    whole = {layer: units["layer", layer] + units["experts", layer] // mesh.ep for layer in stage.layers}
    mtp = config.num_hidden_layers
    largest = max(*whole.values(), units["layer", mtp] + units["experts", mtp] // mesh.ep)
    hidden, experts = config.hidden_size, config.num_experts_per_tok
    # queries, attended values and their projections of all heads; rows of chosen experts; each once more as a gradient
    attention = config.num_attention_heads * (2 * config.qk_head_dim + config.latent_dim + config.v_head_dim)
    feed_forward = experts * (2 * hidden + 3 * config.moe_intermediate_size)
    if mesh.pp == 1:  # the one that runs and the one that is on its way
        gathered = {
            "gathered layers (2)": 2 * largest * narrow,
            "gradients of a gathered layer": largest * (narrow + FP32),
        }
    else:
        gathered = {
            "gathered layers of a stage": sum(whole.values()) * narrow,
            "gradients of them": sum(whole.values()) * FP32,
        }
    num_full = sum(map(config.is_full, stage.layers)) + num_mtp
    return {
        "parameters (fp32 shard)": FP32 * shard,
        "gradients (fp32 shard)": FP32 * shard,
        "Muon (1 buffer)": FP32 * muon,
        "AdamW (2 buffers)": 2 * FP32 * adamw,
        **gathered,
        "embedding, head and MTP, gathered, with gradients": 2 * FP32 * units["root", -1],
        "kept activations (one layer input each)": FP32 * tokens * hidden * (len(stage.layers) + num_mtp),
        "kept selections (full layers)": 4 * tokens * config.index_topk * num_full,
        "activations of a layer that runs": 2 * narrow * running * (attention + feed_forward),
        # of one tile at a time, see `token_nats`
        "logits": min(4 * FP32 * tokens * config.vocab_size, runtime.settings().workspace_bytes) * stage.is_last,
    }


def _volumes(
    config: GlmConfig, stage: _Stage, mesh: Mesh, cluster: Cluster, tokens: int, narrow: int, recompute: bool
) -> list[Volume]:
    by_kind: Counter[str] = Counter()
    for (kind, _), numbers in stage.units.items():
        by_kind[kind] += numbers
    num_mtp, mtp = stage.num_mtp(config), config.num_hidden_layers
    mtp_layer, mtp_experts = stage.units["layer", mtp], stage.units["experts", mtp]
    ranks, expert_ranks = mesh.stage_ranks, mesh.stage_ranks // mesh.ep
    num_sparse = sum(config.mlp_layer_types[layer] == "sparse" for layer in stage.layers)
    rows = tokens * config.num_experts_per_tok * config.hidden_size * narrow
    # each rank runs the MTP layer over the tokens of all
    routed = (num_sparse + num_mtp * mesh.cp) * rows
    num_full = sum(map(config.is_full, stage.layers))
    keys = len(stage.layers) * config.latent_dim + num_full * config.index_head_dim
    hidden = num_mtp * config.hidden_size * FP32
    scattered = mesh.cp * tokens * (keys * narrow + hidden)
    gathered = scattered + recompute * mesh.cp * tokens * keys * narrow
    # there and back, forward, once more before the way back, backward
    routed_times = 6 if recompute else 4
    # forward and backward each gather a layer; a stage keeps its own from the first row on
    gathers = 2 if mesh.pp == 1 else 1
    layers = gathers * (by_kind["layer"] - mtp_layer) + 2 * mtp_layer
    experts = gathers * (by_kind["experts"] - mtp_experts) + 2 * mtp_experts
    boundaries = (stage.layers.start > 0) + (not stage.is_last)
    lends = config.num_nextn_predict_layers * (stage.layers.start == 0 or stage.is_last) * (mesh.pp > 1)
    row_bytes = tokens * config.hidden_size * FP32

    def volume(name: str, ranks: int, span: int, payload: int, is_sent_whole: bool = False) -> Volume:
        sent = payload if is_sent_whole else payload * (ranks - 1) // ranks
        speed = cluster.inside_node if span <= cluster.devices_per_node else cluster.between_nodes
        return Volume(name=name, ranks=ranks, payload_bytes=payload, sent_bytes=sent, seconds=sent / speed)

    return [
        volume("FSDP all-gather", ranks, ranks, layers * narrow + 2 * by_kind["root"] * FP32),
        volume("FSDP reduce-scatter", ranks, ranks, FP32 * (by_kind["layer"] + by_kind["root"])),
        volume("FSDP all-gather, experts", expert_ranks, ranks, experts // mesh.ep * narrow),
        volume("FSDP reduce-scatter, experts", expert_ranks, ranks, FP32 * by_kind["experts"] // mesh.ep),
        volume("EP all-to-all", mesh.ep, mesh.ep, routed_times * routed),
        volume("CP all-gather", mesh.cp, mesh.cp * mesh.ep, gathered),
        volume("CP reduce-scatter", mesh.cp, mesh.cp * mesh.ep, scattered),
        volume("PP hidden states", mesh.pp, mesh.num_ranks, boundaries * row_bytes, True),
        # at most: of the different tokens of a batch
        volume("PP embedding for MTP", mesh.pp, mesh.num_ranks, lends * row_bytes, True),
        volume("Muon all-to-all", ranks, ranks, 2 * (stage.muon - by_kind["experts"]) // ranks * narrow),
        volume(
            "Muon all-to-all, experts",
            expert_ranks,
            ranks,
            2 * (by_kind["experts"] // mesh.ep // expert_ranks) * narrow,
        ),
    ]


def render(plan: TrainPlan) -> RenderableType:
    """The plan as rich tables with the verdict under them."""
    from rich.console import Group
    from rich.table import Table

    mesh = plan.mesh
    unit, divisor = ("GiB", GIB) if plan.needed_bytes >= GIB else ("MiB", MIB)
    devices = "1 device" if mesh.num_ranks == 1 else f"{mesh.num_ranks:,} devices"
    stages = f"pp {mesh.pp} x " if mesh.pp > 1 else ""
    title = f"{plan.model} on {devices}: {stages}dp {mesh.dp} x cp {mesh.cp} x ep {mesh.ep}"
    memory = Table(title=f"{title}; memory of each", title_justify="left")
    memory.add_column("what")
    memory.add_column(unit, justify="right")
    for name, size in plan.memory.items():
        memory.add_row(name, f"{size / divisor:,.2f}")
    memory.add_section()
    memory.add_row("in all", f"{plan.needed_bytes / divisor:,.2f}")
    volumes = Table(title="sent by each in a step", title_justify="left")
    for column in ("collective", "ranks", unit, "seconds"):
        volumes.add_column(column, justify="left" if column == "collective" else "right")
    for volume in plan.volumes:
        if volume.ranks > 1:
            size = f"{volume.sent_bytes / divisor:,.2f}"
            volumes.add_row(volume.name, f"{volume.ranks:,}", size, f"{volume.seconds:.3f}")
    seconds = sum(volume.seconds for volume in plan.volumes)
    verdict = "fits" if plan.fits else "does not fit: more devices, a shorter batch, or more pp, ep and cp"
    return Group(
        memory,
        *([volumes] if mesh.num_ranks > 1 else []),
        f"verdict: {verdict}",
        f"a step: {plan.tokens_per_step:,} tokens, {plan.rows} x {plan.length:,} for each group of cp;"
        f" {plan.compute_seconds:.2f} s of compute, {seconds:.2f} s of communication, which may overlap",
        f"assumed: {plan.cluster.description}, of which {plan.cluster.utilisation:.0%} is reached",
        "assumed: layers are computed again on the way back (recompute = true in a phase); activations are estimates",
    )
