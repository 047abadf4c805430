"""Expand cells into steps. The key of a step is the hash of everything that determines its result.

    teacher ─ prepare ─ select ─ convert ─ stage … stage ─ export ─ evaluate

A key covers the step's parameters, the content of its files and the keys of its input steps, but no paths. So
cells with equal first steps share them, in one experiment and in several.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_hydra.config.loading import from_dict, load_run_config, read_config, to_dict
from megatron_hydra.config.model import HydraConfig, stored_switches
from megatron_hydra.config.run import RunConfig, SourceConfig
from megatron_hydra.config.validate import accumulation_steps, check_run
from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import fingerprint
from megatron_hydra.experiments.spec import (
    SHIPPED,
    TEACHER,
    Cell,
    SelectionSpec,
    StageSpec,
    as_plain,
)
from megatron_hydra.head_map import HeadMap, strategy_name
from megatron_hydra.hf_identity import is_hub_name, resolve_hf_folder

FORMAT = 1
"""It increases when the meaning of a step changes, so that earlier results are not used."""

PREPARED = "{prepare}"
"""In file names: the folder of the cell's prepare step."""

PLACE = "<input>"
"""Placeholder in a run's config for a path that is known only when the stage runs."""

_NEW_KEYS = {
    "data": ("held_out",),
    "schedule": ("patience", "min_improvement"),
    "validation": ("interval", "blend", "sequences", "probes", "probe_sequences"),
}
"""Keys of a run that are newer than existing steps."""

_SEEDLESS = ("layerwise", "fixed")
"""Strategies without prompts and without random draws."""
_DRAWN = ("global_random", "layer_random")
"""Strategies without prompts that draw heads at random."""
_BLIND_KEYS = ("strategy", "ratio", "granularity", "min_per_layer", "max_per_layer")
"""Options that matter to strategies without prompts."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step, which is computed only once.

    Attributes:
        key: hash of ``action``, ``params`` and ``inputs``.
        kind: name of its folder: the action, or the stage's name.
        action: its action (:data:`megatron_hydra.experiments.actions.ACTIONS`).
        title: the first cell that needs it, for logs.
        params: parameters that decide the result, as plain data.
        inputs: name → key of an input step.
        places: name → path on this machine; does not affect the result.
        row: the first cell's row, for the progress line.
    """

    key: str
    kind: str
    action: str
    title: str
    params: dict[str, Any]
    inputs: dict[str, str]
    places: dict[str, Any]
    row: str = ""


@dataclasses.dataclass
class Plan:
    """All steps of some cells.

    Attributes:
        steps: key → step; a step comes after its inputs.
        cells: cell name → its evaluation's key.
    """

    steps: dict[str, Step] = dataclasses.field(default_factory=dict)
    cells: dict[str, str] = dataclasses.field(default_factory=dict)

    def ancestors(self, key: str) -> list[str]:
        """``key`` and all steps that it needs, inputs first."""
        found: dict[str, None] = {}

        def visit(one: str) -> None:
            for other in self.steps[one].inputs.values():
                visit(other)
            found[one] = None

        visit(key)
        return list(found)


def make_plan(cells: Iterable[Cell], *, fetch: bool = True) -> Plan:
    """Expand cells into steps.

    Args:
        fetch: whether to download missing Hub models, whose content is a part of the keys. Without it, a key
            has only such a model's name, and no finished step has this key.

    Raises:
        HydraError: a stage's config is wrong, or a file is missing; names the cell.
    """
    plan = Plan()
    for cell in cells:
        try:
            plan.cells[cell.name] = _CellPlanner(plan, cell, fetch).evaluation()
        except HydraError as error:
            raise HydraError(f"{cell.name}: {error}") from None
    return plan


