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
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.cost import Cost, Products, cost_of, evaluate, mac_table
from ekgfx.errors import EkgfxError, TraceError
from ekgfx.graph import AxisGraph, Example
from ekgfx.groups import Groups, find_groups
from ekgfx.leaf import Leaves, as_operators, evaluation_mode, find_leaves, record
from ekgfx.obstacle import explained, unknown_sizes
from ekgfx.plan import Plan
from ekgfx.rules.registry import passing
from ekgfx.sliced import SubNetwork
from ekgfx.untouched import State, differing, put, state_of, untouched


class TracedModel(AxisGraph):
    """A traced model: its axis graph, and the questions that can be asked of it."""

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

    def changed(self, model: nn.Module) -> State:
        """What the modules of `model` (this one, or another built the same way) have otherwise than these had when they
        were traced: caches filled since then, or for other sizes."""
        return differing(state_of(model), self.state)

    def rebound(self, model: nn.Module) -> "TracedModel":
        """The same graph over the weights of another module that was built the same way."""
        other = copy.copy(self)
        other.model = model
        return other

    @cached_property
    def _mac_table(self) -> dict[str, Products]:
        return mac_table(self)

    def subnetwork(self, plan: Plan | None = None, *, batch_stats: bool = False, rescale: bool = False) -> SubNetwork:
        """The network that `plan` leaves, as the graph on sliced weights; see `SubNetwork`."""
        return SubNetwork(self, self.groups.kept(plan), batch_stats=batch_stats, rescale=rescale)


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    leaf: Sequence[str | type[nn.Module]] = (),
) -> TracedModel:
    """Trace a model in evaluation mode.

    Args:
        model: any module that `torch.export` can follow; it is left as it was, also where its forward keeps something.
        example_inputs: one tensor or a tuple of positional arguments; if all tensors share their leading size it is the
            batch (a batch of one is doubled, so that the batch can be told from other sizes of one).
        kwargs: keyword arguments.
        leaf: modules that run as they are, by name, glob (`*` also matches dots) or class: their Python may depend on
            values. All positions of their inputs, outputs and parameters stay.

    Raises:
        TraceError: the model's forward cannot be turned into a graph; the message says where.
    """
    args = tuple(example_inputs) if not isinstance(example_inputs, Tensor) else (example_inputs,)
    return _traced(model, _at_least_two((args, dict(kwargs or {}))), find_leaves(model, leaf))


def retrace(model: nn.Module, source: TracedModel, state: State | None = None) -> TracedModel:
    """Trace a model that was made from a traced one in the same way, so that their operators can be compared.

    state: what modules are given for the time of the tracing: caches that were filled since the first one, say, as they
    were then (`TracedModel.changed`).

    Raises:
        TraceError: as `trace`.
    """
    return _traced(model, source.example, list(source.leaves), source.decomposed, state)


def _traced(
    model: nn.Module, example: Example, names: list[str], decompose: bool = False, state: State | None = None
) -> TracedModel:
    with untouched(model), evaluation_mode(model):
        put(model, state or {})
        try:
            leaves, program = _exported(model, names, example)
        except TraceError:
            if not _fills_caches(model, *example):
                raise
            leaves, program = _exported(model, names, example)
        return TracedModel(model, program, example, leaves, decompose, state_of(model))


def _exported(model: nn.Module, names: list[str], example: Example) -> tuple[Leaves, torch.export.ExportedProgram]:
    with untouched(model):
        try:
            leaves = record(model, names, *example)
            with torch.no_grad(), as_operators(model, leaves), _quiet():
                program = torch.export.export(model, *example, strict=False)
        except EkgfxError:
            raise
        except Exception as error:  # torch.export raises many types, all of them about the user's model
            raise explained(model, error, *example) from error
        problem = unknown_sizes(model, program)
        if problem is not None:
            raise problem
        return leaves, program


def _fills_caches(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Run the model; whether it has kept something that it did not have. What has no graph may then be in a cache: the
    anchors of a detector, say, which are made anew for each new size of image."""
    before = state_of(model)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception:  # noqa: BLE001  whatever the user's forward raises; why the export failed is said
        return False
    return bool(differing(state_of(model), before))


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
            # What a forward keeps is put back; recurrent layers look at a list of their own parameters in each.
            warnings.filterwarnings(
                "ignore", message=r"The tensor attributes? self\..*(was|were) assigned during export"
            )
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
