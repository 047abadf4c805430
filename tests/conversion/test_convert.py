"""Hugging Face -> Megatron -> Hugging Face: exact, complete, and equal in the logits."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.canonical import is_fp32
from megatron_hydra.config.model import DENSE_ATTENTION, HydraConfig
from megatron_hydra.conversion import convert, parity
from megatron_hydra.conversion.convert import StudentOptions, hf_to_megatron, megatron_to_hf
from megatron_hydra.conversion.hf_io import HfWeights
from megatron_hydra.errors import HydraError
from megatron_hydra.hf.export_files import hf_export_files
from tests.checkpoint.models import VARIANTS, make_head_map, make_hf

TOOLS = Path(__file__).parents[2] / "tools"
TOKENS = torch.arange(90) * 7 % 61


def assert_same_folder(one: Path, other: Path) -> None:
    first, second = HfWeights(one), HfWeights(other)
    assert set(first) == set(second)
    for key in first:
        assert first[key].dtype == second[key].dtype
        assert torch.equal(first[key], second[key]), key
    for name in ("config.json", "generation_config.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())


# -- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_comes_back_bit_for_bit(variant, hf_folders, tmp_path):
    source = hf_folders[variant]
    model = hf_to_megatron(source, tmp_path / "megatron")
    assert model.source["name"] == str(source)
    assert model.source["fingerprint"].startswith("sha256:")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")


def test_dense_comes_back_from_shards_in_bf16(tmp_path):
    source = make_hf(tmp_path / "hf", "qwen2", torch.bfloat16, max_shard_size="30KB")
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=25_000, verify=True)
    assert_same_folder(source, tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_and_transformers_agree_on_dense_logits(variant, hf_folders, tmp_path):
    hf_to_megatron(hf_folders[variant], tmp_path / "megatron")
    expected = parity.hf_logits(hf_folders[variant], TOKENS)
    found = parity.megatron_logits(tmp_path / "megatron", TOKENS)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_verification_of_the_checkpoint(hf_folders, head_map, tmp_path, capsys, monkeypatch):
    source, options = hf_folders["qwen3-tied"], StudentOptions(head_map=head_map, calibrate=False)
    hf_to_megatron(source, tmp_path / "dense", verify=True)
    assert "logits differ by at most" in capsys.readouterr().err
    hf_to_megatron(source, tmp_path / "student", options, dtype=torch.bfloat16, verify=True)
    count = len(store.stored_tensors(tmp_path / "student"))
    assert capsys.readouterr().err == f"verified: {count} tensors equal the source's\n"
    monkeypatch.setattr(parity, "megatron_logits", lambda *_: torch.zeros(128, 61))
    with pytest.raises(HydraError, match="logits differ"):
        hf_to_megatron(source, tmp_path / "wrong", verify=True)
    assert not (tmp_path / "wrong").exists()


def test_a_hub_name_is_resolved_at_its_revision(hf_folders, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, revision=None, allow_patterns=(), **_):
        asked.append((name, revision, [p for p in allow_patterns if "bin" in p or p == "*"]))
        return str(hf_folders["qwen2"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = hf_to_megatron("some/model", tmp_path / "out", revision="v2")
    assert asked == [("some/model", "v2", [])]
    assert (model.source["name"], model.source["revision"]) == ("some/model", "v2")


def test_dtype_is_converted_and_reported(hf_folders, tmp_path):
    hf_to_megatron(hf_folders["llama"], tmp_path / "megatron", dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.bfloat16
    original, back = HfWeights(hf_folders["llama"]), HfWeights(tmp_path / "back")
    assert all(torch.equal(back[key], original[key].bfloat16()) for key in original)


@pytest.mark.parametrize("hybrid", [False, True], ids=["dense", "hybrid"])
def test_tokenizer_files_are_copied_through_both_conversions(
    hybrid, hf_folders, head_map, tmp_path
):
    source = shutil.copytree(hf_folders["qwen3-tied"], tmp_path / "hf")
    names = {"tokenizer.json", "merges.txt", "chat_template.jinja", "generation_config.json"}
    for name in names:
        (source / name).write_text(f'{{"this is": "{name}"}}')
    options = StudentOptions(head_map=head_map, calibrate=False) if hybrid else None
    hf_to_megatron(source, tmp_path / "megatron", options)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    made = {"head_map.json", *hf_export_files()} if hybrid else set()
    found = {path.name for path in (tmp_path / "back").iterdir()}
    assert found == {path.name for path in source.iterdir()} | made


def test_named_chat_templates_are_copied_and_skipped_files_are_named(hf_folders, tmp_path, capsys):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = shutil.copytree(hf_folders["qwen3-tied"], tmp_path / "hf")
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "tool_use.jinja").is_file()
    hf_to_megatron(source, tmp_path / "megatron")
    assert "not carried" not in capsys.readouterr().err
    for name in ("LICENSE", "additional_chat_templates/notes.txt", "original/params.json", ".git"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    hf_to_megatron(source, tmp_path / "megatron", force=True)
    names = "LICENSE, additional_chat_templates/notes.txt, original/;"
    assert f"hf: not carried over: {names}" in capsys.readouterr().err
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert "not carried" not in capsys.readouterr().err
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.chat_template == tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    chat = [{"role": "user", "content": "a"}]
    assert back.apply_chat_template(chat, tools=[tool], tokenize=False) == "with tools"
    assert back.apply_chat_template(chat, tokenize=False) == "plain"


# -- hybrid --------------------------------------------------------------------------------------


def make_student(hf, head_map, token_file, output, **hydra):
    options = StudentOptions(
        head_map=head_map, hydra=HydraConfig(**hydra), calibration_file=token_file
    )
    return hf_to_megatron(hf, output, options)


def disturb(checkpoint: Path) -> None:
    """Replace a student's weights by random ones, so that no term vanishes or hides another."""
    model = store.read_model_config(checkpoint)
    state = store.load_canonical(checkpoint)
    generator = torch.Generator().manual_seed(3)
    for key, tensor in state.items():
        if key.endswith("A_log"):
            state[key] = torch.full_like(tensor, -3.0)  # slow: a leak between tokens would show
        else:
            state[key] = tensor + 0.15 * torch.randn(tensor.shape, generator=generator)
    store.save_canonical(checkpoint, state, model, force=True)


