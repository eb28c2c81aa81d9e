"""Which models can be pruned, and is the result right? `python benchmarks/coverage.py PART --help` says more."""

from common import program
from parts import (
    coverage_int8,
    coverage_libraries,
    coverage_list,
    coverage_onnx,
    coverage_peers,
    coverage_round_trip,
    coverage_timm,
    coverage_transformers,
)

PARTS = {
    "timm": coverage_timm,
    "transformers": coverage_transformers,
    **coverage_libraries.LIBRARIES,
    "onnx": coverage_onnx,
    "int8": coverage_int8,
    **coverage_peers.PEERS,
    "round-trip": coverage_round_trip,
    "list": coverage_list,
}

if __name__ == "__main__":
    program(__doc__, PARTS)
