"""The models of the coverage sweep: for every timm module, the smallest model of each architecture signature.

    python benchmarks/coverage.py list > benchmarks/models.txt

The signature of a model is the set of module classes it is built of. Models are built on the meta device, so that
nothing is allocated.
"""

import argparse
import sys
import warnings

import timm
import torch


def main(_: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    smallest: dict[tuple[str, frozenset[str]], tuple[int, str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            key = module, frozenset(type(m).__qualname__ for m in model.modules())
            size = sum(p.numel() for p in model.parameters())
            smallest[key] = min(smallest.get(key, (sys.maxsize, "")), (size, name))
    print("\n".join(name for _, name in sorted(smallest.values())))


def options(_: argparse.ArgumentParser) -> None:
    """None."""
