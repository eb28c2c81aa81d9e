"""What is told of a description that a pruned model carries, and that describes the network before the cut."""

from torch import nn


def told(pruned: nn.Module) -> str:
    """A sentence where a library would build the unpruned network from what the model holds; "" elsewhere."""
    layers = getattr(pruned, "yaml", None)  # Ultralytics' models, and YOLOv5's
    if not isinstance(layers, dict) or not {"backbone", "head"} <= layers.keys():
        return ""
    kind = type(pruned).__name__
    return (
        f"{kind}.yaml describes the network before the cut, and what builds a network from it, as YOLO.train does, "
        "builds that one: ekgfx.callbacks.ultralytics.keep(yolo, pruned) lets it train the pruned one"
    )
