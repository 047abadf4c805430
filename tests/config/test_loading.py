"""Unknown keys, wrong types and malformed overrides are refused by path."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hydra.config import (
    ModelConfig,
    RunConfig,
    apply_overrides,
    from_dict,
    load_run_config,
    to_dict,
    to_yaml,
)
from megatron_hydra.config.loading import parse_yaml
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.errors import HydraError

MINIMAL = """
verb: finetune
output: runs/x
student: {checkpoint: models/student}
data: {blend: [{path: data/text}, {path: data/more, weight: 3}]}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_round_trip(config_file: Path) -> None:
    config = load_run_config(config_file, ["optimizer.lr=1e-4", "data.blend.1.weight=2"])
    assert config.optimizer.lr == 1e-4
    assert [part.weight for part in config.data.blend] == [1.0, 2.0]
    assert from_dict(RunConfig, parse_yaml(to_yaml(config), "x")) == config


def test_model_config_round_trip() -> None:
    model = ModelConfig(
        family="qwen3", num_layers=2, hidden_size=8, ffn_hidden_size=8, vocab_size=8,
        num_query_heads=2, num_kv_heads=1, head_dim=4, hydra=HydraConfig(fusion="gated"),
        full_attention_heads=((), (0, 1)), source={"name": "x"},
    )  # fmt: skip
    assert from_dict(ModelConfig, to_dict(model)) == model
    assert from_dict(ModelConfig, to_dict(model.dense())) == model.dense()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("paralel.tensor=2", "unknown key 'paralel'; did you mean 'parallel'"),
        ("parallel.tensr=2", "unknown key 'parallel.tensr'; did you mean 'tensor'"),
        ("parallel.tensor=two", "parallel.tensor must be a whole number, not 'two'"),
        ("parallel.tensor=1.5", "parallel.tensor must be a whole number, not 1.5"),
        ("parallel.tensor=true", "parallel.tensor must be a whole number, not True"),
        ("parallel.sequence=1", "parallel.sequence must be true or false, not 1"),
        ("optimizer.lr=fast", "optimizer.lr must be a number, not 'fast'"),
        ("schedule.kind=linear", "schedule.kind must be one of 'cosine', 'constant', not 'linear'"),
        ("data.blend=3", "data.blend must be a list, not 3"),
        ("data.blend.0.weigth=3", "unknown key 'data.blend.0.weigth'; did you mean 'weight'"),
        ("data.blend.7.weight=3", "has 2 items; '7' is none of them"),
        ("optimizer=3", "optimizer must be a mapping, not 3"),
        ("output=3", "output must be a string, not 3"),
        ("output", "is not of the form section.key=value"),
        ("verb.x=3", "verb has no keys"),
    ],
)
def test_refused_overrides(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(HydraError) as error:
        load_run_config(config_file, [override])
    assert message in str(error.value)


def test_unknown_key_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(MINIMAL + "optimiser: {lr: 1}\n")
    with pytest.raises(HydraError, match=r"bad\.yaml: unknown key 'optimiser'; did you mean"):
        load_run_config(path)


def test_repeated_key_and_bad_syntax(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(MINIMAL + "verb: align\n")
    with pytest.raises(HydraError, match=r"twice\.yaml: line 6: key 'verb' is given twice"):
        load_run_config(path)
    path.write_text("verb: [")
    with pytest.raises(HydraError, match="is not valid YAML"):
        load_run_config(path)
    with pytest.raises(HydraError, match=r"nowhere\.yaml cannot be read"):
        load_run_config(tmp_path / "nowhere.yaml")


def test_later_files_override_key_by_key(config_file: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout.yaml"
    layout.write_text("parallel: {tensor: 2}\nbatch: {global_batch_size: 64}\n")
    config = load_run_config([config_file, layout], ["parallel.tensor=4"])
    assert (config.parallel.tensor, config.batch.global_batch_size) == (4, 64)
    assert config.verb == "finetune"
    assert len(config.data.blend) == 2


def test_exponents_without_a_dot_are_numbers() -> None:
    assert parse_yaml("[1e-4, 2E3, -1e+2, 1.5e-3]", "x") == [1e-4, 2000.0, -100.0, 1.5e-3]
    assert parse_yaml("e4", "x") == "e4"


def test_empty_value_is_an_empty_string(config_file: Path) -> None:
    config = load_run_config(config_file)
    assert apply_overrides(config, ["data.tokenizer="]).data.tokenizer == ""


def test_a_file_overrides_the_file_that_it_includes(config_file: Path) -> None:
    folder = config_file.parent / "data"
    folder.mkdir()
    (folder / "stage.yaml").write_text("data: {seed: 7, sequence_length: 64}\nverb: align\n")
    body = MINIMAL.replace("data: {", "data: {sequence_length: 128, ")
    config_file.write_text("include: data/stage.yaml\n" + body)
    config = load_run_config(config_file)
    assert (config.data.seed, config.data.sequence_length, config.verb) == (7, 128, "finetune")


def test_invalid_includes_are_named(config_file: Path) -> None:
    config_file.write_text("include: absent.yaml\n" + MINIMAL)
    with pytest.raises(HydraError, match=r"absent\.yaml cannot be read"):
        load_run_config(config_file)
    config_file.write_text("include: [a.yaml]\n" + MINIMAL)
    with pytest.raises(HydraError, match="include must be a path"):
        load_run_config(config_file)
    config_file.write_text(f"include: {config_file.name}\n" + MINIMAL)
    with pytest.raises(HydraError, match="unknown key 'include'"):
        load_run_config(config_file)


def test_merge_keys_put_one_mapping_under_another(config_file: Path) -> None:
    config_file.write_text(
        MINIMAL
        + "optimizer: &base {lr: 1e-3, beta1: 0.8}\nloss: {<<: {temperature: 2}, kl_weight: 0.5}\n"
    )
    config = load_run_config(config_file)
    assert (config.loss.temperature, config.loss.kl_weight) == (2.0, 0.5)
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "x")["b"] == {"x": 1, "y": 3}


def test_paths_are_expanded_wherever_a_config_takes_one(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/people/someone")
    monkeypatch.setenv("RUNS", "/big/disk")
    text = MINIMAL.replace("runs/x", "$RUNS/x").replace("models/student", "~/student")
    text = text.replace("data/text", "'${RUNS}/text'").replace(
        "data: {", "data: {tokenizer: ~/t, cache_dir: $RUNS, "
    )
    config_file.write_text(text)
    config = load_run_config(config_file, ["teacher.checkpoint=", "data.blend.1.path=~/more"])
    assert config.output == "/big/disk/x"
    assert config.student.checkpoint == "/people/someone/student"
    assert [part.path for part in config.data.blend] == ["/big/disk/text", "/people/someone/more"]
    assert (config.data.tokenizer, config.data.cache_dir) == ("/people/someone/t", "/big/disk")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("output: $HYDRA_UNSET/x", "output: .*no variable HYDRA_UNSET"),
        ("output: ~nobody-of-that-name/x", "output: .*no user of that name"),
        ('output: "a\\0b"', "output: .*NUL"),
        ("seed: -1", "seed is -1: it must be between 0"),
        ("data: {seed: -5}", "data.seed is -5: it must be between 0"),
        ("optimizer: {lr: .inf}", "optimizer.lr must be a number that is finite"),
        ("schedule: {steps: 1" + "0" * 400 + "}", "schedule.steps must be a number that is finite"),
        ("? [a, b]\n: 1", "cannot be a key"),
        ("seed: 2020-13-45", "is not valid YAML: month must be in 1..12"),
        ("seed: 0x", "is not valid YAML|whole number"),
        ("seed: &a [*a]", "seed must be a whole number"),
        ("data: {blend: [{task: x, options: {a: 2020-01-01}}]}", r"options\.a must be a string"),
        ("data: {blend: [{task: x, options: &a {b: *a}}]}", "nested too deeply"),
        ("data: " + "[" * 3000, "nested too deeply"),
    ],
)  # fmt: skip
def test_yaml_values_that_json_cannot_store_are_refused_by_name(
    config_file: Path, tmp_path: Path, change: str, message: str
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(change + "\n")
    with pytest.raises(HydraError, match=message):
        load_run_config([config_file, other])
