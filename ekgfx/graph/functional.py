"""Make an exported graph purely functional, so that activations can be kept, reused and differentiated."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

# Higher-order operators that only wrap a nested graph: (position of the graph, position of its first input).
WRAPPERS = {"wrap_with_autocast": (4, 5), "wrap_with_set_grad_enabled": (1, 2), "tag_activation_checkpoint": (0, 1)}
BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
BATCH_NORM_TRAINING = torch.ops.aten._native_batch_norm_legit_functional.default


CHECKS = (torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range.default)
"""What PyTorch writes down of numbers that it does not know: no operator reads it."""


def functionalize(
    program: ExportedProgram, decompose: bool = False, updates: bool = False
) -> tuple[fx.Graph, ExportedProgram, bool]:
    """The program's graph with nested graphs inlined, in-place operators replaced, and dead nodes removed.

    An in-place operator on a tensor that nobody reads through another view afterwards is replaced by its functional
    twin; that is nearly all of them, and much faster than tracing again. Where a view is read later, PyTorch's own
    functionalization is used (with `decompose`, in any case), which replaces some operators by others and may put the
    inputs in another order: the program that comes with the graph is the one whose signature describes them.

    updates: what the model writes to its buffers, as in training, is functional as well: the new values (but for
    counters and the running statistics of norms) stand before the model's own outputs, and the output node's meta has
    them under "updates", with the buffers' placeholders.

    Returns:
        the graph, its program, and whether PyTorch's functionalization was used.
    """
    graph = inlined(program.graph_module)
    decompose = decompose or not replace_in_place(graph, updates)
    if decompose:
        program = program.run_decompositions({})
        graph = inlined(program.graph_module)
        replace_in_place(graph)
        if updates:
            _note_updates(graph, program)
    _canonical_batch_norm(graph)
    signature = program.graph_signature
    _keep_readers(graph, {*signature.inputs_to_parameters, *signature.inputs_to_buffers})
    graph.eliminate_dead_code()
    graph.lint()
    return graph, program, decompose


def inlined(module: fx.GraphModule) -> fx.Graph:
    """A copy of the graph in which every wrapped nested graph stands in place of its call, without PyTorch's checks."""
    graph = fx.Graph()
    done: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.target in CHECKS:
            continue
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule):
            continue
        if node.op == "call_function" and name in WRAPPERS:
            nested, first = WRAPPERS[name]
            inner = inlined(getattr(module, node.args[nested].target))
            inputs = [done[n] for n in node.args[first:]]
            values = dict(zip((n for n in inner.nodes if n.op == "placeholder"), inputs, strict=True))
            done[node] = graph.graph_copy(inner, values)
        elif name == "getitem" and not isinstance(done[node.args[0]], fx.Node):
            done[node] = done[node.args[0]][node.args[1]]  # an inlined graph's output is a plain tuple of nodes
        else:
            done[node] = graph.node_copy(node, done.__getitem__)
    return graph


def _aliased_arguments(node: fx.Node, write: bool) -> list[fx.Node]:
    """Tensor arguments that the operator writes to (write=True) or may return a view of."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    found = []
    for i, argument in enumerate(node.target._schema.arguments):
        info = argument.alias_info
        if info is not None and info.is_write is write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found


def replace_in_place(graph: fx.Graph, updates: bool = False) -> bool:
    """Replace in-place operators by functional ones; False if one of them is read through another view later, or (but
    for `updates`) writes to an input or a weight."""
    written_inputs: dict[fx.Node, fx.Node] = {}  # input → its last value
    order = {node: i for i, node in enumerate(graph.nodes)}
    family: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        sources = _aliased_arguments(node, write=False)
        if getattr(node.target, "__name__", "") == "getitem":
            sources = [node.args[0]]
        shared = {node}.union(*(family[s] for s in sources))
        for member in shared:
            family[member] = shared
    for node in list(graph.nodes):
        written = _aliased_arguments(node, write=True)
        if not written:
            continue
        functional = functional_twin(node.target)
        target = written[0]
        others = family[target] - {target, node}
        read_later = any(order[user] > order[node] for member in others for user in member.users if user is not node)
        root = next((n for n, last in written_inputs.items() if last is target), target)
        outside = root.op == "placeholder"
        if functional is None or len(written) > 1 or (outside and not updates) or read_later:
            return False
        node.target = functional
        if outside:
            written_inputs[root] = node
        for user in [user for user in target.users if order[user] > order[node]]:
            user.replace_input_with(target, node)
    if written_inputs:
        _output_first(graph, {value: weight for weight, value in written_inputs.items() if weight.meta["val"].ndim})
    return True


def _output_first(graph: fx.Graph, updates: Mapping[fx.Node, fx.Node | None]) -> None:
    """Let the graph return further values before its outputs. updates: new value → placeholder of a buffer, or None."""
    (output,) = graph.find_nodes(op="output")
    output.args = ((*updates, *output.args[0]),)
    output.meta["updates"] = {**updates, **output.meta.get("updates", {})}


def _keep_readers(graph: fx.Graph, weights: set[str]) -> None:
    """Keep what the model computes with weights that nothing else reads, though nobody reads the result: its Python
    computes it too, and must be able to once it has been cut."""
    (output,) = graph.find_nodes(op="output")
    live = _ancestors(output)
    ends = [n for n in graph.nodes if n.op == "call_function" and not n.users and getattr(n.meta.get("val"), "ndim", 0)]
    kept = [n for n in ends if any(a.op == "placeholder" and a.name in weights for a in _ancestors(n) - live)]
    if kept:
        _output_first(graph, dict.fromkeys(kept))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, ahead = {node}, [node]
    while ahead:
        new = set(ahead.pop().all_input_nodes) - found
        found |= new
        ahead += new
    return found


def _note_updates(graph: fx.Graph, program: ExportedProgram) -> None:
    """The same for a graph that PyTorch made functional, which returns all new values of buffers."""
    (output,) = graph.find_nodes(op="output")
    signature = program.graph_signature
    placeholders = graph.find_nodes(op="placeholder")
    inputs = {spec.target: node for spec, node in zip(signature.input_specs, placeholders, strict=True)}
    updates, outputs = {}, []
    for spec, value in zip(signature.output_specs, output.args[0], strict=True):
        if spec.kind not in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            outputs.append(value)
        elif value.meta["val"].ndim and getattr(value.args[0], "target", None) is not BATCH_NORM_TRAINING:
            updates[value] = inputs[spec.target]
    output.args = (tuple(outputs),)
    _output_first(graph, updates)


def functional_twin(op: OpOverload) -> OpOverload | None:
    """aten.relu_.default → aten.relu.default."""
    namespace, _, name = op._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, op._overloadname, None) if name.endswith("_") and packet is not None else None


def _canonical_batch_norm(graph: fx.Graph) -> None:
    """`_native_batch_norm_legit_no_training(...)[0]` → `batch_norm(..., training=False)`, likewise in training."""
    for node in list(graph.nodes):
        if node.target not in (BATCH_NORM, BATCH_NORM_TRAINING):
            continue
        x, weight, bias, mean, var, *training, momentum, eps = node.args
        with graph.inserting_before(node):
            args = (x, weight, bias, mean, var, bool(training and training[0]), momentum, eps, True)
            norm = graph.call_function(torch.ops.aten.batch_norm.default, args)
        norm.meta = {**node.meta, "val": node.meta["val"][0]}
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(norm)
                graph.erase_node(user)
