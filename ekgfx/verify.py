"""Check a cut: against the uncut network with zeroed weights, and by tracing the pruned model again.

For tests of one's own rules and models; `ekgfx.prune` checks every cut by itself.

    from ekgfx.verify import check_masked, check_pruned

    assert check_masked(traced, plan, (x,)) < 1e-10
    check_pruned(traced, plan, ekgfx.prune(model, plan, traced), (x,))
"""

from ekgfx.surgery.check import check_pruned, perturb, relative_error
from ekgfx.surgery.masked import MaskedNetwork, check_masked, mask_tensor

__all__ = ["MaskedNetwork", "check_masked", "check_pruned", "mask_tensor", "perturb", "relative_error"]
