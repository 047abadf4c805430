"""The options of a selection: of ``tools/select_heads.py``, and of ``selection`` in an experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from megatron_hydra.arguments import path_text, real
from megatron_hydra.errors import HydraError
from megatron_hydra.options import option

Effect = Literal["direct", "total"]

PROMPTS = "prompts"
PAPER = "the paper's scoring (global_interp_c, global_interp, layer_interp)"
FORMER = "our former scoring (interp_denoise)"
GATES = "learned_gates"

PROBE_TOKENS = 4096
"""Length of a needle prompt without an own ``tokens``; the paper's length."""

LEAST_STEPS = 50
"""Minimum number of gate steps. With fewer steps, the gates cannot close one after another."""

Granularity = Literal["query_head", "kv_group"]


@dataclasses.dataclass(frozen=True)
class Constraints:
    """Constraints on the choice of heads.

    Attributes:
        granularity: ``query_head``, or ``kv_group``: whole KV groups only.
        min_per_layer, max_per_layer: FA heads in every layer; ``None``: no upper limit.
        kv_group_bonus: added to the score of a head whose KV group already has a chosen head (its
            keys and values are then in the cache anyway); in standard deviations of the score.
    """

    granularity: Granularity = option(
        "query_head", "choose single query heads or whole KV groups", group="constraints"
    )
    min_per_layer: int = option(0, "smallest number of FA heads in a layer", group="constraints")
    max_per_layer: int | None = option(
        None, "largest number of FA heads in a layer", group="constraints"
    )
    kv_group_bonus: float = option(
        0.0,
        "bonus for heads whose KV group already has an FA head, in standard deviations",
        parse=real(0),
        group="constraints",
    )

    def __post_init__(self) -> None:
        if self.granularity not in ("query_head", "kv_group"):
            raise HydraError(f"--granularity {self.granularity}: must be query_head or kv_group")
        if self.min_per_layer < 0 or self.kv_group_bonus < 0:
            raise HydraError("--min-per-layer and --kv-group-bonus must not be negative")
        if self.granularity == "kv_group" and self.kv_group_bonus:
            raise HydraError(
                "--kv-group-bonus is for --granularity query_head: with kv_group, whole groups are "
                "chosen anyway"
            )
        if self.max_per_layer is not None and self.max_per_layer < max(1, self.min_per_layer):
            raise HydraError("--max-per-layer must be at least 1 and at least --min-per-layer")


