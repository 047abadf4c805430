"""The planner's shapes against a real model, its search, its command."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from megatron_hydra.config.loading import from_dict, load_run_config
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import ParallelConfig, RecomputeConfig, RunConfig
from megatron_hydra.conversion.hf_config import hf_config_from_model
from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap, num_full_attention_heads
from megatron_hydra.model.layer_spec import build_gpt_model
from megatron_hydra.planning.command import Request, plan
from megatron_hydra.planning.hardware import GPUS, Efficiency, find_gpu
from megatron_hydra.planning.models import hydrahead, layer_wise, model_kinds, read_model
from megatron_hydra.planning.parameters import layer_parameters, stage_parameters
from megatron_hydra.planning.plan import Plan, plan_run
from megatron_hydra.planning.report import cost_of, ranked, stage_lines
from megatron_hydra.planning.search import Job, layouts, search
from megatron_hydra.planning.stages import STAGES, ValidationBudget, recipe_stages, stages_up_to
from megatron_hydra.planning.tape.rank import Rank
from megatron_hydra.planning.tape.stage import StageBuilder
from megatron_hydra.planning.timing import Machine
from tests.parallel.launch import ROOT
from tests.planning import cases
from tools.plan import main, parser

QWEN = "Qwen/Qwen3-1.7B"
H200 = Machine(find_gpu("h200"), Efficiency())


# -- shapes ---------------------------------------------------------------------------------------

VARIANTS = [
    cases.DENSE,
    cases.MODELS["layer-wise"],
    cases.MODELS["hydrahead"],
    cases.MODELS["kda"],
    cases._hybrid(((1, 6), (), (0, 1, 5), (2,)), fusion="gated", gdn_kv="gqa"),
    cases._hybrid(((1, 6), (), (0, 1, 5), tuple(range(8))), qkv="shared"),
    dataclasses.replace(
        cases._hybrid(((1, 6), (), (0, 1, 5), (2,)), qkv="shared", gdn_kv="gqa"), qkv_bias=True
    ),
    dataclasses.replace(
        cases._hybrid(((1, 6), (), (0, 1, 5), (2,)), short_conv=False, fa_gate=False),
        qkv_bias=True, out_bias=True, qk_norm=False, tie_embeddings=False,
    ),
]  # fmt: skip


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("model", VARIANTS)
def test_parameters_are_those_of_the_model_that_would_be_built(model: ModelConfig) -> None:
    run = from_dict(RunConfig, cases.run_config())
    built = build_gpt_model(model, run)
    builder = StageBuilder(model, Rank(run))
    heads = [builder.heads(layer) for layer in range(model.num_layers)]
    planned = stage_parameters(model, heads, tp=1, first=True, last=True)
    assert sum(p.numel for p in planned) == sum(p.numel() for p in built.parameters())
    for index, layer in enumerate(built.decoder.layers):
        real = sum(p.numel() for p in layer.parameters())
        assert sum(p.numel for p in layer_parameters(model, heads[index], 1)) == real


def test_qwen_has_as_many_parameters_as_its_name_says() -> None:
    for name, expected in {"0.6B": 0.596e9, "1.7B": 1.72e9, "4B": 4.02e9, "8B": 8.19e9,
                           "14B": 14.77e9, "32B": 32.76e9}.items():  # fmt: skip
        model = read_model(f"Qwen/Qwen3-{name}")
        builder = StageBuilder(model, Rank(from_dict(RunConfig, cases.run_config())))
        heads = [builder.heads(layer) for layer in range(model.num_layers)]
        total = sum(p.numel for p in stage_parameters(model, heads, 1, True, True))
        assert total == pytest.approx(expected, rel=0.005)


def test_a_model_is_found_by_name_file_or_folder(tmp_path: Path) -> None:
    from megatron_hydra.planning.models import SHAPES

    (tmp_path / "config.json").write_text(json.dumps(SHAPES[QWEN]))
    by_name = read_model(QWEN)
    assert by_name.num_query_heads == 16
    assert read_model(str(tmp_path)) == read_model(str(tmp_path / "config.json")) == by_name
    with pytest.raises(HydraError, match=r"--model Qwen/Qwen9: no such file.*Qwen3-1.7B"):
        read_model("Qwen/Qwen9")


def test_kinds_have_the_ratio_that_was_asked_for() -> None:
    dense = read_model(QWEN)
    budget = num_full_attention_heads(28, 16, "7:1")
    counts = {
        name: [len(model.fa_heads(i)) for i in range(28)]
        for name, model in model_kinds(dense, "7:1", "").items()
    }
    assert sum(counts["dense"]) == 448
    assert sum(counts["hydrahead"]) == budget == 56
    assert sorted(set(counts["layer-wise"])) == [0, 16]
    assert abs(sum(counts["layer-wise"]) - budget) <= 16
    assert sum(map(len, layer_wise(dense, 0).full_attention_heads or ())) == 0
    with pytest.raises(HydraError, match="ratio"):
        hydrahead(dense, "seven")


def _map(path: Path, dense: ModelConfig, heads: int, **changes: object) -> str:
    """Write a head map with ``heads`` FA heads, all in the first layers; returns its path."""
    identity = dataclasses.replace(dense.identity(), **changes)  # type: ignore[arg-type]
    chosen = tuple(
        tuple(range(min(16, max(0, heads - 16 * layer)))) for layer in range(dense.num_layers)
    )
    HeadMap(identity, chosen, "random", "7:1").save(path)
    return str(path)


@pytest.mark.parametrize(
    ("heads", "layers"),
    [(3, 1), (25, 2), (112, 7)],  # of 16 heads a layer
)
def test_whole_layers_have_the_heads_of_the_map(tmp_path: Path, heads: int, layers: int) -> None:
    """A map may have any ratio, whatever --ratio is; the model may also be a hybrid."""
    dense = read_model(QWEN)
    kinds = model_kinds(dense, "7:1", _map(tmp_path / "map.json", dense, heads))
    for found in (kinds, model_kinds(kinds["hydrahead"], "7:1", "")):
        assert sum(len(found["hydrahead"].fa_heads(i)) for i in range(28)) == heads
        assert sum(len(found["layer-wise"].fa_heads(i)) > 0 for i in range(28)) == layers


def test_the_command_refuses_a_map_that_does_not_belong(tmp_path: Path, capfd) -> None:
    dense = read_model(QWEN)
    path = _map(tmp_path / "map.json", dense, 56, num_query_heads=32, num_kv_heads=16)
    machine = ["--seq", "4096", "--gpus", "8", "--gpu", "h200", "--head-map", path]
    assert main(["--model", QWEN, *machine]) == 2
    message = capfd.readouterr().err
    assert f"error: {path} was made for another model" in message and "num_query_heads" in message

    hybrid = hydrahead(dense, "7:1")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(hf_config_from_model(hybrid, "bfloat16")))
    assert main(["--model", str(config), *machine]) == 2
    assert f"error: --head-map {path}: --model is a hybrid" in capfd.readouterr().err


# -- plans ----------------------------------------------------------------------------------------


def _job(**changes: object) -> Job:
    return dataclasses.replace(Job("finetune", 65_536, 1_048_576, 16), **changes)  # type: ignore[arg-type]


def test_work_does_not_depend_on_the_layout() -> None:
    """The FLOPs of all ranks together do not depend on the layout."""
    model = hydrahead(read_model(QWEN), "7:1")
    totals = []
    for parallel in (
        ParallelConfig(),
        ParallelConfig(context=4),
        ParallelConfig(tensor=4, sequence=True, fa_partition="sequence"),
    ):
        job = _job(gpus=parallel.tensor * parallel.context, tokens_per_step=65_536)
        found = plan_run(model, job.run(parallel, 1, RecomputeConfig()), job.gpus, H200)
        totals.append(sum(found.flops.values()) * job.gpus)
    assert totals[1] == pytest.approx(totals[0], rel=1e-9)
    # Some layers' GDN heads are not a multiple of four: the busiest rank has more than its share.
    assert totals[0] * (1 - 1e-9) < totals[2] < totals[0] * 1.1


def test_recomputation_trades_flops_for_memory() -> None:
    model = read_model(QWEN)
    job = _job(gpus=8)
    parallel = ParallelConfig(context=8)
    memory, flops = [], []
    for again in (
        RecomputeConfig("none"),
        RecomputeConfig("selective", ("attention", "mlp")),
        RecomputeConfig("full"),
    ):
        found = plan_run(model, job.run(parallel, 1, again), 8, H200)
        memory.append(found.memory.total)
        flops.append(sum(found.flops.values()))
    assert memory[0] > memory[1] > memory[2]
    assert flops[0] < flops[1] < flops[2]


def test_the_distributed_optimizer_shares_its_states() -> None:
    model, job = read_model(QWEN), _job(gpus=8)
    parallel = ParallelConfig(context=4)
    shared, own = (
        plan_run(
            model,
            job.run(
                dataclasses.replace(parallel, distributed_optimizer=on), 1, RecomputeConfig("full")
            ),
            8,
            H200,
        ).memory.held["optimizer"]
        for on in (True, False)
    )
    assert own == pytest.approx(8 * shared, rel=1e-3)


def test_found_layouts_fit_and_are_ranked() -> None:
    plans = search(hydrahead(read_model(QWEN), "7:1"), _job(), H200)
    usable = H200.gpu.memory * H200.efficiency.usable
    assert len(plans) > 3
    assert all(p.memory.total <= usable and p.fits for p in plans)
    speeds = [p.tokens_per_second for p in plans]
    assert speeds == sorted(speeds, reverse=True)
    for p in plans:
        sizes = p.layout()
        assert sizes["tensor"] * sizes["context"] * sizes["pipeline"] * sizes["data"] == 16  # type: ignore[operator]


@pytest.mark.parametrize("gpus", [24, 48, 96])
def test_machines_of_no_power_of_two_have_a_plan(gpus: int) -> None:
    """If a step should have two sequences, three replicas take three."""
    job = _job(gpus=gpus, sequence_length=524_288)
    sizes = {
        (job.batch(parallel, micro), parallel.tensor * parallel.context * parallel.pipeline)
        for parallel, micro in layouts(hydrahead(read_model(QWEN), "7:1"), job)
    }
    assert sizes == {(3, gpus // 3)}
    parallel = ParallelConfig(tensor=8, context=gpus // 24, sequence=True, fa_partition="sequence")
    run = job.run(parallel, 1, RecomputeConfig("full"))
    found = plan_run(hydrahead(read_model(QWEN), "7:1"), run, gpus, H200)
    assert found.data_parallel == found.run.batch.global_batch_size == 3
    assert "3" in ranked([found], 1)[1].split()


def test_powers_of_two_keep_the_batch() -> None:
    job = _job(gpus=64)
    found = list(layouts(read_model(QWEN), job))
    assert found and all(job.batch(parallel, micro) == 16 for parallel, micro in found)


def test_what_does_not_fit_names_what_binds() -> None:
    model = read_model("Qwen/Qwen3-32B")
    with pytest.raises(
        HydraError, match=r"does not fit.*leanest layout.*what binds is .*GiB"
    ) as held:
        search(model, _job(gpus=2, sequence_length=1024, tokens_per_step=2048), H200)
    assert "what binds is gradient buffer" in str(held.value) or "optimizer" in str(held.value)
    with pytest.raises(HydraError, match="shorter --seq"):
        search(read_model(QWEN), _job(gpus=1, sequence_length=2**20), H200)


def test_shipped_layouts_are_among_those_searched() -> None:
    """By the planner's estimate, the shipped layout of 64 GPUs fits."""
    folder = ROOT / "configs" / "qwen3_1.7b"
    run = load_run_config(
        [
            folder / "ours/finetune.yaml",
            folder / "ours/finetune_512k.yaml",
            folder / "layouts/64_gpus_long.yaml",
        ]
    )
    found = plan_run(hydrahead(read_model(QWEN), "7:1"), run, 64, H200)
    assert found.fits
    assert found.data_parallel == 2


