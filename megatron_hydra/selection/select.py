"""Head selection from model to head map: the entry point of the package.

head_map = select_heads("path/to/hf_model", ratio="3:1", strategy="global_interp", tasks=["general"])
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hydra.config.selection import Constraints, SelectionOptions
from megatron_hydra.conversion.calibration import SEQUENCE_LENGTH, calibration_batches
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import (
    DEFAULT_RATIO,
    DEFAULT_STRATEGY,
    HeadMap,
    parse_ratio,
    strategy_name,
)
from megatron_hydra.hf_identity import model_identity_from_hf, resolve_hf_folder
from megatron_hydra.hf_loading import find_tokenizer
from megatron_hydra.ranks import Ranks
from megatron_hydra.selection.capabilities import Capability
from megatron_hydra.selection.effects import EffectEngine, Solved
from megatron_hydra.selection.learned_gates import TEXT_SHARE, orders_of
from megatron_hydra.selection.opening import (
    Placement,
    load_runner,
    native_length,
    vocab_size_of,
)
from megatron_hydra.selection.prompts import PromptPair, prompts_fingerprint
from megatron_hydra.selection.ranking import budget, weighted_mean
from megatron_hydra.selection.runner import DecoderRunner, default_tokens_per_batch
from megatron_hydra.selection.strategies import (
    STRATEGIES,
    Context,
    Scored,
    Strategy,
    ranking_of,
)
from megatron_hydra.selection.tasks import Tasks, solved_tasks
from megatron_hydra.selection.work import WorkBench

_log = logging.getLogger(__name__)

MOST_REPEATS = 20
"""Log a warning if the same text is read more often than this."""


def select_heads(
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    ratio: str = DEFAULT_RATIO,
    strategy: str = DEFAULT_STRATEGY,
    tasks: Sequence[str | Capability] | None = None,
    tokenizer: Any | None = None,
    seed: int = 0,
    revision: str = "",
    options: SelectionOptions | None = None,
    placement: Placement | None = None,
    output: str | os.PathLike[str] | None = None,
    work_folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> HeadMap:
    """Choose the query heads of a dense Hugging Face model that keep full attention.

    Under torchrun, ranks share the work. Every rank returns the same map, and the map does not depend on the
    number of ranks.

    Args:
        model: a folder, a Hub name, or a loaded Qwen3, Qwen2 or Llama ``*ForCausalLM``. A loaded
            model is left in eval mode with gradients off.
        ratio: GDN:FA, ``"3:1"``; ``"dense"``; ``"all-gdn"``.
        strategy: a key of :data:`megatron_hydra.selection.strategies.STRATEGIES`, or an old name
            (:data:`megatron_hydra.head_map.OLD_STRATEGY_NAMES`).
        tasks: tasks as on the command line (``"retrieval"``, ``"needle_multi:keys=6"``, ``"jsonl:PATH"``), or
            objects; ignored by strategies that need no model. The model must solve every named capability.
            ``None``: those of :data:`megatron_hydra.selection.DEFAULT_TASKS` that the model solves.
        tokenizer: default: the folder's tokenizer, if any.
        seed: seed of the prompts and of random choices.
        options: prompts, effects, weights, constraints.
        placement: device and dtype, if ``model`` is a path.
        output: rank 0 saves the map here before it deletes partial results.
        work_folder: folder of partial results until the map is done. A run that was killed resumes from them
            and gives the same map. A run with another ratio, strategy, weight or constraint uses them as
            well. Results of other models and prompts in the folder are not changed.
        show_progress: show a bar with the remaining time on standard error of rank 0.

    Raises:
        HydraError: an input or option is invalid.
    """
    options = options or SelectionOptions()
    strategy = strategy_name(strategy)
    if strategy not in STRATEGIES:
        raise HydraError(f"--strategy {strategy}: must be one of {', '.join(STRATEGIES)}")
    parse_ratio(ratio)
    folder = None if isinstance(model, torch.nn.Module) else resolve_hf_folder(model, revision)
    identity = model_identity_from_hf(
        model if folder is None else folder,
        name="" if folder is None else str(model),
        revision=revision,
    )
    context = Context(identity, ratio, seed, options)
    chosen = STRATEGIES[strategy]
    chosen.refuse_options(strategy, options)
    ranks = Ranks()
    try:
        if not chosen.stages(options):
            return _save(_finish(context, strategy, chosen), output, ranks)
        tokenizer = tokenizer or (folder and find_tokenizer(folder))
        vocab_size = vocab_size_of(model, folder)
        longest = 0
        if options.stability and "receivers" in chosen.stages(options):
            longest = native_length(model, folder)
        if chosen.learns:
            context = _with_text(
                context, tokenizer, vocab_size, native_length(model, folder), ranks
            )
        drawn = Tasks.draw(tasks, tokenizer, vocab_size, seed, options, longest)
        _validate_selection(context, chosen, drawn.capabilities)
        runner = load_runner(model, folder, placement or Placement(), ranks)
        options = _with_batch_size(options, runner)
        context = dataclasses.replace(context, options=options)
        inputs = _inputs_fingerprint(context, drawn.all_pairs(), runner)
        kept = Path(work_folder) / inputs.removeprefix("sha256:")[:16] if work_folder else None
        bench = WorkBench(ranks, kept, show_progress)
        try:
            engine = EffectEngine(runner, bench, options.tokens_per_batch)
            context = dataclasses.replace(context, engine=engine)
            head_map = _save(_measure(context, strategy, chosen, drawn), output, ranks)
        finally:
            bench.close()
        bench.remove()
        return head_map
    finally:
        ranks.close()


def _save(head_map: HeadMap, output: str | os.PathLike[str] | None, ranks: Ranks) -> HeadMap:
    if output is not None and ranks.rank == 0:
        head_map.save(output)
    return head_map


def _validate_selection(context: Context, strategy: Strategy, capabilities: Iterable[str]) -> None:
    """Validate options and heads before the measurements, which take long."""
    nothing = np.zeros(context.shape)
    weighted_mean(dict.fromkeys(capabilities, nothing), context.options.task_weights)
    strategy.choose(context, Scored({}, nothing))


def _measure(context: Context, name: str, strategy: Strategy, drawn: Tasks) -> HeadMap:
    options, engine = context.options, context.engine
    assert engine is not None
    kinds = strategy.stages(options)
    heads = None if strategy.total_heads is None else strategy.total_heads(context)
    layers, per_layer = context.shape
    solved, left_out = solved_tasks(
        engine,
        drawn,
        options,
        kinds,
        receivers=options.num_receivers or budget(context.model, context.ratio),
        total_heads=layers * per_layer if heads is None else len(heads),
    )
    capabilities = {
        name: present
        for name, tasks in drawn.capabilities.items()
        if (present := [task for task in tasks if task in solved])
    }
    _validate_selection(context, strategy, capabilities)
    for task, prompts in solved.items():
        engine.plan(task, prompts, kinds, heads)
    context = dataclasses.replace(
        context, prompts=solved, capabilities=capabilities, lengths=drawn.lengths
    )
    return _finish(context, name, strategy, left_out)


def _finish(
    context: Context,
    name: str,
    strategy: Strategy,
    left_out: dict[str, dict[str, Any]] | None = None,
) -> HeadMap:
    scored = None if strategy.score is None else strategy.score(context)
    heads = strategy.choose(context, scored)
    details: dict[str, Any] = {} if scored is None else dict(scored.details)
    if scored is not None:
        details["unified_score"] = scored.unified.tolist()
        if scored.signal is not None:
            details["trust"]["chosen_without_signal"] = _count_without_signal(scored.signal, heads)
    prompts = context.prompts
    details["prompts"] = {task: _prompt_facts(solved) for task, solved in prompts.items()}
    if left_out:
        details["left_out"] = left_out
    details["options"] = _options_dict(context.options)
    return HeadMap(
        model=context.model,
        full_attention_heads=heads,
        strategy=name,
        ratio=context.ratio,
        seed=context.seed,
        granularity=context.options.constraints.granularity,
        prompts_fingerprint=(
            prompts_fingerprint({t: s.pairs for t, s in prompts.items()}) if prompts else ""
        ),
        scores={} if scored is None else {t: s.tolist() for t, s in scored.by_task.items()},
        ranking=tuple(ranking_of(scored)),
        details=details,
    )


def _count_without_signal(signal: np.ndarray, heads: Sequence[Sequence[int]]) -> int:
    """Number of these heads without a signal."""
    return sum(not signal[layer, head] for layer, row in enumerate(heads) for head in row)


def _prompt_facts(solved: Solved) -> dict[str, Any]:
    return {
        "drawn": len(solved.pairs),
        "solved": len(solved.keep),
        "dropped": len(solved.pairs) - len(solved.keep),
        "clean_readout": float(solved.clean.mean()),
        "corrupted_readout": float(solved.corrupted.mean()),
    }


def _options_dict(options: SelectionOptions) -> dict[str, Any]:
    body = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    body["task_weights"] = dict(options.task_weights)
    body["effects"] = list(options.exact_effects)
    body["compare"] = list(options.compare)
    return body


# -- inputs ----------------------------------------------------------------------------------------


def _with_text(
    context: Context, tokenizer: Any | None, vocab_size: int, longest: int, ranks: Ranks
) -> Context:
    """The context with text for training, and with rankings for comparison.

    Args:
        longest: native context length of the model, or 0 if unknown.
    """
    options = context.options
    if ranks.size > 1:
        raise HydraError(
            f"--strategy learned_gates runs in one process, but torchrun started {ranks.size}: start it "
            "without torchrun (--gpus-per-process distributes a large model)"
        )
    text = calibration_batches(
        tokenizer,
        vocab_size,
        options.text or None,
        options.align_tokens,
        min(SEQUENCE_LENGTH, longest or SEQUENCE_LENGTH),
        "give token ids with --text FILE.jsonl ({'tokens': [ids]} lines)",
    )
    tokens = sum(piece.numel() for piece in text)
    if tokens < 2:
        raise HydraError(f"--text {options.text}: one token is not enough text")
    times = (options.align_tokens + options.gate_tokens * TEXT_SHARE) / tokens
    if times > MOST_REPEATS:
        _log.warning(
            "the text has %d tokens and is read %.0f times: the GDN branch will be better on this text than on "
            "other text; give more text with --text FILE",
            tokens,
            times,
        )
    maps = [(path, HeadMap.load(path)) for path in options.compare]
    for path, head_map in maps:
        head_map.check_model(context.model, source=path)
    return dataclasses.replace(context, text=text, compared=orders_of(maps))


def recut(
    head_map: HeadMap,
    ratio: str,
    constraints: Constraints | None = None,
    source: str = "head map",
    strategy: str = "",
) -> HeadMap:
    """Make a map from the same scores with another ratio or strategy, without measurements.

    Args:
        head_map: a map with scores.
        ratio: GDN:FA.
        constraints: constraints on the choice; default: none.
        source: the map's file, for messages.
        strategy: another strategy that uses the same scores; "": the map's strategy.

    Raises:
        HydraError: the map has no scores, the strategy uses other scores, or the constraints contradict the
            ratio.
    """
    scores = head_map.details.get("unified_score")
    if scores is None or head_map.strategy not in STRATEGIES:
        raise HydraError(
            f"{source}: strategy {head_map.strategy} has no scores, but another ratio needs them; select again "
            "with tools/select_heads.py --ratio"
        )
    strategy = strategy or head_map.strategy
    measured = STRATEGIES[head_map.strategy].score
    alike = [name for name, one in STRATEGIES.items() if one.score is measured]
    if strategy not in alike:
        raise HydraError(
            f"--strategy {strategy}: {source} has the scores of {head_map.strategy}, which only "
            f"{', '.join(alike)} can use; select with tools/select_heads.py --strategy {strategy}"
        )
    options = SelectionOptions(**dataclasses.asdict(constraints or Constraints()))
    context = Context(head_map.model, ratio, head_map.seed, options)
    chosen = STRATEGIES[strategy].choose(context, Scored({}, np.array(scores)))
    details = head_map.details | {"cut_from": head_map.fingerprint()}
    if "trust" in details:
        weights = details["options"]["task_weights"]
        counted = [np.array(s) for n, s in head_map.scores.items() if weights.get(n, 1.0) > 0]
        signal = np.any([one > one.min() for one in counted], axis=0)
        details["trust"] = details["trust"] | {
            "full_attention": sum(map(len, chosen)),
            "chosen_without_signal": _count_without_signal(signal, chosen),
        }
    return dataclasses.replace(
        head_map,
        full_attention_heads=chosen,
        strategy=strategy,
        ratio=ratio,
        granularity=options.constraints.granularity,
        details=details,
    )


def _with_batch_size(options: SelectionOptions, runner: DecoderRunner) -> SelectionOptions:
    """Set the device's default batch size if none is given."""
    size = options.tokens_per_batch or default_tokens_per_batch(runner)
    return dataclasses.replace(options, tokens_per_batch=size)


def _inputs_fingerprint(
    context: Context, prompts: dict[str, list[PromptPair]], runner: DecoderRunner
) -> str:
    """Hash of all inputs that partial results depend on, except those in their own keys.

    It excludes weights and options of the choice. So a corrected command or another ratio can use the
    measurements.
    """
    identity = dataclasses.asdict(context.model) | {"name": "", "revision": ""}
    weights = runner.model.model.embed_tokens.weight
    body = {
        "model": identity,
        "prompts": prompts_fingerprint(prompts),
        "solved": context.options.solved,
        "tokens_per_batch": context.options.tokens_per_batch,
        "dtype": str(weights.dtype),
        "device": weights.device.type,
    }
    return "sha256:" + hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