class _CellPlanner:
    """Adds one cell's steps to a plan."""

    def __init__(self, plan: Plan, cell: Cell, fetch: bool) -> None:
        self.plan, self.cell, self.spec, self.fetch = plan, cell, cell.spec, fetch

    def _add(
        self,
        action: str,
        params: dict[str, Any],
        inputs: Mapping[str, str | None],
        places: dict[str, Any] | None = None,
        kind: str = "",
    ) -> str:
        used = {name: key for name, key in inputs.items() if key is not None}
        key = fingerprint.of_json(
            {"format": FORMAT, "action": action, "params": params, "inputs": used}
        )[:24]
        if key not in self.plan.steps:
            title = f"{kind or action}: {self.cell.name}"
            self.plan.steps[key] = Step(
                key, kind or action, action, title, params, used, places or {}, self.cell.variant
            )
        return key

    # -- common inputs --------------------------------------------------------------------------

    def _teacher_model(self) -> tuple[dict[str, Any], dict[str, str | None], dict[str, Any]]:
        """The dense model as (params, inputs, places) for a step that reads it."""
        teacher = self.spec.teacher
        if teacher.train:
            params: dict[str, Any] = {
                "module": teacher.train[0],
                "arguments": list(teacher.train[1:]),
            }
            if any("{seed}" in word for word in teacher.train):
                params["seed"] = self.cell.seed
            return {}, {"teacher_hf": self._add("train_teacher", params, {})}, {}
        hashed, place = self._model(teacher.model, teacher.revision)
        return {"model": hashed}, {}, {"teacher_hf": place}

    def _model(self, name: str, revision: str = "", *, with_code: bool = False) -> tuple[Any, str]:
        """The hashed description of a Hugging Face model, and its folder."""
        if name == SHIPPED:
            from megatron_hydra.quickstart.shipped import shipped_teacher

            folder = shipped_teacher()
        elif (self.cell.folder / name).is_dir():
            folder = self.cell.folder / name
        else:
            found = self._hub_folder(name, revision, with_code)
            if found is None:
                return {"not here": name, "revision": revision}, name
            folder = found
        return fingerprint.of_model(folder), str(folder)

    def _hub_folder(self, name: str, revision: str, with_code: bool) -> Path | None:
        try:
            return resolve_hf_folder(name, revision, with_code=with_code, fetch=self.fetch)
        except HydraError:
            if self.fetch or not is_hub_name(name):
                raise
            return None

    def _prepare(self) -> str | None:
        prepare = self.spec.prepare
        if not prepare.function:
            return None
        params, inputs, places = self._teacher_model()
        params |= {"function": prepare.function, "options": prepare.options, "seed": self.cell.seed}
        return self._add("prepare", params, inputs, places)

    def _file(self, name: str) -> tuple[Any, str]:
        """The hashed description of a file, and its path; a prepared file is covered by its step's key."""
        if PREPARED in name or not name:
            return name, name
        path = self.cell.folder / name
        return {"name": path.name, "content": fingerprint.of_file(path)}, str(path)

    def _task(self, task: str) -> tuple[Any, str]:
        """The same for a task, which may be ``jsonl:PATH``, ``KIND:path=PATH`` or ``PATH.jsonl``."""
        for prefix in ("jsonl:", "qa:"):
            if task.startswith(prefix):
                hashed, place = self._file(task.removeprefix(prefix))
                return {"prefix": prefix, "file": hashed}, prefix + place
        return self._file(task) if task.endswith(".jsonl") else (task, task)

    # -- the steps ------------------------------------------------------------------------------

    def _select(self) -> str:
        selection = self.spec.selection
        if selection.ratio in ("all-gdn", "dense"):  # no heads to choose
            selection = SelectionSpec(
                strategy="layer_random", ratio=selection.ratio, granularity=selection.granularity
            )
        if given := self._given_map(selection):
            params, inputs, places = self._teacher_model()
            hashed, place = self._file(given)
            params |= {"head_map": hashed["content"]}
            return self._add("select", params, inputs, places | {"head_map": place})
        selection = dataclasses.replace(selection, head_maps=())
        seedless = selection.strategy in _SEEDLESS or selection.ratio in ("all-gdn", "dense")
        blind = seedless or selection.strategy in _DRAWN
        tasks = [] if blind else [self._task(task) for task in selection.tasks]
        text, text_place = self._file("" if blind else selection.text)
        compared = [self._file(path) for path in selection.compare]
        body = as_plain(selection) | {"tasks": [hashed for hashed, _ in tasks]}
        if text:
            body |= {"text": text}
        if compared:
            body |= {"compare": [hashed for hashed, _ in compared]}
        if blind:  # options of prompts and effects do not matter
            body = {key: body[key] for key in _BLIND_KEYS}
        params, inputs, places = self._teacher_model()
        params |= {"selection": body}
        if not seedless:
            params["seed"] = self.cell.seed
        if any(PREPARED in place for place in (text_place, *(place for _, place in tasks))):
            inputs |= {"prepare": self._prepare()}
        places |= {"tasks": [place for _, place in tasks], "text": text_place}
        places["compare"] = [place for _, place in compared]
        return self._add("select", params, inputs, places)

    def _given_map(self, selection: SelectionSpec) -> str:
        """The file of ``selection.head_maps`` for this cell; empty: heads are selected."""
        facts = ("strategy", "ratio", "granularity")
        wanted = [getattr(selection, name) for name in facts]
        found = []
        for name in selection.head_maps:
            head_map = HeadMap.load(self.cell.folder / name)
            drawn = strategy_name(head_map.strategy) in _DRAWN
            if [
                strategy_name(head_map.strategy),
                head_map.ratio,
                head_map.granularity,
            ] == wanted and (not drawn or head_map.seed == self.cell.seed):
                found.append(name)
        if len(found) > 1:
            raise HydraError(
                f"selection.head_maps: {found[0]} and {found[1]} both have {', '.join(map(str, wanted))}: "
                "name one of them"
            )
        return found[0] if found else ""

    def _convert(self) -> str:
        student = self.spec.student
        hashed, place = self._file(student.calibration_file)
        params, inputs, places = self._teacher_model()
        params |= {
            "hydra": _changed_switches(self.spec.hydra),
            "student": as_plain(student) | {"calibration_file": hashed},
            "seed": self.cell.seed,
        }
        if not from_dict(HydraConfig, self.spec.hydra, "hydra").mixes_in_every_head:
            inputs |= {"head_map": self._select()}
        if PREPARED in place:
            inputs |= {"prepare": self._prepare()}
        return self._add("convert", params, inputs, places | {"calibration_file": place})

    def _teacher(self) -> str:
        return self._add("teacher", *self._teacher_model())

    def _stages(self) -> str:
        before = self._convert()
        numbers = {name: number for number, name in enumerate(self.spec.stages)}
        for name, stage in self.cell.stages:
            before = self._stage(name, stage, numbers[name], before)
        return before

    def _stage(self, name: str, stage: StageSpec, number: int, before: str) -> str:
        files = [self.cell.folder / config for config in stage.configs]
        overrides = [f"{key}={_yaml(value)}" for key, value in stage.set.items()]
        verbs = [verb for file in files if (verb := read_config(file).get("verb"))]
        reads_teacher = bool(verbs) and verbs[-1] in ("align", "distill")
        config = load_run_config(
            files,
            [
                f"student.checkpoint={PLACE}",
                *([f"teacher.checkpoint={PLACE}"] if reads_teacher else []),
                f"output={PLACE}",
                f"data.tokenizer={PLACE}",
                f"seed={self.cell.seed}",
                # Each stage has another seed, so that no stage sees another one's batches again.
                f"data.seed={1000 * self.cell.seed + number}",
                *overrides,
            ],
        )
        if stage.tokens:
            per_step = config.batch.global_batch_size * config.data.sequence_length
            schedule = dataclasses.replace(config.schedule, **stage.schedule(per_step))
            config = dataclasses.replace(config, schedule=schedule)
            check_run(config)
        try:
            accumulation_steps(config, stage.processes)
        except HydraError as error:  # before the steps of an hour that come first
            raise HydraError(f"stages.{name}, processes: {stage.processes}: {error}") from None
        _, inputs, places = self._teacher_model()
        inputs |= {"student": before, "teacher": self._teacher() if reads_teacher else None}
        paths = {
            f"{name}{n}": os.path.abspath(part.path)
            for name, blend in (("", config.data.blend), ("validation.", config.validation.blend))
            for n, part in enumerate(blend)
            if part.path
        }
        params = {
            "config": _without_new_defaults(to_dict(_without_paths(config))),
            "data": {n: fingerprint.of_data(path) for n, path in paths.items()},
            "processes": stage.processes,
        }
        places |= {"data": paths, "cache_dir": config.data.cache_dir}
        return self._add("stage", params, inputs, places, kind=name)

    def evaluation(self) -> str:
        """Key of the cell's last step."""
        spec = self.spec
        evaluation = spec.evaluation
        if evaluation.lm_eval and self.fetch:
            from megatron_hydra.evaluation.lm_eval_suite import require_lm_eval

            require_lm_eval()  # before days of training, not after them
        tasks = [self._task(task) for task in evaluation.tasks]
        text, haystack = self._file(evaluation.haystack)
        params: dict[str, Any] = {}
        inputs: dict[str, str | None]
        places: dict[str, Any] = {}
        if not spec.hf_model:
            inputs = {"model": self._add("export", {}, {"student": self._stages()})}
        elif spec.hf_model == TEACHER:
            params, inputs, places = self._teacher_model()
            inputs = {"model": inputs.get("teacher_hf")}
            places = {"model": places.get("teacher_hf")}
        else:
            hashed, place = self._model(
                spec.hf_model, spec.hf_revision, with_code=evaluation.trust_remote_code
            )
            params, inputs, places = {"model": hashed}, {}, {"model": place}
        body = as_plain(evaluation) | {"tasks": [h for h, _ in tasks], "haystack": text}
        places["processes"] = body.pop("processes", 1)
        if include := evaluation.lm_eval_include:
            include = str(self.cell.folder / include)
            body["lm_eval_include"] = fingerprint.of_folder(Path(include))
            places["lm_eval_include"] = include
        if any(PREPARED in place for _, place in tasks):
            inputs |= {"prepare": self._prepare()}
        places |= {"tasks": [place for _, place in tasks], "haystack": haystack}
        return self._add(
            "evaluate", params | {"evaluation": body, "seed": self.cell.seed}, inputs, places
        )