# -- stages and the command -----------------------------------------------------------------------


def test_stages_are_those_of_the_shipped_configs() -> None:
    found, total = recipe_stages(ROOT / "configs" / "qwen3_1.7b" / "ours")
    assert total == pytest.approx(15e9, rel=0.01)
    for stage, planned in zip(found, STAGES, strict=True):
        assert stage.share == pytest.approx(planned.share, abs=0.003)
        assert dataclasses.replace(stage, share=planned.share) == planned


@pytest.mark.parametrize(("recipe", "tokens"), [("paper", 2.3e9), ("optimised", 5.8e9)])
def test_a_recipe_is_a_folder_of_stages(recipe: str, tokens: float) -> None:
    found, total = recipe_stages(ROOT / "configs" / "qwen3_1.7b" / recipe)
    assert [stage.name for stage in found] == ["align", "distill", "finetune"]
    assert total == pytest.approx(tokens, rel=0.001)
    assert sum(stage.share for stage in found) == pytest.approx(1)


def test_validations_of_a_recipe_are_in_its_hours(tmp_path: Path) -> None:
    shipped = (ROOT / "configs/smollm2_135m/finetune.yaml").read_text()
    held_out = shipped.replace("packing:", "held_out: 0.001\n  packing:")
    (tmp_path / "finetune.yaml").write_text(
        held_out + "\nvalidation: {interval: 150, sequences: 64}\n"
    )
    (stage,), tokens = recipe_stages(tmp_path)
    assert stage.validation == ValidationBudget(3, 64)  # in 400 steps: 150, 300, and the last one
    model = hydrahead(read_model(QWEN), "7:1")
    run = _job(gpus=8, sequence_length=4096, tokens_per_step=8 * 4096).run(
        ParallelConfig(), 1, RecomputeConfig()
    )
    found = plan_run(model, run, 8, H200)
    with_them = cost_of(stage, tokens, found, None)
    without = cost_of(dataclasses.replace(stage, validation=None), tokens, found, None)
    # a validation is 8 forwards on each of 8 replicas.
    assert with_them.validating * 3600 == pytest.approx(3 * 8 * found.time.forward_only)
    assert with_them.hours == pytest.approx(without.hours + with_them.validating)
    assert 0.2 < found.time.forward_only / found.time.total < 0.6
    lines = "\n".join(stage_lines({"hydrahead": [with_them]}, {}))
    assert "3 validations of 64 sequences" in lines


