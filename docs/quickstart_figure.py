"""Draws the picture in the README from a run of the quick start.

ekgfx prune --recipe quickstart -o run && python docs/quickstart_figure.py run docs/quickstart.svg
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def main(run: Path, picture: Path) -> None:
    results = json.loads((run / "run.json").read_text())["results"]
    stages = [name for name in ("before", "searched", "repaired", "finetuned") if name in results]
    labels = {
        "before": "before",
        "searched": "after search",
        "repaired": "after repair",
        "finetuned": "after fine-tuning",
    }
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    colors = dict(zip(labels, ("#8a94a6", "#e0a458", "#7fae8e", "#3b7a57"), strict=True))
    for panel, key, scale, title in zip(
        panels, ("accuracy", "macs"), (100, 1e-3), ("test accuracy, %", "MACs, thousands"), strict=True
    ):
        values = [results[stage][key] * scale for stage in stages]
        bars = panel.barh([labels[stage] for stage in stages], values, color=[colors[stage] for stage in stages])
        panel.bar_label(bars, fmt="%.1f", padding=3)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlim(80 if key == "accuracy" else 0, max(values) * (1.01 if key == "accuracy" else 1.2))
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlabel("axis begins at 80", fontsize=8)
    panels[1].set_yticks([])
    figure.savefig(picture, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
