"""What a cut adds to the memory of a process, beside a deep copy of the model. Linux; a process for every row.

    python benchmarks/surgery_memory.py resnet50 vit_base_patch16_224 --output benchmarks/results/surgery_memory.json

Every group is cut evenly until 55% of the MACs are left, without verification. "Added" is the highest resident memory
while cutting less that before it; "largest" is the model's largest parameter.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WAYS = ("deepcopy", "prune", "prune inplace")


def measure(name: str, way: str) -> dict[str, Any]:
    """MiB of the model, of its largest parameter, and added by one way."""
    import copy

    import timm
    import torch
    from coverage import even_plan

    import ekgfx

    torch.set_num_threads(1)
    model = timm.create_model(name).eval()
    traced = ekgfx.trace(model, torch.randn(2, *model.pretrained_cfg["input_size"]))
    plan = even_plan(traced, 0.55)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    kept = (
        copy.deepcopy(model)
        if way == "deepcopy"
        else ekgfx.prune(model, plan, traced, verify=False, inplace=way == "prune inplace")
    )
    added = _status("VmHWM") - before
    del kept
    return {"model": name, "way": way, "weights": _mib(sum(sizes)), "largest": _mib(max(sizes)), "added": _mib(added)}


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


def _mib(size: float) -> float:
    return round(size / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("surgery_memory.json"))
    parser.add_argument("--one", choices=WAYS, help="measure the first model only, that way, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.models[0], args.one)))
        return
    rows = []
    for name in args.models:
        for way in WAYS:
            command = [sys.executable, __file__, name, "--one", way]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            print(rows[-1], flush=True)
    args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
