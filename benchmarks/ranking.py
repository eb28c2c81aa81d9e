"""Which channels a cut, or a search, should keep.
`python benchmarks/ranking.py PART --help` says what a part measures."""

from common import program
from parts import ranking_cut, ranking_search

PARTS = {
    "cut": ranking_cut,
    "search": ranking_search,
}

if __name__ == "__main__":
    program(__doc__, PARTS)
