"""What the search finds, and what its steps cost. `python benchmarks/search.py PART --help` says what a part does."""

from common import program
from parts import (
    search_batches,
    search_budgets,
    search_depth,
    search_kernels,
    search_rounding,
    search_rule,
    search_scale,
    search_speed,
    search_whole,
)

PARTS = {
    "speed": search_speed,
    "whole": search_whole,
    "kernels": search_kernels,
    "scale": search_scale,
    "batches": search_batches,
    "budgets": search_budgets,
    "rule": search_rule,
    "rounding": search_rounding,
    "depth": search_depth,
}

if __name__ == "__main__":
    program(__doc__, PARTS)
