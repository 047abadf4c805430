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
"""Value of ``hf_model``: the row is the teacher itself."""

SHIPPED = "quickstart"
"""Value of ``teacher.model``: the package's teacher."""

_FIRST = {
    "SelectionSpec": "strategy ratio tasks num_prompts min_prompts probe_tokens solved max_rounds control "
    "stability receiver_effect senders sender_weight num_receivers attribution granularity min_per_layer "
    "max_per_layer kv_group_bonus",
    "StudentStart": "half_life calibrate calibration_file calibration_tokens",
    "EvaluationSpec": "tasks lengths depths samples batch_tokens haystack cache_length dtype device "
    "trust_remote_code",
}
"""The first keys of specs. Any other key is omitted from the hashes of steps at its default, so that steps from
before this key are still found."""


def as_plain(spec: SelectionSpec | StudentStart | EvaluationSpec) -> dict[str, Any]:
    """A spec as plain data for the hashes of steps."""
    default, first = type(spec)(), _FIRST[type(spec).__name__].split()
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {
        name: value
        for name, value in values.items()
        if name in first or value != getattr(default, name)
    }


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """The dense model from which everything starts.

    Attributes:
        model: a Hugging Face folder or Hub name, or ``quickstart``, the shipped teacher.
        revision: Hub revision.
        train: instead of a model, a module that trains one, and its arguments; it runs as ``python -m MODULE
            ARGUMENTS --output DIR``. ``{seed}`` is the cell's seed.
    """

    model: str = ""
    revision: str = ""
    train: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PrepareSpec:
    """Files for selection or calibration, which a function makes once for each seed.

    Attributes:
        function: ``module:function``, called with (folder, model folder, seed, **options).
        options: its keyword arguments.
    """

    function: str = ""
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SelectionSpec(SelectionOptions):
    """Options of the head selection (``tools/select_heads.py``).

    ``tasks`` may name the prepared folder as ``{prepare}``; without tasks, the default tasks that the teacher
    solves are used. ``text`` may, too (``learned_gates``). ``strategy`` may be an old name; the hash of a step
    has today's. ``head_maps``: files of ``tools/select_heads.py`` for this teacher. A cell uses the file with
    its strategy, ratio and granularity (and seed, if heads are drawn at random); its other options are then not
    read.
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
        configs: run configs, which later files override; paths are relative to the experiment file.
        set: ``section.key: value``, which overrides the files.
        tokens: number of training tokens (times the command's ``--tokens-scale``), rounded up to whole steps;
            0: the configs' steps.
        warmup: with ``tokens``, the share of these steps in which the learning rate rises.
        skip: whether to leave the stage out.
        processes: number of ranks on this machine; ``launch/local.sh`` starts more than one.
    """

    configs: tuple[str, ...] = ()
    set: dict = dataclasses.field(default_factory=dict)
    tokens: float = 0
    warmup: float = 0.03
    skip: bool = False
    processes: int = 1

    def schedule(self, tokens_per_step: int) -> dict[str, Any]:
        """Keys of a run's ``schedule`` for a budget in tokens; empty without a budget."""
        if not self.tokens:
            return {}
        steps = max(1, math.ceil(self.tokens / tokens_per_step))
        return {"steps": steps, "warmup_steps": min(steps - 1, math.ceil(self.warmup * steps))}


