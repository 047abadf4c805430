from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.finding import load_task
from megatron_hydra.evaluation.hf_backend import HfBackend
from megatron_hydra.evaluation.runner import summarise
from megatron_hydra.evaluation.scoring import Places, score_samples
from megatron_hydra.evaluation.tasks import GenerationSample, SampleRequest, ScoredSample


def score(model, tokenizer, samples, batch_tokens=10_000, chunk=0):
    return list(score_samples(HfBackend(model, chunk), tokenizer, samples, batch_tokens))


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = (30, 55, 55, 8)
    return [torch.randint(0, 257, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("batch_tokens", [1, 120, 10_000])
@pytest.mark.parametrize("chunk", [0, 16])
def test_answers_inside_a_sequence_are_scored_by_argmax(model, batch_tokens, chunk):
    answers = [[3, 17, 29], [1, 54], [40], [7]]
    with torch.no_grad():
        said = [model(torch.tensor([s])).logits[0].argmax(-1).tolist() for s in sequences()]
    samples, expected = [], []
    for tokens, positions, argmax in zip(sequences(), answers, said, strict=True):
        tokens[positions[0]] = argmax[positions[0] - 1]  # the first answer is made right
        samples.append(ScoredSample(tokens, positions, [p / 55 for p in positions]))
        with torch.no_grad():
            again = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        expected.append(tuple(float(again[p - 1] == tokens[p]) for p in positions))
    outcomes = score(model, None, samples, batch_tokens, chunk)
    assert [o.scores for o in outcomes] == expected
    assert [o.scores[0] for o in outcomes] == [1.0] * 4
    assert outcomes[0].depths == (3 / 55, 17 / 55, 29 / 55)


class Saying:
    """A back end that continues every prompt with the next of these texts."""

    vocabulary = 257

    def __init__(self, tokenizer, texts):
        self.rows = [tokenizer(text)["input_ids"] for text in texts]

    def end_tokens(self, tokenizer):
        return ()

    def generate(self, continuations, end_tokens):
        return [self.rows.pop(0) for _ in continuations]


def test_a_wrong_answer_with_another_facts_value_is_confused(tokenizer):
    said = ["it is 12", "it is 34", "it is 56", "12, not 34", "12"]
    one = GenerationSample("x", ("12",), others=("34", "78"))
    samples = [one, one, one, one, GenerationSample("x", ("12",))]
    outcomes = list(score_samples(Saying(tokenizer, said), tokenizer, samples, 10_000))
    assert [o.scores for o in outcomes] == [(1.0,), (0.0,), (0.0,), (1.0,), (1.0,)]
    assert [o.confused for o in outcomes] == [False, True, False, False, None]


def test_the_place_of_the_fact_that_was_picked(tokenizer):
    """By the order in the text; the first value of an answer counts."""
    said = ["34", "it is 56, or 12", "12", "none", "34"]
    text = "a is 34, b is 12, c is 56"
    one = GenerationSample(text, ("12",), others=("56", "34"))
    uneven = GenerationSample(text + ", d is 34", ("12",), others=("56", "34"))
    samples = [one, one, one, one, uneven]
    outcomes = list(score_samples(Saying(tokenizer, said), tokenizer, samples, 10_000))
    picked = [0, 2, 1, None]
    assert [o.places for o in outcomes] == [*(Places(3, 1, place) for place in picked), None]
    cell = summarise(outcomes, ())
    assert (cell["asked"], cell["picked"]) == ([0.0, 1.0, 0.0], [0.25, 0.25, 0.25])
    # Always asked for is the second fact, which a quarter of the answers have.
    assert cell["by_place"] == 0.25
    assert "picked" not in summarise(outcomes[4:], ())


def test_a_task_of_several_keys_asks_for_every_place(tokenizer):
    request = SampleRequest(length=4000, count=2, seed=0, tokenizer=tokenizer)
    samples = load_task("niah_multikey_1").samples(request)
    right = [sample.answers[0] for sample in samples]
    outcomes = list(score_samples(Saying(tokenizer, right), tokenizer, samples, 10_000))
    assert all(o.places.count == 4 and o.places.asked == o.places.picked for o in outcomes)
    assert len({o.places.asked for o in outcomes}) > 1


def test_any_causal_model_is_scored(tokenizer):
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    qwen = Qwen3ForCausalLM(config).eval()
    tokens = sequences()[0]
    whole = score(qwen, None, [ScoredSample(tokens, [5, 20])])
    assert whole == score(qwen, None, [ScoredSample(tokens, [5, 20])], chunk=7)
    sample = GenerationSample("some prompt", ("zzz",), max_new_tokens=5)
    assert score(qwen, tokenizer, [sample]) == score(qwen, tokenizer, [sample], chunk=4)


def test_generation_in_a_batch_equals_one_by_one(model, tokenizer):
    samples = [GenerationSample("x" * n, ("no such answer",), max_new_tokens=6) for n in (1, 9, 40)]
    together = score(model, tokenizer, samples)
    assert together == [score(model, tokenizer, [s])[0] for s in samples]
    assert together == score(model, tokenizer, samples, chunk=8)
    assert all(o.scores == (0.0,) for o in together)
    assert len({o.prediction for o in together}) > 1


def test_a_batch_that_does_not_fit_the_memory_is_halved(model, tokenizer, monkeypatch):
    prompts = [GenerationSample(text, ["x"], max_new_tokens=4) for text in ("a", "bc", "def")]
    samples = [*prompts, *(ScoredSample(tokens, [3, 5]) for tokens in sequences())]
    expected = score(model, tokenizer, samples)
    sizes = []

    def limited(name, most):
        run = getattr(HfBackend, name)

        def wrapper(self, batch, *rest):
            sizes.append(len(batch))
            if len(batch) > most:
                raise torch.OutOfMemoryError("no memory")
            return run(self, batch, *rest)

        monkeypatch.setattr(HfBackend, name, wrapper)

    limited("_generate", 1)
    limited("_argmax_at", 1)
    assert score(model, tokenizer, samples) == expected
    assert sizes == [3, 1, 2, 1, 1, 4, 2, 1, 1, 2, 1, 1]
    limited("_generate", 0)
    with pytest.raises(HydraError, match=r"a single sample does not fit .*--prefill-chunk"):
        score(model, tokenizer, prompts)


def test_stopping_early_does_not_change_a_score(model, tokenizer):
    """The expected answers come from the model, so that rows are decided at different steps."""
    prompts = ["alpha", "a longer prompt", "z"]
    free = score(
        model, tokenizer, [GenerationSample(p, ("\x00",), max_new_tokens=12) for p in prompts]
    )
    said = [o.prediction for o in free]
    for match, expected in (("all", 0.5), ("any", 1.0)):
        samples = [
            GenerationSample(p, (text[:n].upper(), "\x00"), match, 12)
            for p, text, n in zip(prompts, said, (2, 5, 9), strict=True)
        ]
        assert [o.scores for o in score(model, tokenizer, samples)] == [(expected,)] * 3
    found = [GenerationSample(p, (t[:n],), "all", 12) for p, t, n in zip(prompts, said, (2, 5, 9))]
    assert [o.scores for o in score(model, tokenizer, found)] == [(1.0,)] * 3


def test_stopping_early_gives_the_scores_of_full_continuations(model, tokenizer, monkeypatch):
    """Score the same samples with every continuation at its full length."""
    prompts = ["alpha", "a longer prompt", "z", "something else entirely", "q" * 30]
    limits = (12, 5, 9, 12, 7)
    free = [GenerationSample(p, ("\x00",), max_new_tokens=n) for p, n in zip(prompts, limits)]
    said = [o.prediction for o in score(model, tokenizer, free)]
    samples = [
        GenerationSample(p, (text[start : start + 2], other), match, n)
        for match in ("all", "any")
        for other in ("\x00", said[0][:1])
        for start in (0, 3)
        for p, text, n in zip(prompts, said, limits, strict=True)
    ]
    early = score(model, tokenizer, samples)
    monkeypatch.setattr("megatron_hydra.evaluation.scoring._settled", lambda *_: False)
    full = score(model, tokenizer, samples)
    assert [o.scores for o in early] == [o.scores for o in full]
    shorter = [len(a.prediction) < len(b.prediction) for a, b in zip(early, full, strict=True)]
    assert any(shorter) and not all(shorter)


def test_token_answers_must_start_the_continuation(model):
    prompt = tuple(sequences()[3])
    with torch.no_grad():
        new = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, 8:]
    right, (a, b, c) = tuple(new.tolist()), new.tolist()
    samples = [
        GenerationSample(prompt, answer, max_new_tokens=3)
        for answer in (right, right[:1], (a, b, c + 1), (b,))
    ]
    assert [o.scores[0] for o in score(model, None, samples)] == [1.0, 1.0, 0.0, float(a == b)]


def test_chunked_prefill_is_used_only_where_it_is_known_to_be_exact(model):
    assert HfBackend(model).chunk == 8192
    assert HfBackend(model, 0).chunk == 0

    config = Qwen3Config(vocab_size=9, hidden_size=8, num_hidden_layers=1, head_dim=8)
    unknown = Qwen3ForCausalLM(config)
    unknown.config.model_type = "somebody_s_hybrid"
    assert HfBackend(unknown).chunk == 0
    assert HfBackend(unknown, 77).chunk == 77


def test_samples_that_do_not_fit_the_model_are_refused(model):
    with pytest.raises(HydraError, match="tokenizer"):
        score(model, None, [GenerationSample("text", ("x",))])
    with pytest.raises(HydraError, match="vocabulary of 257"):
        score(model, None, [ScoredSample([1, 2, 257], [1])])
    with pytest.raises(HydraError, match="no tokens"):
        score(model, None, [GenerationSample((), (1,))])
