"""The declarations of linear rules: what models, kernels and FLA read from them."""

from __future__ import annotations

import inspect

import pytest

from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.model.layer_spec import kernel_case
from megatron_hydra.model.parameters import parameters_by_key
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.ops.linear_rules import RULES
from tests.parallel.layouts import tiny


@pytest.mark.parametrize("name", RULES)
def test_a_model_gets_the_kernels_of_its_rule(name):
    model, run = tiny(HydraConfig(linear=name), ((1, 6), (0,))), RunConfig(precision="fp32")
    case = kernel_case(model, run)
    assert case.rule is RULES[name]
    assert choose_kernels(run.backend, case).delta_rule is RULES[name].twin


@pytest.mark.parametrize("name", RULES)
def test_parameters_have_the_shape_of_the_rules_decays(name):
    model = tiny(HydraConfig(linear=name), ((1, 6), (0,)))
    rows, decays = parameters_by_key(model), RULES[name].decays_of_head(model.head_dim)
    assert rows["gdn.dt_bias"].shape(model, 6) == (6, *decays)
    assert rows["in.gdn.a"].shape(model, 6) == (6, *decays, model.hidden_size)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.fla])
def test_fla_has_the_kernel_with_the_arguments_that_it_is_called_with(name):
    pytest.importorskip("fla.ops.kda")
    parameters = inspect.signature(inspect.unwrap(RULES[name].fla.load())).parameters
    assert list(parameters)[:5] == ["q", "k", "v", "g", "beta"]
    assert {"initial_state", "cu_seqlens", "cu_seqlens_cpu", "cp_context"} <= set(parameters)
