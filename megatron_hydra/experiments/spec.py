"""The experiment file: typed specs of a cell, and axes and variants that expand into cells."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_hydra.config.evaluation import EvaluationOptions
from megatron_hydra.config.loading import from_dict, merge_sections, parse_yaml
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.selection import SelectionOptions
from megatron_hydra.config.student import StudentStart
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import DEFAULT_RATIO, DEFAULT_STRATEGY, strategy_name
from megatron_hydra.options import keys, worded

TEACHER = "teacher"
"""As ``hf_model``: the row is the teacher itself."""

SHIPPED = "quickstart"
"""As ``teacher.model``: the one that the package brings."""

_FIRST = {
    "SelectionSpec": "strategy ratio tasks num_prompts min_prompts probe_tokens solved max_rounds control "
    "stability receiver_effect senders sender_weight num_receivers attribution granularity min_per_layer "
    "max_per_layer kv_group_bonus",
    "StudentStart": "half_life calibrate calibration_file calibration_tokens",
    "EvaluationSpec": "tasks lengths depths samples batch_tokens haystack cache_length dtype device "
    "trust_remote_code",
}
"""The keys that specs had at first. Any other is omitted from the hashes of steps at its default, so that what
was computed before there was such a key is still found."""


def as_plain(spec: SelectionSpec | StudentStart | EvaluationSpec) -> dict[str, Any]:
    """A spec as the plain data that steps are hashed by."""
    default, first = type(spec)(), _FIRST[type(spec).__name__].split()
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {
        name: value
        for name, value in values.items()
        if name in first or value != getattr(default, name)
    }


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """The dense model that everything starts from.

    Attributes:
        model: a Hugging Face folder or Hub name, or ``quickstart``: the teacher that is shipped.
        revision: Hub revision.
        train: instead of a model: a module that trains one, as ``python -m MODULE ARGUMENTS
            --output DIR``, and its arguments; ``{seed}`` is the cell's seed.
    """

    model: str = ""
    revision: str = ""
    train: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PrepareSpec:
    """Files that a selection or calibration reads, made by a function, once a seed.

    Attributes:
        function: ``module:function``, called with (folder, model folder, seed, **options).
        options: its keyword arguments.
    """

    function: str = ""
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SelectionSpec(SelectionOptions):
    """Options of the head selection (``tools/select_heads.py``).

    ``tasks`` may name the prepared folder as ``{prepare}``; none: the default ones that the teacher solves.
    ``text`` likewise (``learned_gates``). ``strategy`` may be a name from before; a step is hashed by today's.
    ``head_maps``: files of ``tools/select_heads.py`` for this teacher. The one that has a cell's strategy,
    ratio and granularity (and seed, where heads are drawn) is used, and the cell's other options are not read.
    """

    strategy: str = DEFAULT_STRATEGY
    ratio: str = DEFAULT_RATIO
    tasks: tuple[str, ...] = ()
    head_maps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "strategy", strategy_name(self.strategy))


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """One stage of the transfer.

    Attributes:
        configs: run configs, later files over earlier ones; paths relative to the experiment file.
        set: ``section.key: value``, over the files.
        tokens: train on so many tokens (times the command's ``--tokens-scale``), rounded up to whole
            steps; 0: as many steps as the configs say.
        warmup: with ``tokens``, the share of these steps in which the learning rate rises.
        skip: leave the stage out.
        processes: ranks on this machine; more than one start through ``launch/local.sh``.
    """

    configs: tuple[str, ...] = ()
    set: dict = dataclasses.field(default_factory=dict)
    tokens: float = 0
    warmup: float = 0.03
    skip: bool = False
    processes: int = 1

    def schedule(self, tokens_per_step: int) -> dict[str, Any]:
        """What a budget in tokens says of a run's ``schedule``; nothing without a budget."""
        if not self.tokens:
            return {}
        steps = max(1, math.ceil(self.tokens / tokens_per_step))
        return {"steps": steps, "warmup_steps": min(steps - 1, math.ceil(self.warmup * steps))}


@dataclasses.dataclass(frozen=True)
class EvaluationSpec(EvaluationOptions):
    """Options of the evaluation (``tools/evaluate.py``).

    ``model_config``: keys of the model's ``config.json`` with other values, in a row with ``hf_model``.
    """

    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    model_config: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """Spec of a table row, without the seed.

    Attributes:
        hf_model: score this Hugging Face model (folder or Hub name) instead of a student;
            ``teacher``: the teacher itself.
        hf_revision: of a Hub name in ``hf_model``: branch, tag or commit.
        hydra: switches of the layer (keys of :class:`~megatron_hydra.config.model.HydraConfig`).
        stages: name → stage, in this order.
    """

    teacher: TeacherSpec = dataclasses.field(default_factory=TeacherSpec)
    prepare: PrepareSpec = dataclasses.field(default_factory=PrepareSpec)
    hf_model: str = ""
    hf_revision: str = ""
    selection: SelectionSpec = dataclasses.field(default_factory=SelectionSpec)
    hydra: dict = dataclasses.field(default_factory=dict)
    student: StudentStart = dataclasses.field(default_factory=StudentStart)
    stages: dict = dataclasses.field(default_factory=dict)
    evaluation: EvaluationSpec = dataclasses.field(default_factory=EvaluationSpec)


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """What the table and the pictures show.

    Attributes:
        columns: the main table's columns, ``task@length``, or ``task/metric`` of lm-eval; empty: all.
        baseline: the row that differences are taken from, or empty.
        train_length: marked in the pictures; 0: not.
        bars: lengths of the bar chart; empty: the shortest and the longest.
    """

    columns: tuple[str, ...] = ()
    baseline: str = ""
    train_length: int = 0
    bars: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cell:
    """One variant with one seed.

    Attributes:
        experiment, variant, seed: its place in the table.
        spec: what is done.
        stages: the stages that are not skipped, in order.
        folder: of the experiment file, which paths are relative to.
    """

    experiment: str
    variant: str
    seed: int
    spec: CellSpec
    stages: tuple[tuple[str, StageSpec], ...]
    folder: Path

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.experiment} / {self.variant} / seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment file.

    Attributes:
        name: the file's stem.
        title: of the table.
        paper: what the paper says about it, in words.
        seeds: all of them appear in the table.
        variants: names of the rows, in order.
        cells: rows × seeds, row by row.
        table: what is shown.
    """

    name: str
    title: str
    paper: str
    seeds: tuple[int, ...]
    variants: tuple[str, ...]
    cells: tuple[Cell, ...]
    table: TableSpec


@dataclasses.dataclass(frozen=True)
class _File:
    """The keys of an experiment file.

    Attributes:
        include: another file under this one, path relative to it; it may include one in turn.
        constants: name → value; ``$name`` in place of a value stands for it. Those of this file are
            over those of included ones.
        base: what all rows share (a :class:`CellSpec`).
        variants: row → what differs from base.
        axes: a grid: each axis is ``dotted.key: [values]`` or ``name: {label: what differs}``; the
            rows are the product of all axes.
    """

    include: str = ""
    constants: dict = dataclasses.field(default_factory=dict)
    title: str = ""
    paper: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    base: dict = dataclasses.field(default_factory=dict)
    variants: dict = dataclasses.field(default_factory=dict)
    axes: dict = dataclasses.field(default_factory=dict)
    table: TableSpec = dataclasses.field(default_factory=TableSpec)


def load_experiment(
    path: str | Path,
    base: str | Path | None = None,
    *,
    tokens_scale: float = 1.0,
    changes: Mapping[str, Any] | None = None,
) -> Experiment:
    """Read an experiment file and expand it.

    Args:
        base: a file to include in place of the one that the experiment file names.
        tokens_scale: every stage's ``tokens`` are multiplied by it.
        changes: keys of the file with other values, section by section; paths are absolute.

    Raises:
        HydraError: an unreadable file, an unknown key, constant or type (file, row and key are
            named), no rows, a row given twice, no seeds.
    """
    path = Path(path)
    body = merge_sections(_read(path, None if base is None else Path(base)), changes or {})
    file = from_dict(_File, body, str(path))
    if not file.seeds or len(set(file.seeds)) != len(file.seeds):
        raise HydraError(f"{path}: seeds {list(file.seeds)} must be there, each one once")
    rows = _rows(file, path)
    if not rows:
        raise HydraError(f"{path}: no rows; give variants or axes")
    cells = []
    for variant, differing in rows.items():
        where = f"{path}, row {variant!r}"
        spec, stages = _cell_spec(merge_sections(file.base, differing), where, tokens_scale)
        cells += [
            Cell(path.stem, variant, seed, spec, stages, path.resolve().parent)
            for seed in file.seeds
        ]
    if file.table.baseline and file.table.baseline not in rows:
        raise HydraError(f"{path}: table.baseline {file.table.baseline!r} is none of the rows")
    return Experiment(
        path.stem,
        file.title or path.stem,
        file.paper,
        file.seeds,
        tuple(rows),
        tuple(cells),
        file.table,
    )


def _read(path: Path, base: Path | None) -> dict[str, Any]:
    """The file over what it includes, which may include another, constants filled in."""
    files = [(path, *_parse(path))]
    while include := _included(*files[-1], base if len(files) == 1 else None):
        if include.resolve() in {other.resolve() for other, _, _ in files}:
            raise HydraError(f"{files[-1][0]} includes {include}, which includes it in turn")
        files.append((include, *_parse(include)))
    constants: dict[str, Any] = {}
    for _, _, head in reversed(files):
        constants |= head.constants
    merged: dict[str, Any] = {}
    for file, body, _ in reversed(files):
        merged = merge_sections(merged, _checked(body, constants, file))
    return merged


def _included(path: Path, body: dict[str, Any], head: _File, base: Path | None) -> Path | None:
    return base or (path.parent / head.include if head.include else None)


def _parse(path: Path) -> tuple[dict[str, Any], _File]:
    """A file's keys, and those of them that hold before constants are filled in."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"experiment {path} cannot be read: {error}") from None
    body = parse_yaml(text, str(path)) or {}
    if not isinstance(body, dict):
        raise HydraError(f"experiment {path} must be a mapping of keys")
    head = {key: body[key] for key in ("include", "constants") if key in body}
    return body, from_dict(_File, head, str(path))


