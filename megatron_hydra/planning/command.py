"""The planner as a command: it takes a request and returns a report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import Verb
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import DEFAULT_RATIO
from megatron_hydra.planning import report
from megatron_hydra.planning.hardware import Efficiency, find_gpu
from megatron_hydra.planning.models import model_kinds, read_model
from megatron_hydra.planning.search import Job
from megatron_hydra.planning.stages import STAGES, recipe_stages, stages_up_to
from megatron_hydra.planning.timing import Machine


@dataclasses.dataclass(frozen=True)
class Request:
    """The request; see ``tools/plan.py --help``. A recipe has its own sequence length, verb and tokens."""

    model: str
    sequence_length: int
    gpus: int
    gpu: str
    recipe: str = ""
    verb: Verb | None = None
    ratio: str = DEFAULT_RATIO
    head_map: str = ""
    tokens: float = 15e9
    tokens_per_step: int = 1_048_576
    price_per_gpu_hour: float | None = None
    precision: str = "bf16"
    distributed_optimizer: bool = True
    loss_chunk: int = 2048
    gated_delta_net: Literal["fla", "torch"] = "fla"
    efficiency: tuple[str, ...] = ()
    top: int = 5
    as_json: bool = False


def plan(request: Request, show: Callable[[str], None]) -> int:
    """Plan and report.

    Raises:
        HydraError: bad input, or nothing fits.
    """
    if request.recipe:
        return _plan_recipe(request, show)
    _check(request)
    machine = _machine(request)
    model = read_model(request.model)
    kinds = model_kinds(model, request.ratio, request.head_map)
    if request.verb in ("align", "distill"):
        kinds.pop("dense")  # this is the teacher, which is not trained towards itself
    job = _job(request)
    plans, refused = report.compare(kinds, job, machine)
    costs, no_stage = _costs(request, kinds, job, machine, plans)
    if request.as_json:
        body = _as_json(request, machine, plans, refused, costs)
        show(json.dumps(body | {"stages_that_do_not_fit": no_stage}, indent=1))
        return 0
    is_drawn = not (request.head_map or model.is_hybrid)
    text = _as_text(request, machine, kinds, plans, refused, is_drawn)
    stages = ["", "Stages, each under its fastest layout", *report.stage_lines(costs, no_stage)]
    for line in [*text, *stages]:
        show(line)
    return 0


def _plan_recipe(request: Request, show: Callable[[str], None]) -> int:
    """The cost of a recipe's stages for HydraHead, each under its fastest layout."""
    budgets, tokens = recipe_stages(request.recipe)
    longest = max(budget.sequence_length for budget in budgets)
    request = dataclasses.replace(request, sequence_length=longest, tokens=tokens)
    _check(request)
    machine = _machine(request)
    name, model = list(
        model_kinds(read_model(request.model), request.ratio, request.head_map).items()
    )[-1]
    found, missing = report.all_stages(
        model, budgets, tokens, _job(request), machine, request.price_per_gpu_hour
    )
    if not found:
        raise HydraError(f"{request.recipe}: no stage fits: {next(iter(missing.values()))}")
    costs, refused = {name: found}, {name: missing} if missing else {}
    if request.as_json:
        body = _as_json(request, machine, {}, {}, costs)
        show(json.dumps(body | {"stages_that_do_not_fit": refused}, indent=1))
        return 0
    kind = f"{request.gpus} × {request.gpu}, {request.precision}"
    for line in (
        f"{request.recipe}: {request.model}, {tokens / 1e9:.2f} B tokens on {kind}",
        *_basis(request),
        "",
        "Stages, each under its fastest layout",
        *report.stage_lines(costs, refused),
    ):
        show(line)
    return 0


def _machine(request: Request) -> Machine:
    return Machine(find_gpu(request.gpu), Efficiency().changed(list(request.efficiency)))


def _job(request: Request) -> Job:
    return Job(
        request.verb or "finetune", request.sequence_length,
        max(request.tokens_per_step, request.sequence_length), request.gpus, request.precision,
        request.distributed_optimizer, request.loss_chunk, request.gated_delta_net,
    )  # fmt: skip


