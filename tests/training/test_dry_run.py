"""The output of ``--dry-run``: a config that can be loaded, and the shapes of each rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_hydra import train
from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config import RunConfig, from_dict, to_yaml
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.conversion.student import initialise_student
from megatron_hydra.model.layer_spec import build_gpt_model
from megatron_hydra.training.dry_run import describe_layout
from tests.training import tiny


def _lines(config: RunConfig, world_size: int) -> list[str]:
    return describe_layout(config, world_size).splitlines()


def test_the_output_is_the_config_with_comments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_all(tmp_path, tiny.DEEP)
    config = tiny.run_config(tmp_path, "distill", "unused", parallel={"tensor": 2, "pipeline": 2})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    options = ["--config", str(path), "--dry-run", "--world-size", "4"]
    assert train.main(options) == 0
    printed = capsys.readouterr().out
    assert "# pipeline rank 1, layers 2–3:" in printed
    assert from_dict(RunConfig, yaml.safe_load(printed)) == config
    assert train.main([*options, f"student.checkpoint={tmp_path / 'none'}"]) == 0
    printed = capsys.readouterr().out
    assert "# shapes need the model: " in printed
    assert from_dict(RunConfig, yaml.safe_load(printed)).parallel == config.parallel


def test_full_attention_by_sequence_is_shown_on_its_slice(inputs: Path) -> None:
    """Layer 0 has FA heads 1 and 6 of 8 with one KV head each, three GDN heads on each rank, d 8, D 32."""
    parallel = {"tensor": 2, "fa_partition": "sequence"}
    lines = _lines(tiny.run_config(inputs, "finetune", "unused", parallel=parallel), 2)
    start = lines.index("#   layer 0 (FA imbalance 1.00)")
    assert lines[start + 1 : start + 5 : 2] == [
        "#     tensor rank 0: FA 1,6, GDN 0,2,3, head outputs [96, 24] and FA on a slice [48, 16]",
        "#     tensor rank 1: FA 1,6, GDN 4,5,7, head outputs [96, 24] and FA on a slice [48, 16]",
    ]
    # a GDN head: q, k, v, gate of 8 rows each, β and a: 102 rows, padded to 112
    # FA: q and gate of two heads, two k and v
    weights = "in_proj [112, 32], out_proj [32, 24], fa_in [64, 32], fa_out [32, 16]"
    assert lines[start + 2] == lines[start + 4] == f"#       {weights}"


def test_heads_that_are_both_are_counted_once(tmp_path: Path) -> None:
    student = tiny.TEACHER.with_every_head_mixed(HydraConfig(mixer="parallel"))
    weights = initialise_student(tiny.teacher_weights(), student)
    save_canonical(tmp_path / "student", weights, student)
    config = tiny.run_config(tmp_path, "finetune", "unused", parallel={"tensor": 2})
    (line,) = {line for line in _lines(config, 2) if line.startswith("#     tensor rank 1")}
    assert line.endswith("head outputs [96, 32]")


@pytest.mark.usefixtures("one_rank")
def test_shapes_are_those_of_the_model(inputs: Path) -> None:
    config = tiny.run_config(inputs, "finetune", "unused")
    lines = _lines(config, 1)
    model = build_gpt_model(tiny.student_config(), config)
    for index, layer in enumerate(model.decoder.layers):
        projections = layer.self_attention.projections
        shown = lines[lines.index(f"#   layer {index} (FA imbalance 1.00)") + 2]
        of_input, of_output = (
            list(linear.weight.shape) for linear in (projections.in_proj, projections.out_proj)
        )
        assert shown == f"#       in_proj {of_input}, out_proj {of_output}"
