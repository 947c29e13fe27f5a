"""`indexshare plan`: does a model fit, to run it here or to train it on many devices."""

from __future__ import annotations

import math
from typing import Literal

from cyclopts import App

from indexshare.options import DEFAULT_CACHE, AsJson, CacheOptions, ModelOrRecipe

app = App(
    name="plan",
    help_epilogue="Examples:\n\n"
    "    indexshare plan glm-5.2 --context 1048576\n"
    "    indexshare plan train glm-5.2 --devices 512",
    help_format="plaintext",
)


@app.default
def plan(
    model: ModelOrRecipe,
    /,
    *,
    context: int = 131_072,
    device: str = "cpu",
    index_pattern: str | None = None,
    strict: bool = True,
    as_json: AsJson = False,
    cache: CacheOptions = DEFAULT_CACHE,
) -> None:
    """Does a model fit on this machine, in which format, and what will be slow; nothing is loaded.

    Args:
        context: Tokens of one sequence, prompt and answer together.
        device: Whose memory to count: cpu, cuda, cuda:1, ..., or auto.
        index_pattern: Full (F) and shared (S) layers in place of the model's own.
        strict: Refuse unknown keys in config.json; --no-strict warns instead.
    """
    from indexshare.engine.resolve import resolve_config, storage_of
    from indexshare.model.plan import make_plan, render, this_machine
    from indexshare.terminal import show

    config = resolve_config(model, index_pattern=index_pattern, strict=strict)
    directory, on_disk = storage_of(model)
    machine = this_machine(device, directory)
    result = make_plan(config, model, context, machine, on_disk=on_disk, caches=cache.formats())
    show(result, render(result), as_json)


@app.command(name="train", help_epilogue="Example:\n\n    indexshare plan train glm-5.2 --devices 512 --cluster h200")
def plan_train(
    model: ModelOrRecipe,
    /,
    *,
    devices: int = 256,
    cluster: Literal["a100", "h100", "h200"] = "h100",
    memory_gib: float | None = None,
    pp: int = 1,
    ep: int | None = None,
    cp: int = 1,
    length: int = 4096,
    rows: int = 1,
    precision: Literal["bf16", "fp32"] = "bf16",
    as_json: AsJson = False,
) -> None:
    """Memory of each device, and what it sends in a training step; nothing is loaded.

    Args:
        devices: Devices in all.
        cluster: What they are and how they are connected.
        memory_gib: Memory of a device, in place of the cluster's.
        pp: Devices that divide the layers; each row of a group is a part that stages work on at the same time.
        ep: Devices that divide the experts of each layer; by default 8, or as many as divide them and the devices.
        cp: Devices that divide the tokens of the same rows.
        length: Tokens of a row.
        rows: Rows for each group of cp devices.
        precision: In which layers are gathered and compute.
    """
    from indexshare.engine.resolve import resolve_config
    from indexshare.terminal import show
    from indexshare.train.distributed import Mesh
    from indexshare.train.plan import CLUSTERS, GIB, make_train_plan, render

    config = resolve_config(model)
    if ep is None:
        ep = math.gcd(devices // max(cp * pp, 1), config.n_routed_experts, 8)
    plan = make_train_plan(
        config,
        model,
        Mesh.of(devices, pp=pp, cp=cp, ep=ep),
        CLUSTERS[cluster],
        length=length,
        rows=rows,
        precision=precision,
        memory_bytes=None if memory_gib is None else memory_gib * GIB,
    )
    show(plan, render(plan), as_json)
