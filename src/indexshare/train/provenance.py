"""Where a NaN or an infinity comes from: a step run again, every operation of it looked at.

This is far slower than a step and runs once, when a step has failed already. Infinities that belong there (the minus
infinity of a masked score) come from an operation that was given one, or from one that only moves numbers; an
operation that makes one out of finite numbers is what is looked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from indexshare.errors import KernelError
from indexshare.train.distributed import local

MAX_INPUTS_NAMED = 4
_TORCH = str(Path(torch.__file__).parent)


def explain_non_finite(model: nn.Module, compute: Callable[[], Tensor]) -> str:
    """The first operation that makes a NaN or an infinity in `compute()` or in the backward pass of its result.

    A sentence that names the operation, forward or backward, its module by its path in `model`, the line of source and
    its inputs; or the parameters that are not finite to begin with. Gradients of `model` are gone afterwards. All
    processes of a run have to call it together: it runs the whole step.
    """
    parameters = dict(model.named_parameters())
    bad = {name: tensor for name, tensor in parameters.items() if not _is_finite(tensor)}
    for parameter in parameters.values():
        parameter.grad = None
    search = _Search(
        {_storage(tensor): name for name, tensor in parameters.items()}, {_storage(t) for t in bad.values()}
    )
    with search, search.modules(model):
        try:
            compute().backward()
        except KernelError as error:  # an operation that refuses NaN: what is looked for came before it
            search.refusal = str(error)
    for parameter in parameters.values():
        parameter.grad = None
    found = search.found or search.first_nan
    sentences = [f"{_listed(list(bad))} had values that are not finite before the step"] if bad else []
    if found is not None:
        sentences.append(f"first {found}")
    elif not bad:
        sentences.append(
            search.refusal or "the same step was finite when it was run again, which points at the machine, not the run"
        )
    return "; ".join(sentences)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the model an operation was called."""

    module: str
    source: str

    def __str__(self) -> str:
        return f"{self.module or 'the loss'} ({self.source})"


@dataclass(slots=True)
class _Found:
    operation: str
    outcome: str
    place: _Place
    backward_of: str | None
    inputs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        direction = f"in the backward pass ({self.backward_of}) of" if self.backward_of else "in"
        return f"{self.operation} {direction} {self.place} made {self.outcome} from {_listed(self.inputs) or 'nothing'}"


class _Search(TorchDispatchMode):
    """Looks at every operation. `found`: the first that makes something non-finite from finite inputs; `first_nan`: the
    first that makes a NaN from inputs without one, for what `found` cannot see (a row that is masked as a whole)."""

    def __init__(self, names: Mapping[int, str], bad_storages: set[int]) -> None:
        super().__init__()
        self.names, self.bad_storages = names, bad_storages
        self.found: _Found | None = None
        self.first_nan: _Found | None = None
        self.refusal: str | None = None
        self._path: list[str] = []
        self._places: dict[int, _Place] = {}  # by number of the autograd node that the operation belongs to

    @contextmanager
    def modules(self, model: nn.Module) -> Generator[None]:
        """Follows which module runs."""

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self._path.append(name)

        with ExitStack() as stack:
            for name, module in model.named_modules():
                stack.callback(module.register_forward_pre_hook(enter(name)).remove)
                leave = module.register_forward_hook(lambda *_: (self._path.pop(), None)[1], always_call=True)
                stack.callback(leave.remove)
            yield

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place, backward_of = self._place()
        inputs = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        bad_inputs = [tensor for tensor in tensors if not _is_finite(tensor)]
        has_nan = any(bool(local(tensor).isnan().any()) for tensor in bad_inputs)
        outputs = func(*args, **kwargs)
        if self.found is not None or _moves_numbers(func, inputs):
            return outputs
        bad_outputs = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and not _is_finite(leaf)]
        if not bad_outputs:
            return outputs
        is_nan = any(bool(local(tensor).isnan().any()) for tensor in bad_outputs)
        made = _Found(str(func), "NaN" if is_nan else "infinity", place, backward_of)
        if all(_storage(tensor) in self.bad_storages for tensor in bad_inputs):
            self.found = made
        elif is_nan and not has_nan and self.first_nan is None:
            self.first_nan = made
        made.inputs = [self._describe(tensor) for tensor in tensors]
        return outputs

    def _place(self) -> tuple[_Place, str | None]:
        """Where the running operation was called, and its autograd node in a backward pass.

        torch numbers the nodes of a graph as they are made: the number leads from a backward operation to the forward
        one. Both functions are torch's own, without a public name.
        """
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is not None and not self._path:  # with a path it is a forward pass that is being repeated
            return self._places.get(node._sequence_nr(), _Place("", _source())), node.name()
        place = _Place(self._path[-1] if self._path else "", _source())
        self._places.setdefault(torch.autograd._get_sequence_nr() - 1, place)  # type: ignore[attr-defined]
        return place, None

    def _describe(self, tensor: Tensor) -> str:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        name = self.names.get(_storage(tensor), "")
        tensor = local(tensor)
        if not tensor.is_floating_point() or not tensor.numel():
            return f"{name} {dtype} {shape}".strip()
        finite = tensor[tensor.isfinite()].abs()
        size = f"up to {float(finite.max()):.3g}" if finite.numel() else "with no finite value"
        wrong = tensor.numel() - finite.numel()
        return f"{name} {dtype} {shape} {size}".strip() + (f" and {wrong} not finite" if wrong else "")


def _moves_numbers(func: Any, inputs: list[Any]) -> bool:
    """Views and uninitialised memory make no numbers; one that is given an infinity as an argument means it."""
    is_view = any(given.alias_info is not None and not given.alias_info.is_write for given in func._schema.returns)
    is_masking = any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in inputs)
    return is_view or is_masking or "empty" in func._schema.name


def _is_finite(tensor: Tensor) -> bool:
    """Of what this rank holds: nothing here may wait for another rank, which may have found something else."""
    tensor = local(tensor)
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all())


def _storage(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


def _source() -> str:
    """ "glm.py:214, forward": the innermost frame that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}"


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_INPUTS_NAMED
    return ", ".join(names[:MAX_INPUTS_NAMED]) + (f" and {more} more" if more > 0 else "")
