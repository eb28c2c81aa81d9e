"""What the repair gives back, and what that changes.
`python benchmarks/repair.py PART --help` says what a part measures."""

from common import program
from parts import repair_gain, repair_questions, repair_scale

PARTS = {
    "gain": repair_gain,
    "questions": repair_questions,
    "scale": repair_scale,
}

if __name__ == "__main__":
    program(__doc__, PARTS)
