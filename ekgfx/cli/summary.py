"""The table at the end of a job."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ekgfx.base.files import read_json
from ekgfx.cli.render import change, human, out, percent, show_table, table
from ekgfx.runs.directory import STAGES, read_manifest


def show_frontier(path: Path) -> None:
    """The networks of all budgets beside the unpruned one, where the run has several."""
    from ekgfx.pipeline.frontier import Frontier

    found = Frontier.of(path)
    if found is None:
        return
    first = found.networks[0]
    timed = any(network.milliseconds is not None for network in found.networks)
    rows = []
    for number, network in enumerate(found.networks):
        reach = f" ({' – '.join(map(percent, network.interval))})" if network.interval else ""
        said = [network.label + (" (knee)" if number == found.knee else ""), percent(network.quality) + reach]
        said += [f"{human(network.macs)} ({network.macs / first.macs:.1%})", human(network.params)]
        if timed:
            said.append(_milliseconds(network.milliseconds))
        rows.append(tuple(said))
    columns = ["budget", f"{found.measures} (95%)", "MACs", "parameters", *([found.target] if timed else [])]
    out.print()
    show_table(table(None, columns, rows, numbers=range(1, len(columns))))
    key, _, value = found.networks[1].label.split(",")[-1].partition("=")
    out.print(f"take one with: ekgfx export {path} --{key} {value}", soft_wrap=True)


def show(path: Path) -> None:
    """Accuracy, MACs, parameters and ONNX latency of the run: before → after search → after fine-tuning."""
    manifest = read_manifest(path)
    results: Mapping[str, Mapping[str, Any]] = manifest.get("results", {})
    quality = "agreement" if any(score["agreement"] is not None for score in results.values()) else "accuracy"
    latency = _medians(path)
    promise = manifest.get("latency", {})
    kept: Mapping[str, float] = promise.get("milliseconds", {})
    cases = list(dict.fromkeys(case for case, _ in latency))
    rows = []
    for name, title in STAGES.items():
        if name in results:
            score, network = results[name], "dense" if name == "before" else "pruned"
            times = [_milliseconds(latency.get((case, network))) for case in cases]
            if kept:
                times.insert(0, f"{kept[network]:.3g} ms")
            rows.append((title, percent(score[quality]), human(score["macs"]), human(score["params"]), *times))
    columns = ["", quality, "MACs", "parameters", *(f"ONNX, {case}" for case in cases)]
    if kept:
        columns.insert(4, promise["target"] + (" (predicted)" if promise["measured"] is None else ""))
    show_frontier(path)
    out.print()
    show_table(table(None, columns, rows, numbers=range(1, len(columns))))
    first, last = results["before"], next(results[name] for name in reversed(STAGES) if name in results)
    out.print(f"\nMACs {change(first['macs'], last['macs'])}")
    out.print(f"parameters {change(first['params'], last['params'])}")
    dropped = read_json(path / "plan.json").get("dropped", [])
    if dropped:
        out.print(f"residual blocks that became identities: {', '.join(dropped)}", soft_wrap=True)
    if kept:
        dense, pruned = kept["dense"], kept["pruned"]
        share = pruned / dense
        out.print(f"latency {dense:.3g} ms → {pruned:.3g} ms ({share:.1%} kept, {1 - share:.1%} removed)")
    if quality == "agreement":
        out.print(
            "agreement: test images for which the network says what the unpruned one says (no labels, no accuracy)"
        )
    if str(manifest.get("weights", "")).startswith("random") and not manifest["settings"]["pretrain"]["epochs"]:
        out.print(f"weights: {manifest['weights']}; structure, cost and latency don't depend on them, accuracy does")
    if "finetuned" not in results:
        out.print(f"not fine-tuned; to do so: ekgfx finetune {path} --epochs N")
    out.print(f"run {path}")
    both = [case for case in cases if {(case, "dense"), (case, "pruned")} <= set(latency)]
    if both:
        ratios = {case: latency[case, "dense"] / latency[case, "pruned"] for case in both}
        speed = ", ".join(f"{ratio:.2f} times as fast on {case}" for case, ratio in ratios.items())
        change_of = f"{quality} {percent(first[quality])} → {percent(last[quality])}"
        left = last["macs"] / first["macs"]
        out.print(f"\ngained: {speed}; {change_of} at {left:.1%} of the MACs")
        widths = [len(kept) for kept in read_json(path / "plan.json")["kept"].values()]
        said = advice(max(ratios.values()), left, manifest["settings"]["search"], widths)
        if said is not None:
            out.print(said, soft_wrap=True)
    if str(manifest["settings"]["model"]).startswith("ekgfx.models:"):
        out.print(
            "your own model: ekgfx prune my_model.py:factory --weights FILE --data folder:DIR --flops 0.55 --epochs 20"
        )


def advice(faster: float, left: float, search: Mapping[str, Any], widths: Collection[int]) -> str | None:
    """What to try where the milliseconds did not follow the MACs by half; None where they did.

    left: share of the MACs. search: its settings. widths: channels that each group keeps.
    """
    if search["latency"] is not None or search["align"] not in (None, 1) or faster >= (1 + 1 / left) / 2:
        return None
    by_time = "--latency 0.6 --target cpu:fp32:batch=1 searches by milliseconds"
    odd = sum(width % 8 > 0 for width in widths)
    if odd:
        return (
            f"fewer MACs brought little speed: {odd} of {len(widths)} widths are no multiple of 8, and leave hardware "
            f"idle; --align 8 (or auto) keeps them even, {by_time}"
        )
    return (
        f"fewer MACs brought little speed, though all widths are even: {by_time}; `ekgfx report` has each layer's time"
    )


def _milliseconds(time: float | None) -> str:
    return "–" if time is None else f"{time:.3g} ms"


def _medians(path: Path) -> dict[tuple[str, str], float]:
    """(case, dense | pruned) → median in ms; empty where nothing was exported or timed."""
    file = path / "export.json"
    latency = read_json(file)["latency"] if file.is_file() else None
    timings = [] if latency is None else latency["timings"]
    return {(f"{t['provider']} {t['precision']} batch {t['batch']}", t["network"]): t["median_ms"] for t in timings}
