"""`ekgfx prune --depth`: blocks go, and the run, its report and what goes on from it know of it."""

import json

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1)

    def forward(self, x):
        return x + self.b(self.a(x).relu())

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Conv2d(1, 6, 3), Block(), Block(), nn.Linear(6, 10)
        nn.init.zeros_(self.two.b.weight), nn.init.zeros_(self.two.b.bias)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x).relu())).mean((2, 3)))

def made():
    torch.manual_seed(0)
    return Net(), torch.zeros(2, 1, 8, 8)
"""


def test_a_run_without_a_block(ekgfx, refused, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    recipe = "data: photos\nsearch: {flops: 0.5, step: 0.5, images: 16, depth: true}\nexport: {latency: false}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = ekgfx("prune", "net.py:made", "--recipe", "recipe.yaml", "--weights", "none", "--onnx", "-o", "run")
    assert done.code == 0, done.said
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "two" in plan["dropped"]
    assert "without two" in done.err
    assert "residual blocks that became identities: " in done.out
    assert (tmp_path / "run" / "model.onnx").is_file()
    assert ekgfx("report", "run").code == 0
    assert "Residual blocks that became identities: " in (tmp_path / "run" / "report.html").read_text()
    told = json.loads(ekgfx("groups", "run", "--json").out)
    assert not any(place["parameter"].startswith("two") for group in told["groups"] for place in group["places"])
    assert "depth goes with the strategy 'ekg'" in refused(
        "prune", "net.py:made", "--depth", "--search", "uniform", "--flops", "0.5", "--weights", "none"
    )