def _check(request: Request) -> None:
    for flag, value in (
        ("--seq", request.sequence_length),
        ("--gpus", request.gpus),
        ("--top", request.top),
    ):
        if value < 1:
            raise HydraError(f"{flag} is {value}: it must be at least 1")
    if request.tokens <= 0 or request.loss_chunk < 1:
        raise HydraError("--tokens and --loss-chunk must be above 0")
    if request.price_per_gpu_hour is not None and request.price_per_gpu_hour < 0:
        raise HydraError("--price-per-gpu-hour must not be negative")


def _costs(
    request: Request,
    kinds: dict[str, ModelConfig],
    job: Job,
    machine: Machine,
    plans: dict[str, list[report.Plan]],
) -> tuple[dict[str, list[report.StageCost]], dict[str, dict[str, str]]]:
    """Stages of the kinds that have a plan, and why some stages have none."""
    if request.verb is not None:
        return {name: [_only_stage(request, job, found[0])] for name, found in plans.items()}, {}
    costs: dict[str, list[report.StageCost]] = {}
    refused: dict[str, dict[str, str]] = {}
    for name in plans:
        if name == "dense":  # it exists already
            continue
        costs[name], missing = report.all_stages(
            kinds[name],
            stages_up_to(job.sequence_length),
            request.tokens,
            job,
            machine,
            request.price_per_gpu_hour,
        )
        if missing:
            refused[name] = missing
    return costs, refused


def _only_stage(request: Request, job: Job, plan: report.Plan) -> report.StageCost:
    """The requested stage, with all tokens."""
    budget = next(s for s in STAGES if s.verb == request.verb)
    budget = dataclasses.replace(
        budget, sequence_length=job.sequence_length, tokens_per_step=job.tokens_per_step
    )
    return report.cost_of(budget, request.tokens, plan, request.price_per_gpu_hour)


def _as_json(
    request: Request,
    machine: Machine,
    plans: dict[str, list[report.Plan]],
    refused: dict[str, str],
    costs: dict[str, list[report.StageCost]],
) -> dict[str, Any]:
    return {
        "request": dataclasses.asdict(request),
        "basis": report.BASIS
        | ({"gated_delta_net": report.TORCH_GDN} if request.gated_delta_net == "torch" else {}),
        "gpu": dataclasses.asdict(machine.gpu),
        "assumed_efficiency": dataclasses.asdict(machine.efficiency),
        "layouts": {
            name: [report.plan_as_dict(p) for p in found[: request.top]]
            for name, found in plans.items()
        },
        "does_not_fit": refused,
        "stages": {name: [report.stage_as_dict(c) for c in found] for name, found in costs.items()},
    }


def _basis(request: Request) -> list[str]:
    efficiency = dataclasses.asdict(_machine(request).efficiency)
    lines = [
        "",
        "What the figures rest on",
        *(f"  {name}: {text}" for name, text in report.BASIS.items()),
        "  efficiencies: " + ", ".join(f"{k} {v:g}" for k, v in efficiency.items()),
    ]
    if request.gated_delta_net == "torch":
        lines.append(f"  gated_delta_net: {report.TORCH_GDN}")
    return lines


def _as_text(
    request: Request,
    machine: Machine,
    kinds: dict[str, ModelConfig],
    plans: dict[str, list[report.Plan]],
    refused: dict[str, str],
    is_drawn: bool,
) -> list[str]:
    verb = request.verb or "finetune"
    lines = [
        f"{request.model}: {verb} at {request.sequence_length:,} tokens on {request.gpus} × "
        f"{request.gpu}, {request.precision}",
        *_basis(request),
    ]
    if is_drawn:
        lines.append(
            "  head map: ASSUMED: FA heads drawn at random (give --head-map for a real one)"
        )
    for name, found in plans.items():
        lines += ["", *report.details(name, kinds[name], found[0])]
    for name, why in refused.items():
        lines += ["", f"{name}: {why}"]
    for name, found in plans.items():
        lines += [
            "",
            f"Best of {len(found)} layouts that fit, {name}",
            *report.ranked(found, request.top),
        ]
    return lines