def _checked(body: dict[str, Any], constants: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """One file with its constants filled in and its keys looked at."""
    filled = _filled(body, constants, str(path))
    file = from_dict(_File, filled, str(path))
    folder = path.resolve().parent
    rows = {name: _anchored(part, folder) for name, part in file.variants.items()}
    anchored = {"base": _anchored(file.base, folder), "variants": rows}
    return filled | {key: part for key, part in anchored.items() if key in filled}


def _anchored(body: Any, folder: Path) -> Any:
    """A row's keys with their paths made absolute: they are relative to the file they stand in."""
    for where, absolute in _PATHS.items():
        body = _applied(body, where, functools.partial(absolute, folder))
    return body


def _applied(body: Any, keys: tuple[str, ...], change: Callable[[str], str]) -> Any:
    """``change`` applied to the text, or each text of the list, that stands at ``keys``."""
    if not keys:
        if isinstance(body, list):
            return [_applied(part, keys, change) for part in body]
        return change(body) if isinstance(body, str) else body
    if not isinstance(body, dict):
        return body  # of the wrong type: the reader of the whole row says so
    chosen = body if keys[0] == "*" else {keys[0]} & set(body)
    return body | {key: _applied(body[key], keys[1:], change) for key in chosen}


def _file_path(folder: Path, text: str) -> str:
    # A prepared file is found in the folder that the prepare step has written.
    return text if not text or text.startswith("{") else str(folder / text)


def _model_path(folder: Path, text: str) -> str:
    if text in ("", TEACHER, SHIPPED):
        return text
    return str(folder / text) if (folder / text).is_dir() else text  # else a Hub name


def _task_path(folder: Path, text: str) -> str:
    for prefix in ("jsonl:", "qa:"):
        if text.startswith(prefix):
            return prefix + _file_path(folder, text.removeprefix(prefix))
    return _file_path(folder, text) if text.endswith(".jsonl") and ":" not in text else text


_PATHS: dict[tuple[str, ...], Callable[[Path, str], str]] = {
    ("teacher", "model"): _model_path,
    ("hf_model",): _model_path,
    ("selection", "tasks"): _task_path,
    ("selection", "text"): _file_path,
    ("selection", "head_maps"): _file_path,
    ("selection", "compare"): _file_path,
    ("student", "calibration_file"): _file_path,
    ("stages", "*", "configs"): _file_path,
    ("evaluation", "tasks"): _task_path,
    ("evaluation", "haystack"): _file_path,
    ("evaluation", "lm_eval_include"): _file_path,
}
"""Where a row's keys name files or folders."""


def _filled(value: Any, constants: Mapping[str, Any], where: str) -> Any:
    """``value`` with every ``$name`` replaced by that constant."""
    if isinstance(value, dict):
        return {key: _filled(part, constants, f"{where}: {key}") for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, constants, where) for part in value]
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    if value[1:] not in constants:
        known = ", ".join(constants) or "none"
        raise HydraError(f"{where}: no constant is called {value[1:]!r}; there are: {known}")
    return constants[value[1:]]


