"""Many processes: who takes part, which part of a step is whose, and what they must agree on.

torchrun starts the processes; without it there is one, and everything here costs nothing. Each process, a *rank*, does
its share of every step of one and the same run: with the same recipe, N ranks have the losses of one, up to rounding.
Ranks lie in a mesh, the last dimension innermost, between the nearest neighbours:

    pp    the same rows, of which each rank runs other layers
    dp    other rows of the batch
    cp    the same rows, of which each rank holds a contiguous part of the tokens
    ep    other rows of the batch, and other experts
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from indexshare.data.rows import Batch
from indexshare.errors import ConfigError

Choice = TypeVar("Choice")


@contextmanager
def process_group(device: torch.device) -> Generator[torch.device]:
    """Connects the processes that torchrun started, by the backend for `device`: gloo for cpu, nccl for cuda, ...

    Yields this process's device: of several accelerators in a machine, the one of its local rank. Without torchrun, the
    device as it was given.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device)
    distributed.init_process_group(distributed.get_default_backend_for_device(device))
    try:
        yield device
        wait_for_all()  # nobody closes a connection that another still waits for
    finally:
        distributed.destroy_process_group()


def require_one_process(what: str) -> None:
    """Raises ConfigError when torchrun has started several: each would write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} runs in one process: start it without torchrun")


def num_ranks() -> int:
    """Processes in this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and reports."""
    return rank() == 0


def global_sum(value: Tensor, ranks: distributed.ProcessGroup | None = None) -> Tensor:
    """The sum over `ranks`, by default all, without gradient; the tensor itself when there is one process."""
    if num_ranks() == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total, group=ranks)
    return total


def agree(choices: tuple[Choice, ...], wanted: Choice) -> Choice:
    """On all ranks the same: the last of `choices` that some rank wants."""
    if num_ranks() == 1:
        return wanted
    code = torch.tensor(choices.index(wanted), device=communication_device())
    distributed.all_reduce(code, distributed.ReduceOp.MAX)
    return choices[int(code)]


def wait_for_all() -> None:
    """Returns once every rank has come here."""
    agree((0,), 0)


def write_on_main(write: Callable[..., object], *arguments: Any) -> None:
    """Calls `write` in the main process while the others wait. An OSError there is one on all ranks."""
    problem = None
    if is_main():
        try:
            write(*arguments)
        except OSError as error:
            problem = error
    if agree((False, True), problem is not None):
        raise problem or OSError("the main process could not, and says why")


def communication_device() -> torch.device:
    """Where the tensors of collectives lie: the accelerator, or with gloo the processor's memory."""
    accelerator = torch.accelerator.current_accelerator() if distributed.get_backend() != "gloo" else None
    return accelerator or torch.device("cpu")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds: the shard of a DTensor, as a view; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scales gradients, over all ranks one vector, to a norm of at most `limit`; returns the norm before, a scalar.

    Every parameter that has a gradient is sharded over all ranks and none is held twice, so that squares add up.
    """
    parameters = tuple(parameters)
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    nothing = torch.zeros((), dtype=torch.float64, device=parameters[0].device)  # a stage may have nothing to train
    norm = global_sum(sum((gradient.norm().double().square() for gradient in gradients), nothing)).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))
    return norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes of the four dimensions, whose product is the number of ranks."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, total: int, *, pp: int = 1, cp: int = 1, ep: int = 1) -> Mesh:
        """The mesh of that many ranks; dp is what remains. Raises ConfigError."""
        if min(pp, cp, ep) < 1:
            raise ConfigError(f"pp, cp and ep must be at least 1, not {pp}, {cp} and {ep}: leave them out for 1")
        if total % (pp * cp * ep):
            raise ConfigError(
                f"{total} processes do not divide into pp {pp} x cp {cp} x ep {ep}:"
                f" start a multiple of {pp * cp * ep} of them"
            )
        return cls(pp=pp, dp=total // (pp * cp * ep), cp=cp, ep=ep)

    @classmethod
    def over_all(cls, *, pp: int = 1, cp: int = 1, ep: int = 1) -> Mesh:
        """The mesh of all ranks of this run. Raises ConfigError."""
        mesh = cls(pp=pp, cp=cp, ep=ep)
        if num_ranks() == 1 and mesh.num_ranks > 1:
            raise ConfigError(
                f"pp {pp} x cp {cp} x ep {ep} need several processes: start a multiple of {mesh.num_ranks} of them with"
                f" torchrun --nproc-per-node {mesh.num_ranks} -m indexshare train ..."
            )
        return cls.of(num_ranks(), pp=pp, cp=cp, ep=ep)

    @property
    def num_ranks(self) -> int:
        return self.pp * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks that run the same layers."""
        return self.dp * self.cp * self.ep

    @property
    def stage(self) -> int:
        """Which layers are this rank's."""
        return rank() // self.stage_ranks

    @property
    def num_batches(self) -> int:
        """Parts into which the rows of a batch are divided."""
        return self.dp * self.ep

    @property
    def batch_index(self) -> int:
        """Which of these parts is this rank's."""
        return rank() % self.stage_ranks // (self.cp * self.ep) * self.ep + rank() % self.ep

    def rows_of(self, batch: Batch) -> Batch:
        """This rank's rows of a batch that is the same on all ranks. Raises ConfigError when they do not come out even.

        Ranks that differ in pp or cp only have the same rows.
        """
        num_rows = len(batch.token_ids)
        if num_rows % self.num_batches:
            raise ConfigError(
                f"a batch of {num_rows} rows does not divide among {self.num_batches} ranks (dp x ep): set batch_size"
                f" to a multiple of {self.num_batches} in every phase of the recipe, or start fewer processes"
            )
        share = num_rows // self.num_batches
        return batch.rows(self.batch_index * share, (self.batch_index + 1) * share)


def over_all_ranks(losses: Any) -> Any:
    """A step's losses (`Losses`, a dataclass), each rank's its part of means: their sums, without gradient.

    Acceptance is the mean over the ranks that have tokens, which all watch about as many.
    """
    if num_ranks() == 1:
        return losses
    scalars = (losses.total, losses.lm, losses.mtp, losses.index_kl)
    sums = global_sum(torch.stack([scalar.detach().double() for scalar in scalars]))
    tokens = torch.tensor([losses.num_tokens, losses.num_tokens > 0], device=sums.device)
    num_tokens, num_watching = global_sum(tokens).tolist()
    return replace(
        losses,
        **dict(zip(("total", "lm", "mtp", "index_kl"), sums.unbind(), strict=True)),
        num_tokens=num_tokens,
        mtp_acceptance=global_sum(losses.mtp_acceptance) / max(num_watching, 1),
        expert_counts={layer: global_sum(counts) for layer, counts in losses.expert_counts.items()},
        metrics={
            name: float(global_sum(torch.tensor(value, device=sums.device))) for name, value in losses.metrics.items()
        },
    )
