"""Text that a model generates: a resumed run writes the same lines, in the format that tokenising reads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_hydra.data import generation
from megatron_hydra.data.corpus import CorpusConfig
from megatron_hydra.data.generation import Generation, GenerationSettings
from megatron_hydra.data.tokenization import tokenize
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import load_tokenizer
from megatron_hydra.stopping import REQUEUE_EXIT_CODE, Stopped

PROMPTS = ["the of", "it was on", "for", "they are as with his", "be this have from or one"]
GREEDY = {"temperature": 0.0, "max_new_tokens": 5, "batch_size": 2}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, eos_token_id=0, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return Qwen3ForCausalLM(shape).eval()


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    return str(path)


class Case:
    """A model, its tokenizer and an output path."""

    def __init__(self, model: torch.nn.Module, tokenizer: str, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.tokenizer_path, self.tokenizer = tokenizer, load_tokenizer(tokenizer)

    def make(
        self, corpus: CorpusConfig, name: str = "out.jsonl", force=False, **settings: Any
    ) -> Generation:
        given = {"max_new_tokens": 6, "batch_size": 2, **settings}
        how, output = GenerationSettings(**given), self.folder / name
        return Generation(corpus, how, output, self.model, self.tokenizer, {"name": "m"}, force)

    def run(self, corpus: CorpusConfig, name: str = "out.jsonl", **settings: Any) -> list[dict]:
        self.make(corpus, name, **settings).run(lambda _: None)
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture
def case(model, qwen, tmp_path) -> Case:
    return Case(model, qwen, tmp_path)


def test_a_padded_batch_writes_what_each_prompt_alone_would(case, prompts):
    lines = case.run(CorpusConfig((prompts,)), **GREEDY)
    assert [line["row"] for line in lines] == list(range(len(PROMPTS)))
    for line, prompt in zip(lines, PROMPTS, strict=True):
        ids = case.tokenizer(prompt, return_tensors="pt").input_ids
        out = case.model.generate(
            ids, do_sample=False, max_new_tokens=5, eos_token_id=0, pad_token_id=0
        )
        said = out[0, ids.shape[1] :].tolist()
        said = said[: said.index(0)] if 0 in said else said
        assert line["text"] == prompt + case.tokenizer.decode(said)
        assert line["text"][: line["prompt_characters"]] == prompt
    assert not list(case.folder.glob("*.work"))


def test_seeds_and_samples_draw_other_texts_and_the_same_ones_again(case, prompts):
    corpus = CorpusConfig((prompts,))
    one, same, other = (
        case.run(corpus, f"{name}.jsonl", samples=2, seed=seed)
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert one == same
    assert [line["text"] for line in one] != [line["text"] for line in other]
    assert [(line["row"], line["sample"]) for line in one[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert one[0]["text"] != one[1]["text"]
    likeliest = case.run(corpus, "k.jsonl", top_k=1, max_new_tokens=5)
    assert [x["text"] for x in likeliest] == [
        x["text"] for x in case.run(corpus, "g.jsonl", **GREEDY)
    ]


def test_the_temperature_is_that_of_the_distribution(case, prompts):
    """The first token has the frequencies of the model's probabilities at that temperature."""
    ids = case.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = case.model(ids).logits[0, -1]
    count = 400
    first = CorpusConfig((prompts,))
    made = case.make(first, samples=count, temperature=2.0, max_new_tokens=1, batch_size=count)
    batch = [prompt for prompt in made._prompts() if prompt.row == 0]
    said = torch.tensor(made._generate(0, batch))[:, 0]
    got = torch.bincount(said, minlength=512) / count
    wanted = (logits / 2.0).softmax(-1)
    # The expected total variation of so many draws from this distribution, plus four standard deviations.
    expected = 0.5 * (2 * wanted * (1 - wanted) / (np.pi * count)).sqrt().sum()
    limit = expected + 4 * 0.5 / count**0.5
    assert 0.5 * (got - wanted).abs().sum() < limit
    assert 0.5 * (got - logits.softmax(-1)).abs().sum() > limit  # those of another temperature


@pytest.mark.parametrize("end", [RuntimeError, Stopped])
def test_a_stopped_run_resumes_to_the_same_bytes(case, prompts, monkeypatch, end):
    corpus, options = CorpusConfig((prompts,)), {"samples": 2, "batch_size": 3}
    case.run(corpus, "whole.jsonl", **options)
    original, calls = Generation._generate, []

    def dying(self, number, batch):
        if number == 2:
            raise end
        calls.append(number)
        return original(self, number, batch)

    monkeypatch.setattr(Generation, "_generate", dying)
    with pytest.raises(end):
        case.run(corpus, "cut.jsonl", **options)
    assert not (case.folder / "cut.jsonl").exists()
    with open(case.folder / "cut.jsonl.work/rows.jsonl", "ab") as stream:
        stream.write(b'{"half a li')  # as a killed process leaves it
    monkeypatch.setattr(Generation, "_generate", original)
    case.run(corpus, "cut.jsonl", **options)
    assert calls == [0, 1]
    for suffix in ("", ".manifest"):
        assert (case.folder / f"cut.jsonl{suffix}").read_bytes() == (
            case.folder / f"whole.jsonl{suffix}"
        ).read_bytes()


