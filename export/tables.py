"""The measurements as rich tables, for a terminal; what is measured knows nothing of how it is shown."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ekgfx.base.units import human, percent, several

from .latency import LatencyTable, Speedup
from .parity import Parity
from .precisions import Precisions


def _plain(title: str, caption: str) -> Table:
    """A table without a frame, its title and caption at its left."""
    return Table(
        title=title,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )


def latency_table(measured: LatencyTable) -> Table:
    """One row for each network in each setting: median, 95th percentile, and the speed-up where it exceeds noise."""
    table = _plain(_title(measured), measured.note)
    for column in ("provider", "batch", "network"):
        table.add_column(column, no_wrap=True)
    for column in ("median ms", "p95 ms", "speed-up (95% range)"):
        table.add_column(column, justify="right", no_wrap=True)
    ratios = {(s.provider, s.precision, s.batch, s.network): s for s in measured.speedups}
    setting: tuple[str, str, int] | None = None
    for timing in measured.timings:
        previous, setting = setting, (timing.provider, timing.precision, timing.batch)
        if previous is not None and previous != setting:
            table.add_section()
        table.add_row(
            f"{timing.provider} {timing.precision}",
            str(timing.batch),
            timing.network,
            f"{timing.median_ms:.3f}",
            f"{timing.p95_ms:.3f}",
            speedup_text(ratios.get((*setting, timing.network))),
        )
    return table


def precisions_table(found: Precisions, measured: LatencyTable | None) -> Table:
    """One row for each network in each precision (and batch size): its score, the size of its file, and its latency."""
    caption = "; ".join(filter(None, (*found.notes, measured.note if measured else "")))
    shown = _plain("Precisions" if measured is None else _title(measured), caption)
    for column in ("network", "precision"):
        shown.add_column(column, no_wrap=True)
    for column in (found.quality or "score", "file"):
        shown.add_column(column, justify="right", no_wrap=True)
    if measured is not None:
        for column in ("batch", "median ms", "p95 ms", "speed-up (95% range)"):
            shown.add_column(column, justify="right", no_wrap=True)
    timings = {} if measured is None else {(t.network, t.batch): t for t in measured.timings}
    ratios = {} if measured is None else {(s.network, s.batch): s for s in measured.speedups}
    for batch in dict.fromkeys(batch for _, batch in timings) or [None]:
        for variant in found.variants:
            cells = [variant.network, variant.precision, percent(variant.score), f"{human(variant.bytes)}B"]
            if batch is not None:
                if (timing := timings.get((variant.name, batch))) is None:
                    continue
                cells += [str(batch), f"{timing.median_ms:.3f}", f"{timing.p95_ms:.3f}"]
                cells.append(speedup_text(ratios.get((variant.name, batch))))
            shown.add_row(*cells)
        shown.add_section()
    return shown


def speedup_text(speedup: Speedup | None) -> str:
    """ "1.52× (1.48–1.56)", or "no difference (0.97–1.04)" inside the noise; empty for the reference itself."""
    if speedup is None:
        return ""
    ratio = speedup.ratio
    head = "no difference" if ratio.verdict == "no difference" else f"{ratio.value:.2f}×"
    return f"{head} ({ratio.low:.2f}–{ratio.high:.2f})"


def parity_text(parity: Parity) -> str:
    """One line: how far the file is from the model."""
    batches = " and ".join(map(str, parity.batches))
    return (
        f"parity with PyTorch: {parity.relative:.1e} relative, {parity.absolute:.1e} absolute "
        f"({parity.precision}, batches {batches}, tolerance {parity.tolerance:.0e})"
    )


def places(measured: LatencyTable) -> list[str]:
    """Where it was timed: the processor and its threads, the GPU, as far as it is known."""
    facts = measured.environment
    threads = [several(int(facts["threads"]), "thread")] if "threads" in facts else []
    processor = ", ".join([facts.get("cpu", "CPU"), *threads])
    return [processor, *([facts["gpu"]] if "gpu" in facts else [])]


def _title(measured: LatencyTable) -> str:
    return f"Latency · {' · '.join(places(measured))} · onnxruntime {measured.environment['onnxruntime']}"
