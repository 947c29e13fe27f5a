"""What training costs on several devices: memory of each, and what it sends in a step. From configuration alone.

The figures follow what `parallel.py` and `sharded_muon.py` do, and tests hold them against counted bytes of small runs.
Activations are an estimate, times are bounds from bytes and FLOP under the stated speeds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from indexshare.errors import ConfigError
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.inspect import token_work
from indexshare.train.distributed import Mesh
from indexshare.train.optim import is_muon

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


def count_units(config: GlmConfig) -> Counter[tuple[str, int]]:
    """Parameters by what `parallelize` gathers at once: ("experts", layer), ("layer", layer) and ("root", -1)."""
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    units: Counter[tuple[str, int]] = Counter()
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            continue  # a copy on each rank
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        if ".mlp.experts." in name:
            units["experts", layer] += parameter.numel()
        elif layer == -1 or (layer == config.num_hidden_layers and ".self_attn." not in name):
            units["root", -1] += parameter.numel()
        else:
            units["layer", layer] += parameter.numel()
    return units


def _muon_numbers(config: GlmConfig) -> tuple[int, int]:
    """Parameters that Muon and that AdamW update."""
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    muon = sum(parameter.numel() for name, parameter in trained if is_muon(name, parameter))
    return muon, sum(parameter.numel() for _, parameter in trained) - muon


def make_train_plan(
    config: GlmConfig,
    name: str,
    mesh: Mesh,
    cluster: Cluster,
    *,
    length: int,
    rows: int = 1,
    precision: Literal["fp32", "bf16"] = "bf16",
    memory_bytes: int | None = None,
) -> TrainPlan:
    """Of one step with `rows` rows of `length` tokens for each group of cp ranks. Raises ConfigError.

    memory_bytes: of a device, in place of the cluster's.
    """
    if config.n_routed_experts % mesh.ep or (rows * length) % mesh.cp:
        raise ConfigError("ep must divide the experts, and cp the tokens of a batch")
    units = count_units(config)
    tokens = rows * length // mesh.cp  # of one rank
    narrow = 2 if precision == "bf16" else FP32
    memory = _memory(config, units, mesh, tokens, narrow)
    needed = sum(memory.values())
    context = length / 2  # keys that a token sees on average
    work = token_work(config, max(1, int(context)))
    return TrainPlan(
        model=name,
        cluster=cluster,
        mesh=mesh,
        length=length,
        rows=rows,
        tokens_per_step=tokens * mesh.num_ranks,
        memory=memory,
        volumes=tuple(_volumes(config, units, mesh, cluster, tokens, narrow)),
        # forward, twice as much backward, and the forward pass again
        compute_seconds=4 * work.total * tokens / (cluster.compute * cluster.utilisation),
        fits=needed <= (memory_bytes or cluster.memory_bytes),
    )


def _memory(config: GlmConfig, units: Counter[tuple[str, int]], mesh: Mesh, tokens: int, narrow: int) -> dict[str, int]:
    shard = -(-sum(units.values()) // mesh.num_ranks)
    muon, adamw = (-(-numbers // mesh.num_ranks) for numbers in _muon_numbers(config))
    whole = [
        units["layer", layer] + units["experts", layer] // mesh.ep for layer in range(config.num_hidden_layers + 1)
    ]
    hidden, experts = config.hidden_size, config.num_experts_per_tok
    # queries, attended values and their projections of all heads; rows of chosen experts; each once more as a gradient
    attention = config.num_attention_heads * (2 * config.qk_head_dim + config.latent_dim + config.v_head_dim)
    feed_forward = experts * (2 * hidden + 3 * config.moe_intermediate_size)
    return {
        "parameters (fp32 shard)": FP32 * shard,
        "gradients (fp32 shard)": FP32 * shard,
        "Muon (1 buffer)": FP32 * muon,
        "AdamW (2 buffers)": 2 * FP32 * adamw,
        # the one that runs and the one that is on its way
        "gathered layers (2)": 2 * max(whole) * narrow,
        "gradients of a gathered layer": max(whole) * (narrow + FP32),
        "embedding, head and MTP, gathered, with gradients": 2 * FP32 * units["root", -1],
        "kept activations (one layer input each)": FP32 * tokens * hidden * (config.num_hidden_layers + 1),
        "kept selections (full layers)": 4 * tokens * config.index_topk * (len(config.full_layers) + 1),
        "activations of a layer that runs": 2 * narrow * tokens * (attention + feed_forward),
        "logits and their gradient": 2 * FP32 * tokens * config.vocab_size,
    }


def _volumes(
    config: GlmConfig, units: Counter[tuple[str, int]], mesh: Mesh, cluster: Cluster, tokens: int, narrow: int
) -> list[Volume]:
    by_kind: Counter[str] = Counter()
    for (kind, _), numbers in units.items():
        by_kind[kind] += numbers
    experts, others = by_kind["experts"] // mesh.ep, by_kind["layer"]
    all_ranks, expert_ranks = mesh.num_ranks, mesh.num_ranks // mesh.ep
    muon_experts, muon_others = experts // expert_ranks, (_muon_numbers(config)[0] - by_kind["experts"]) // all_ranks
    num_mtp, num_sparse = config.num_nextn_predict_layers, config.mlp_layer_types.count("sparse")
    rows = tokens * config.num_experts_per_tok * config.hidden_size * narrow
    # each rank runs the MTP layer over the tokens of all
    routed = (num_sparse + num_mtp * mesh.cp) * rows
    keys = config.num_hidden_layers * config.latent_dim + len(config.full_layers) * config.index_head_dim
    hidden = num_mtp * config.hidden_size * FP32
    gathered = mesh.cp * tokens * (keys * narrow + hidden)

    def volume(name: str, ranks: int, span: int, payload: int) -> Volume:
        sent = payload * (ranks - 1) // ranks
        speed = cluster.inside_node if span <= cluster.devices_per_node else cluster.between_nodes
        return Volume(name=name, ranks=ranks, payload_bytes=payload, sent_bytes=sent, seconds=sent / speed)

    # forward and backward each gather a layer
    return [
        volume("FSDP all-gather", all_ranks, all_ranks, 2 * (others * narrow + by_kind["root"] * FP32)),
        volume("FSDP reduce-scatter", all_ranks, all_ranks, FP32 * (others + by_kind["root"])),
        volume("FSDP all-gather, experts", expert_ranks, all_ranks, 2 * experts * narrow),
        volume("FSDP reduce-scatter, experts", expert_ranks, all_ranks, FP32 * experts),
        volume("EP all-to-all", mesh.ep, mesh.ep, 4 * routed),  # there and back, forward and backward
        volume("CP all-gather", mesh.cp, mesh.cp * mesh.ep, gathered),
        volume("CP reduce-scatter", mesh.cp, mesh.cp * mesh.ep, gathered),
        volume("Muon all-to-all", all_ranks, all_ranks, 2 * muon_others * narrow),
        volume("Muon all-to-all, experts", expert_ranks, all_ranks, 2 * muon_experts * narrow),
    ]


def render(plan: TrainPlan) -> RenderableType:
    """The plan as rich tables with the verdict under them."""
    from rich.console import Group
    from rich.table import Table

    mesh = plan.mesh
    unit, divisor = ("GiB", GIB) if plan.needed_bytes >= GIB else ("MiB", MIB)
    devices = "1 device" if mesh.num_ranks == 1 else f"{mesh.num_ranks:,} devices"
    title = f"{plan.model} on {devices}: dp {mesh.dp} x cp {mesh.cp} x ep {mesh.ep}"
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
    verdict = "fits" if plan.fits else "does not fit: more devices, a shorter batch, or more ep and cp"
    return Group(
        memory,
        *([volumes] if mesh.num_ranks > 1 else []),
        f"verdict: {verdict}",
        f"a step: {plan.tokens_per_step:,} tokens, {plan.rows} x {plan.length:,} for each group of cp;"
        f" {plan.compute_seconds:.2f} s of compute, {seconds:.2f} s of communication, which may overlap",
        f"assumed: {plan.cluster.description}, of which {plan.cluster.utilisation:.0%} is reached",
        "assumed: layers are computed again on the way back (recompute = true in a phase); activations are estimates",
    )
