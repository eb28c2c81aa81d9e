"""What the sweep over other libraries knows of a network: how it is built, its inputs, and what people do with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Inputs = Callable[[int, bool], tuple[Any, ...]]
"""(batch, whether of another size) → positional arguments, in float64."""


@dataclass(frozen=True)
class Network:
    """model: as the library makes it. inputs: its positional arguments. use: what people do with such a model, tried
    on the cut one; leaf: as `ekgfx.trace` takes it. exports: to ONNX, from here; export: as the library does it.
    double: the library's own forward runs in float64. also: its Python does otherwise at another size (a table of
    positions, whether windows are shifted), and it is traced with a call at another size besides."""

    model: Any
    inputs: Inputs
    use: Callable[[Any], Any] | None = None
    leaf: tuple[str, ...] = ()
    exports: bool = True
    export: Callable[[Any], Any] | None = None
    double: bool = True
    also: bool = False


Make = Callable[[], Network]


def tensors(*shapes: tuple[tuple[int, ...], tuple[int, ...]], single: bool = False) -> Inputs:
    """Random tensors; of each, its shape after the batch, and the same at another size. single: in float32."""

    def make(batch: int, another: bool) -> tuple[Any, ...]:
        import torch

        draw = torch.Generator().manual_seed(batch)
        kind = torch.float32 if single else torch.float64
        return tuple(torch.randn(batch, *pair[another], generator=draw, dtype=kind) for pair in shapes)

    return make


def times(batch: int) -> Any:
    """A step of diffusion for each sample."""
    import torch

    return torch.arange(1, batch + 1)


def images(size: int, other: int, channels: int = 3) -> Inputs:
    """Random images."""
    return tensors(((channels, size, size), (channels, other, other)))
