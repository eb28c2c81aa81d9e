"""One step of the search in each of the ways that `search_speed.py` compares, with time and memory."""

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.plan import Plan
from ekgfx.search.candidates import worth_evaluating
from ekgfx.search.details import PAPER
from ekgfx.search.ekg import Pace, State, keeper_of, propose
from ekgfx.search.forks import Forks
from ekgfx.search.importance import taylor
from ekgfx.search.problem import Computing, Problem
from ekgfx.search.race import Outcome, evaluate_candidates
from ekgfx.search.reward import evaluate
from ekgfx.sliced import kernel_names
from ekgfx.trace import TracedModel
from ekgfx.verify import MaskedNetwork, mask_tensor

WAYS = ("masked", "sliced", "prefixes", "contiguous", "all")


def timed(problem: Problem, plan: Plan, way: str, early_stop: bool = True) -> dict[str, Any]:
    """Seconds of a step from `plan` by its parts, with the candidates' −ℛ by group.

    importance: scores of all channels. candidate: mean over those evaluated. accepted: the best network, evaluated
    again. Masked and sliced candidates are a sample, every third and every fourth.
    """
    computing = {
        "contiguous": Computing(early_stop=early_stop),
        "all": Computing(early_stop=early_stop, channels_last=True),
    }.get(way, Computing(cache=0))
    problem = replace(problem, computing=computing, batches=tuple(map(computing.prepared, problem.batches)))
    network = problem.network(plan)
    _, knowledge = evaluate(problem.network(problem.full()), problem.batches, problem.objective, None)
    widths = {name: len(problem.kept(plan, name)) / rule.size for name, rule in problem.rules.items()}
    state = State(plan, widths, knowledge)
    forks = Forks(problem.traced)
    keeper = keeper_of(problem, forks, state)
    start = clock(problem.traced)
    scores = taylor(problem, problem.full() if way == "masked" else plan, knowledge, keeper)
    importance = clock(problem.traced) - start
    if way == "masked":  # that of the uncut network takes as long; whom to remove is decided as in the others
        scores = taylor(problem, plan, knowledge)
    found = [propose(problem, state, group, scores[group], Pace(), PAPER) for group in problem.rules]
    proposals = [proposal for proposal in found if proposal is not None]
    chosen, _ = worth_evaluating(proposals, {proposal.group: proposal.lost for proposal in proposals})
    sample = chosen if way in ("prefixes", "contiguous", "all") else chosen[:: 3 if way == "masked" else 4]
    pairs = [(proposal.group, proposal.plan) for proposal in sample]
    start = clock(problem.traced)
    if way == "masked":
        outcomes = [Outcome(masked(problem, candidate, knowledge)) for _, candidate in pairs]
    elif way == "sliced":
        outcomes = [
            Outcome(evaluate(problem.network(candidate), problem.batches, problem.objective, knowledge)[0])
            for _, candidate in pairs
        ]
    else:
        outcomes = evaluate_candidates(problem, forks, plan, pairs, knowledge, kept=keeper.kept)
    candidate = (clock(problem.traced) - start) / len(pairs)
    start = clock(problem.traced)
    if way in ("sliced", "prefixes"):
        evaluate(network, problem.batches, problem.objective, knowledge)
    accepted = candidate if way == "masked" else clock(problem.traced) - start
    negatives = {
        group: None if outcome.evaluation is None else -outcome.evaluation.reward
        for (group, _), outcome in zip(pairs, outcomes, strict=True)
    }
    return {
        "importance": importance,
        "candidate": candidate,
        "accepted": accepted,
        "candidates": len(chosen),
        "step": importance + candidate * len(chosen) + accepted,
        "stopped": sum(value is None for value in negatives.values()),
        "negatives": negatives,
    }


def masked(problem: Problem, plan: Plan, knowledge: Any) -> Any:
    """A candidate in the authors' way: the model itself at full size, its cut weights zero."""
    traced = problem.traced
    kept = traced.groups.kept(plan)
    if not problem.rescale:  # no BatchNorm; layer norms over masked channels need the graph
        return evaluate(MaskedNetwork(traced, kept), problem.batches, problem.objective, knowledge)[0]
    kernels, weights = kernel_names(traced), dict(traced.model.named_buffers())
    weights = {name: value.clone() for name, value in weights.items()}  # the norms write to them
    for name, dims in traced.weight_dims().items():
        full = traced.tensor(name)
        cut = mask_tensor(full, dims, kept)
        if cut is not full:
            weights[name] = cut * (full.norm() / cut.norm().clamp_min(1e-12)) if name in kernels else cut

    def network(*inputs: Tensor) -> Any:
        return torch.func.functional_call(traced.model, weights, inputs)

    with training_norms(traced.model):
        return evaluate(network, problem.batches, problem.objective, knowledge)[0]


class training_norms:
    """BatchNorms normalize by the batch."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.train()

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.eval()


def clock(traced: TracedModel) -> float:
    """CPU seconds of this process; on a GPU wall seconds, when it is done with what it was given."""
    device = next(traced.model.parameters()).device
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def apart(work: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What `work` returns, done in a fork, with the MiB by which that grew at most (GPU: peak memory in all). Memory
    that this process has freed goes back to the system first, or the fork would grow into it."""
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return {**work(), "memory": torch.cuda.max_memory_allocated(device) >> 20}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    if (child := os.fork()) == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        theirs.send({**work(), "memory": (resident("VmHWM") - before) >> 10})
        os._exit(0)
    theirs.close()
    found: dict[str, Any] = ours.recv()
    os.waitpid(child, 0)
    return found


def resident(kind: str) -> int:
    """KiB of this process in memory: now (VmRSS), or at most so far (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1])
