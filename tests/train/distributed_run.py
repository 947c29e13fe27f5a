"""One rank of the runs that test_distributed.py starts: python distributed_run.py JOBS, where JOBS is a JSON list."""

import errno
import json
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.optim.optimizer import register_optimizer_step_post_hook

from indexshare.data.rows import IGNORED, Batch
from indexshare.errors import TrainingError
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.recipes import tiny
from indexshare.train import checkpoint, parallel
from indexshare.train import run as loop_state
from indexshare.train.distributed import Mesh, local, process_group, rank
from indexshare.train.loop import train
from indexshare.train.losses import Losses
from indexshare.train.parallel import whole_model
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes import shared_loss

LENGTH, ROWS = 32, 4
# Function of torch.distributed -> collective, and which of its tensors is the whole. Newer versions have new names.
COLLECTIVES = {
    "all_gather_into_tensor": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "all_to_all_single": ("all-to-all", 1),
    "isend": ("hidden states", 0),
}
CONFIG = tiny(vocab_size=64)


def recipe(num_steps: int, *, recompute: bool = False) -> TrainRecipe:
    """Dense, then the indexers alone, then everything: the parts of a real run, `num_steps` in all."""
    common: dict[str, Any] = {"sequence_length": LENGTH, "batch_size": ROWS}
    dense = Phase(name="dense", num_steps=num_steps // 4, attention="dense", trains="model", **common)
    indexer = Phase(
        name="indexer",
        num_steps=num_steps // 4,
        attention="dense",
        trains="indexer",
        index_loss_weight=1.0,
        index_target="visible",
        **common,
    )
    sparse = Phase(
        name="sparse",
        num_steps=num_steps - 2 * (num_steps // 4),
        attention="sparse",
        index_loss_weight=1.0,
        mtp_loss_weight=0.3,
        mtp_num_steps=2,
        recompute=recompute,
        **common,
    )
    return TrainRecipe(
        name="test",
        model=CONFIG,
        phases=(dense, indexer, sparse) if num_steps > 1 else (replace(sparse, mtp_num_steps=1),),
        seed=7,
        learning_rate_muon=5e-3,
        learning_rate_adamw=5e-3,
        warmup_steps=2,
        muon_split=True,
        checkpoint_every=1000,
        log_every=1,
    )


def global_batch(step: int) -> Batch:
    """Counting sequences, two to a row, with weights that differ: the ranks' shares weigh differently, too."""
    rng = np.random.default_rng(step)
    tokens = (rng.integers(0, 16, (ROWS, 1)) + np.arange(LENGTH + 1) * rng.integers(1, 3, (ROWS, 1))) % 16
    token_ids, targets = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    positions, starts = np.empty_like(token_ids), []
    for row in range(ROWS):
        cut = int(rng.integers(5, LENGTH - 5))
        starts += [row * LENGTH, row * LENGTH + cut]
        positions[row] = np.concatenate((np.arange(cut), np.arange(LENGTH - cut)))
        targets[row, [cut - 1, -1]] = IGNORED
    weights = (targets != IGNORED) * rng.choice([0.5, 1.0, 2.0], targets.shape)
    return Batch(
        token_ids=token_ids,
        targets=targets,
        loss_weights=weights.astype(np.float32),
        positions=positions,
        segment_starts=(*starts, ROWS * LENGTH),
    )


def _counting(original: Any, payloads: Counter[str], collective: str, which: int) -> Any:
    def call(*arguments: Any, **more: Any) -> Any:
        tensors = [value for value in (*arguments, *more.values()) if isinstance(value, torch.Tensor)]
        if tensors[which].is_floating_point() and distributed.get_world_size(more.get("group")) > 1:
            payloads[collective] += tensors[which].nbytes
        return original(*arguments, **more)

    return call


@contextmanager
def counted_bytes() -> Generator[Counter[str]]:
    """By collective: bytes of what each call assembles, scatters or exchanges, of floats and between several ranks."""
    payloads: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name, (collective, which) in COLLECTIVES.items():
            if hasattr(distributed, name):
                patch.setattr(distributed, name, _counting(getattr(distributed, name), payloads, collective, which))
        for name, collective, which in (("_all_gather", "all-gather", 0), ("_reduce_scatter", "reduce-scatter", 1)):
            patch.setattr(parallel, name, _counting(getattr(parallel, name), payloads, collective, which))
        yield payloads


@contextmanager
def full_disk(refused: str) -> Generator[None]:
    """Writing of "state" (the main process does that), "mark" (in the state of a checkpoint that a run went back to) or
    "shards" (the last rank) fails."""

    def fail(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    places: dict[str, tuple[Any, str]] = {
        "state": (checkpoint, "_write_state"),
        "mark": (loop_state, "update_state"),
        "shards": (HuggingFaceStorageWriter, "write_data"),
    }
    is_concerned = rank() == (distributed.get_world_size() - 1 if refused == "shards" else 0)
    with pytest.MonkeyPatch.context() as patch:
        if is_concerned:
            patch.setattr(*places[refused], fail)
        yield


@contextmanager
def broken_update(number: int) -> Generator[None]:
    """AdamW leaves a NaN in the last rank's part of a weight, at its update of that number, from 1."""
    num_updates = 0

    def plant(optimizer: torch.optim.Optimizer, arguments: object, options: object) -> None:
        nonlocal num_updates
        if isinstance(optimizer, torch.optim.AdamW):
            num_updates += 1
            if num_updates == number and rank() == distributed.get_world_size() - 1:
                shards = [local(weight.detach()) for weight in optimizer.param_groups[0]["params"]]
                next(shard for shard in shards if shard.numel()).view(-1)[-1] = torch.nan

    hook = register_optimizer_step_post_hook(plant)
    try:
        yield
    finally:
        hook.remove()


def run(job: dict[str, Any]) -> None:
    """Train as the job says: output, num_steps, and optionally pp, cp, ep, meta (start without weights in memory),
    recompute, max_steps, signal (step, on the last rank), nan (step, on the first rank), count, update (which one
    breaks, on the last rank), refused (what a full disk does not take, see `full_disk`)."""
    mesh = Mesh.over_all(pp=job.get("pp", 1), cp=job.get("cp", 1), ep=job.get("ep", 1))
    loss = shared_loss(mesh, "cpu")
    is_meta = bool(job.get("meta"))
    with torch.device("meta" if is_meta else "cpu"):
        model = GlmForCausalLM(CONFIG)
    if not is_meta:
        model.init_weights(7)

    bad_batch: dict[str, Any] = {}

    def batches(step: int) -> Batch:
        if step == job.get("signal") and rank() == mesh.num_ranks - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        batch = mesh.rows_of(global_batch(step))
        if step == job.get("nan") and rank() == 0:
            bad_batch["token_ids"] = batch.token_ids
        return batch

    def step_loss(model: nn.Module, batch: Batch, phase: Phase) -> Losses:
        found = loss(model, batch, phase)
        is_bad = job.get("nan") is not None and batch.token_ids is bad_batch.get("token_ids")
        return replace(found, total=found.total * torch.nan) if is_bad else found

    try:
        with (
            counted_bytes() if job.get("count") else nullcontext({}) as payloads,
            full_disk(job["refused"]) if "refused" in job else nullcontext(),
            broken_update(job["update"]) if "update" in job else nullcontext(),
        ):
            result = train(
                recipe(job["num_steps"], recompute=bool(job.get("recompute"))),
                Path(job["output"]),
                model=model,
                batches=batches,
                step_loss=step_loss,
                max_steps=job.get("max_steps"),
                progress=False,
                mesh=mesh,
                weights=model.random_weights(7) if is_meta else None,
            )
    except TrainingError as error:
        Path(job["output"], f"error-{rank()}").write_text(str(error))
        return
    whole = whole_model(model, mesh)
    if rank() == 0:
        save_file({name: value.detach() for name, value in whole.named_parameters()}, Path(job["output"], "whole"))
    shards = sum(p.to_local().numel() if hasattr(p, "to_local") else 0 for p in model.parameters())
    report = {"stopped": result.stopped, "step": result.step, "shard_numbers": shards, "payloads": dict(payloads)}
    Path(job["output"], f"rank-{rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with process_group(torch.device("cpu")):
        for job in json.loads(sys.argv[1]):
            run(job)