def test_what_is_no_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(HydraError, match=r"--recipe .*gone: no folder with run configs"):
        recipe_stages(tmp_path / "gone")
    (tmp_path / "first.yaml").write_text("output: x")
    with pytest.raises(HydraError, match=r"first\.yaml: the first config .* must name its verb"):
        recipe_stages(tmp_path)


def test_the_command_says_what_a_recipe_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_layout(model: ModelConfig, job: Job, machine: Machine) -> list[Plan]:
        run = job.run(ParallelConfig(), 1, RecomputeConfig("selective", ("attention",)))
        return [plan_run(model, run, 8, machine)]

    monkeypatch.setattr("megatron_hydra.planning.report.search", one_layout)
    recipe = str(ROOT / "configs" / "qwen3_1.7b" / "paper")
    changes = {"recipe": recipe, "verb": None, "sequence_length": 0, "price_per_gpu_hour": 2.0}
    text = _run(**changes)
    assert "2.30 B tokens on 8 × h200" in text and "time: ASSUMED" in text
    rows = [line.split() for line in text.splitlines() if "hydrahead" in line]
    assert [row[0] for row in rows] == ["align", "distill", "finetune", "all"]
    body = json.loads(_run(**changes, as_json=True))
    stages = body["stages"]["hydrahead"]
    assert [round(stage["tokens"] / 1e9, 2) for stage in stages] == [0.3, 1.0, 1.0]
    for stage in stages:
        assert stage["gpu_hours"] == pytest.approx(8 * stage["hours"])
        assert stage["price"] == pytest.approx(2.0 * stage["gpu_hours"])
    assert (
        main(
            ["--model", QWEN, "--recipe", recipe, "--verb", "align", "--gpus", "8", "--gpu", "h200"]
        )
        == 2
    )


