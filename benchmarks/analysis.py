"""What a trace, a cut and an installation take.
`python benchmarks/analysis.py PART --help` says what a part measures."""

from common import program
from parts import analysis_freed, analysis_install, analysis_memory, analysis_time

PARTS = {
    "time": analysis_time,
    "memory": analysis_memory,
    "freed": analysis_freed,
    "install": analysis_install,
}

if __name__ == "__main__":
    program(__doc__, PARTS)
