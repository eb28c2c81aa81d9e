"""What the memory bank takes, and what it knows. `python benchmarks/bank.py PART --help` says what a part measures."""

from common import program
from parts import bank_class_folders, bank_scale

PARTS = {"scale": bank_scale, "class-folders": bank_class_folders}

if __name__ == "__main__":
    program(__doc__, PARTS)
