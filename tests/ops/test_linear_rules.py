"""The description of linear rules: what a model, decays and FLA have to do with each other."""

from __future__ import annotations

import inspect

import pytest
import torch

from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.model.layer_spec import kernel_case
from megatron_hydra.ops.linear_rules import RULES, rule_of_decays
from tests.parallel.layouts import tiny


@pytest.mark.parametrize("name", RULES)
def test_a_models_kernels_are_checked_for_its_rule(name):
    model = tiny(HydraConfig(linear=name), ((1, 6), (0,)))
    assert kernel_case(model, RunConfig(precision="fp32")).rule is RULES[name]


@pytest.mark.parametrize("name", RULES)
def test_decays_tell_the_rule(name):
    rule = RULES[name]
    assert rule_of_decays(torch.zeros(5, 3, *rule.decays_of_head(8))) is rule


@pytest.mark.parametrize("name", RULES)
def test_fla_has_the_kernel_with_the_arguments_that_it_is_called_with(name):
    pytest.importorskip("fla.ops.kda")
    rule = RULES[name]
    parameters = inspect.signature(inspect.unwrap(rule.fla_kernel())).parameters
    assert list(parameters)[:5] == ["q", "k", "v", "g", "beta"]
    assert {"initial_state", "cu_seqlens", "cu_seqlens_cpu", "cp_context"} <= set(parameters)
