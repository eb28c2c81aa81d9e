"""Where a network is to run: provider, precision, batch size, and the widths that such hardware likes.

`cuda:fp16:batch=64`, `cpu:fp32:batch=8:threads=1`, `cpu:int8:batch=8`
"""

import re
from dataclasses import dataclass

import torch

from ekgfx.base.schema import show
from ekgfx.errors import RecipeError

PRECISIONS = {"cpu": ("fp32", "fp16", "int8"), "cuda": ("fp32", "tf32", "fp16")}
"""What each provider whose layers can be timed one by one computes in."""


@dataclass(frozen=True)
class Target:
    """threads: of the CPU; 0 takes as many as there are."""

    provider: str
    precision: str = "fp32"
    batch: int = 1
    threads: int = 0

    def __str__(self) -> str:
        """What `parse` reads back."""
        threads = f":threads={self.threads}" if self.threads else ""
        return f"{self.provider}:{self.precision}:batch={self.batch}{threads}"

    @classmethod
    def parse(cls, text: str) -> "Target":
        """A target as it is typed: PROVIDER[:PRECISION][:batch=N][:threads=N]. Raises RecipeError for anything else."""
        provider, *rest = text.split(":")
        if provider not in PRECISIONS:
            raise RecipeError(
                f"unknown target {show(text)}: layers can be timed on {' and '.join(PRECISIONS)}; "
                "write cuda:fp16:batch=64"
            )
        precision, numbers = "fp32", {"batch": 1, "threads": 0}
        for part in rest:
            key, equals, value = part.partition("=")
            if not equals and part in PRECISIONS[provider]:
                precision = part
            elif key in numbers and re.fullmatch("[1-9][0-9]{0,8}", value):
                numbers[key] = int(value)
            else:
                raise RecipeError(
                    f"cannot read {show(part)} in target {show(text)}: after {provider} come a precision "
                    f"({', '.join(PRECISIONS[provider])}), batch=N and threads=N"
                )
        return cls(provider, precision, **numbers)

    @property
    def staircase(self) -> "Staircase":
        """How latency depends on widths there."""
        return staircase(self.provider, self.precision)


@dataclass(frozen=True)
class Staircase:
    """How latency depends on a width. tile: channels that the hardware computes at once, so that fewer cost the same
    time; grain: only multiples of this get the fast kernels."""

    tile: int
    grain: int


def staircase(provider: str, precision: str) -> Staircase:
    """The staircase of a kind of hardware; on the CPU that of this machine.

    Tensor cores multiply 8 channels of fp16, bf16 or int8 and 4 of TF32 at once, and NVIDIA's libraries use them where
    the channel counts of a layer are multiples of that (Deep Learning Performance Guide); other GPU kernels load 4 fp32
    values at once. onnxruntime's CPU convolutions pad channels to blocks of one vector register of fp32
    (`MlasNchwcGetBlockSize`: 16 with AVX-512, else 8), and take only multiples of 4 into that layout: a MobileNetV2 cut
    to 55% of its MACs without alignment takes longer than the uncut one. Its INT8 products pack the output channels in
    blocks of 16 as well and add up four inputs at a time.
    """
    if provider == "cpu":
        return Staircase(16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8, 4)
    channels = 8 if precision in ("fp16", "bf16", "int8") else 4
    return Staircase(channels, channels)
