"""What each dependency adds to an installation, in MB of files, beside torch, torchvision and timm and what they need.

python benchmarks/analysis.py install    # in an environment where ekgfx is installed
"""

import argparse
import re
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires

from packaging.requirements import Requirement

GIVEN = ("torch", "torchvision", "timm")


def megabytes(package: Distribution) -> float:
    files = (package.locate_file(file) for file in package.files or ())
    return sum(file.stat().st_size for file in files if file.exists()) / 1e6  # type: ignore[attr-defined]


def needed(names: Iterable[str]) -> dict[str, float]:
    """Package → size, for these and all that they need; what is not installed (for another platform) is left out."""
    found: dict[str, float] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if name not in found:
            found[name] = megabytes(package)
            waiting += wanted(package.requires or ())
    return found


def wanted(lines: Iterable[str]) -> list[str]:
    asked = map(Requirement, lines)
    return [each.name for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]


def main(_: argparse.Namespace) -> None:
    base = needed(GIVEN)
    own = wanted(requires("ekgfx") or ())
    print(f"{', '.join(GIVEN)}, and what they need: {sum(base.values()):.0f} MB")
    for name in own:
        more = {package: size for package, size in needed([name]).items() if package not in base}
        if more:
            print(f"{name}: {sum(more.values()):.1f} MB, {len(more)} packages")
    print(f"all: {sum(needed([*GIVEN, *own]).values()):.0f} MB")


def options(_: argparse.ArgumentParser) -> None:
    """None."""
