"""Optimizers that a GPU machine may have, and where they keep their state, which matters to checkpoints.

========================  =====================================  =============================
optimizer                 step                                   moments
========================  =====================================  =============================
torch's AdamW             a tensor a parameter, on the host      on the device, fp32
torch's AdamW, fused      a tensor a parameter, on the device    on the device, fp32
Apex's FusedAdam          a number in each parameter group       on the device, fp32
Transformer Engine's      a number in each parameter group       on the device, of any dtype
========================  =====================================  =============================

:class:`FusedAdam` stands in for the last two; sources: ``apex/optimizers/fused_adam.py`` and
``transformer_engine/pytorch/optimizers/fused_adam.py``.
"""

from __future__ import annotations

from typing import Any

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the constructor and the state of Apex's and Transformer Engine's optimizers."""

    moments = torch.float32

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        capturable: bool = False,  # later releases of Megatron-Core pass this
    ) -> None:
        assert adam_w_mode and not capturable
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One AdamW step."""
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], parameter.grad.float()
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, dtype=self.moments)
                state["exp_avg"].lerp_(grad.to(self.moments), 1 - first)
                state["exp_avg_sq"].mul_(second).add_(grad.square(), alpha=1 - second)
                scale = (state["exp_avg_sq"].float() / (1 - second**step)).sqrt() + group["eps"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = state["exp_avg"].float() / (1 - first**step) / scale
                parameter.sub_(group["lr"] * update)


class TransformerEngineAdam(FusedAdam):
    """Moments in another dtype; a state dict returns and accepts them as fp32."""

    moments = torch.bfloat16

    def state_dict(self) -> dict[str, Any]:
        """See torch's."""
        body = super().state_dict()
        body["state"] = {
            i: {name: value.float() for name, value in state.items()}
            for i, state in body["state"].items()
        }
        return body

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch's."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: value.to(self.moments) for name, value in state.items()})


class _FusedAdamW(torch.optim.AdamW):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)


OPTIMIZERS = ("torch", "torch-fused", "apex", "transformer-engine")


def use_optimizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that one of :data:`OPTIMIZERS` is installed."""
    if name == "torch-fused":
        monkeypatch.setattr(torch.optim, "AdamW", _FusedAdamW)
    if name in ("torch", "torch-fused"):
        return
    kind = FusedAdam if name == "apex" else TransformerEngineAdam
    monkeypatch.setattr(megatron_optimizer, "Adam", kind)
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "Adam", kind)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_APEX_OPTIMIZER", name == "apex")
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", name != "apex")