@pytest.mark.parametrize("length", [1024, 4096, 65_536, 131_072, 524_288])
def test_stages_end_at_the_planned_length_and_share_all_tokens(length: int) -> None:
    stages = stages_up_to(length)
    assert stages[-1].sequence_length == length
    assert all(s.sequence_length <= length for s in stages)
    assert sum(s.share for s in stages) == pytest.approx(1.0)
    assert [s.verb for s in stages][:2] == ["align", "distill"]


def _run(**changes: object) -> str:
    lines: list[str] = []
    request = Request(QWEN, 32_768, 8, "h200", verb="finetune")
    assert plan(dataclasses.replace(request, **changes), lines.append) == 0  # type: ignore[arg-type]
    return "\n".join(lines)


def test_the_report_says_what_is_assumed() -> None:
    text = _run(price_per_gpu_hour=2.0)
    for kind in ("dense", "layer-wise", "hydrahead"):
        assert f"\n{kind}: " in text
    assert "time: ASSUMED" in text
    assert "three whole steps within 5 %" in text
    assert "GPU-hours" in text
    assert re.search(
        r"[\d,]+ launches a step, [\d,]+ of them by Triton: [\d.]+ s of the host", text
    )


def test_a_plan_for_gpus_without_fla_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It also needs several times the memory for the tensors that the layer keeps."""

    def one_layout(model: ModelConfig, job: Job, machine: Machine) -> list[Plan]:
        parallel = ParallelConfig(context=8)
        return [plan_run(model, job.run(parallel, 1, RecomputeConfig("none")), 8, machine)]

    monkeypatch.setattr("megatron_hydra.planning.report.search", one_layout)
    text = _run(gated_delta_net="torch")
    assert "gated_delta_net: torch: the plain twin" in text
    assert "so are the launches" in text
    assert "gated_delta_net" not in _run()
    memory, launches = {}, {}
    for kind in ("fla", "torch"):
        body = json.loads(_run(gated_delta_net=kind, as_json=True))
        assert ("gated_delta_net" in body["basis"]) == (kind == "torch")
        launches[kind] = body["layouts"]["hydrahead"][0]["launches_per_rank_and_step"]["torch"]
        memory[kind] = {k: v[0]["memory_bytes"]["total"] for k, v in body["layouts"].items()}
    assert memory["torch"]["hydrahead"] > 1.3 * memory["fla"]["hydrahead"]
    assert memory["torch"]["dense"] == memory["fla"]["dense"]
    assert launches["torch"] > 5 * launches["fla"]


def test_a_stage_that_does_not_fit_leaves_the_rest_of_the_report(monkeypatch) -> None:
    def search_but_distill(model: ModelConfig, job: Job, machine: Machine) -> list[Plan]:
        if job.verb == "distill":
            raise HydraError("teacher and student do not fit")
        parallel = ParallelConfig(context=8)
        return [plan_run(model, job.run(parallel, 1, RecomputeConfig("full")), 8, machine)]

    monkeypatch.setattr("megatron_hydra.planning.report.search", search_but_distill)
    text = _run(verb=None)
    assert "hydrahead, distill: teacher and student do not fit" in text
    sums = [line.split() for line in text.splitlines() if line.startswith("  all")]
    assert [line[:4] for line in sums] == [
        ["all", "but", "distill", kind] for kind in ("layer-wise", "hydrahead")
    ]
    body = json.loads(_run(verb=None, as_json=True))
    assert set(body["stages_that_do_not_fit"]["hydrahead"]) == {"distill"}
    stages = [stage["stage"] for stage in body["stages"]["hydrahead"]]
    assert stages == ["align", "finetune"]


def test_json_adds_up() -> None:
    body = json.loads(_run(as_json=True, price_per_gpu_hour=2.0, tokens=1e9))
    for found in body["layouts"].values():
        for entry in found:
            memory = dict(entry["memory_bytes"])
            assert memory.pop("total") == sum(memory.values())
            seconds = dict(entry["seconds"])
            assert seconds.pop("step") == pytest.approx(sum(seconds.values()))
    (cost,) = body["stages"]["hydrahead"]
    assert cost["hours"] * 8 * 2.0 == pytest.approx(cost["price"])
    speed = body["layouts"]["hydrahead"][0]["tokens_per_second"]
    assert cost["hours"] * 3600 * speed == pytest.approx(1e9)


def test_the_help_names_every_efficiency():
    (option,) = (a for a in parser()._actions if "--efficiency" in a.option_strings)
    names = {field.name for field in dataclasses.fields(Efficiency)}
    assert names <= set(re.findall(r"\w+", option.help))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "v100"}, "--gpu v100"),
        ({"gpus": 0}, "--gpus is 0"),
        ({"efficiency": ("matmul=2",)}, "--efficiency matmul=2"),
        ({"efficiency": ("speed=1",)}, "known: matmul"),
        ({"efficiency": ("matmul=0",)}, "a share above 0 and up to 1"),
        ({"efficiency": ("overlap=-1",)}, "a share from 0 up to 1"),
        ({"efficiency": ("latency=-1",)}, "give seconds, 0 or more"),
        ({"efficiency": ("launch=nan",)}, "give seconds, 0 or more"),
        ({"tokens": -1.0}, "--tokens"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    with pytest.raises(HydraError, match=message):
        _run(**changes)


def test_the_table_of_gpus_is_plausible() -> None:
    """A wrong unit would be a factor of a thousand."""
    for gpu in GPUS.values():
        assert 1e14 < gpu.peak < 1e16
        assert 1e12 < gpu.bandwidth < 2e13
        assert 4e10 < gpu.memory < 3e11
        assert gpu.network < gpu.nvlink < gpu.bandwidth


def test_slower_assumptions_make_slower_plans() -> None:
    model, job = read_model(QWEN), _job(gpus=8)
    run = job.run(ParallelConfig(context=8), 1, RecomputeConfig("full"))
    slow = Machine(H200.gpu, Efficiency().changed(["matmul=0.3", "attention=0.3"]))
    assert plan_run(model, run, 8, slow).time.total > plan_run(model, run, 8, H200).time.total
