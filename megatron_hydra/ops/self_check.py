"""Start-up check: the chosen kernels against their torch twins, on this machine, with gradients.

With some compiler versions, kernels have silently given wrong results, mostly in backward passes. Seconds at
the start of a run are cheaper than a model trained on wrong gradients.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.ops import fla_tuning, kernel_cache, packages
from megatron_hydra.ops.differences import first_difference
from megatron_hydra.ops.kernels import FLA_BACKENDS, Case, Kernels
from megatron_hydra.ops.linear_distillation_loss import linear_distillation_loss
from megatron_hydra.ops.sharded_delta_rule import ShardsHere
from megatron_hydra.startup import startup_phase
from megatron_hydra.watchdog import PATIENCE, feed_watchdog

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest ‖got − twin‖ / ‖twin‖ of an output or a gradient. The twin computes in fp32 from the same rounded
inputs. Rounding is far below this bound; a wrong kernel has an error of a tenth or more."""

BOUNDARIES = (0, 70, 71, 200, 330)
"""Documents of the test stream: lengths are unequal, one is a single token, none is a multiple of a chunk."""

TAIL_BOUNDARIES = (0, 30, 31, 130, 195)
"""Boundaries of queries that are the last ones of each document, as in a context-parallel shard."""

SHARDS = 3
"""Shards of a stream under context parallelism. The middle one may lie within one document."""

SHARDED = {
    "packed {} of {} heads over shards": (BOUNDARIES, -0.05, 1.0),
    "long packed {} of {} heads over shards": (
        (0, 1000, 3000, 3001, 6000, 6144), -0.05, 1.0,
    ),
    "one long document's {} of {} heads over shards": ((0, 6144), -0.001, 0.05),
}  # fmt: skip
"""Streams of so many shards: short ones, and ones that kernels cut into parts. Each has boundaries, the
smallest log α and the largest β. The last stream forgets so slowly that its first shard changes its last
one."""

Run = Callable[[Kernels, list[torch.Tensor]], torch.Tensor]

Check = tuple[str, str, dict[str, torch.Tensor], Run]
"""A key of the ``backend`` section, the kernel's name in messages, its inputs by name, the call."""

_passed: set[str] = set()
"""Names (:func:`_name_of`) of the checks that have passed in this process."""

_postponed = False


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """While the block runs, :func:`check_kernels` checks nothing.

    It is for a first call at the run's own lengths: kernels tune themselves at the length of their first call,
    and the checks' streams are short.
    """
    global _postponed
    before, _postponed = _postponed, True
    try:
        yield
    finally:
        _postponed = before


def check_kernels(kernels: Kernels, case: Case) -> None:
    """Compare every chosen kernel with its twin; skips twins and kernels that have passed.

    On a GPU, passed checks are recorded beside the compilers' caches, for this card, these versions, sources
    and settings (:func:`~.kernel_cache.fingerprint`). Other processes do not repeat them.
    ``HYDRA_CHECK_AGAIN=1`` repeats them.

    Raises:
        HydraError: a kernel fails, or an output or gradient is wrong; names the key that avoids it.
    """
    if _postponed:
        return
    with startup_phase("start-up check"):
        _check_all(kernels, case)


def call_delta_rules(kernels: Kernels, case: Case) -> None:
    """Call the delta rule as :func:`check_kernels` would, forward and backward, and compare nothing."""
    for (key, _, inputs, run), *_ in _not_yet_passed(kernels, case):
        if key == "gated_delta_net":
            tensors = [x.requires_grad_() for x in inputs.values()]
            output = run(kernels, tensors)
            torch.autograd.grad(output, tensors, torch.zeros_like(output))


def _not_yet_passed(
    kernels: Kernels, case: Case
) -> Iterator[tuple[Check, str, dict[str, Any] | None]]:
    """Each check that is due, its name, and the facts for which a pass is recorded."""
    facts = _on_record(case)
    for found in all_checks(case):
        key, what, *_ = found
        check = f"{key}={kernels.names[key]} {_name_of(what, case)}"
        if kernels.names[key] == "torch" or check in _passed:
            continue
        again = os.environ.get("HYDRA_CHECK_AGAIN") == "1"
        if facts and not again and kernel_cache.is_recorded(_record_of(facts, check)):
            _passed.add(check)
            continue
        yield found, check, facts


