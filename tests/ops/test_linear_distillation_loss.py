"""Chunked equals unchunked: losses, gradients, masks, memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hydra.ops.linear_distillation_loss import (
    linear_distillation_loss,
    linear_distillation_loss_reference,
)

N, D, D_TEACHER, V = 37, 16, 24, 50


def _inputs(n: int = N, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    return {
        "student_hidden": make(n, D).requires_grad_(),
        "student_weight": make(V, D).requires_grad_(),
        "labels": torch.randint(0, V, (n,), generator=g),
        "loss_mask": (torch.rand(n, generator=g) < 0.7).float(),
        "teacher_hidden": make(n, D_TEACHER),
        "teacher_weight": make(V, D_TEACHER),
    }


def _gradients(result, inputs: dict) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(result.loss * 0.5, [inputs["student_hidden"], inputs["student_weight"]])
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 1000])
def test_equals_unchunked(kl_weight: float, temperature: float, chunk_tokens: int) -> None:
    inputs = _inputs()
    options = {"kl_weight": kl_weight, "temperature": temperature}
    plain = linear_distillation_loss_reference(**inputs, **options)
    chunked = linear_distillation_loss(**inputs, **options, chunk_tokens=chunk_tokens)
    for got, expected in zip(chunked, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    for got, expected in zip(_gradients(chunked, inputs), _gradients(plain, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_without_teacher_is_cross_entropy() -> None:
    inputs = _inputs() | {"teacher_hidden": None, "teacher_weight": None}
    plain = linear_distillation_loss_reference(**inputs)
    chunked = linear_distillation_loss(**inputs, kl_weight=0.9, chunk_tokens=8)
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-5, atol=0)
    assert chunked.kl == 0
    for got, expected in zip(_gradients(chunked, inputs), _gradients(plain, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_bf16_inputs_accumulate_in_fp32() -> None:
    inputs = _inputs(n=500, dtype=torch.bfloat16)
    plain = linear_distillation_loss_reference(**inputs, kl_weight=0.5)
    chunked = linear_distillation_loss(**inputs, kl_weight=0.5, chunk_tokens=7)
    assert chunked.loss.dtype == torch.float32
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-5, atol=0)
    for got, expected in zip(_gradients(chunked, inputs), _gradients(plain, inputs), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - expected).float().norm() < 0.01 * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_the_weights_dtype_change_the_loss_by_their_rounding_alone(dtype) -> None:
    inputs = _inputs(dtype=dtype)
    wide = linear_distillation_loss(**inputs, kl_weight=0.5, chunk_tokens=7)
    narrow = linear_distillation_loss(**inputs, kl_weight=0.5, chunk_tokens=7, fp32_logits=False)
    pairs = [
        (narrow.loss, wide.loss),
        *zip(_gradients(narrow, inputs), _gradients(wide, inputs), strict=True),
    ]
    distances = [
        float((a - b).detach().float().norm() / b.detach().float().norm()) for a, b in pairs
    ]
    if dtype == torch.float32:
        assert distances == [0, 0, 0]
    else:
        assert all(distance < 2e-2 for distance in distances) and max(distances) > 0


def test_masked_tokens_contribute_nothing_not_even_nan() -> None:
    inputs = _inputs()
    clean = linear_distillation_loss(**inputs, kl_weight=0.5, chunk_tokens=8)
    clean_gradients = _gradients(clean, inputs)
    masked = inputs["loss_mask"] == 0
    with torch.no_grad():
        inputs["student_hidden"][masked] = float("nan")
        inputs["teacher_hidden"][masked] = float("inf")
    poisoned = linear_distillation_loss(**inputs, kl_weight=0.5, chunk_tokens=8)
    assert torch.equal(poisoned.loss, clean.loss)
    for got, expected in zip(_gradients(poisoned, inputs), clean_gradients, strict=True):
        assert torch.equal(got, expected)
    assert (clean_gradients[0][masked] == 0).all()


def test_all_masked_is_zero() -> None:
    inputs = _inputs() | {"loss_mask": torch.zeros(N)}
    result = linear_distillation_loss(**inputs, kl_weight=0.5)
    assert [x.item() for x in result] == [0, 0, 0]
    assert all((g == 0).all() for g in _gradients(result, inputs))


def test_large_logits_stay_finite() -> None:
    inputs = _inputs()
    with torch.no_grad():
        inputs["student_weight"].mul_(1e3)
    plain = linear_distillation_loss_reference(**inputs, kl_weight=0.5)
    result = linear_distillation_loss(**inputs, kl_weight=0.5)
    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-5, atol=0)


def test_tied_weight_adds_to_the_embeddings_gradient() -> None:
    inputs = _inputs()
    weight = inputs["student_weight"]
    loss = linear_distillation_loss(**inputs, kl_weight=0.5).loss + weight[3].sum()
    loss.backward()
    head_only = torch.autograd.grad(
        linear_distillation_loss(**inputs, kl_weight=0.5).loss, [weight]
    )[0]
    head_only[3] += 1
    torch.testing.assert_close(weight.grad, head_only)


class _LiveBytes(TorchDispatchMode):
    """Peak bytes of live tensors that were made within the block."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self.seen or not size:
            return
        self.seen.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.seen.discard(pointer)
            self.live -= size

        weakref.finalize(storage, freed)


def _peak_bytes(n: int) -> int:
    inputs = _inputs(n)
    with _LiveBytes(list(inputs.values())) as bytes_:
        result = linear_distillation_loss(**inputs, kl_weight=0.5, temperature=2.0, chunk_tokens=64)
        _gradients(result, inputs)
    return bytes_.peak


def test_peak_memory_does_not_grow_with_tokens_beyond_the_gradient() -> None:
    few, many = 128, 4096
    per_token = (_peak_bytes(many) - _peak_bytes(few)) / (many - few)
    gradient_labels_and_mask = D * 4 + 8 + 1
    assert per_token <= 1.1 * gradient_labels_and_mask, per_token
    assert 2 * gradient_labels_and_mask < V * 4  # one row of logits would exceed the bound


def test_rejects_batched_hidden_states() -> None:
    inputs = _inputs()
    inputs["student_hidden"] = inputs["student_hidden"][:, None]
    with pytest.raises(ValueError, match=r"hidden \[N, D\]"):
        linear_distillation_loss(**inputs)
