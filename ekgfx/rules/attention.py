"""Fused attention."""

from ekgfx.axes import Prod
from ekgfx.rules.pointwise import broadcast
from ekgfx.rules.registry import Call, Effect, rule


@rule("aten.scaled_dot_product_attention.default")
def scaled_dot_product_attention(call: Call) -> Effect:
    """query (*, H, L, E), key (*, Hₖ, S, E), value (*, Hₖ, S, V), mask → (*, H, L, V).

    Heads stand or fall together; with grouped queries H = Hₖ·repeat. Features shared by query and key may be cut only
    if the scale is given: the implicit 1/√E would change with them. The value's features pass through.
    """
    query, key, value, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    lead = query[:-2]
    if call["enable_gqa"] and query[-3].size != key[-3].size:
        repeat = call.fresh(query[-3].size // key[-3].size)
        call.unify(query[-3], Prod((key[-3], repeat)))
        call.unify(key[-3], value[-3])
    else:
        lead = broadcast(call, query[:-2], key[:-2], value[:-2])
    call.unify(query[-1], key[-1])
    if call["scale"] is None:
        call.freeze(query[-1], why="the implicit scale depends on it")
    call.unify(key[-2], value[-2])
    call.freeze(query[-2], key[-2], why="tokens")
    if mask:
        broadcast(call, (*lead, query[-2], key[-2]), mask)
    pairs = (*lead, query[-2], key[-2])
    return Effect(
        (*lead, query[-2], value[-1]),
        sums=[("query", None, -1)],
        macs=[(*pairs, query[-1]), (*pairs, value[-1])],
    )