@dataclasses.dataclass(frozen=True)
class SelectionOptions(Constraints):
    """Options of a selection, apart from model, ratio, strategy, tasks and seed.

    :class:`Constraints` has the constraints on the choice.

    Attributes:
        num_prompts: prompt pairs per capability, split equally between its tasks.
        min_prompts: smallest number of solved prompts per capability, split equally between its tasks.
        probe_tokens: length of needle prompts without an own length.
        solved: which prompts count as solved: ``top1``, ``pair`` or ``off``
            (see :meth:`EffectEngine.solve`).
        max_rounds: largest number of rounds of path patching (the paper's scoring).
        control: knock out the best heads of every capability: its readout must fall (the paper's scoring).
        stability: compare with receiver effects on needles of a quarter, half and twice the length (the
            paper's scoring).
        effects: effects measured exactly by ``interp_denoise``: ``direct``, ``total`` or both;
            empty: the receiver effect alone (:attr:`exact_effects`). The other effect is only reported
            and does not change the choice; ``total`` takes most of the time.
        receiver_effect: the effect that makes a head a receiver and is its receiver score.
        senders: ``interp_denoise`` measures path patching to the receivers.
        sender_weight: weight of a head's sender effect relative to its receiver effect in
            ``interp_denoise`` (both in units of the readout, 0 corrupted … 1 clean).
        num_receivers: largest number of receivers per task in ``interp_denoise``; default: the number of
            FA heads.
        attribution: ``interp_denoise`` also measures the first-order estimate of the total effects. The
            map then holds it and its rank correlation with the measured effects.
        check_heads: ``attribution`` measures this many random heads exactly, for the rank correlation.
        task_weights: capability -> weight in the fusion; default 1. The tasks of a capability share it.
        text: a file of text or token ids on which ``learned_gates`` aligns its GDN branch (like
            ``--calibration-file`` of ``tools/hf_to_megatron.py``); "": a short bundled text.
        align_tokens, gate_tokens: tokens on which ``learned_gates`` learns the GDN branch and the gates.
        gate_steps: steps in which the gates' budget decreases from all heads to none.
        head_cost: share of a head's own work in the cost of a gate of ``learned_gates``, 0 … 1; the rest is
            the cache of its KV group.
        compare: files of other head maps; ``learned_gates`` measures the curves of their rankings as well.
        tokens_per_batch: number of positions per forward; 0: 2048 on a CPU, 32768 on a GPU.
    """

    num_prompts: int = option(
        40,
        "prompt pairs per capability, split equally between its tasks (default %(default)s)",
        group=PROMPTS,
    )
    min_prompts: int = option(
        8,
        "smallest number of solved prompts; below it, the task fails or is skipped (default %(default)s)",
        group=PROMPTS,
    )
    probe_tokens: int = option(
        PROBE_TOKENS,
        "length of needle prompts without tokens=… (default %(default)s)",
        group=PROMPTS,
    )
    solved: Literal["top1", "pair", "off"] = option(
        "top1",
        "rule for a solved prompt. top1: every answer token is the likeliest. pair: the answer is preferred "
        "to the wrong answer in the clean run, and not in the corrupted run. off: the corruption lowers the "
        "answer at all",
        group=PROMPTS,
    )
    max_rounds: int = option(
        2,
        "largest number of rounds of path patching; senders become the receivers of the next round until no "
        "new sender is found; 0: measure receivers only (default %(default)s)",
        group=PAPER,
    )
    control: bool = option(
        True,
        "skip the control that knocks out the best heads and checks that the readout falls",
        group=PAPER,
    )
    stability: bool = option(
        True,
        "skip the comparison with needle prompts of a quarter, half and twice the length",
        group=PAPER,
    )
    effects: tuple[Effect, ...] = option(
        (),
        "effects to measure exactly (default: the receiver effect); total takes by far the longest",
        group=FORMER,
    )
    receiver_effect: Effect = option(
        "direct", "effect that decides which heads are receivers", group=FORMER
    )
    senders: bool = option(True, "skip path patching", group=FORMER)
    sender_weight: float = option(
        0.5, "weight of senders; receivers have weight 1", parse=real(0), group=FORMER
    )
    num_receivers: int | None = option(
        None, "largest number of receivers per task (default: number of FA heads)", group=FORMER
    )
    attribution: bool = option(False, "also compute the first-order estimate", group=FORMER)
    check_heads: int = option(
        24,
        "number of random heads to also measure exactly (default %(default)s)",
        group="attribution",
    )
    task_weights: dict = option(
        {}, "weights of capabilities", flag="--task-weight", metavar="NAME=W"
    )
    tokens_per_batch: int = option(
        0,
        "tokens per batch (default 2048 on a CPU, 32768 on a GPU)",
        group="machine",
    )
    text: str = option(
        "",
        "plain text, or .jsonl of {'text': …} or {'tokens': [ids]} lines (default: a bundled text, which is "
        "only long enough for a trial)",
        parse=path_text,
        metavar="FILE",
        group=GATES,
    )
    align_tokens: int = option(
        4_000_000,
        "text tokens for aligning the GDN branch (default %(default)s)",
        group=GATES,
    )
    gate_tokens: int = option(
        20_000_000,
        "prompt and text tokens for learning the gates (default %(default)s)",
        group=GATES,
    )
    gate_steps: int = option(
        600,
        "steps while the budget decreases, of --gate-tokens / --gate-steps tokens each (default %(default)s)",
        group=GATES,
    )
    head_cost: float = option(
        0.5,
        "share of a head's own work in the cost of an open head; the rest is the cache of its KV group, "
        "which its heads share (0: only the cache; default %(default)s)",
        group=GATES,
    )
    compare: tuple[str, ...] = option(
        (),
        "other head maps of this model; the curves of their rankings are measured too",
        parse=path_text,
        metavar="MAP",
        group=GATES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solved not in ("top1", "pair", "off"):
            raise HydraError(f"--solved {self.solved}: must be top1, pair or off")
        if self.receiver_effect not in ("direct", "total"):
            raise HydraError(f"--receiver-effect {self.receiver_effect}: must be direct or total")
        if not set(self.effects) <= {"direct", "total"}:
            raise HydraError("--effects: must be direct, total or both")
        if self.receiver_effect not in self.exact_effects:
            raise HydraError(
                f"--receiver-effect {self.receiver_effect}: add this effect to --effects, which has "
                f"{' '.join(self.effects)}"
            )
        if self.min_prompts < 1 or self.num_prompts < self.min_prompts:
            raise HydraError(
                f"--min-prompts {self.min_prompts} must be at least 1 and at most --num-prompts "
                f"{self.num_prompts}"
            )
        if self.probe_tokens < 1 or self.max_rounds < 0:
            raise HydraError("--probe-tokens must be at least 1, --max-rounds at least 0")
        if self.tokens_per_batch < 0 or self.sender_weight < 0 or self.check_heads < 2:
            raise HydraError(
                "--tokens-per-batch must be at least 0, --sender-weight at least 0, "
                "--check-heads at least 2"
            )
        if self.num_receivers is not None and self.num_receivers < 1:
            raise HydraError(f"--num-receivers {self.num_receivers}: must be at least 1")
        if self.align_tokens < 1 or not LEAST_STEPS <= self.gate_steps <= self.gate_tokens:
            raise HydraError(
                f"--align-tokens must be at least 1. --gate-steps must be at least {LEAST_STEPS}, so that all "
                "gates can close, and at most --gate-tokens"
            )
        if not 0 <= self.head_cost <= 1:
            raise HydraError(f"--head-cost {self.head_cost:g}: must be from 0 to 1")

    @property
    def exact_effects(self) -> tuple[Effect, ...]:
        """The effects that ``interp_denoise`` measures: ``effects``, or if empty the receiver effect."""
        return self.effects or (self.receiver_effect,)

    @property
    def constraints(self) -> Constraints:
        """The options that are constraints."""
        return Constraints(
            *(getattr(self, field.name) for field in dataclasses.fields(Constraints))
        )

    def changed(self, names: Sequence[str]) -> list[str]:
        """Names of the options that differ from their defaults."""
        default = SelectionOptions()
        return [name for name in names if getattr(self, name) != getattr(default, name)]
