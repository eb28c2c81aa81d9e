"""Operators that compute each output position from the inputs at the same position."""

from ekgfx.axes import ONE, Dims, Expr, Prod, fixed
from ekgfx.rules.registry import Call, Effect, Memory, rule


def broadcast(call: Call, *tensors: Dims) -> Dims:
    """Align from the right, unify the dimensions larger than one; the result has the rank of the longest."""
    rank = max(map(len, tensors), default=0)
    out: list[Expr] = [ONE] * rank
    for dims in tensors:
        for i, dim in enumerate(dims, rank - len(dims)):
            if dim.size == 1:
                continue
            if out[i].size == 1:
                out[i] = dim
            else:
                call.unify(out[i], dim)
    return tuple(out)


@rule("aten.relu.default", memory=Memory(overwrites=True, derivative=("result",)))
@rule("aten.add.Tensor", memory=Memory(overwrites=True, derivative=()))
@rule(*(f"aten.{name}.default" for name in ("hardtanh", "silu", "hardswish", "gelu")), memory=Memory(overwrites=True))
@rule("pointwise")  # every operator that PyTorch tags as pointwise, see registry.lookup
@rule(
    "aten.dropout.default",
    "aten.feature_dropout.default",
    "aten.native_dropout.default",
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.lift_fresh_copy.default",
    "aten.lift_fresh.default",
    "aten.to.dtype",
    "aten.to.device",
    "aten.to.dtype_layout",
    "aten._to_copy.default",
    "aten.where.self",
    "aten.where.ScalarSelf",
    "aten.where.ScalarOther",
    "aten.where.Scalar",
    "aten.masked_fill.Scalar",
    "aten.masked_fill.Tensor",
    "aten.copy.default",
    "aten.rrelu.default",
    "aten.leaky_relu.default",  # tagged from torch 2.12 on
    "aten.floor_divide.default",
    "aten.floor_divide.Scalar",
    "aten.zeros_like.default",
    "aten.zero.default",
    "aten.fill.Tensor",
    "aten.fill.Scalar",
    "aten.ones_like.default",
    "aten.full_like.default",
    "aten.empty_like.default",
    "aten.rand_like.default",
    "aten.randn_like.default",
    "aten.bernoulli.default",
    "aten.bernoulli.p",
    "aten.uniform.default",
    "aten.normal_functional.default",
    "aten.exponential.default",
    "aten.complex.default",
    "aten.polar.default",
    "aten.real.default",
    "aten.imag.default",
    "aten.conj.default",
    "aten._conj.default",
    "aten.resolve_conj.default",
    "aten.resolve_neg.default",
    "aten.relu6.default",
    "aten.log_sigmoid.default",
    "aten.fake_quantize_per_tensor_affine.default",
)
def pointwise(call: Call) -> Effect:
    out = broadcast(call, *call.tensors())
    return Effect([out] * len(call.shapes) if len(call.shapes) > 1 else out, carries=True)


@rule(*(f"aten.__{name}__.{kind}" for name in ("and", "or", "xor") for kind in ("Tensor", "Scalar")))
@rule(*(f"aten.{name}.{kind}" for name in ("multiply", "subtract") for kind in ("Tensor", "Scalar")))
@rule("aten.true_divide.Tensor", "aten.true_divide.Scalar")
def another_name(call: Call) -> Effect:
    """Python's operators and other names of pointwise operators, which PyTorch does not tag."""
    return pointwise(call)


@rule("aten.div.Tensor")
def divide(call: Call) -> Effect:
    """A sum divided by the number of its terms is a mean: of those that are kept, or that the batch has."""
    terms, number = Prod(tuple(getattr(call["self"], "summed", ()))), call["other"]
    if type(number) is not int or number != terms.size or all(map(fixed, terms.factors)):
        return pointwise(call)
    return Effect(call["self"], sizes={"other": terms}, carries=True, statistics=True)


@rule("aten.broadcast_tensors.default")
def broadcast_tensors(call: Call) -> Effect:
    return Effect([broadcast(call, *call["tensors"])] * len(call.shapes), carries=True)


@rule("aten.bucketize.Tensor")
def bucketize(call: Call) -> Effect:
    call.freeze(*call["boundaries"], why="boundaries")
    return Effect(call["self"], carries=True)


@rule("aten.type_as.default", "aten.to.other")
def cast(call: Call) -> Effect:
    """`self` in the type of another tensor, whose shape has no say."""
    return Effect(call["self"], carries=True)


@rule("aten.prelu.default")
def prelu(call: Call) -> Effect:
    x, weight = call["self"], call["weight"]
    if weight[0].size > 1:
        call.unify(x[1], weight[0])
    return Effect(x, carries=True)
