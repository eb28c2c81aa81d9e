"""Finding the values that fp16 cannot hold."""

import json
import subprocess
import sys

PROBE = """
import json, resource, sys, torch, onnx_ir as ir
from torch import nn
from ekgfx.export import to_onnx
from ekgfx.export.ranges import overflowing

class Chain(nn.Module):
    def forward(self, x):
        for _ in range(40):
            x = torch.tanh(1.1 * x)
        return x.mean((1, 2)) * 1e5

pixels = torch.ones(2, 512, 2048)  # 8 MiB
model = ir.load(to_onnx(Chain(), pixels, sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large = overflowing(model, [pixels])
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(large)]))
"""


def test_values_do_not_wait_in_memory_for_their_magnitudes(tmp_path):
    command = [sys.executable, "-c", PROBE, str(tmp_path / "chain.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, large = json.loads(done.stdout.splitlines()[-1])
    grown /= 2**20 if sys.platform == "darwin" else 2**10  # MiB
    # 80 values of 8 MiB, of which a few live at a time.
    assert grown < 160
    assert large == 1
