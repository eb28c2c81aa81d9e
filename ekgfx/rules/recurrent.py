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
    of a layer must have the same number of units, and so must all layers: one η serves them all. A projection
    (`proj_size`) makes the output's units other ones than the cell's: frozen.
    """
    x, hx, params = call["input"], call["hx"], call["params"]
    states: list[Dims] = hx if isinstance(hx, list) else [hx]
    tensors_each = len(params) // (call["num_layers"] * (2 if call["bidirectional"] else 1))
    cells = [params[i : i + tensors_each] for i in range(0, len(params), tensors_each)]
    if tensors_each not in (2, 4) or any(s[-1].size != cells[0][1][1].size for s in states):
        for dims in call.tensors():
            call.freeze(*dims, why="its units are projected")
        macs = [(*x[:-1], *weight) for weight in params if len(weight) == 2]
        return Effect([call.constants(shape) for shape in call.shapes], macs=macs)
    eta = call.fresh(states[0][-1].size)
    gates = call.constant(cells[0][1][0].size // eta.size, "gates")
    directions = [eta] * (2 if call["bidirectional"] else 1)
    below: Expr = x[-1]
    for number, (weight_in, weight_hidden, *biases) in enumerate(cells):
        if number and number % len(directions) == 0:
            below = Prod((call.constant(len(directions), "directions"), eta))
        call.unify(weight_in[1], below)
        call.unify(weight_hidden[1], eta)
        for dims in (weight_in, weight_hidden, *biases):
            call.unify(dims[0], Prod((gates, eta)))
    time = 1 if call["batch_first"] and len(x) == 3 else 0
    call.freeze(x[time], why="steps of the sequence")
    for state in states:
        call.freeze(state[0], why="layers and directions")
        call.unify(state[-1], eta)
        if len(x) == 3:
            call.unify(x[1 - time], state[1])
    out = (*x[:-1], Prod((call.constant(len(directions), "directions"), eta)))
    macs = [(*x[:-1], *weight) for weight in params if len(weight) == 2]
    return Effect([out, *states], produces=("params", eta), macs=macs)