def test_a_stop_signal_ends_it_between_batches(case, prompts, monkeypatch):
    def leave():
        raise Stopped

    monkeypatch.setattr(generation, "exit_if_stopped", leave)
    with pytest.raises(SystemExit) as stopped:
        case.run(CorpusConfig((prompts,)))
    assert stopped.value.code == REQUEUE_EXIT_CODE


def test_shards_write_every_line_of_the_whole_once(case, prompts):
    corpus = CorpusConfig((prompts,))
    whole = case.run(corpus, "whole.jsonl")
    parts = []
    for own in range(2):
        case.make(corpus, "part.jsonl", shard=(own, 2)).run(lambda _: None)
        path = case.folder / f"part-{own:05d}-of-00002.jsonl"
        parts += [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(parts, key=lambda line: line["row"]) == whole


def test_the_output_of_another_run_is_not_overwritten(case, prompts):
    corpus, lines = CorpusConfig((prompts,)), []
    case.run(corpus)
    case.make(corpus).run(lines.append)
    assert lines == [f"{case.folder}/out.jsonl is complete, nothing to do"]
    with pytest.raises(HydraError, match=r"has another origin \(different: temperature\)"):
        case.run(corpus, temperature=0.5)
    assert case.make(corpus, force=True, temperature=0.5).run(lambda _: None)["temperature"] == 0.5


def test_rows_without_a_usable_prompt_are_counted_and_named(case, tmp_path):
    path = tmp_path / "bad.jsonl"
    rows = [{"text": "the of"}, {"text": 3}, {"text": "the of and " * 60}, {"text": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = CorpusConfig((str(path),))
    with pytest.raises(HydraError, match=r"1 rows without a usable prompt.*\n.*'text' is a int"):
        case.run(corpus)
    lines: list[str] = []
    body = case.make(corpus, max_bad_rows=3).run(lines.append)
    assert (body["counts"]["texts"], body["counts"]["bad_rows"]) == (1, 3)
    said = "\n".join(lines)
    assert "exceeds the model's 128" in said and "the prompt is empty" in said


def test_tokenising_reads_texts_and_answers(case, prompts, tmp_path):
    texts = case.run(CorpusConfig((prompts,)), "texts.jsonl")
    config = CorpusConfig((str(tmp_path / "texts.jsonl"),))
    tokenize(
        TokenizeConfig(config, str(tmp_path / "texts"), case.tokenizer_path, workers=0),
        lambda _: None,
    )
    documents = case.tokenizer.decode(np.fromfile(tmp_path / "texts.bin", np.uint16))
    assert documents == "".join(line["text"] + "<|endoftext|>" for line in texts)

    user = {"role": "user", "content": "what?"}
    rows = [[user], [user, {"role": "assistant", "content": "an old answer"}]]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    chat = CorpusConfig((str(path),), column="messages", chat=True)
    answers = case.run(chat, "answers.jsonl", **GREEDY)
    asked = case.tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    alone = case.run(CorpusConfig((_lines(tmp_path, asked),)), "alone.jsonl", **GREEDY)
    for line in answers:
        assert [message["role"] for message in line["messages"]] == ["user", "assistant"]
        assert asked + line["messages"][1]["content"] == alone[0]["text"]
    config = CorpusConfig((str(tmp_path / "answers.jsonl"),), column="messages", chat=True)
    body = tokenize(
        TokenizeConfig(config, str(tmp_path / "answers"), case.tokenizer_path, workers=0),
        lambda _: None,
    )
    assert body.counts["documents"] == 2


def _lines(folder: Path, text: str) -> str:
    """A file with one document of several lines."""
    path = folder / "asked.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    return str(path)


def test_the_command(model, qwen, prompts, tmp_path, capsys):
    path = Path(__file__).parents[2] / "data_prep/sample.py"
    spec = importlib.util.spec_from_file_location("data_prep_sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model.save_pretrained(tmp_path / "model")
    arguments = [
        "--model", str(tmp_path / "model"), "--tokenizer", qwen, "--input", prompts, "--device", "cpu",
        "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4", "--batch-size", "3",
    ]  # fmt: skip
    assert module.main(arguments) == 0
    assert "5 texts for 5 prompts" in capsys.readouterr().out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5
    assert module.main([*arguments, "--top-p", "2"]) == 2
    assert "--top-p 2.0: it must be at most 1" in capsys.readouterr().err
    assert module.main([*arguments[:-6], "--output", str(tmp_path / "x"), "--shard", "3/2"]) == 2
    assert "the first number must be 0..1" in capsys.readouterr().err
