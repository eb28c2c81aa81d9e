"""How the network came about: the search, the fine-tuning, and the knowledge that guided it."""

from collections.abc import Mapping
from xml.etree.ElementTree import Element

from ekgfx.base.units import duration, percent, several
from ekgfx.report import charts
from ekgfx.report.charts import Line
from ekgfx.report.facts import Facts
from ekgfx.report.markup import element
from ekgfx.report.parts import figure, section, table
from ekgfx.runs.directory import STAGES
from ekgfx.settings.budgets import BUDGETS


def search(facts: Facts) -> Element | None:
    """The way of the search: what was kept, loss and reward after each step."""
    if not facts.steps:
        return None
    asked, base = facts.settings.search, facts.search.baseline if facts.search else None
    steps = facts.steps
    kept = [(0.0, 1.0), *((float(step.number), step.kept_fraction) for step in steps)]
    unit, budget = _budget(facts)
    shown = [
        figure(
            f"{unit} kept",
            charts.lines(
                f"{unit} kept after each step",
                [Line(f"{unit} kept", kept)],
                x="step",
                marks=[] if budget is None else [(f"budget {budget:.1%}", budget)],
                form=lambda value: f"{100 * value:.0f}%",
            ),
        )
    ]
    start = [] if base is None else [(0.0, base)]
    measured = [*start, *((float(step.number), step.measure) for step in steps)]
    losses = [(x, measure.loss) for x, measure in measured if measure.loss is not None]
    if losses:
        chart = charts.lines("loss after each step", [Line("loss", losses)], x="step", form="{:.3g}".format)
        shown.append(figure("Loss on the search's images", chart))
    rewards = [(x, measure.reward) for x, measure in measured if measure.reward is not None]
    if rewards:
        others = [
            (float(step.number), candidate.measure.reward)
            for step in steps
            for candidate in step.candidates
            if candidate.measure.reward is not None
        ]
        chart = charts.lines("reward", [Line("reward", rewards, others)], x="step", form="{:.3g}".format)
        shown.append(figure("Reward (faint: other candidates)", chart))
    count = sum(len(step.candidates) for step in steps)
    said = (
        f"{asked.strategy} search by {asked.importance} importance: {several(len(steps), 'step')}, "
        f"{count} candidates weighed, {duration(sum(step.seconds for step in steps))}."
    )
    if losses:
        said += f" The reward compares each candidate with {_TEACHERS[asked.knowledge]}."
    return section("Search", element("p", said), element("div", *shown, class_="grid3"))


def _budget(facts: Facts) -> tuple[str, float | None]:
    """What the budget was on, and the fraction to keep."""
    asked = facts.settings.search
    told = facts.search.settings.get("budget") if facts.search else None
    if isinstance(told, Mapping) and isinstance(told.get("unit"), str) and type(told.get("keep")) is float:
        return told["unit"], told["keep"]
    key, keep = next(iter(asked.budgets.items()), ("flops", None))
    return BUDGETS[key], keep if isinstance(keep, float) else None


_TEACHERS = {
    "ensemble": "the ensemble of the sub-networks met so far",
    "single": "the unpruned network",
    "none": "the labels alone",
}


def repair(facts: Facts) -> Element | None:
    """What the refit of the cut network brought, as a whole and operator by operator."""
    found = facts.repair
    if found is None:
        return None
    said = f"{str(found)[:1].upper()}{str(found)[1:]}. It took {duration(found.seconds)}."
    rows = [
        [
            layer.name,
            f"{layer.before:.3g}",
            f"{layer.after:.3g}",
            {"nothing": "left as it was", "offset": "offset alone"}.get(layer.done) or f"{layer.ridge:.0e}",
        ]
        for layer in found.layers
    ]
    parts = [element("p", said)]
    if rows:
        note = (
            "Errors are squares of what an operator's output (or the residual sum behind it) lacks, in the variance of "
            "what it should be, on held-out images."
        )
        parts += [element("p", note), table(["operator", "error before", "after", "ridge"], rows)]
    if found.skipped:
        parts.append(table(["not refitted", "why"], [[s.name, s.reason] for s in found.skipped], texts=2))
    return section("Repair", *parts)


def training(facts: Facts) -> Element | None:
    """Accuracy and loss of each epoch."""
    epochs = facts.epochs
    if not epochs:
        return None
    shown = []
    tested = [(float(epoch.number), epoch.test_accuracy) for epoch in epochs if epoch.test_accuracy is not None]
    if tested:
        marks = [
            (f"{STAGES[stage]} {percent(facts.results[stage].accuracy)}", facts.results[stage].accuracy)
            for stage in ("before", "searched", "repaired")
            if stage in facts.results and facts.results[stage].accuracy is not None
        ]
        chart = charts.lines(
            "test accuracy after each epoch",
            [Line("test accuracy", tested)],
            x="epoch",
            marks=[(name, value) for name, value in marks if value is not None],
            form=lambda value: f"{100 * value:.4g}%",
        )
        shown.append(figure("Test accuracy", chart))
    losses = [(float(epoch.number), epoch.loss) for epoch in epochs]
    chart = charts.lines(
        "training loss of each epoch", [Line("training loss", losses)], x="epoch", form="{:.3g}".format
    )
    shown.append(figure("Training loss", chart))
    asked = facts.settings.finetune
    number = several(len(epochs), "epoch")
    said = (
        f"{number} of {asked.optimizer}, batches of {asked.batch_size}, learning rate {asked.lr:g} "
        f"({asked.schedule}), {duration(sum(epoch.seconds for epoch in epochs))} of training."
    )
    return section("Fine-tuning", element("p", said), element("div", *shown, class_="grid2"))


def knowledge(facts: Facts) -> Element | None:
    """The memory bank: its teachers, and how far they agree."""
    known = facts.knowledge
    if known is None or not known.teachers:
        return None
    names = [_teacher(teacher) for teacher in known.teachers]
    rows = [
        [name, f"{teacher['loss']:.4f}", _lost(teacher["infidelity"])]
        for name, teacher in zip(names, known.teachers, strict=True)
    ]
    chart = charts.square("share of images on which two teachers agree", names, known.agreement)
    said = (
        "The memory bank: what interim sub-networks say about the training images guides the fine-tuning. The square "
        f"shows for how many of {known.samples} images, in percent, two teachers name the same class."
    )
    listed = table(["teacher", "loss when found", "lost in storage (KL)"], rows)
    parts = [figure("Agreement of the teachers", chart)] if known.agreement else []
    return section("Knowledge", element("p", said), element("div", *parts, element("div", listed), class_="grid2"))


def _lost(infidelity: float | None) -> str:
    return "–" if infidelity is None else f"{infidelity:.1e}"


def _teacher(teacher: Mapping[str, object]) -> str:
    return "unpruned" if teacher["step"] == 0 else f"step {teacher['step']}"
