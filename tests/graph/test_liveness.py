"""When the value of a node can be dropped, derived by hand."""

from torch import fx

from ekgfx.graph.liveness import last_reads


def diamond() -> dict[str, fx.Node]:
    """x → a → b, and a + b → c."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(abs, (x,), name="a")
    b = graph.call_function(abs, (a,), name="b")
    c = graph.call_function(max, (a, b), name="c")
    graph.output((c,))
    return {node.name: node for node in graph.nodes}


def test_a_value_is_dropped_at_its_last_reader():
    assert last_reads(diamond().values()) == {"a": ["x"], "c": ["a", "b"], "output": ["c", "output"]}


def test_what_is_computed_decides_not_what_the_graph_reads_later():
    nodes = diamond()
    assert last_reads([nodes["a"], nodes["b"]]) == {"a": ["x"], "b": ["a", "b"]}


def test_what_nobody_reads_is_dropped_when_it_is_made():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(abs, (x,), name="unread")
    assert last_reads(graph.nodes) == {"unread": ["x", "unread"]}


def test_what_is_wanted_stays():
    assert last_reads(diamond().values(), stay={"a", "output"}) == {"a": ["x"], "c": ["b"], "output": ["c"]}