def _changed_switches(hydra: Mapping[str, Any]) -> dict[str, Any]:
    """Options that differ from the defaults. An explicit default does not change the key.

    It uses the first defaults: if a default has changed, an old step's student differs from today's.
    """
    default = {**to_dict(HydraConfig()), **stored_switches({})}
    chosen = to_dict(from_dict(HydraConfig, hydra, "hydra"))
    return {key: value for key, value in chosen.items() if value != default[key]}


def _yaml(value: Any) -> str:
    """A value as text for an override: JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _without_paths(config: RunConfig) -> RunConfig:
    """Remove data paths; the content of the data is hashed separately."""

    def nowhere(blend: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return tuple(dataclasses.replace(part, path=PLACE) if part.path else part for part in blend)

    data = dataclasses.replace(config.data, blend=nowhere(config.data.blend), cache_dir="")
    validation = dataclasses.replace(config.validation, blend=nowhere(config.validation.blend))
    return dataclasses.replace(config, data=data, validation=validation)


def _without_new_defaults(body: dict[str, Any]) -> dict[str, Any]:
    """Remove keys of new features at their defaults, so that existing steps keep their hashes."""
    default = to_dict(RunConfig())
    shortened = dict(body)
    for section, keys in _NEW_KEYS.items():
        kept = {
            key: value
            for key, value in body[section].items()
            if key not in keys or value != default[section][key]
        }
        shortened[section] = kept
    return {key: value for key, value in shortened.items() if value != {}}
