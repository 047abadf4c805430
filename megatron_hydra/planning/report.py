"""The planner's report, as a table or as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.planning.hardware import GIB
from megatron_hydra.planning.plan import Plan
from megatron_hydra.planning.search import Job, search
from megatron_hydra.planning.stages import HOUR, StageBudget
from megatron_hydra.planning.timing import Machine

BASIS = {
    "shapes": "exact: the head partition and padding that a run would use",
    "memory": "derived operator by operator; held within 10 % of the measured peak on the CPU (torch "
    "twins, docs/planning.md); of the GPU's kernels, GDN and the loss within 5 % of an H200's peak, "
    "three whole steps within 5 % (docs/planning.md)",
    "flops": "derived; held within 2 % of torch.utils.flop_counter on the CPU",
    "traffic": "derived: bytes that a rank sends",
    "time": "ASSUMED: a roofline of the GPU's data sheet and the host's launches beside it, with the "
    "efficiencies below; docs/planning.md holds measured steps of one to four GPUs against it",
    "launches": "counted operator by operator; held within 15 % of the operators of a step on the CPU",
    "documents": "ASSUMED: every sequence is one document (the most attention there can be)",
}
"""The assumptions of the figures."""

TORCH_GDN = (
    "torch: the plain twin, as a GPU without FLA runs it. Memory is that of its operators, and so are the "
    "launches, which make up most of a small model's step (38,000 were measured in align of a 135M model on "
    "an H200, 85 % of the step); install flash-linear-attention"
)
"""The note of a plan without FLA."""


@dataclasses.dataclass(frozen=True)
class StageCost:
    """One stage under its fastest layout.

    Attributes:
        budget: the stage.
        tokens: number of tokens that it reads.
        plan: its layout.
        hours: wall-clock hours, with validations.
        validating: hours of validations.
        gpu_hours: of all GPUs.
        price: of the GPU hours; ``None`` without a price per hour.
    """

    budget: StageBudget
    tokens: float
    plan: Plan
    hours: float
    validating: float
    gpu_hours: float
    price: float | None


def cost_of(budget: StageBudget, tokens: float, plan: Plan, price: float | None) -> StageCost:
    """The cost of a stage's tokens and validations under a layout."""
    wanted = budget.validation
    validating = 0.0
    if wanted is not None:
        validating = wanted.times * plan.validation_seconds(wanted.sequences) / HOUR
    hours = tokens / plan.tokens_per_second / HOUR + validating
    gpu_hours = hours * plan.world
    paid = None if price is None else gpu_hours * price
    return StageCost(budget, tokens, plan, hours, validating, gpu_hours, paid)


def stage_cost(
    model: ModelConfig,
    budget: StageBudget,
    tokens: float,
    job: Job,
    machine: Machine,
    price: float | None,
) -> StageCost:
    """The fastest layout of a stage, and the cost of its tokens.

    Raises:
        HydraError: nothing fits.
    """
    ours = dataclasses.replace(
        job,
        verb=budget.verb,
        sequence_length=budget.sequence_length,
        tokens_per_step=max(budget.tokens_per_step, budget.sequence_length),
    )
    return cost_of(budget, tokens, search(model, ours, machine)[0], price)


def all_stages(
    model: ModelConfig,
    budgets: Sequence[StageBudget],
    tokens: float,
    job: Job,
    machine: Machine,
    price: float | None,
) -> tuple[list[StageCost], dict[str, str]]:
    """Costs of stages that share ``tokens``, and why some have no plan."""
    costs: list[StageCost] = []
    refused: dict[str, str] = {}
    for budget in budgets:
        try:
            costs.append(stage_cost(model, budget, tokens * budget.share, job, machine, price))
        except HydraError as error:
            refused[budget.name] = str(error)
    return costs, refused


# -- JSON -----------------------------------------------------------------------------------------


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """One plan in bytes, FLOPs and seconds."""
    return {
        "layout": plan.layout(),
        "gpus": plan.world,
        "global_batch_size": plan.run.batch.global_batch_size,
        "micro_batches": plan.micro_batches,
        "parameters_per_rank": plan.memory.parameters,
        "memory_bytes": {"total": plan.memory.total, **dict(plan.memory.peak.most_common())},
        "flops_per_rank_and_step": dict(plan.flops),
        "sent_bytes_per_rank_and_step": dict(plan.sent),
        "launches_per_rank_and_step": {
            "torch": plan.time.launches.torch,
            "triton": plan.time.launches.triton,
        },
        "host_seconds_for_launches": plan.time.host,
        "share_waiting_for_the_host": plan.time.waiting / plan.time.total,
        "seconds": {
            "step": plan.time.total,
            **{f"compute {phase}": s for phase, s in plan.time.compute.items()},
            **{f"communication {kind}": s for kind, s in plan.time.communication.items()},
            "waiting for the host": plan.time.waiting,
            "pipeline bubble": plan.time.bubble,
            "optimizer": plan.time.update,
        },
        "tokens_per_second": plan.tokens_per_second,
    }


def stage_as_dict(cost: StageCost) -> dict[str, Any]:
    """One stage."""
    return {
        "stage": cost.budget.name, "verb": cost.budget.verb,
        "sequence_length": cost.budget.sequence_length, "tokens": cost.tokens,
        "hours": cost.hours, "validation_hours": cost.validating,
        "gpu_hours": cost.gpu_hours, "price": cost.price,
        "plan": plan_as_dict(cost.plan),
    }  # fmt: skip


