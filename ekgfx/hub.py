"""Pruned timm models in timm's own form: a folder or a Hugging Face repository with config.json and model.safetensors.

    import ekgfx.hub                      # teaches timm the architecture "ekgfx_pruned"
    ekgfx.hub.save("runs/NAME", "small")
    model = timm.create_model("local-dir:small", pretrained=True)

config.json names the unpruned architecture and what was kept of it; everything else is as timm writes it, so that
timm's scripts, transforms and `hf-hub:` names work.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_pretrained, register_model, save_for_hf
from torch import nn

from ekgfx.errors import ModelError
from ekgfx.graph.plan import Plan
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import read_manifest
from ekgfx.surgery.cut import prune

__all__ = ["arguments", "ekgfx_pruned", "save"]

ARCHITECTURE = "ekgfx_pruned"


def save(run: str | Path, folder: str | Path) -> None:
    """Writes the pruned model of a run to `folder`: config.json and model.safetensors, as timm's `save_for_hf` does.

    Args:
        run: the run's folder.
        folder: where to write; it is made.

    Raises:
        ModelError: the run's model is none of timm's.

    Example:
        >>> ekgfx.hub.save("runs/r50", "small")  # doctest: +SKIP
        >>> again = timm.create_model("local-dir:small", pretrained=True)  # doctest: +SKIP
    """
    told = arguments(run)
    save_for_hf(checkpoint.load(run), str(folder), safe_serialization=True, **told)


def arguments(run: str | Path) -> dict[str, Any]:
    """What timm's `save_for_hf` and `push_to_hf_hub` must know besides the model: model_config and model_args.

    Args:
        run: the run's folder.

    Example:
        >>> timm.models.push_to_hf_hub(ekgfx.load(run), "me/small", **ekgfx.hub.arguments(run))  # doctest: +SKIP
    """
    path = Path(run)
    manifest = read_manifest(path)
    source = checkpoint.recorded_source(manifest, path)
    if source is None or not source.model.startswith("timm:"):
        raise ModelError(f"{path} is no run of a timm model ({source and source.model}); keep it with ekgfx.save")
    dense = source.without_weights().build()
    plans = [*manifest.get("ancestors", []), checkpoint.read_plan(path).to_json()]
    given = {
        "dense": source.model.removeprefix("timm:").partition(".")[0],
        "dense_args": source.timm_options(),
        "plans": plans,
        "input_size": list(dense.example_inputs[0].shape[1:]),
    }
    return {"model_config": {"architecture": ARCHITECTURE}, "model_args": given}


@register_model
def ekgfx_pruned(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    *,
    dense: str = "",
    dense_args: Mapping[str, Any] | None = None,
    plans: Sequence[str] = (),
    input_size: Sequence[int] = (3, 224, 224),
    num_classes: int | None = None,
    **options: Any,
) -> nn.Module:
    """timm's entry point: the unpruned architecture `dense`, cut by `plans` one after the other, with the weights
    beside config.json if `pretrained`. num_classes: other than the saved ones get a new classifier; options: timm's.

    Raises ModelError when `dense` is no architecture of this timm, PlanError when a plan does not fit it.
    """
    if not timm.is_model(dense) or dense == ARCHITECTURE:
        raise ModelError(f"this timm has no model {dense!r}; config.json was written by another version, or damaged")
    for name in ("pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"):
        options.pop(name, None)
    model = timm.create_model(dense, **{**options, **dict(dense_args or {})}).eval()
    whole: Any = model
    config = dict(whole.pretrained_cfg)
    for plan in plans:
        whole = prune(whole, Plan.from_json(plan), example_inputs=torch.zeros(2, *input_size), graphs="allow")
    told = pretrained_cfg.to_dict() if hasattr(pretrained_cfg, "to_dict") else dict(pretrained_cfg or {})
    config = {**config, **told, "architecture": dense, "input_size": tuple(input_size)}
    whole.pretrained_cfg = whole.default_cfg = config
    if pretrained:
        load_pretrained(whole, whole.pretrained_cfg, num_classes=whole.num_classes, in_chans=int(input_size[0]))
    if num_classes is not None and num_classes != whole.num_classes:
        if isinstance(whole.get_classifier(), nn.Linear):  # timm makes the new one as wide as this says
            whole.num_features = whole.head_hidden_size = whole.get_classifier().in_features
        whole.reset_classifier(num_classes)
    return whole  # type: ignore[no-any-return]