@pytest.mark.parametrize(
    "hydra",
    [
        {},
        {"fusion": "gated", "gdn_kv": "gqa", "fa_position": "both"},
        {"fusion": "concat", "fusion_norm": "none", "short_conv": False, "fa_gate": False},
        {"qkv": "shared"},
        {"qkv": "shared", "gdn_kv": "gqa"},
        {"linear": "kda"},
    ],
    ids=["default", "gated-gqa", "concat", "shared", "shared-gqa", "kda"],
)
def test_hybrid_exports_exactly_and_agrees_in_the_logits(
    hydra, hf_folders, head_map, token_file, tmp_path
):
    checkpoint, export = tmp_path / "megatron", tmp_path / "export"
    model = make_student(hf_folders["qwen3-tied"], head_map, token_file, checkpoint, **hydra)
    disturb(checkpoint)
    megatron_to_hf(checkpoint, export, verify=True)
    assert (export / "modeling_hydrahead.py").is_file()
    expected, found = (
        parity.megatron_logits(checkpoint, TOKENS),
        parity.hf_logits(export, TOKENS),
    )
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    again = hf_to_megatron(export, tmp_path / "again")
    assert (again.hydra, again.head_map) == (model.hydra, model.head_map)
    one, other = store.load_canonical(checkpoint), store.load_canonical(tmp_path / "again")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_final_log_scale_is_switched_on_in_the_export(hf_folders, head_map, token_file, tmp_path):
    checkpoint, export = tmp_path / "megatron", tmp_path / "export"
    switches = {"log_scale": "final", "log_scale_a": 5.0}
    model = make_student(hf_folders["qwen3-tied"], head_map, token_file, checkpoint, **switches)
    assert model.hydra.log_scale == store.read_model_config(checkpoint).hydra.log_scale == "final"
    disturb(checkpoint)
    assert megatron_to_hf(checkpoint, export, verify=True) == model.finished()
    assert json.loads((export / "config.json").read_text())["hydra"]["log_scale"] == "train"
    expected, found = parity.megatron_logits(checkpoint, TOKENS), parity.hf_logits(export, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    again = hf_to_megatron(export, tmp_path / "again")
    assert again.hydra == dataclasses.replace(model.hydra, log_scale="train")


@pytest.mark.parametrize("variant", ["qwen2", "llama", "llama-bias-tied", "qwen3-bias"])
def test_every_family_makes_a_student_that_agrees(variant, hf_folders, token_file, tmp_path):
    head_map = make_head_map(tmp_path / "map.json", hf_folders[variant])
    make_student(hf_folders[variant], head_map, token_file, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    assert parity.verify_logits(tmp_path / "megatron", tmp_path / "export") < 1e-4


@pytest.mark.parametrize("variant", ["qwen3-tied", "llama"])
def test_a_student_with_the_teachers_switches_is_the_teacher(variant, hf_folders, tmp_path):
    """If every head is FA with rotary, without gates, norm and scale, the student computes the teacher."""
    heads = (tuple(range(4)),) * 4
    head_map = make_head_map(tmp_path / "map.json", hf_folders[variant], heads)
    options = StudentOptions(head_map=head_map, hydra=DENSE_ATTENTION)
    hf_to_megatron(hf_folders[variant], tmp_path / "megatron", options)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    teacher = parity.hf_logits(hf_folders[variant], TOKENS)
    torch.testing.assert_close(
        parity.hf_logits(tmp_path / "export", TOKENS), teacher, rtol=0, atol=1e-5
    )


def test_the_bundled_text_calibrates_a_model_with_a_tokenizer(hf_folders, head_map, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source = shutil.copytree(hf_folders["qwen3-tied"], tmp_path / "hf")
    words = ["?", "the", "a", "of", "and", "it", "is", "was", "in", "not"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(source)
    hf_to_megatron(source, tmp_path / "megatron", StudentOptions(head_map=head_map))
    provenance = store.read_manifest(tmp_path / "megatron")["provenance"]
    assert provenance["gamma"] == "calibrated on bundled text"
    key = "decoder.layers.1.self_attention.gamma"
    gamma = store.load_canonical(tmp_path / "megatron", [key])[key]
    assert ((gamma > 0) & (gamma != 1)).all()
    assert (store.tokenizer_folder(tmp_path / "megatron") / "tokenizer.json").is_file()


def test_decays_stay_fp32_in_a_bf16_student(hf_folders, head_map, tmp_path):
    options = StudentOptions(head_map=head_map, calibrate=False)
    hf_to_megatron(hf_folders["qwen3-tied"], tmp_path / "megatron", options, dtype=torch.bfloat16)
    for key, (_, dtype) in store.stored_tensors(tmp_path / "megatron").items():
        assert dtype == (torch.float32 if is_fp32(key) else torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export", verify=True)
    gamma = HfWeights(tmp_path / "export")["model.layers.0.self_attn.gamma"]
    assert torch.equal(gamma, torch.ones(4, dtype=torch.bfloat16))


def test_an_export_loads_with_remote_code(hf_folders, head_map, tmp_path):
    options = StudentOptions(head_map=head_map, calibrate=False)
    hf_to_megatron(hf_folders["qwen3-tied"], tmp_path / "megatron", options)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__name__ == "HydraHeadForCausalLM"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# -- refusals ------------------------------------------------------------------------------------


def test_a_head_map_of_another_model_is_refused(hf_folders, head_map, tmp_path):
    with pytest.raises(HydraError, match=r"map\.json was made for another model.*family"):
        hf_to_megatron(hf_folders["qwen2"], tmp_path / "x", StudentOptions(head_map=head_map))
    other = shutil.copytree(hf_folders["qwen3-tied"], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(HydraError, match="other weights"):
        hf_to_megatron(other, tmp_path / "x", StudentOptions(head_map=head_map))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("field", ["num_layers", "num_query_heads", "num_kv_heads"])
def test_a_head_map_of_another_shape_is_refused(field, hf_folders, head_map, tmp_path):
    """It compares shapes only, because the map has no fingerprint of weights."""
    body = json.loads(head_map.read_text())
    body["model"] |= {"fingerprint": "", field: 2 * body["model"][field]}
    heads = body["full_attention_heads"]
    if field == "num_layers":
        body["full_attention_heads"] = heads + heads
    (tmp_path / "map.json").write_text(json.dumps(body))
    options = StudentOptions(head_map=tmp_path / "map.json")
    with pytest.raises(HydraError, match=rf"map\.json was made for another model.*{field} is"):
        hf_to_megatron(hf_folders["qwen3-tied"], tmp_path / "x", options)
    assert not (tmp_path / "x").exists()


def test_a_hybrid_takes_no_head_map(hf_folders, head_map, tmp_path):
    options = StudentOptions(head_map=head_map, calibrate=False)
    hf_to_megatron(hf_folders["qwen3-tied"], tmp_path / "megatron", options)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    with pytest.raises(HydraError, match="HydraHead model already"):
        hf_to_megatron(tmp_path / "export", tmp_path / "x", options)


def test_without_tokenizer_calibration_asks_for_tokens(hf_folders, head_map, tmp_path):
    with pytest.raises(HydraError, match=r"no tokenizer.*--calibration-file"):
        hf_to_megatron(hf_folders["qwen3-tied"], tmp_path / "x", StudentOptions(head_map=head_map))


def test_verification_finds_a_wrong_tensor_and_leaves_no_folder(hf_folders, tmp_path, monkeypatch):
    hf_to_megatron(hf_folders["qwen2"], tmp_path / "megatron")
    write = convert.write_hf_weights

    def wrong(folder, shards, load, on_shard):
        def load_wrong(keys):
            return {
                key: tensor + (key == "output_layer.weight") for key, tensor in load(keys).items()
            }

        write(folder, shards, load_wrong, on_shard)

    monkeypatch.setattr(convert, "write_hf_weights", wrong)
    with pytest.raises(HydraError, match=r"'output_layer\.weight' differs from its source"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "export", verify=True)
    assert not (tmp_path / "export").exists()


def test_an_export_of_a_changed_checkpoint_leaves_no_folder(hf_folders, tmp_path):
    hf_to_megatron(hf_folders["qwen2"], tmp_path / "megatron")
    file = tmp_path / "megatron" / "weights" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(HydraError, match=r"__0_0\.distcp"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    assert not (tmp_path / "export").exists()


# -- the commands --------------------------------------------------------------------------------


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_commands_convert_there_and_back(hf_folders, head_map, token_file, tmp_path, capsys):
    status = load_tool("hf_to_megatron").main(
        [
            *("--hf-path", str(hf_folders["qwen3-tied"]), "--output", str(tmp_path / "megatron")),
            *("--head-map", str(head_map), "--calibration-file", str(token_file)),
            *("--set", "fusion=gated", "--half-life", "8", "64", "--quiet"),
        ]
    )
    assert status == 0
    assert "HydraHead, 8 of 16 heads FA" in capsys.readouterr().err
    assert store.read_model_config(tmp_path / "megatron").switches.fusion == "gated"
    init = store.read_manifest(tmp_path / "megatron")["provenance"]["student_init"]
    assert init == {"half_life_min": 8.0, "half_life_max": 64.0, "kind": "spread"}
    status = load_tool("megatron_to_hf").main(
        ["--checkpoint", str(tmp_path / "megatron"), "--output", str(tmp_path / "hf"), "--verify"]
    )
    assert status == 0
    said = capsys.readouterr().err
    assert "tensors equal the checkpoint's" in said
    assert "fp32 logits differ by at most" in said


SAID = {"missing": "is missing", "extra": "is not part of", "misshapen": "has shape"}


def change_safetensors(file: Path, key: str, change: str) -> str:
    """Change one tensor of a file; returns the key that the message must name."""
    tensors = load_file(file)
    if change == "missing":
        del tensors[key]
    elif change == "extra":
        tensors[f"{key}.more"] = tensors[key].clone()
        key = f"{key}.more"
    else:
        tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, file)
    return key


def change_checkpoint(folder: Path, key: str, change: str) -> str:
    """Change the index of a checkpoint and write a matching manifest."""
    index = store.read_index(folder / store.WEIGHTS)
    entries = index.state_dict_metadata
    if change == "missing":
        del entries[key]
    elif change == "extra":
        entries[f"{key}.more"] = entries[key]
        key = f"{key}.more"
    else:
        entries[key].size = torch.Size([entries[key].size[0] - 1])
    (folder / store.WEIGHTS / ".metadata").write_bytes(pickle.dumps(index))
    store.write_manifest(folder)
    return key


@pytest.mark.parametrize("change", SAID)
def test_a_wrong_tensor_of_a_model_folder_ends_the_command(change, hf_folders, tmp_path, capsys):
    folder = shutil.copytree(hf_folders["qwen2"], tmp_path / "hf")
    key = change_safetensors(folder / "model.safetensors", "model.norm.weight", change)
    arguments = ["--hf-path", str(folder), "--output", str(tmp_path / "out")]
    assert load_tool("hf_to_megatron").main(arguments) == 2
    assert f"key '{key}' {SAID[change]}" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("change", SAID)
def test_a_wrong_tensor_of_a_checkpoint_ends_the_command(change, hf_folders, tmp_path, capsys):
    folder = tmp_path / "megatron"
    hf_to_megatron(hf_folders["qwen2"], folder)
    key = change_checkpoint(folder, "decoder.final_layernorm.weight", change)
    arguments = ["--checkpoint", str(folder), "--output", str(tmp_path / "out")]
    assert load_tool("megatron_to_hf").main(arguments) == 2
    assert f"key '{key}' {SAID[change]}" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["megatron"]


def test_switches_come_from_a_file_and_from_flags(hf_folders, head_map, tmp_path, capsys):
    switches = tmp_path / "switches.yaml"
    switches.write_text("fusion: concat\nshort_conv: false\n")
    arguments = [
        *("--hf-path", str(hf_folders["qwen3-tied"]), "--output", str(tmp_path / "megatron")),
        *("--head-map", str(head_map), "--no-calibration", "--quiet"),
        *("--hydra-config", str(switches), "--set", "fusion=scale"),
    ]
    assert load_tool("hf_to_megatron").main(arguments) == 0
    chosen = store.read_model_config(tmp_path / "megatron").switches
    assert (chosen.fusion, chosen.short_conv, chosen.fa_gate) == ("scale", False, True)
    assert load_tool("hf_to_megatron").main([*arguments, "--set", "fushion=scale", "--force"]) == 2
    assert "fushion" in capsys.readouterr().err


def test_initial_decays_follow_the_teachers_attention(hf_folders, head_map, token_file, tmp_path):
    arguments = [
        *("--hf-path", str(hf_folders["qwen3-tied"]), "--output", str(tmp_path / "megatron")),
        *("--head-map", str(head_map), "--calibration-file", str(token_file)),
        *("--init", "statistics", "--half-life", "2", "64", "--no-calibration", "--quiet"),
    ]
    assert load_tool("hf_to_megatron").main(arguments) == 0
    made = store.read_manifest(tmp_path / "megatron")["provenance"]
    assert made["student_init"]["kind"] == "statistics"
    life = torch.tensor(made["statistics"]["half_life"])
    state = store.load_canonical(tmp_path / "megatron")
    model = store.read_model_config(tmp_path / "megatron")
    assert life.shape == (4, 4) and life.min() >= 2 and life.max() <= 64
    for layer in (0, 1, 3):
        prefix = f"decoder.layers.{layer}.self_attention."
        rate = torch.nn.functional.softplus(state[prefix + "gdn.dt_bias"])
        chosen = life[layer, list(model.gdn_heads(layer))]
        torch.testing.assert_close(torch.log(torch.tensor(2.0)) / rate, chosen, rtol=1e-2, atol=0)
        assert state[prefix + "in.gdn.b"].any()


def test_student_flags_without_a_head_map_are_refused(capsys, tmp_path):
    arguments = ["--hf-path", "x", "--output", str(tmp_path / "x"), "--set", "fusion=gated"]
    assert load_tool("hf_to_megatron").main(arguments) == 2
    said = capsys.readouterr().err
    assert "--set" in said and "mixer=token or mixer=parallel" in said


@pytest.mark.parametrize("mixer", ["token", "parallel"])
def test_a_baseline_that_is_both_in_every_head_needs_no_map(
    mixer, hf_folders, head_map, tmp_path, capsys
):
    arguments = [
        *("--hf-path", str(hf_folders["qwen3-tied"]), "--output", str(tmp_path / "megatron")),
        *("--set", f"mixer={mixer}", "--set", "window=9", "--no-calibration", "--quiet"),
    ]
    assert load_tool("hf_to_megatron").main(arguments) == 0
    assert f"mixer={mixer}" in capsys.readouterr().err
    assert store.read_model_config(tmp_path / "megatron").switches.window == 9
    export = ["--checkpoint", str(tmp_path / "megatron"), "--output", str(tmp_path / "hf")]
    assert load_tool("megatron_to_hf").main([*export, "--verify"]) == 0
    assert "fp32 logits differ by at most" in capsys.readouterr().err
    assert not (tmp_path / "hf" / "head_map.json").exists()
    with_map = [*arguments, "--head-map", str(head_map), "--force"]
    assert load_tool("hf_to_megatron").main(with_map) == 2
    assert "leave the head map out" in capsys.readouterr().err
