#!/usr/bin/env python3
"""Whether the choice of FA heads matters: accuracy against transfer tokens, by strategy.

For each seed, a teacher of six layers with several kinds of retrieval is trained. Head maps are made from it at
two ratios (causal effects, attention mass, uniform, layer-wise, random draws). Every map is transferred alike
(layer alignment, then distillation), and the student is scored several times during the transfer. All data are
synthetic: facts are triples (key, first, second) hidden in noise. The end of a sequence asks for key → first,
key → second, or first → key; copying is the fourth kind.

It writes into ``--output``: the teachers, the maps, one JSON for each transfer (existing ones are not computed
again), ``table.md`` and ``curves.png``. ``--workers`` processes train and transfer.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from megatron_hydra.arguments import command_parser, path_argument
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.conversion import families
from megatron_hydra.conversion.hf_config import hf_config_from_model, read_hf_config
from megatron_hydra.conversion.hf_io import HfWeights, hf_to_canonical
from megatron_hydra.conversion.student import calibrate_gamma, initialise_student
from megatron_hydra.errors import HydraError, command
from megatron_hydra.files import write_json_atomic, write_text_atomic
from megatron_hydra.head_map import HeadMap
from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM
from megatron_hydra.selection import PromptPair, SelectionOptions, select_heads
from megatron_hydra.selection.capabilities import Induction
from megatron_hydra.selection.prompts import pair_from_ids

NUM_NOISE, NUM_SYMBOLS = 48, 32
KEYS, FIRSTS, SECONDS = (
    range(NUM_NOISE + i * NUM_SYMBOLS, NUM_NOISE + (i + 1) * NUM_SYMBOLS) for i in range(3)
)
KINDS = ("key_to_first", "key_to_second", "first_to_key", "copying")
MARKS = range(SECONDS.stop, SECONDS.stop + 3)
VOCABULARY = MARKS.stop
LENGTH, TRIPLES, QUERIES = 128, 20, 8
LOOKUPS = {"key_to_first": (0, 1), "key_to_second": (0, 2), "first_to_key": (1, 0)}
"""Kind of question -> the member of a triple that is shown, and the one that is asked for."""


# -- data -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences, and the kind of every answer.

    Attributes:
        tokens: ``[B, S]`` int64.
        kinds: index into :data:`KINDS` where the token is an answer, else -1, ``[B, S]``.
    """

    tokens: torch.Tensor
    kinds: torch.Tensor

    def to(self, device: str) -> Batch:
        """The same on another device."""
        return Batch(self.tokens.to(device), self.kinds.to(device))


def draw(
    rng: np.random.Generator, size: int, length: int, triples: tuple[int, int], copying: float
) -> Batch:
    """``size`` sequences; a share of them is copying, the rest are lookups among some triples."""
    rows = []
    for _ in range(size):
        if rng.random() < copying:
            rows.append(_copying(rng, length))
        else:
            rows.append(_lookups(rng, length, int(rng.integers(triples[0], triples[1] + 1))))
    tokens, kinds = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Batch(tokens, kinds)


