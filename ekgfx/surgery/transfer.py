"""The other half of pruning in the middle of training: optimizers and moving averages go on with the pruned network."""

from collections.abc import Collection, Iterator, MutableMapping
from typing import Any, TypeVar, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from ekgfx.axes import ONE, Axis, Dims, axes, count
from ekgfx.errors import PruneError
from ekgfx.execution.subnetwork import slice_tensor, slice_weights
from ekgfx.graph.plan import Plan
from ekgfx.graph.untouched import deep_copy
from ekgfx.tracing.traced import TracedModel

Kept = dict[Axis, Tensor]
Subject = TypeVar("Subject", Optimizer, MutableMapping[str, Tensor])


@overload
def transfer(subject: Subject, pruned: nn.Module, plan: Plan, traced: TracedModel, *, model: Any = ...) -> Subject: ...
@overload
def transfer(subject: nn.Module, pruned: nn.Module, plan: Plan, traced: TracedModel, *, model: Any = ...) -> Any: ...
def transfer(
    subject: Any, pruned: nn.Module, plan: Plan, traced: TracedModel, *, model: nn.Module | None = None
) -> Any:
    """Give the pruned network what was gathered while the original trained: momenta, second moments, averaged weights.

    The subject is changed in place and returned, so that schedulers, scalers and trainers that hold it go on as before.
    What belongs to other parameters than the model's stays as it is.

    Args:
        subject: one of

            - an optimizer of the model's parameters: its groups hold those of `pruned` from now on, in the same order
              and with the same options; of every state tensor of a parameter's shape the kept positions stay, or of
              that shape with ones in it (factored second moments of `torch.optim.Adafactor`); single numbers (`step`)
              stay as they are, and what belongs to a block that the plan drops goes. An optimizer inside it (lookahead,
              sharpness-aware minimization) goes with it;
            - an average of the model's weights, that is a second module with the same parameters, or a wrapper of one
              (`torch.optim.swa_utils.AveragedModel`, timm's `ModelEmaV3`): the wrapper then holds a module built as
              `pruned` is, with the kept positions of the averaged weights. An average without a wrapper is not changed,
              its successor is returned;
            - a dictionary of such weights by name: every entry is replaced by what is kept of it.
        pruned: what `prune` made of the model by `plan`.
        plan: the plan.
        traced: the traced model.
        model: the module whose parameters the optimizer holds, where `traced` is of another one built the same way.

    Returns:
        The subject; of an average without a wrapper, its successor.

    Raises:
        PruneError: `pruned` is not what the plan leaves, a state's shape follows from the parameter's in no known way
            (the message names both; nothing has been changed then), or an average is not of this model.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> pruned = ekgfx.prune(model, plan, traced)
        >>> ekgfx.transfer(optimizer, pruned, plan, traced)
        >>> ekgfx.transfer(average, pruned, plan, traced)
    """
    source = traced if model is None or traced.model is model else traced.rebound(model)
    kept, gone = source.groups.kept(plan), source.left_by(plan).gone
    if isinstance(subject, Optimizer):
        return _optimizer(subject, pruned, source, kept, gone)
    if isinstance(subject, nn.Module):
        return _average(subject, pruned, plan, source, kept)
    dims = source.weight_dims()
    for name in subject.keys() & gone:
        del subject[name]
    for name in subject.keys() & dims.keys():
        subject[name] = slice_tensor(subject[name], dims[name], kept)
    return subject


def _optimizer(
    optimizer: Optimizer, pruned: nn.Module, source: TracedModel, kept: Kept, gone: Collection[str]
) -> Optimizer:
    dims, new = source.weight_dims(), dict(pruned.named_parameters(remove_duplicate=False))
    counts = {axis: len(index) for axis, index in kept.items()}
    names: dict[Tensor, str] = {}
    for name, old in source.model.named_parameters():
        names[old] = name
        if name in gone:
            continue
        expected = [count(dim, counts) for dim in dims[name]] if name in dims else [*old.shape]
        found = [*new[name].shape] if name in new else None
        if found != expected:
            raise PruneError(
                f"{name} of the pruned {type(pruned).__name__} has the shape {found}, the plan leaves {expected}: pass "
                "what prune made of this model by this plan"
            )
    optimizers = list(_optimizers(optimizer))
    states = [(one.state, dict(one.state)) for one in optimizers]
    for _, made in states:
        for parameter in [parameter for parameter in made if parameter in names]:
            name, entries = names[parameter], made.pop(parameter)
            if name in gone:
                continue
            if name in dims:
                entries = {key: _kept_of(value, key, name, dims[name], kept) for key, value in entries.items()}
            made[new[name]] = entries
    for state, made in states:
        state.clear()
        state.update(made)
    for group in {id(group): group for one in optimizers for group in one.param_groups}.values():
        left = [held for held in group["params"] if names.get(held) not in gone]
        group["params"][:] = [new[names[held]] if held in names else held for held in left]
    return optimizer


def _optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer and those that it holds."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _optimizers(value)


def _kept_of(value: Any, key: str, name: str, dims: Dims, kept: Kept) -> Any:
    """What is kept of one entry of a parameter's state."""
    if not isinstance(value, Tensor) or value.numel() == 1 or not any(a in kept for dim in dims for a in axes(dim)):
        return value
    shape = [dim.size for dim in dims]
    if value.ndim != len(shape) or any(has not in (size, 1) for has, size in zip(value.shape, shape, strict=True)):
        raise PruneError(
            f"the optimizer's {key!r} of {name} has the shape {[*value.shape]}, which does not follow from the "
            f"parameter's, {shape}: empty the optimizer's state, so that it begins anew, or make a new optimizer"
        )
    own = [dim if has == dim.size else ONE for dim, has in zip(dims, value.shape, strict=True)]
    return slice_tensor(value, own, kept)


def _average(average: nn.Module, pruned: nn.Module, plan: Plan, source: TracedModel, kept: Kept) -> nn.Module:
    dims = source.weight_dims()
    shapes = {n: [d.size for d in dims[n]] if n in dims else [*p.shape] for n, p in source.model.named_parameters()}

    def is_average(module: nn.Module) -> bool:
        return {name: [*parameter.shape] for name, parameter in module.named_parameters()} == shapes

    path, inner = next(((path, m) for path, m in average.named_modules() if is_average(m)), ("", None))
    if inner is None:
        raise PruneError(
            f"this {type(average).__name__} holds no module with the parameters of the unpruned "
            f"{type(source.model).__name__}: pass an average of this model, before it was transferred"
        )
    weights = slice_weights(source.rebound(inner), kept, rescale=plan.rescale)
    own = {**dict(inner.named_parameters()), **dict(inner.named_buffers()), **weights}
    successor: nn.Module = deep_copy(pruned)
    asks = {name: parameter.requires_grad for name, parameter in inner.named_parameters()}
    for name, tensor in [*successor.named_parameters(), *successor.named_buffers()]:
        if name in own:
            tensor.data = own[name].detach().clone()
            tensor.requires_grad_(asks.get(name, False))
    modes = {name: module.training for name, module in inner.named_modules()}
    for name, module in successor.named_modules():
        module.training = modes.get(name, inner.training)
    if not path:
        return successor
    parent, _, name = path.rpartition(".")
    setattr(average.get_submodule(parent), name, successor)
    return average
