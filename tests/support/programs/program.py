"""A random program as a module, and how one is drawn."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.programs.base import INPUTS, LARGEST, OPS, PAIRS, Apply, Shape, Spec, Step, dim_of, one_of


class Program(nn.Module):
    """A stem, the steps that fit, and a classifier of every value that nothing reads."""

    def __init__(self, kind: str, steps: Sequence[Step], ending: int) -> None:
        super().__init__()
        shape = INPUTS[kind]
        width = (4, 6, 8, 12)[ending % 4]
        match kind:
            case "words":
                self.stem: nn.Module = nn.Embedding(7, width)
            case "vector" | "tokens":
                self.stem = nn.Linear(shape[-1], width)
            case _:
                self.stem = {3: nn.Conv2d, 2: nn.Conv1d, 4: nn.Conv3d}[len(shape)](shape[0], width, 1)
        self.steps, self.reads = nn.ModuleList(), []
        self.names: list[str] = []
        with torch.no_grad():
            values = [self.stem(example(kind, 2, torch.float32))]
            for name, back, a, b, c in steps:
                self._add(values, name, back, a, b, c)
        unread = [i for i in range(len(values)) if not any(i in read for read in self.reads)]
        self.heads = nn.ModuleDict({str(i): self._head(values[i].shape, ending // 4) for i in unread[-3:]})

    def _add(self, values: list[Tensor], name: str, back: int, a: int, b: int, c: int) -> None:
        at = len(values) - 1 - back % min(len(values), 3)
        shape = tuple(values[at].shape)
        read: tuple[int, ...] = (at,)
        if name in PAIRS:
            same = [i for i, value in enumerate(values) if tuple(value.shape) == shape]
            read = (at, one_of(same, c))
        step = (OPS | PAIRS)[name](shape, a, b, c)
        if step is None:
            return
        out = step.eval()(*(values[i] for i in read))
        if out.shape[0] != 2 or not 2 <= out.ndim <= 5 or not 0 < out.numel() <= 2 * LARGEST:
            return
        self.steps.append(step)
        self.reads.append(read)
        self.names.append(name)
        values.append(out)

    def _head(self, shape: Shape, ending: int) -> Apply:
        if ending % 2 or math.prod(shape[1:]) > 256:
            keep = dim_of(shape, ending // 2)
            others = tuple(i for i in range(1, len(shape)) if i != keep)
            return Apply(lambda m, x: m.layer(x.mean(others) if others else x), layer=nn.Linear(shape[keep], 3))
        return Apply(lambda m, x: m.layer(x.flatten(1)), layer=nn.Linear(math.prod(shape[1:]), 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [self.stem(x)]
        for step, read in zip(self.steps, self.reads, strict=True):
            values.append(step(*(values[i] for i in read)))
        return [head(values[int(i)]) for i, head in self.heads.items()]


def example(kind: str, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    if kind == "words":
        return torch.randint(0, 7, (batch, *INPUTS[kind]), generator=generator)
    return torch.randn((batch, *INPUTS[kind]), generator=generator, dtype=torch.float64).to(dtype)


def specs() -> st.SearchStrategy[Spec]:
    number = st.integers(0, 23)
    step = st.tuples(st.sampled_from([*OPS, *PAIRS]), st.integers(0, 2), number, number, number)
    steps = st.lists(step, min_size=1, max_size=8)
    return st.tuples(st.sampled_from(list(INPUTS)), steps, st.integers(0, 15))
