"""Normalizations: their parameters follow the channels; statistics over channels are taken over the kept ones."""

from ekgfx.axes import ONE, Prod
from ekgfx.rules.registry import Call, Effect, Memory, rule

AFFINE = ("weight", "bias", "running_mean", "running_var")


@rule("aten.batch_norm.default", memory=Memory(overwrites=True, derivative=("input",)))
@rule("aten.instance_norm.default")
def batch_norm(call: Call) -> Effect:
    """input (N, C, *), all parameters and running statistics (C).

    In training form (weight standardization is written so) the statistics are those of the positions at hand.
    """
    x = call["input"]
    for name in AFFINE:
        if call[name]:
            call.unify(x[1], call[name][0])
    return Effect(x, carries=True, statistics=bool(call.args.get("training", call.args.get("use_input_stats"))))


@rule("aten.layer_norm.default", "aten.rms_norm.default", "aten._fused_rms_norm.default")
def layer_norm(call: Call) -> Effect:
    """input (*, normalized_shape), parameters (normalized_shape); statistics over the kept positions."""
    x = call["input"]
    normalized = x[len(x) - len(call["normalized_shape"]) :]
    for name in AFFINE[:2]:
        for dim, parameter in zip(normalized, call.args.get(name) or (), strict=False):
            call.unify(dim, parameter)
    return Effect(x, sizes={"normalized_shape": normalized}, carries=True, statistics=True)


@rule("aten.group_norm.default")
def group_norm(call: Call) -> Effect:
    """input (N, γ·ω, *), parameters (γ·ω), γ = num_groups; statistics over the kept part of each group."""
    x, groups = call["input"], call["num_groups"]
    gamma, omega = call.fresh(groups), call.fresh(x[1].size // groups)
    call.unify(x[1], Prod((gamma, omega)))
    for name in AFFINE[:2]:
        if call[name]:
            call.unify(x[1], call[name][0])
    return Effect(x, sizes={"num_groups": gamma}, carries=True, statistics=True)


@rule("aten._weight_norm.default")
def weight_norm(call: Call) -> Effect:
    """v / ‖v‖ · g with norms over all dimensions of v but one (or none), which alone are longer than one in g."""
    v, g = call["v"], call["g"]
    for dim, magnitude in zip(v, g, strict=False):
        if magnitude.size > 1:
            call.unify(dim, magnitude)
    return Effect(v, statistics=True)


@rule("aten.norm_except_dim.default")
def norm_except_dim(call: Call) -> Effect:
    """The norms above, by themselves: (1, …, size, …, 1), or a single one."""
    out = tuple(ONE if n == 1 else dim for dim, n in zip(call["v"], call.shape, strict=True)) if call.shape else ()
    return Effect(out, statistics=True)