def _copying(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    period = int(rng.integers(length // 4, length // 2 + 1))
    segment = rng.permutation(SECONDS.stop)[:period]
    tokens = np.tile(segment, length // period + 1)[:length]
    return tokens, np.where(np.arange(length) > period, KINDS.index("copying"), -1)


def _facts(
    rng: np.random.Generator, room: int, triples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise with triples in it ``[room]``, the triples ``[n, 3]``, and where they begin ``[n]``."""
    facts = np.stack([rng.permutation(r)[:triples] for r in (KEYS, FIRSTS, SECONDS)], axis=1)
    noise = room - 3 * triples
    at = np.sort(rng.choice(noise + triples, triples, replace=False)) + 2 * np.arange(triples)
    tokens = rng.integers(0, NUM_NOISE, room)
    for place, fact in zip(at, facts, strict=True):
        tokens[place : place + 3] = fact
    return tokens, facts, at


def _lookups(rng: np.random.Generator, length: int, triples: int) -> tuple[np.ndarray, np.ndarray]:
    queries = min(QUERIES, triples)
    body, facts, _ = _facts(rng, length - 3 * queries, triples)
    asked = rng.permutation(triples)[:queries]
    kinds = np.full(length, -1)
    tail = []
    for i, fact in enumerate(facts[asked]):
        kind = int(rng.integers(3))
        shown, answer = LOOKUPS[KINDS[kind]]
        tail += [MARKS[kind], fact[shown], fact[answer]]
        kinds[len(body) + 3 * i + 2] = kind
    return np.concatenate([body, np.array(tail)]), kinds


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A kind of lookup as a capability. In the corrupted prompt, two facts have exchanged the shown member."""

    name: str

    def prompts(self, tokenizer: Any, vocab_size: int, count: int, seed: int) -> list[PromptPair]:
        """See :class:`megatron_hydra.selection.Capability`."""
        rng = np.random.default_rng([seed, KINDS.index(self.name)])
        shown, answer = LOOKUPS[self.name]
        pairs: list[PromptPair] = []
        while len(pairs) < count:
            body, facts, at = _facts(rng, LENGTH - 3 * QUERIES, TRIPLES)
            a, b = rng.choice(TRIPLES, 2, replace=False)
            exchanged = body.copy()
            exchanged[[at[a] + shown, at[b] + shown]] = body[[at[b] + shown, at[a] + shown]]
            tail = [MARKS[KINDS.index(self.name)], int(facts[a, shown])]
            pair = pair_from_ids(
                body.tolist() + tail,
                exchanged.tolist() + tail,
                [int(facts[a, answer])],
                [int(facts[b, answer])],
            )
            if pair is not None:
                pairs.append(pair)
        return pairs


# -- models ---------------------------------------------------------------------------------------


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Next-token cross-entropy at the answers."""
    hidden = model.model(batch.tokens, use_cache=False).last_hidden_state[:, :-1]
    here = batch.kinds[:, 1:] >= 0
    return F.cross_entropy(model.lm_head(hidden[here]), batch.tokens[:, 1:][here])


@torch.no_grad()
def accuracy(model: Any, batch: Batch) -> dict[str, float]:
    """Share of right answers by kind, and their mean over kinds."""
    predicted = model(batch.tokens, use_cache=False).logits[:, :-1].argmax(-1)
    right, kinds = predicted == batch.tokens[:, 1:], batch.kinds[:, 1:]
    scores = {k: right[kinds == i].float().mean().item() for i, k in enumerate(KINDS)}
    return scores | {"mean": sum(scores.values()) / len(KINDS)}


def evaluation_batch() -> Batch:
    """The evaluation data, equal for every model: lookups among all triples, and a quarter copying."""
    return draw(np.random.default_rng(10**6), 64, LENGTH, (TRIPLES, TRIPLES), 0.25)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the teacher's curriculum; it ends early at an accuracy of ``enough``."""

    steps: int
    length: int
    triples: tuple[int, int]
    copying: float
    enough: float


CURRICULUM = (
    Phase(3000, 48, (2, 4), 0.6, 0.95),
    Phase(3000, 80, (4, 10), 0.2, 0.95),
    Phase(1500, LENGTH, (10, TRIPLES), 0.15, 2.0),
)


def train_teacher(seed: int, folder: Path, device: str, shorten: int) -> None:
    """Train and save a dense Qwen3 of 6 layers, 8 query heads and 4 KV heads of 16 channels."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    model = transformers.Qwen3ForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng, done, start = np.random.default_rng(seed), 0, time.time()
    for phase in CURRICULUM:
        last = phase is CURRICULUM[-1]
        for step in range(phase.steps // shorten):
            scale = min(1.0, (done + 1) / 50)
            if last:
                scale *= 0.02 + 0.49 * (1 + math.cos(math.pi * step * shorten / phase.steps))
            _set_lr(optimizer, 2e-3 * scale)
            batch = draw(rng, 32, phase.length, phase.triples, phase.copying).to(device)
            _update(model, optimizer, answer_loss(model, batch))
            done += 1
            if done % 100 == 0:
                probe = draw(
                    np.random.default_rng(1), 64, phase.length, (phase.triples[1],) * 2, 0.25
                )
                score = accuracy(model, probe.to(device))["mean"]
                print(
                    f"teacher {seed}: step {done}, {score:.3f}, {time.time() - start:.0f} s",
                    flush=True,
                )
                if score >= phase.enough:
                    break
    model.cpu().save_pretrained(folder)
    write_json_atomic(folder / "accuracy.json", accuracy(model, evaluation_batch()))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _update(model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def build_student(teacher: Any, folder: Path, head_map: HeadMap, seed: int) -> Any:
    """The HydraHead that conversion makes of the teacher, as a Hugging Face module."""
    dense = read_hf_config(folder)
    config = dense.with_head_map(head_map, HydraConfig())
    rng = np.random.default_rng([seed, 7])
    calibration = draw(rng, 64, LENGTH, (TRIPLES, TRIPLES), 0.25).tokens
    gamma = calibrate_gamma(teacher, calibration.split(16))
    weights = initialise_student(hf_to_canonical(HfWeights(folder), dense), config, gamma, seed)
    state: dict[str, torch.Tensor] = {}
    for mapping in families.name_map(config):
        parts = mapping.form.to_hf(weights[mapping.canonical])
        state |= dict(zip(mapping.hf, parts, strict=True))
    student = HydraHeadForCausalLM(HydraHeadConfig(**hf_config_from_model(config, "float32")))
    student.load_state_dict(state)
    return student


# -- transfer -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of the transfer: steps of both stages, learning rates, sequences of a step."""

    align_steps: int = 40
    distill_steps: int = 120
    align_lr: float = 4e-3
    distill_lr: float = 3e-3
    batch: int = 16
    probe_every: int = 10


class Alignment:
    """Stage 1: every student attention sees the teacher's stream and follows its output."""

    def __init__(self, teacher: Any, student: Any) -> None:
        self.teacher, self.student = teacher, student
        self.inputs: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sum over layers of the squared error, relative to the teacher's mean square."""
        self.inputs, self.targets, self.outputs = [], [], []
        handles = []
        for layer in self.teacher.model.layers:
            handles.append(layer.input_layernorm.register_forward_hook(self._keep_input))
            handles.append(layer.self_attn.register_forward_hook(self._keep_target))
        for i, layer in enumerate(self.student.model.layers):
            swap = lambda m, a, i=i: (self.inputs[i], *a[1:])  # noqa: E731
            handles.append(layer.self_attn.register_forward_pre_hook(swap))
            handles.append(layer.self_attn.register_forward_hook(self._keep_output))
        try:
            with torch.no_grad():
                self.teacher.model(tokens, use_cache=False)
            self.student.model(tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        errors = [
            (output - target).square().mean() / target.square().mean()
            for output, target in zip(self.outputs, self.targets, strict=True)
        ]
        return torch.stack(errors).sum()

    def _keep_input(self, module: Any, arguments: Any, output: torch.Tensor) -> None:
        self.inputs.append(output)

    def _keep_target(self, module: Any, arguments: Any, output: Any) -> None:
        self.targets.append(output[0])

    def _keep_output(self, module: Any, arguments: Any, output: torch.Tensor) -> None:
        self.outputs.append(output)


def distillation_loss(teacher: Any, student: Any, batch: Batch) -> torch.Tensor:
    """0.9 · KL(teacher ‖ student) over all positions + 0.1 · cross-entropy at the answers."""
    with torch.no_grad():
        target = teacher(batch.tokens, use_cache=False).logits.log_softmax(-1)
    logits = student(batch.tokens, use_cache=False).logits
    mine = logits.log_softmax(-1)
    divergence = F.kl_div(mine, target, log_target=True, reduction="none").sum(-1).mean()
    here = batch.kinds[:, 1:] >= 0
    entropy = F.cross_entropy(logits[:, :-1][here], batch.tokens[:, 1:][here])
    return 0.9 * divergence + 0.1 * entropy


def transfer(teacher: Any, student: Any, seed: int, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Run both stages; yields the scores at the start, at regular steps, and at the end."""
    device = str(student.device)
    rng, held_out = np.random.default_rng([seed, 11]), evaluation_batch().to(device)
    alignment = Alignment(teacher, student)
    attention = [p for n, p in student.named_parameters() if "self_attn" in n]
    stages = (
        ("align", recipe.align_steps, recipe.align_lr, attention),
        ("distill", recipe.distill_steps, recipe.distill_lr, list(student.parameters())),
    )
    tokens = 0
    yield {"stage": "start", "tokens": 0, **accuracy(student, held_out)}
    for name, steps, peak, parameters in stages:
        optimizer = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.98), weight_decay=0.01)
        for step in range(1, steps + 1):
            _set_lr(
                optimizer,
                peak * min(step / 10, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))),
            )
            batch = draw(rng, recipe.batch, LENGTH, (TRIPLES, TRIPLES), 0.25).to(device)
            if name == "align":
                loss = alignment.loss(batch.tokens)
            else:
                loss = distillation_loss(teacher, student, batch)
            student.zero_grad()
            _update(student, optimizer, loss)
            tokens += batch.tokens.numel()
            if step % recipe.probe_every == 0 or step == steps:
                yield {"stage": name, "tokens": tokens, **accuracy(student, held_out)}


# -- the experiment -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """One transfer, as data for another process."""

    teacher: Path
    head_map: Path
    result: Path
    seed: int
    recipe: Recipe
    device: str


def run_job(job: Job) -> Path:
    """Transfer one map and write its curve."""
    torch.set_num_threads(1)
    head_map = HeadMap.load(job.head_map)
    teacher = (
        transformers.Qwen3ForCausalLM.from_pretrained(job.teacher).eval().requires_grad_(False)
    )
    torch.manual_seed(job.seed)
    student = build_student(teacher, job.teacher, head_map, job.seed).to(job.device)
    teacher = teacher.to(job.device)
    begun = time.perf_counter()
    curve = list(transfer(teacher, student, job.seed, job.recipe))
    body = {
        "full_attention": head_map.num_full_attention,
        "heads": [list(layer) for layer in head_map.full_attention_heads],
        "seconds": round(time.perf_counter() - begun, 1),
        "curve": curve,
    }
    write_json_atomic(job.result, body)
    return job.result


def make_maps(teacher: Path, folder: Path, ratio: str, seed: int, draws: int) -> dict[str, Path]:
    """All strategies' maps of one teacher: name -> file."""
    torch.set_num_threads(1)
    tasks = [*(Lookup(kind) for kind in LOOKUPS), Induction("copying", length=40)]
    plain = SelectionOptions(num_prompts=32, attribution=False)
    wanted: dict[str, dict[str, Any]] = {
        "interp": {"strategy": "global_interp", "options": SelectionOptions(num_prompts=32)},
        "interp_denoise": {"strategy": "interp_denoise", "options": plain},
        "interp_receivers": {
            "strategy": "interp_denoise",
            "options": dataclasses.replace(plain, senders=False),
        },
        "interp_total": {
            "strategy": "interp_denoise",
            "options": dataclasses.replace(plain, receiver_effect="total", senders=False),
        },
        "attention_mass": {"strategy": "attention_mass"},
        "uniform": {"strategy": "layer_random", "seed": seed},
        "layerwise": {"strategy": "layerwise"},
        **{
            f"random_{i}": {"strategy": "global_random", "seed": 1000 * seed + i}
            for i in range(draws)
        },
    }
    files = {}
    for name, arguments in wanted.items():
        files[name] = folder / f"{name}.json"
        if not files[name].exists():
            options = arguments | {"tasks": tasks, "ratio": ratio}
            select_heads(teacher, **options).save(files[name])
    return files


def report(output: Path, ratios: list[str], seeds: list[int], recipe: Recipe) -> str:
    """``table.md`` and ``curves.png`` from the results; the table's text."""
    batch_tokens = recipe.batch * LENGTH
    marks = {
        "start": 0,
        "aligned": recipe.align_steps,
        "early": recipe.align_steps + recipe.distill_steps // 8,
        "half": recipe.align_steps + recipe.distill_steps // 2,
        "end": recipe.align_steps + recipe.distill_steps,
    }
    lines = []
    curves: dict[str, dict[str, np.ndarray]] = {}
    for ratio in ratios:
        lines += [f"\n{ratio}, mean accuracy over {len(seeds)} seeds (least to most)\n"]
        lines += ["| map | FA heads | " + " | ".join(marks) + " |", "|---" * (2 + len(marks)) + "|"]
        results = _results(output, ratio, seeds)
        curves[ratio] = {}
        for name, runs in _grouped(results).items():
            points = np.array([p["tokens"] for p in runs[0]["curve"]]) / batch_tokens
            scores = np.array([[p["mean"] for p in run["curve"]] for run in runs])
            curves[ratio][name] = scores
            cells = []
            for step in marks.values():
                at = scores[:, int(np.abs(points - step).argmin())]
                cells.append(f"{at.mean():.3f} ({at.min():.2f}–{at.max():.2f})")
            counts = sorted({run["full_attention"] for run in runs})
            lines.append(f"| {name} | {'/'.join(map(str, counts))} | " + " | ".join(cells) + " |")
        curves[ratio]["tokens"] = points * batch_tokens
    text = "\n".join(lines) + "\n"
    write_text_atomic(output / "table.md", text)
    _draw(curves, output / "curves.png")
    return text


def _results(output: Path, ratio: str, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Map name -> its results, one for each seed."""
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for path in sorted(_place(output, seed, ratio).glob("result_*.json")):
            name = path.stem.removeprefix("result_")
            results.setdefault(name, []).append(json.loads(path.read_text()))
    return results


def _grouped(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """All random draws together, and for each seed the best one at the end of the transfer."""
    draws = [runs for name, runs in results.items() if name.startswith("random_")]
    groups = {name: runs for name, runs in results.items() if not name.startswith("random_")}
    if draws:
        groups["random, all draws"] = [run for runs in draws for run in runs]
        groups["random, best draw"] = [
            max(runs, key=lambda run: np.mean([p["mean"] for p in run["curve"]]))
            for runs in zip(*draws, strict=True)
        ]
    return groups


def _draw(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(curves), 4.2), layout="constrained")
    axes = np.atleast_1d(np.array(figure.subplots(1, len(curves), sharey=True)))
    for ax, (ratio, groups) in zip(axes, curves.items(), strict=True):
        tokens = groups["tokens"]
        for name, scores in groups.items():
            if name == "tokens":
                continue
            style = "--" if name.startswith("random") else "-"
            (line,) = ax.plot(tokens, scores.mean(0), style, label=name, lw=1.8)
            if name in ("interp", "random, all draws"):
                ax.fill_between(
                    tokens, scores.min(0), scores.max(0), color=line.get_color(), alpha=0.12
                )
        ax.set(title=ratio, xlabel="transfer tokens", ylabel="accuracy, mean of four kinds")
        ax.grid(alpha=0.3)
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _place(output: Path, seed: int, ratio: str) -> Path:
    return output / f"seed_{seed}" / ratio.replace(":", "to")


def _train_teachers(args: argparse.Namespace, pool: concurrent.futures.Executor) -> None:
    waiting = []
    for seed in args.seeds:
        folder = args.output / f"seed_{seed}" / "teacher"
        if not (folder / "accuracy.json").exists():
            job = pool.submit(train_teacher, seed, folder, args.device, args.shorten)
            waiting.append(job)
    for job in waiting:
        job.result()
    for seed in args.seeds:
        score = json.loads((args.output / f"seed_{seed}" / "teacher" / "accuracy.json").read_text())
        print(f"teacher {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in score.items()), flush=True)
        if score["mean"] < args.least:
            raise HydraError(
                f"teacher {seed} reaches {score['mean']:.3f}, --least asks for {args.least}: give "
                f"another seed, or delete {args.output / f'seed_{seed}'} and train it longer"
            )


def _jobs(args: argparse.Namespace, recipe: Recipe, pool: concurrent.futures.Executor) -> list[Job]:
    cells = [(seed, ratio) for seed in args.seeds for ratio in args.ratios]
    teachers = {seed: args.output / f"seed_{seed}" / "teacher" for seed in args.seeds}
    maps = [
        pool.submit(
            make_maps, teachers[seed], _place(args.output, seed, ratio), ratio, seed, args.draws
        )
        for seed, ratio in cells
    ]
    jobs = []
    for (seed, ratio), files in zip(cells, maps, strict=True):
        for name, file in files.result().items():
            result = _place(args.output, seed, ratio) / f"result_{name}.json"
            if not result.exists():
                jobs.append(Job(teachers[seed], file, result, seed, recipe, args.device))
    # Strategies take turns, so that an interrupted experiment has some results of each.
    random.Random(0).shuffle(jobs)
    return jobs


def _parser() -> argparse.ArgumentParser:
    example = (
        "example:\n  python benchmarks/selection_matters.py --output runs/matters --workers 2\n"
    )
    parser = command_parser(description=__doc__, epilog=example)
    add = parser.add_argument
    recipe = Recipe()
    add(
        "--output",
        type=path_argument,
        required=True,
        help="continued if it exists",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    add("--ratios", nargs="+", default=["7:1", "15:1"], help="default 7:1 15:1")
    add("--draws", type=int, default=5, help="random maps a seed and ratio (default 5)")
    add("--align-steps", type=int, default=recipe.align_steps)
    add("--distill-steps", type=int, default=recipe.distill_steps)
    add("--workers", type=int, default=2, help="transfers (and teachers) at a time")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--least", type=float, default=0.9, help="accuracy that a teacher must reach (default 0.9)")
    add("--shorten", type=int, default=1, help="divide the teachers' steps, to try the command out")
    return parser


@command
def main() -> int:
    """Make teachers, maps, transfers and the report."""
    args = _parser().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    recipe = Recipe(args.align_steps, args.distill_steps)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        _train_teachers(args, pool)
        jobs = _jobs(args, recipe, pool)
        done = [pool.submit(run_job, job) for job in jobs]
        for number, job in enumerate(concurrent.futures.as_completed(done), start=1):
            print(f"[{number}/{len(jobs)}] {job.result()}", flush=True)
    print(report(args.output, args.ratios, args.seeds, recipe))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
