"""Networks cut by ekgfx and by its peers to one budget.
`python benchmarks/peers.py PART --help` says what a part measures."""

from common import program
from parts import peers_referee, peers_training

PARTS = {
    "referee": peers_referee,
    "training": peers_training,
}

if __name__ == "__main__":
    program(__doc__, PARTS)