def _record_of(facts: dict[str, Any], check: str) -> str:
    return f"check-{kernel_cache.key_of([facts, check])}"


def _check_all(kernels: Kernels, case: Case) -> None:
    twins = Kernels(delta_rule=case.rule.twin)
    for (key, what, inputs, run), check, facts in _not_yet_passed(kernels, case):
        name = kernels.names[key]
        problem = _difference(kernels, twins, inputs, run, TOLERANCE[case.dtype])
        if problem and name in FLA_BACKENDS and fla_tuning.is_flash_qla(case, inputs["q"].shape[1]):
            fla_tuning.refuse_flash_qla(case, inputs["q"].shape[1], problem)
            problem = _difference(kernels, twins, inputs, run, TOLERANCE[case.dtype])
        if problem:
            raise HydraError(_refusal(key, name, what, problem, case))
        _passed.add(check)
        if facts:
            kernel_cache.record(_record_of(facts, check), {"check": check, **facts})
        feed_watchdog(PATIENCE)


def _on_record(case: Case) -> dict[str, Any] | None:
    """The fingerprint for which passes are recorded; ``None`` without a GPU, where nothing is compiled."""
    return kernel_cache.fingerprint(case.device) if case.device.type == "cuda" else None


def _name_of(what: str, case: Case) -> str:
    return f"{what}, {case.device.type}, {case.dtype}, head dimension {case.head_dim}"