# -- text -----------------------------------------------------------------------------------------


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def _short(plan: Plan) -> str:
    layout = plan.layout()
    fa = f" fa={layout['fa_partition']}" if plan.run.parallel.tensor > 1 else ""
    return (
        f"tp{layout['tensor']} cp{layout['context']} pp{layout['pipeline']} dp{layout['data']}"
        f"{' sp' if layout['sequence'] else ''}{fa} mb{layout['micro_batch_size']} "
        f"recompute={layout['recompute']}"
    )


def ranked(plans: list[Plan], top: int) -> list[str]:
    """The best layouts, one for each line."""
    rows = [["layout", "sequences", "GiB", "s/step", "tokens/s"]]
    for plan in plans[:top]:
        rows.append(
            [
                _short(plan),
                str(plan.run.batch.global_batch_size),
                f"{plan.memory.total / GIB:.1f}",
                f"{plan.time.total:.2f}",
                f"{plan.tokens_per_second:,.0f}",
            ]
        )
    return _table(rows)


def _parts(title: str, values: Counter[str] | dict[str, float], unit: float, form: str) -> str:
    ordered = sorted(values.items(), key=lambda item: -item[1])
    shown = ", ".join(
        f"{name} {count / unit:{form}}" for name, count in ordered if count / unit >= 0.005
    )
    return f"  {title}: {shown or 'none'}"


def details(name: str, model: ModelConfig, plan: Plan) -> list[str]:
    """Memory, FLOPs, traffic and time of one plan."""
    fa = sum(len(model.fa_heads(layer)) for layer in range(model.num_layers))
    gdn = sum(len(model.gdn_heads(layer)) for layer in range(model.num_layers))
    time = plan.time
    total = sum(plan.flops.values())
    return [
        f"{name}: {fa} FA and {gdn} GDN heads; {_short(plan)}",
        f"  a rank: {plan.memory.parameters / 1e6:,.1f} M parameters, {plan.memory.total / GIB:.2f} GiB at "
        f"the peak; {plan.run.batch.global_batch_size} sequences a step in {plan.micro_batches} "
        "micro-batches a rank",
        _parts("GiB at the peak", plan.memory.peak, GIB, ".2f"),
        _parts("TFLOPs a rank and step", plan.flops, 1e12, ",.1f") + f" (all {total / 1e12:,.1f})",
        _parts("GB sent by a rank in a step", plan.sent, 1e9, ",.2f"),
        _parts("seconds of computation", time.compute, 1, ".2f")
        + f"; optimizer {time.update:.3f}, pipeline bubble {time.bubble:.2f}",
        _parts("seconds of communication", time.communication, 1, ".2f"),
        f"  {time.launches.total:,.0f} launches a step, {time.launches.triton:,.0f} of them by Triton: "
        f"{time.host:.2f} s of the host; the device waits for it {time.waiting:.2f} s, "
        f"{time.waiting / time.total:.0%} of a step",
        f"  {time.total:.2f} s a step, {plan.tokens_per_second:,.0f} tokens/s, "
        f"{total / time.total / 1e12:,.0f} TFLOP/s a GPU",
    ]


def stage_lines(costs: dict[str, list[StageCost]], refused: dict[str, dict[str, str]]) -> list[str]:
    """Hours and price of every stage of every kind of model; the sum names stages that it omits."""
    rows = [
        ["stage", "model", "tokens", "length", "tokens/s", "hours", "GPU-hours", "price", "layout"]
    ]
    for name, stages in costs.items():
        for cost in stages:
            rows.append(
                [
                    cost.budget.name, name, f"{cost.tokens / 1e9:.2f} B",
                    f"{cost.budget.sequence_length:,}", f"{cost.plan.tokens_per_second:,.0f}",
                    f"{cost.hours:,.1f}", f"{cost.gpu_hours:,.0f}",
                    "-" if cost.price is None else f"{cost.price:,.0f}", _short(cost.plan),
                ]
            )  # fmt: skip
        missing = ", ".join(refused.get(name, ()))
        gpu_hours = sum(c.gpu_hours for c in stages)
        prices = [c.price for c in stages if c.price is not None]
        rows.append(
            [
                f"all but {missing}" if missing else "all", name,
                f"{sum(c.tokens for c in stages) / 1e9:.2f} B", "", "",
                f"{sum(c.hours for c in stages):,.1f}", f"{gpu_hours:,.0f}",
                f"{sum(prices):,.0f}" if prices else "-", "",
            ]
        )  # fmt: skip
    lines = _table(rows)
    for name, stages in costs.items():
        for cost in stages:
            if cost.validating:
                assert cost.budget.validation is not None
                lines.append(
                    f"  {name}, {cost.budget.name}: {cost.budget.validation.times:,} validations of "
                    f"{cost.budget.validation.sequences:,} sequences take {cost.validating:,.2f} of its hours"
                )
    for name, reasons in refused.items():
        lines += [f"  {name}, {stage}: {why}" for stage, why in reasons.items()]
    return lines


def compare(
    kinds: dict[str, ModelConfig], job: Job, machine: Machine
) -> tuple[dict[str, list[Plan]], dict[str, str]]:
    """Plans of every kind of model, and why there are none for the others.

    Raises:
        HydraError: nothing fits for the last kind, which is the planned model.
    """
    plans: dict[str, list[Plan]] = {}
    refused: dict[str, str] = {}
    for name, model in kinds.items():
        try:
            plans[name] = search(model, job, machine)
        except HydraError as error:
            if name == list(kinds)[-1]:
                raise
            refused[name] = str(error)
    return plans, refused
