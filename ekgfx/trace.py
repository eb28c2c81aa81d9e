"""The front door: from an nn.Module to everything that can be known about pruning it.

traced = ekgfx.trace(model, torch.randn(1, 3, 224, 224))
print(traced.groups)                    # what can be pruned together
traced.cost(plan)                       # what a plan leaves, without running anything
traced.subnetwork(plan)(images)         # what the pruned network computes, without cutting anything
"""

import contextlib
import copy
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.batches import Inputs
from ekgfx.cost import Cost, Products, cost_of, evaluate, mac_table
from ekgfx.errors import EkgfxError, PlanError, TraceError
from ekgfx.graph import AxisGraph, Example
from ekgfx.groups import Groups, find_groups
from ekgfx.leaf import as_operators, evaluation_mode, find_leaves, record
from ekgfx.obstacle import explained, unknown_sizes
from ekgfx.plan import Plan
from ekgfx.returns import as_choice, tensors_returned
from ekgfx.rules.registry import passing
from ekgfx.sliced import SubNetwork


class TracedModel(AxisGraph):
    """A traced model: its axis graph, and the questions that can be asked of it."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The places of the outputs that matter; none named where all do."""
        return () if self.returns is None else self.returns.choice

    @cached_property
    def groups(self) -> Groups:
        """The channel groups; one for every free axis of a parameter, with all places that it cuts."""
        return find_groups(self, self._mac_table)

    @cached_property
    def unknown_costs(self) -> dict[str, int]:
        """Operator without a rule → how many parameters more would lie in tensors that some group cuts, if it passed
        positions on: what a rule for it can bring. What others hold as well is not counted."""
        here = self.prunable_parameters()
        return {op: self.assuming({op: passing}).prunable_parameters() - here for op in self.unknown_ops}

    def cost(self, plan: Plan | None = None) -> Cost:
        """MACs per sample and parameters of the (sub-)network, from the expressions alone."""
        counts = {axis: len(kept) for axis, kept in self.groups.kept(plan).items()}
        return cost_of(self, self._mac_table, counts)

    def layer_macs(self, plan: Plan | None = None) -> dict[str, int]:
        """Module → MACs per sample of the operators in it (not in its submodules), in the order of the graph."""
        counts = {axis: len(kept) for axis, kept in self.groups.kept(plan).items()}
        counts[self.batch] = 1
        total: dict[str, int] = {}
        for operation in self.operations:
            if operation.name in self._mac_table:
                macs = evaluate(self._mac_table[operation.name], counts)
                total[operation.module] = total.get(operation.module, 0) + macs
        return total

    def rebound(self, model: nn.Module) -> "TracedModel":
        """The same graph over the weights of another module that was built the same way.

        Raises PlanError where the other has not all of the weights, or has them in other shapes.
        """
        other = copy.copy(self)
        other.model = model
        named = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
        for name, dims in self.weight_dims().items():
            shape, found = tuple(dim.size for dim in dims), named.get(name)
            if found is None or tuple(found.shape) != shape:
                has = "no" if found is None else f"{tuple(found.shape)} as"
                raise PlanError(
                    f"the traced model is another one than this {type(model).__name__}, which has {has} {name!r} "
                    f"(traced: {shape}); trace the model that is pruned"
                )
        return other

    @cached_property
    def _mac_table(self) -> dict[str, Products]:
        return mac_table(self)

    def subnetwork(self, plan: Plan | None = None, *, batch_stats: bool = False, rescale: bool = False) -> SubNetwork:
        """The network that `plan` leaves, as the graph on sliced weights; see `SubNetwork`."""
        return SubNetwork(self, self.groups.kept(plan), batch_stats=batch_stats, rescale=rescale)


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    kwargs: dict[str, Any] | None = None,
    *,
    leaf: Sequence[str | type[nn.Module]] = (),
    outputs: str | int | Sequence[str | int] | None = None,
) -> TracedModel:
    """Trace a model in evaluation mode.

    Args:
        model: any module that `torch.export` can follow; neither its weights nor its modes are changed.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of arguments by name; if all tensors
            share their leading size it is the batch (a batch of one is doubled, so that the batch can be told from
            other sizes of one). Moved to the model's device.
        kwargs: keyword arguments.
        leaf: modules that run as they are, by name, glob (`*` also matches dots) or class: their Python may depend on
            values. All positions of their inputs, outputs and parameters stay.
        outputs: which of the model's outputs matter: keys, fields or indices ("logits", 0, "aux.0"), or globs. The
            others come out as well, but narrower where what they show is cut. By default all keep their positions.

    Raises:
        TraceError: the model's forward cannot be turned into a graph; the message says where.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes a torch.nn.Module, not a {type(model).__name__}")
    args, named = Inputs.of(example_inputs)
    args, named = Inputs(args, {**named, **(kwargs or {})}).onto(model)
    example = _at_least_two((args, named))
    return _traced(model, example, find_leaves(model, leaf), outputs=as_choice(outputs))


def check_traced(value: object, caller: str) -> None:
    """TraceError where `value` is no traced model, but the model itself, say."""
    if not isinstance(value, TracedModel):
        raise TraceError(
            f"{caller} takes a traced model, not a {type(value).__name__}: traced = ekgfx.trace(model, example_inputs)"
        )


def retrace(model: nn.Module, source: TracedModel) -> TracedModel:
    """Trace a model that was made from a traced one in the same way, so that their operators can be compared.

    Raises:
        TraceError: as `trace`.
    """
    return _traced(model, source.example, list(source.leaves), source.decomposed, source.outputs)


def _traced(
    model: nn.Module, example: Example, names: list[str], decompose: bool = False, outputs: tuple[str, ...] = ()
) -> TracedModel:
    args, named = example
    with evaluation_mode(model):
        try:
            leaves = record(model, names, args, named)
            with torch.no_grad(), as_operators(model, leaves), tensors_returned(model, outputs) as returns, _quiet():
                program = torch.export.export(model, *example, strict=False)
        except EkgfxError:
            raise
        except Exception as error:  # torch.export raises many types, all of them about the user's model
            raise explained(model, error, args, named) from error
        problem = unknown_sizes(model, program)
        if problem is not None:
            raise problem
        return TracedModel(model, program, example, leaves, decompose, returns[-1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What PyTorch logs and prints about an export that fails is in the exception as well: it goes no further."""
    printed, known = io.StringIO(), logging.root.manager.loggerDict.values()
    loggers = [
        logger for logger in known if isinstance(logger, logging.Logger) and f"{logger.name}.".startswith("torch.")
    ]
    handlers = {handler for logger in loggers for handler in logger.handlers}  # PyTorch gives most of them their own

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    for handler in handlers:
        handler.addFilter(passes)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            # Recurrent layers keep a list of their own parameters, and look at it anew in every forward.
            warnings.filterwarnings("ignore", message=r"The tensor attributes? self\..*were assigned during export")
            yield
        sys.stderr.write(printed.getvalue())  # what the user's own forward says
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def _at_least_two(example: Example) -> Example:
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor)]
    if not tensors or any(t.ndim == 0 or t.shape[0] != 1 for t in tensors):
        return example
    doubled: Example = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), example)
    return doubled