def _rows(file: _File, path: Path) -> dict[str, dict[str, Any]]:
    rows = {
        str(name): _mapping(body, f"{path}: variants.{name}")
        for name, body in file.variants.items()
    }
    axes = [_axis(str(name), body, path) for name, body in file.axes.items()]
    for points in itertools.product(*axes) if axes else ():
        label = ", ".join(label for label, _ in points)
        if label in rows:
            raise HydraError(f"{path}: row {label!r} is given twice")
        body: dict[str, Any] = {}
        for _, differing in points:
            body = merge_sections(body, differing)
        rows[label] = body
    return rows


def _mapping(body: Any, where: str) -> dict[str, Any]:
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise HydraError(f"{where} must be a mapping of what differs from base, not {body!r}")
    return body


def _axis(name: str, body: Any, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Label and difference of each point."""
    where = f"{path}: axes.{name}"
    if isinstance(body, dict) and body:
        return [(str(label), _mapping(part, f"{where}.{label}")) for label, part in body.items()]
    if not isinstance(body, list) or not body:
        raise HydraError(f"{where} must be a list of values or a mapping of labels")
    points = []
    for value in body:
        nested: Any = value
        for key in reversed(name.split(".")):
            nested = {key: nested}
        shown = str(value).lower() if isinstance(value, bool) else value
        points.append((f"{name.rpartition('.')[2]} {shown}", nested))
    return points


def _cell_spec(
    body: dict[str, Any], where: str, tokens_scale: float
) -> tuple[CellSpec, tuple[tuple[str, StageSpec], ...]]:
    options = {
        "selection": SelectionOptions,
        "student": StudentStart,
        "evaluation": EvaluationOptions,
    }
    with worded({k: v for name, cls in options.items() for k, v in keys(cls, name).items()}):
        spec = from_dict(CellSpec, body, where)
    from_dict(HydraConfig, spec.hydra, f"{where}, hydra")
    stages = []
    for name, part in spec.stages.items():
        stage = from_dict(StageSpec, part or {}, f"{where}, stages.{name}")
        if stage.skip:
            continue
        if not stage.configs:
            raise HydraError(f"{where}, stages.{name}: configs names no file")
        if stage.processes < 1:
            raise HydraError(f"{where}, stages.{name}: processes is {stage.processes}, below 1")
        if stage.tokens < 0 or not 0 <= stage.warmup < 1:
            raise HydraError(f"{where}, stages.{name}: tokens must be 0 or more, warmup in 0 … 1")
        if stage.tokens and (twice := {"schedule.steps", "schedule.warmup_steps"} & set(stage.set)):
            raise HydraError(
                f"{where}, stages.{name}: both tokens and {min(twice)}: give one of them"
            )
        stages.append((str(name), dataclasses.replace(stage, tokens=stage.tokens * tokens_scale)))
    _check(spec, where)
    return spec, tuple(stages)


def _check(spec: CellSpec, where: str) -> None:
    teacher = spec.teacher
    needs_teacher = spec.hf_model in ("", TEACHER)
    if needs_teacher and bool(teacher.model) == bool(teacher.train):
        raise HydraError(f"{where}: teacher needs either model or train")
    evaluation = spec.evaluation
    retrieval = bool(evaluation.tasks) and bool(evaluation.lengths)
    if not retrieval and (evaluation.tasks or evaluation.lengths or not evaluation.lm_eval):
        raise HydraError(f"{where}: evaluation needs tasks and lengths, or lm_eval")
    if evaluation.lm_eval_include and not evaluation.lm_eval:
        raise HydraError(f"{where}: evaluation.lm_eval_include is given, and no task of lm_eval")
    if spec.hf_revision and spec.hf_model in ("", TEACHER):
        raise HydraError(f"{where}: hf_revision is of a Hub name in hf_model, which is not given")
    if evaluation.model_config and not spec.hf_model:
        raise HydraError(
            f"{where}: evaluation.model_config belongs to a row with hf_model; a student has the config "
            "that it was trained with"
        )
    if spec.hf_model and spec.hydra:
        raise HydraError(f"{where}: hf_model is scored as it is: hydra switches do not apply")