def _refusal(key: str, name: str, what: str, problem: str, case: Case) -> str:
    others = "torch" if key != "full_attention" else "another one (varlen, torch)"
    remedy = "install other versions of its package and of triton"
    if name in FLA_BACKENDS and packages.needs_tilelang(case):
        remedy = (
            f"pip install {packages.TILELANG} (FLA's backward needs TileLang, or triton 3.7.1, with this "
            "Triton on Hopper)"
        )
    return (
        f"the start-up check of {what} failed with backend.{key}={name} on "
        f"{_device_name(case.device)}: {problem}. Set backend.{key}={others}, or {remedy}"
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _difference(
    kernels: Kernels, twins: Kernels, inputs: dict[str, torch.Tensor], run: Run, tolerance: float
) -> str | None:
    """The kernel's error on these inputs, or ``None``."""
    got_in = [x.clone().requires_grad_() for x in inputs.values()]
    want_in = [x.float().requires_grad_() for x in inputs.values()]
    generator = torch.Generator(device=got_in[0].device).manual_seed(1)
    try:
        got = run(kernels, got_in)
        cotangent = torch.randn(got.shape, generator=generator, device=got.device)
        got_grads = torch.autograd.grad(got, got_in, cotangent.to(got.dtype))
        if got.is_cuda:
            torch.cuda.synchronize(got.device)
    except Exception as error:
        return f"it raised {type(error).__name__}: {str(error)[:300]}"
    want = run(twins, want_in)
    want_grads = torch.autograd.grad(want, want_in, cotangent.to(got.dtype).float())
    results = {"the output": (got, want)}
    for name, a, b in zip(inputs, got_grads, want_grads, strict=True):
        results[f"the gradient of {name}"] = (a, b)
    return first_difference(results, tolerance)


class _Inputs:
    """Random tensors of a case, equal in every process."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.generator = torch.Generator(device=case.device).manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=self.generator, device=self.case.device)
        return x.to(self.case.dtype)

    def unit(self, *shape: int) -> torch.Tensor:
        x = torch.nn.functional.normalize(self.normal(*shape).float(), dim=-1)
        return x.to(self.case.dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Fp32, in 0 … 1."""
        return torch.rand(*shape, generator=self.generator, device=self.case.device)

    def positions(self, boundaries: Sequence[int]) -> torch.Tensor:
        """Every token's position in its document."""
        documents = zip(boundaries, boundaries[1:], strict=False)
        return torch.cat([torch.arange(b - a) for a, b in documents]).to(self.case.device)


def all_checks(case: Case) -> Iterator[Check]:
    """The checks of every kernel, for each way in which layers and losses call it."""
    yield from _attention_checks(case)
    yield from _delta_rule_checks(case)
    yield from _delta_rule_gates_checks(case)
    yield from _preparation_checks(case)
    yield from _delta_rule_inputs_checks(case)
    yield from _fusion_tail_checks(case)
    yield from _loss_checks(case)


def _attention_checks(case: Case) -> Iterator[Check]:
    make, d, tokens = _Inputs(case, 0), case.head_dim, BOUNDARIES[-1]
    streams = {
        "packed full attention": (BOUNDARIES, BOUNDARIES),
        "one document's full attention": ((0, tokens), (0, tokens)),
        "full attention of the documents' last queries": (TAIL_BOUNDARIES, BOUNDARIES),
    }
    for window in (None, 50) if case.windowed else (None,):
        within = "" if window is None else " within a window"
        for name, (cu_q, cu_k) in streams.items():
            yield (
                "full_attention",
                name + within,
                {
                    "q": make.normal(cu_q[-1], 4, d),
                    "k": make.normal(tokens, 2, d),
                    "v": make.normal(tokens, 2, d),
                },
                lambda kernels, x, cu_q=cu_q, cu_k=cu_k, window=window: kernels.attention(  # type: ignore[misc]
                    *x, cu_q, cu_k, window=window
                ),
            )


def _delta_rule_checks(case: Case) -> Iterator[Check]:
    make, d, tokens = _Inputs(case, 1), case.head_dim, BOUNDARIES[-1]
    if case.context_parallel:
        yield from _sharded_delta_rule_checks(case)
        return
    for heads, (cu, name) in itertools.product(
        case.gdn_heads, ((BOUNDARIES, "packed"), ((0, tokens), "one document's"))
    ):
        yield (
            "gated_delta_net",
            f"{name} {case.rule.title} of {heads} heads",
            {
                "q": make.unit(tokens, heads, d),
                "k": make.unit(tokens, heads, d),
                "v": make.normal(tokens, heads, d),
                # Half-lives are tens to hundreds of tokens, which shows a leak between documents.
                "log alpha": -0.05 * make.uniform(tokens, heads, *case.rule.decays_of_head(d)),
                "beta": make.uniform(tokens, heads),
            },
            lambda kernels, x, cu=cu: kernels.delta_rule(*x, cu)[0],  # type: ignore[misc]
        )


def _delta_rule_gates_checks(case: Case) -> Iterator[Check]:
    """Gates as at the start of a model: the bias makes a token's decay smaller than the rounding of 1."""
    make, tokens, heads = _Inputs(case, 6), BOUNDARIES[-1], 5
    yield (
        "fused_kernels",
        "the gates of the delta rule",
        {
            "a": make.normal(tokens, heads),
            "b": make.normal(tokens, heads),
            "A_log": make.uniform(heads),
            "dt_bias": 10 * make.uniform(heads) - 10,
        },
        lambda kernels, x: torch.cat(kernels.delta_rule_gates(*x), dim=1),
    )


def _sharded_delta_rule_checks(case: Case) -> Iterator[Check]:
    """All shards in this process, one after the other, against the whole stream."""
    make, d = _Inputs(case, 1), case.head_dim
    fla_exchanges = case.rule.fla is not None and case.rule.fla.exchanges_states
    for heads, (name, (cu, decay, strength)) in itertools.product(case.gdn_heads, SHARDED.items()):
        tokens, shards = cu[-1], ShardsHere(cu, SHARDS)

        def run(
            kernels: Kernels,
            x: list[torch.Tensor],
            cu: tuple[int, ...] = cu,
            shards: ShardsHere = shards,
        ) -> torch.Tensor:
            # The twin takes the whole stream; FLA's own context parallelism needs the run's ranks.
            by_fla = fla_exchanges or kernels.names["gated_delta_net"] == "fla_cp"
            whole = by_fla or kernels.names["gated_delta_net"] == "torch"
            return kernels.delta_rule(*x, cu, exchange=None if whole else shards)[0]

        inputs = {
            "q": make.unit(tokens, heads, d),
            "k": make.unit(tokens, heads, d),
            "v": make.normal(tokens, heads, d),
            "log alpha": decay * make.uniform(tokens, heads, *case.rule.decays_of_head(d)),
            "beta": strength * make.uniform(tokens, heads),
        }
        yield "gated_delta_net", name.format(case.rule.title, heads), inputs, run


def _preparation_checks(case: Case) -> Iterator[Check]:
    """Two heads of queries and one of keys, as in FA branches."""
    make, d, tokens = _Inputs(case, 2), case.head_dim, BOUNDARIES[-1]
    positions = make.positions(BOUNDARIES)
    tables, log_scale = _tables(make, positions, d), 1 + positions.float() / tokens
    for name, rotary, scale in (
        ("rotary embedding", tables, None),
        ("the log scale", None, log_scale),
    ):

        def run(
            kernels: Kernels,
            x: list[torch.Tensor],
            rotary: tuple[torch.Tensor, torch.Tensor] | None = rotary,
            scale: torch.Tensor | None = scale,
        ) -> torch.Tensor:
            made = kernels.prepare_queries_and_keys(
                x[0], 1, (x[1], x[2]), 1e-6, rotary, scale, False
            )
            return torch.cat(made, dim=1)

        inputs = {
            "x": make.normal(tokens, 3, d), "q norm": make.normal(d), "k norm": make.normal(d),
        }  # fmt: skip
        yield "fused_kernels", f"q/k preparation with {name}", inputs, run


def _delta_rule_inputs_checks(case: Case) -> Iterator[Check]:
    make, d, tokens = _Inputs(case, 3), case.head_dim, BOUNDARIES[-1]
    q_heads, kv_heads = 3, 2
    channels = (q_heads + 2 * kv_heads) * d
    positions = make.positions(BOUNDARIES)
    tables = _tables(make, positions, d) if case.gdn_rotary else None
    inputs = {
        "qkv": make.normal(tokens, channels), "convolution": make.normal(channels, 4),
        "q norm": make.normal(d), "k norm": make.normal(d),
    }  # fmt: skip
    # The first document began two tokens before this shard; earlier tokens are another document's.
    shard = positions.clone()
    shard[: BOUNDARIES[1]] += 2
    for where, at, halo in (
        ("", positions, {}),
        (" after another shard", shard, {"halo": make.normal(3, channels)}),
    ):

        def run(kernels: Kernels, x: list[torch.Tensor], at: torch.Tensor = at) -> torch.Tensor:
            qkv, conv, q_norm, k_norm, *halo = x
            made = kernels.delta_rule_inputs(
                qkv, (q_heads, kv_heads), conv, at, halo[0] if halo else None, (q_norm, k_norm),
                1e-6, tables,
            )  # fmt: skip
            return torch.cat(made, dim=1)

        yield "fused_kernels", f"the inputs of the delta rule{where}", {**inputs, **halo}, run


def _tables(make: _Inputs, positions: torch.Tensor, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (positions.float()[:, None] * make.uniform(d // 2)).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _fusion_tail_checks(case: Case) -> Iterator[Check]:
    make, d, tokens = _Inputs(case, 4), case.head_dim, BOUNDARIES[-1]
    yield (
        "fused_kernels",
        "the fusion tail",
        {
            "o": make.normal(tokens, 2, d), "gate": make.normal(tokens, 2, d),
            "o'": make.normal(tokens, 3, d), "gate'": make.normal(tokens, 3, d),
            "scale": make.normal(5),
        },
        lambda kernels, x: kernels.fusion_tail([(x[0], x[1]), (x[2], x[3])], x[4], 1e-6),
    )  # fmt: skip


def _loss_checks(case: Case) -> Iterator[Check]:
    """More columns than a kernel's block; with a teacher at two temperatures, and without one."""
    make, tokens, vocabulary, d = _Inputs(case, 5), 40, 5000, 64
    labels = (make.uniform(tokens) * vocabulary).long()
    mask = make.uniform(tokens) < 0.8
    teacher = {
        "teacher_hidden": make.normal(tokens, d),
        "teacher_weight": make.normal(vocabulary, d) * d**-0.5,
    }
    for name, options in {
        "cross-entropy": {},
        "distillation loss": {"kl_weight": 0.6},
        "distillation loss at a temperature": {"kl_weight": 0.6, "temperature": 2.5},
    }.items():

        def run(
            kernels: Kernels, x: list[torch.Tensor], options: dict[str, float] = options
        ) -> torch.Tensor:
            hidden, head = x
            given: dict[str, Any] = dict(options)
            if options:
                given |= {key: value.to(hidden.dtype) for key, value in teacher.items()}
            fused = kernels.names["fused_kernels"] == "triton"
            return linear_distillation_loss(
                hidden, head, labels, mask, chunk_tokens=16, fused=fused, **given
            ).loss

        inputs = {
            "hidden states": make.normal(tokens, d),
            "the LM head": make.normal(vocabulary, d) * d**-0.5,
        }
        yield "fused_kernels", f"the {name}", inputs, run
