"""A server's scheduling changes no answer: batches, chunks, reused prefixes, preemption."""

from __future__ import annotations

import random

import pytest

from tests.serving.vllm import engines

engines.need_vllm()

FP32 = 5e-5


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return folder, engines.save_export(folder)


def _check_all(model, prompts, answers):
    for prompt, answer in zip(prompts, answers, strict=True):
        engines.check(model, prompt, answer, FP32)


@pytest.mark.parametrize("prefixes", [False, True])
def test_chunked_prefill(export, prefixes):
    folder, model = export
    prompts = engines.random_prompts([1, 600, 2, 150, 433, 31, 64, 65, 129])
    with engines.engine(
        folder, max_num_batched_tokens=160 if prefixes else 48, enable_prefix_caching=prefixes
    ) as llm:
        _check_all(model, prompts, engines.generate(llm, prompts))


@pytest.mark.parametrize("prefixes", [False, True])
def test_a_prefix_is_reused(export, prefixes):
    folder, model = export
    prefix = engines.random_prompts([800])[0]
    prompts = [prefix + end for end in engines.random_prompts([1, 7, 40, 90], seed=2)]
    with engines.engine(folder, enable_prefix_caching=prefixes) as llm:
        for _ in range(2):
            for prompt in prompts:
                _check_all(model, [prompt], engines.generate(llm, [prompt]))
            _check_all(model, prompts, engines.generate(llm, prompts))
        hits = engines.metric(llm, "prefix_cache_hits")
    assert (hits > 0) == prefixes


@pytest.mark.parametrize("prefixes", [False, True])
def test_preempted_requests_go_on(export, prefixes):
    """The cache has too few pages for two whole requests: some lose their pages and restart later."""
    folder, model = export
    with engines.engine(folder, enable_prefix_caching=prefixes) as llm:
        tokens, pages = engines.pages(llm)
    # Prompts end shortly before a page of keys does, so every request needs one more of each kind.
    prompts = engines.random_prompts([tokens - 10] * 6)
    options = {"num_gpu_blocks_override": 2 * pages, "max_model_len": tokens + 30}
    with engines.engine(folder, enable_prefix_caching=prefixes, **options) as llm:
        answers = engines.generate(llm, prompts, 40)
        assert engines.metric(llm, "num_preemptions") > 0
    _check_all(model, prompts, answers)


@pytest.mark.parametrize("prefixes", [False, True])
def test_random_arrivals(export, prefixes):
    """Two hundred requests of random lengths arrive while others run; some share a prefix."""
    folder, model = export
    rng = random.Random(3)
    common = engines.random_prompts([450, 500], seed=4)
    prompts, news = [], []
    for index, length in enumerate(rng.choices([1, 2, 3, 9, 33, 70, 140, 260], k=200)):
        end = engines.random_prompts([length], seed=100 + index)[0]
        prompts.append(rng.choice([[], [], [], *common])[: rng.choice([400, 500])] + end)
        news.append(rng.randint(1, 12))
    waiting, done = list(range(len(prompts))), {}
    with engines.engine(
        folder, enable_prefix_caching=prefixes, max_num_batched_tokens=256, max_num_seqs=7
    ) as llm:
        running = llm.llm_engine
        while waiting or running.has_unfinished_requests():
            for _ in range(min(len(waiting), rng.choice([0, 0, 1, 1, 2, 5]))):
                index = waiting.pop(0)
                running.add_request(
                    str(index),
                    {"prompt_token_ids": prompts[index]},
                    engines.sampling(news[index]),
                )
            for result in running.step():
                if result.finished:
                    done[int(result.request_id)] = result.outputs[0]
        assert not prefixes or engines.metric(llm, "prefix_cache_hits") > 0
    assert sorted(done) == list(range(200))
    for index, answer in done.items():
        assert len(answer.token_ids) == news[index]
        engines.check(model, prompts[index], answer, FP32)
