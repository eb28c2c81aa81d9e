"""Which groups of a model shrink together, since one number stands for their widths."""

from ekgfx.graph.ties import Ties, head_widths, role_widths, tied
from ekgfx.surgery.description import description
from ekgfx.tracing.traced import TracedModel


def ties_of(traced: TracedModel, uniform_layers: bool = False) -> Ties:
    """Groups that keep the same share of their channels, and groups that stay whole for a width that must.

    uniform_layers: also what the model's configuration has one number for, or, where no configuration builds it, what
    repeated layers have in the same place.
    """
    widths = head_widths(traced)
    if not uniform_layers:
        return tied(traced.groups, widths, {})
    described = description(traced)
    if described is None:
        return tied(traced.groups, [*widths, *role_widths(traced)], {})
    return described.ties(traced.groups, widths)