@dataclasses.dataclass(frozen=True)
class EvaluationSpec(EvaluationOptions):
    """Options of the evaluation (``tools/evaluate.py``).

    Attributes:
        model_config: other values for keys of the model's ``config.json``. A student is trained without them.
        processes: number of processes that share the pairs of task and length, each with its own GPU. It does
            not change the results, so steps with another number are the same.
    """

    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    model_config: dict = dataclasses.field(default_factory=dict)
    processes: int = 1


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """Spec of a table row, without the seed.

    Attributes:
        hf_model: score this Hugging Face model (folder or Hub name) instead of a student;
            ``teacher``: the teacher itself.
        hf_revision: branch, tag or commit of a Hub name in ``hf_model``.
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
    """Contents of the table and the pictures.

    Attributes:
        columns: the main table's columns, ``task@length``, or ``task/metric`` of lm-eval; empty: all.
        baseline: the row to which differences are computed, or empty.
        train_length: length that the pictures mark; 0: none.
        bars: lengths of the bar chart; empty: the shortest and the longest.
        fit_rows: rows with different numbers of tokens, to which power laws are fitted.
        fit_tokens: number of tokens for which the laws predict, all stages together.
    """

    columns: tuple[str, ...] = ()
    baseline: str = ""
    train_length: int = 0
    bars: tuple[int, ...] = ()
    fit_rows: tuple[str, ...] = ()
    fit_tokens: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One variant with one seed.

    Attributes:
        experiment, variant, seed: its place in the table.
        spec: of the row.
        stages: the stages that are not skipped, in order.
        folder: of the experiment file; paths are relative to it.
    """

    experiment: str
    variant: str
    seed: int
    spec: CellSpec
    stages: tuple[tuple[str, StageSpec], ...]
    folder: Path

    @property
    def name(self) -> str:
        """The cell's name in messages."""
        return f"{self.experiment} / {self.variant} / seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment file.

    Attributes:
        name: the file's stem.
        title: of the table.
        paper: the paper's statement about it, in words.
        seeds: all seeds; all appear in the table.
        variants: names of the rows, in order.
        cells: rows × seeds, row by row.
        table: contents of the table.
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
        include: another file, which this file overrides; its path is relative to this file. It may include a
            further one.
        constants: name → value, for ``$name`` in place of a value. This file's constants override those of
            included files.
        base: keys that all rows share (a :class:`CellSpec`).
        variants: row → differences from base.
        axes: a grid: each axis is ``dotted.key: [values]`` or ``name: {label: differences}``; the rows are the
            product of all axes.
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
        base: a file to include instead of the one that the experiment file names.
        tokens_scale: factor of every stage's ``tokens``.
        changes: other values for keys of the file, section by section; paths are absolute.

    Raises:
        HydraError: an unreadable file; an unknown key, constant or type (names file, row and key); no rows; a
            repeated row; no seeds.
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
    if unknown := [row for row in file.table.fit_rows if row not in rows]:
        raise HydraError(f"{path}: table.fit_rows has {unknown[0]!r}, which is none of the rows")
    if file.table.fit_rows and not file.table.fit_tokens > 0:
        raise HydraError(f"{path}: table.fit_rows needs table.fit_tokens, for example 15.0e+9")
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
    """The file merged over its included files, with constants inserted."""
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
    """A file's keys, and the keys that are valid before constants are inserted."""
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
    """One file, with its constants inserted and its keys checked."""
    filled = _filled(body, constants, str(path))
    file = from_dict(_File, filled, str(path))
    folder = path.resolve().parent
    rows = {name: _anchored(part, folder) for name, part in file.variants.items()}
    anchored = {"base": _anchored(file.base, folder), "variants": rows}
    return filled | {key: part for key, part in anchored.items() if key in filled}


def _anchored(body: Any, folder: Path) -> Any:
    """A row's keys with absolute paths; in the file they are relative to it."""
    for where, absolute in _PATHS.items():
        body = _applied(body, where, functools.partial(absolute, folder))
    return body


def _applied(body: Any, keys: tuple[str, ...], change: Callable[[str], str]) -> Any:
    """``change`` applied to the text at ``keys``, or to each text of a list there."""
    if not keys:
        if isinstance(body, list):
            return [_applied(part, keys, change) for part in body]
        return change(body) if isinstance(body, str) else body
    if not isinstance(body, dict):
        return body  # a wrong type: the reader of the whole row reports it
    chosen = body if keys[0] == "*" else {keys[0]} & set(body)
    return body | {key: _applied(body[key], keys[1:], change) for key in chosen}


def _file_path(folder: Path, text: str) -> str:
    # A prepared file is in the folder of the prepare step.
    return text if not text or text.startswith("{") else str(folder / text)


def _model_path(folder: Path, text: str) -> str:
    if text in ("", TEACHER, SHIPPED):
        return text
    return str(folder / text) if (folder / text).is_dir() else text  # otherwise a Hub name


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
"""Keys of a row that name files or folders."""


def _filled(value: Any, constants: Mapping[str, Any], where: str) -> Any:
    """``value`` with every ``$name`` replaced by its constant."""
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
    if spec.evaluation.processes < 1:
        raise HydraError(f"{where}, evaluation: processes is {spec.evaluation.processes}, below 1")
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
    trained = {"hydra", "full_attention_heads"} & set(evaluation.model_config)
    if trained and not spec.hf_model:
        raise HydraError(
            f"{where}: evaluation.model_config changes a trained student when it is scored, and "
            f"{min(trained)!r} decides what is trained: use the row's keys hydra and selection"
        )
    if spec.hf_model and spec.hydra:
        raise HydraError(f"{where}: hf_model is scored as it is: hydra switches do not apply")
