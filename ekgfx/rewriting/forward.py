"""The forward of one module as Python, from the calls that were recorded of it, with the widths that are left.

Only what the module itself runs is written out: its submodules are called as before, with their modes and hooks. A body
is made in `writer`, what its values are called is in `terms`. Where training runs the same operators with other
arguments (dropout), `self.training` chooses; where it runs others, there are two bodies.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from ekgfx.rewriting.patched import Forward
from ekgfx.rewriting.terms import InexpressibleError, Recorded, Widths
from ekgfx.rewriting.writer import Writer

Version = tuple[Recorded, Widths]


def rewrite(
    path: str,
    versions: Sequence[Version],
    inline: Iterable[str],
    reason: str,
    by_size: bool = False,
    exactly: bool = False,
) -> Forward:
    """A forward for the cut version of the module at `path`.

    versions: the calls that were recorded of the model, and what their sizes are after the cut; in a further version it
    took another way. inline: modules in it whose own forward cannot be used. by_size: as in `Terms`. exactly: of the
    sizes that are not free, others than those recorded are refused.

    Raises:
        PruneError: the module's part of the model cannot be written as a function of its arguments.
    """
    objects: dict[str, Any] = {}
    writers: list[Writer] = []
    every = [_writers(path, recorded, widths, set(inline), objects, by_size) for recorded, widths in versions]
    if any(recorded.evaluation.free != "sizes" for recorded, _ in versions):
        _tell_apart([writer for found in every for writer in found])
    if exactly:
        for writer in (writer for found in every for writer in found):
            writer.holds(writer.shapes())
    left_out = {name for found in every for writer in found for name in writer.head.left_out()}
    for found in every:
        for writer in found:
            writer.conditions |= writer.head.given(left_out)
        ours: list[Writer] = []
        for writer in found:
            twin = next((other for other in ours if not other.excludes(writer)), None)
            if twin is not None and twin.alike != writer.alike:
                raise InexpressibleError(f"{path} is called more than once, each time in another way")
            ours += [writer] if twin is None else []
        writers += [writer for writer in ours if all(writer.excludes(other) for other in writers)]
    frees = {recorded.evaluation.free for recorded, _ in versions}
    free = "" if "" in frees else "batch" if "batch" in frees else "sizes"
    fixed = any(writer.fixed for writer in writers)
    sizes = "any" if free == "sizes" and not fixed else "batch" if free == "batch" and not fixed else "example"
    left = any(writer.leaves_training for writer in writers)
    said = dict.fromkeys(note for writer in writers for note in writer.notes)
    return Forward(_source(path, writers, left), tuple(objects.items()), "; ".join((reason, *said)), sizes)


def _tell_apart(writers: Sequence[Writer]) -> None:
    """Of calls that were recorded for sizes of the example alone, each stands for its own."""
    shapes = [writer.shapes() for writer in writers]
    for size in dict.fromkeys(size for shape in shapes for size in shape):
        if len({shape.get(size) for shape in shapes}) > 1:
            for writer, shape in zip(writers, shapes, strict=True):
                writer.holds({size: shape[size]} if size in shape else {})


def _writers(
    path: str, recorded: Recorded, widths: Widths, inline: set[str], objects: dict[str, Any], by_size: bool
) -> list[Writer]:
    """One for every call of the module."""
    module = recorded.model.get_submodule(path)
    if "forward" in vars(module):
        raise InexpressibleError(f"{path} has a forward of its own")
    calls = recorded.evaluation.of(path)
    trained = recorded.training.of(path) if recorded.training else []
    if not calls:
        raise InexpressibleError(f"{path} was not called")
    if len(trained) != len(calls):
        trained = []
    return [
        Writer(module, path, recorded, widths, inline, call, trained[i] if trained else None, objects, by_size)
        for i, call in enumerate(calls)
    ]


def _source(path: str, writers: Sequence[Writer], leaves_training: bool) -> str:
    """The forward: a body for every kind of call that was seen; others are refused. leaves_training: that is left to
    the module's own forward."""
    values = " or ".join(dict.fromkeys(writer.values() for writer in writers))
    refusal = (
        f"ekgfx replaced the forward of {path or 'the model'} when it pruned, for {values} as in the example: "
        "trace with an example that is called as it is used, or with further ones (also=)"
    )
    raising = f"raise NotImplementedError({refusal!r})"
    lines = [writers[0].head.line]
    if leaves_training:
        lines += ["    if self.training:", f"        return own_forward(self, {writers[0].head.passed_on})"]
    guards = [" and ".join(writer.conditions.values()) for writer in writers]
    if len(writers) == 1:
        lines += [f"    if not ({guards[0]}):", f"        {raising}"] if guards[0] else []
        lines += [f"    {line}" for line in writers[0].lines]
    else:
        for guard, writer in zip(guards, writers, strict=True):
            lines += [f"    if {guard}:", *(f"        {line}" for line in writer.lines)]
        lines.append(f"    {raising}")
    return "\n".join(lines) + "\n"
