"""Recurrent layers: hidden units are cut like channels."""

from ekgfx.axes import Dims, Expr, Prod
from ekgfx.rules.registry import Call, Effect, rule


@rule("aten.gru_cell.default", "aten.lstm_cell.default", "aten.rnn_tanh_cell.default", "aten.rnn_relu_cell.default")
def cell(call: Call) -> Effect:
    """input (*, ι), states (*, η), weights (gates·η, ι) and (gates·η, η), biases (gates·η) → the new states.

    As in a layer, a unit whose weights are zero and that starts at zero stays there.
    """
    x, hx, weight_in, weight_hidden = (call[name] for name in ("input", "hx", "w_ih", "w_hh"))
    states: list[Dims] = hx if isinstance(hx, list) else [hx]
    eta = call.fresh(weight_hidden[1].size)
    gates = call.constant(weight_hidden[0].size // eta.size, "gates")
    call.unify(x[-1], weight_in[1])
    call.unify(weight_hidden[1], eta)
    for dims in (weight_in, weight_hidden, call["b_ih"], call["b_hh"]):
        if dims:
            call.unify(dims[0], Prod((gates, eta)))
    for state in states:
        for a, b in zip(state, (*x[:-1], eta), strict=True):
            call.unify(a, b)
    out = (*x[:-1], eta)
    return Effect(
        [out] * len(states) if isinstance(hx, list) else out,
        produces=("w_ih", eta),
        sums=[("input", None, -1), ("hx", 0 if isinstance(hx, list) else None, -1)],
        macs=[(*x[:-1], *weight_in), (*x[:-1], *weight_hidden)],
    )


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(call: Call) -> Effect:
    """input (B, T, ι), states (layers·directions, B, η), per layer and direction weights (gates·η, ι), (gates·η, η),
    biases (gates·η) → output (B, T, directions·η), final states.

    A unit whose weights are zero stays at zero, since its candidate value does, so cutting it is exact. Both directions
    of a layer must have the same number of units, and so must all layers: one η serves them all. With a projection
    (`proj_size`), a weight (π, η) more for each, π units take the place of η in the output, the first state, and what
    comes back.
    """
    x, hx, params = call["input"], call["hx"], call["params"]
    states: list[Dims] = hx if isinstance(hx, list) else [hx]
    directions = 2 if call["bidirectional"] else 1
    tensors_each = len(params) // (call["num_layers"] * directions)
    cells = [params[i : i + tensors_each] for i in range(0, len(params), tensors_each)]
    eta = call.fresh(states[-1][-1].size)
    projected = tensors_each in (3, 5)
    out = call.fresh(states[0][-1].size) if projected else eta
    gates = call.constant(cells[0][1][0].size // eta.size, "gates")
    below: Expr = x[-1]
    for number, (weight_in, weight_hidden, *others) in enumerate(cells):
        if number and number % directions == 0:
            below = Prod((call.constant(directions, "directions"), out))
        call.unify(weight_in[1], below)
        call.unify(weight_hidden[1], out)
        if projected:
            projection = others.pop()
            call.unify(projection[0], out)
            call.unify(projection[1], eta)
        for dims in (weight_in, weight_hidden, *others):
            call.unify(dims[0], Prod((gates, eta)))
    time = 1 if call["batch_first"] and len(x) == 3 else 0
    call.freeze(x[time], why="steps of the sequence")
    for state, units in zip(states, (out, eta), strict=False):
        call.freeze(state[0], why="layers and directions")
        call.unify(state[-1], units)
        if len(x) == 3:
            call.unify(x[1 - time], state[1])
    macs = [(*x[:-1], *weight) for weight in params if len(weight) == 2]
    output = (*x[:-1], Prod((call.constant(directions, "directions"), out)))
    return Effect([output, *states], produces=("params", eta), macs=macs)
