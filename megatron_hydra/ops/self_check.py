"""Start-up check: the chosen kernels against their torch twins, on this machine, with gradients.

Compiled kernels have been wrong on some versions of their compiler without a word, backward passes
above all. A second at the start of a run is cheaper than a model trained on wrong gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.ops.backends import Case, Kernels

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest ‖got − twin‖ / ‖twin‖ of an output or a gradient; the twin computes in fp32 from the same
rounded inputs. Rounding stays well below, a wrong kernel is off by a tenth and more."""

BOUNDARIES = (0, 70, 71, 200, 330)
"""Documents of the test stream: unequal, one of a single token, none a multiple of a chunk."""

Run = Callable[[Kernels, list[torch.Tensor]], torch.Tensor]


def check_kernels(kernels: Kernels, case: Case) -> None:
    """Compare every chosen kernel with its twin; does nothing for twins and after the first time.

    Raises:
        HydraError: a kernel fails, or an output or gradient is off; names the key that avoids it.
    """
    _check_once(tuple(sorted(kernels.names.items())), kernels.attention, kernels.delta_rule, case)


@functools.lru_cache(maxsize=16)
def _check_once(
    names: tuple[tuple[str, str], ...], attention: Callable, delta_rule: Callable, case: Case
) -> None:
    from megatron_hydra.ops.backends import BACKENDS

    twins = Kernels()
    chosen: dict = {}
    for key, name in names:
        (backend,) = (b for b in BACKENDS[key] if b.name == name)
        chosen.update(backend.load())
    kernels = Kernels(**chosen, names=dict(names))
    for key, what, inputs, run in _checks(case):
        name = kernels.names[key]
        if name == "torch":
            continue
        problem = _difference(kernels, twins, inputs, run, TOLERANCE[case.dtype])
        if problem:
            others = "torch" if key != "full_attention" else "another one (varlen, torch)"
            raise HydraError(
                f"the start-up check of {what} failed with backend.{key}={name} on "
                f"{torch.cuda.get_device_name(case.device)}: {problem}. "
                f"Set backend.{key}={others}, or install other versions of its package and of triton"
            )


def _difference(
    kernels: Kernels, twins: Kernels, inputs: dict[str, torch.Tensor], run: Run, tolerance: float
) -> str | None:
    """What is wrong with the kernel on these inputs, or ``None``."""
    got_in = [x.clone().requires_grad_() for x in inputs.values()]
    want_in = [x.float().requires_grad_() for x in inputs.values()]
    generator = torch.Generator(device=got_in[0].device).manual_seed(1)
    try:
        got = run(kernels, got_in)
        cotangent = torch.randn(got.shape, generator=generator, device=got.device)
        got_grads = torch.autograd.grad(got, got_in, cotangent.to(got.dtype))
        torch.cuda.synchronize(got.device)
    except Exception as error:
        return f"it raised {type(error).__name__}: {str(error)[:300]}"
    want = run(twins, want_in)
    want_grads = torch.autograd.grad(want, want_in, cotangent.to(got.dtype).float())
    results = {"the output": (got, want)}
    for name, a, b in zip(inputs, got_grads, want_grads, strict=True):
        results[f"the gradient of {name}"] = (a, b)
    for what, (a, b) in results.items():
        distance = float((a.float() - b).norm() / b.norm().clamp_min(1e-20))
        if not distance < tolerance:  # NaN must fail
            return f"{what} differs from the reference by {distance:.1%}"
    return None


def _checks(case: Case) -> Iterator[tuple[str, str, dict[str, torch.Tensor], Run]]:
    """(backend key, what it is called, inputs, call) of every kernel."""
    device, dtype, d = case.device, case.dtype, case.head_dim
    generator = torch.Generator(device=device).manual_seed(0)
    tokens = BOUNDARIES[-1]

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(kind)

    for cu, name in ((BOUNDARIES, "packed"), ((0, tokens), "one document's")):
        yield (
            "full_attention",
            f"{name} full attention",
            {"q": normal(tokens, 4, d), "k": normal(tokens, 2, d), "v": normal(tokens, 2, d)},
            lambda kernels, x, cu=cu: kernels.attention(*x, cu, cu),  # type: ignore[misc]
        )
        if case.windowed:
            yield (
                "full_attention",
                f"{name} attention within a window",
                {"q": normal(tokens, 4, d), "k": normal(tokens, 2, d), "v": normal(tokens, 2, d)},
                lambda kernels, x, cu=cu: kernels.attention(*x, cu, cu, window=50),  # type: ignore[misc]
            )
        unit = torch.nn.functional.normalize
        yield (
            "gated_delta_net",
            f"{name} gated delta rule",
            {
                "q": unit(normal(tokens, 2, d).float(), dim=-1).to(dtype),
                "k": unit(normal(tokens, 2, d).float(), dim=-1).to(dtype),
                "v": normal(tokens, 2, d),
                # Half-lives from tens to hundreds of tokens: a leak between documents shows.
                "log alpha": -torch.rand(tokens, 2, generator=generator, device=device) * 0.05,
                "beta": torch.rand(tokens, 2, generator=generator, device=device),
            },
            lambda kernels, x, cu=cu: kernels.delta_rule(*x, cu)[0],  # type: ignore[misc]
        )
    positions = torch.cat([torch.arange(b - a) for a, b in zip(BOUNDARIES, BOUNDARIES[1:])])
    positions = positions.to(device)
    angles = (positions.float()[:, None] * torch.rand(d // 2, device=device)).repeat(1, 2)[:, None]
    tables, scale = (angles.cos(), angles.sin()), 1 + positions.float() / tokens
    yield (
        "fused_kernels",
        "q/k preparation",
        {"x": normal(tokens, 3, d), "weight": normal(d)},
        lambda kernels, x: kernels.prepare_heads(x[0], x[1], 1e-6, tables, scale, True),
    )
    yield (
        "fused_kernels",
        "the short convolution",
        {"x": normal(tokens, 3 * d), "weight": normal(3 * d, 4)},
        lambda kernels, x: kernels.short_conv(x[0], x[1], positions),
    )
    yield (
        "fused_kernels",
        "the fusion tail",
        {
            "o": normal(tokens, 2, d), "gate": normal(tokens, 2, d), "o'": normal(tokens, 3, d),
            "gate'": normal(tokens, 3, d), "scale": normal(5),
        },
        lambda kernels, x: kernels.fusion_tail([(x[0], x[1]), (x[2], x[3])], x[4], 1e-6),
    )  # fmt: skip
