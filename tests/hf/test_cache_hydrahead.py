"""The exported model's caches: transformers' containers, static shapes, offload, and removing tokens.

The reference is the model on one sequence in fp32, without padding and without a cache.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache

from megatron_hydra.hf import cache_hydrahead
from megatron_hydra.hf.cache_hydrahead import HydraHeadCache, record_past
from tests.hf.models import KINDS, SHAPE, close, make_model, rope, tokens
from tests.hf.pretended_devices import FIRST, HOST, PretendedDevices, place_of, put

FAST = ("head", "token-gqa")
EVERY = pytest.mark.parametrize(
    "kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
BEAMS = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
SEQUENCES = [tokens(1, n, seed=n) for n in (1, 3, 12)]


def batch_of(sequences):
    """Pad prompts on the left."""
    width = max(s.shape[1] for s in sequences)
    ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - sequence.shape[1] :] = sequence
        mask[row, width - sequence.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def truth(model, sequence, new=NEW):
    """The next tokens of one sequence ``[1, T]``."""
    for _ in range(new):
        with torch.no_grad():
            logits = model(sequence, use_cache=False).logits[:, -1]
        sequence = torch.cat((sequence, logits.argmax(-1)[:, None]), dim=1)
    return sequence[0, -new:].tolist()


CACHES = {
    "dynamic": lambda config: {"past_key_values": DynamicCache(config=config)},
    "without a config": lambda config: {"past_key_values": DynamicCache()},
    "ours": lambda config: {"past_key_values": HydraHeadCache(config)},
    "static": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=64)},
    "by name": lambda config: {"cache_implementation": "static"},
    "in chunks": lambda config: {"cache_implementation": "static", "prefill_chunk_size": 5},
}


@EVERY
@pytest.mark.parametrize("name", CACHES)
def test_every_cache_generates_what_no_cache_does(kind, name):
    """Padded batches, beams with several answers, and a second call with a used static cache."""
    model = make_model(*KINDS[kind])
    batch = batch_of(SEQUENCES)
    expected = [truth(model, sequence) for sequence in SEQUENCES]
    for _ in range(2):
        out = model.generate(**batch, **GREEDY, **CACHES[name](model.config))
        assert out[:, -NEW:].tolist() == expected
    beams = model.generate(**batch, **BEAMS, use_cache=False)
    assert torch.equal(model.generate(**batch, **BEAMS, **CACHES[name](model.config)), beams)


@EVERY
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_turns_of_a_chat_extend_the_cache(kind, name):
    model = make_model(*KINDS[kind])
    options = {**GREEDY, **CACHES[name](model.config), "return_dict_in_generate": True}
    batch = batch_of(SEQUENCES)
    turn = model.generate(**batch, **options)
    said = tokens(3, 4, seed=9)
    text = torch.cat((turn.sequences, said), dim=1)
    ones = torch.ones(3, NEW + 4, dtype=torch.long)
    mask = torch.cat((batch["attention_mask"], ones), dim=1)
    answer = model.generate(text, attention_mask=mask, **options)
    assert answer.past_key_values is options["past_key_values"]
    assert int(answer.past_key_values.get_seq_length()) == text.shape[1] + NEW - 1
    for row in range(3):
        whole = text[row, mask[row].bool()][None]
        assert answer.sequences[row, -NEW:].tolist() == truth(model, whole)


@EVERY
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_a_prefix_is_read_once_and_copied(kind, name):
    model, prefix = make_model(*KINDS[kind]), tokens(1, 20)
    cache = CACHES[name](model.config)["past_key_values"]
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    for seed in (3, 4):
        text = torch.cat((prefix, tokens(1, 5, seed=seed)), dim=1)
        out = model.generate(text, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert out[0, -NEW:].tolist() == truth(model, text)
    assert int(cache.get_seq_length()) == 20


@pytest.mark.parametrize("kind", ["head", "token"])
def test_a_static_cache_is_reset_and_used_again(kind):
    model, cache = make_model(*KINDS[kind]), None
    cache = StaticCache(config=model.config, max_cache_len=20)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        for padding in (mask, None):
            ids = tokens(2, 12, seed=3 + (padding is None))
            whole = model(ids, attention_mask=padding, use_cache=False).logits
            first = model(ids[:, :8], attention_mask=None if padding is None else padding[:, :8],
                          past_key_values=cache).logits  # fmt: skip
            then = model(ids[:, 8:], attention_mask=padding, past_key_values=cache).logits
            shown = mask.bool() if padding is not None else torch.ones_like(mask).bool()
            close(torch.cat((first, then), dim=1)[shown], whole[shown])
            addresses = [t.data_ptr() for layer in cache.layers for t in tensors_of(layer)]
            cache.reset()
            assert int(cache.get_seq_length()) == 0
    assert addresses == [t.data_ptr() for layer in cache.layers for t in tensors_of(layer)]
    with pytest.raises(ValueError, match="holds at most 20 tokens, the input has 21"):
        model(tokens(2, 21), past_key_values=cache)


def tensors_of(layer):
    return [x for x in vars(layer).values() if isinstance(x, torch.Tensor)]


@EVERY
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_an_offloaded_cache_is_in_the_hosts_memory_between_its_layers(kind, name):
    """Devices are pretended: a tensor that is used before it is fetched causes an error."""
    model, ids = make_model(*KINDS[kind]), tokens(2, 9)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for tensor in (*model.parameters(), *model.buffers()):
        put(tensor, FIRST)
    cache = CACHES[name](model.config)["past_key_values"]
    cache.offloading = True  # its argument does the same, but needs an accelerator for its stream
    pieces = []
    with torch.no_grad(), PretendedDevices():
        for start, end in ((0, 6), (6, 7), (7, 9)):
            new = put(ids[:, start:end].clone(), FIRST)
            pieces.append(model(new, past_key_values=cache).logits)
            held = [getattr(x, n) for x in cache.layers for n in (*x.STORES, *x.MEMORIES)]
            assert {place_of(x) for x in held if x is not None} == {HOST}
    close(torch.cat(pieces, dim=1), whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["head", "token-gqa"])
def test_a_step_with_a_static_cache_is_compiled_once_as_one_graph(kind):
    """Shapes are fixed, as CUDA graphs need; also after a reset of the cache, and with a padded prompt."""
    from torch._dynamo.testing import CompileCounter  # slow to import

    model, graphs = make_model(*KINDS[kind]), CompileCounter()
    compiled = torch.compile(model, backend=graphs, dynamic=False, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=40)
    counts = []
    for padding in (0, 5):
        prompt = tokens(2, 8, seed=padding)
        mask = torch.ones_like(prompt)
        mask[0, :padding] = 0
        with torch.no_grad():
            model(prompt, attention_mask=mask, past_key_values=cache)
            text = prompt
            for step in range(20):
                token = tokens(2, 1, seed=step)
                logits = compiled(token, past_key_values=cache).logits
                counts.append(graphs.frame_count)
                text = torch.cat((text, token), dim=1)
            whole = torch.cat((mask, torch.ones(2, 20, dtype=torch.long)), dim=1)
            expected = model(text, attention_mask=whole, use_cache=False).logits[:, -1:]
        close(logits, expected)
        cache.reset()
    assert set(counts) == {1}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generate_compiles_the_steps_of_a_static_cache():
    """generate() does this by itself on a GPU."""
    model, graphs = make_model(), []

    def noted(graph, inputs):  # a function, because generate() copies any other object
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(fullgraph=True, dynamic=False, backend=noted, mode=None)
    compiled._compile_all_devices = True
    for sequence in SEQUENCES:
        out = model.generate(
            sequence,
            attention_mask=torch.ones_like(sequence),
            past_key_values=StaticCache(config=model.config, max_cache_len=40),
            compile_config=compiled,
            **GREEDY,
        )
        assert out[0, -NEW:].tolist() == truth(model, sequence)
    assert graphs  # steps were compiled; fullgraph raises if there are several graphs


# -- removing tokens ------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("undo", [512, 9])
def test_tokens_are_removed(kind, padding, undo, monkeypatch):
    """Remove a part of a call, of several calls, or a whole call; then feed other tokens."""
    monkeypatch.setattr(cache_hydrahead, "UNDO", undo)
    model = make_model(*KINDS[kind])
    cache = HydraHeadCache(model.config)
    record_past(cache, True)
    ids, mask = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    calls = [(20, 0), (3, 5), (1, 0), (1, 0), (1, 2), (4, 4), (5, 1), (1, 1), (2, 0)]
    with torch.no_grad():
        for number, (new, removed) in enumerate(calls):
            ids = torch.cat((ids, tokens(2, new, seed=number)), dim=1)
            fresh = torch.ones(2, new, dtype=torch.long)
            if not number:
                fresh[0, :padding] = 0
            if padding and number == 6:
                fresh[1, 2:4] = 0  # within the removed tokens
            mask = torch.cat((mask, fresh), dim=1)
            logits = model(ids[:, -new:], attention_mask=mask, past_key_values=cache).logits
            expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -new:]
            close(logits[fresh.bool()], expected[fresh.bool()])
            if removed:
                cache.crop(-removed)
                ids, mask = ids[:, :-removed], mask[:, :-removed]
            assert cache.get_seq_length() == ids.shape[1]
            assert cache.lengths.tolist() == mask.sum(1).tolist()
    assert all(layer.is_croppable for layer in cache.layers)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_the_record_of_a_long_prompt_is_bounded(kind, monkeypatch):
    monkeypatch.setattr(cache_hydrahead, "UNDO", 9)
    model = make_model(*KINDS[kind])
    held = []
    for length in (40, 80):
        cache = HydraHeadCache(model.config)
        record_past(cache, True)
        with torch.no_grad():
            model(tokens(1, length), past_key_values=cache)
        records = [record for layer in cache.layers for record in layer.records]
        kept = [x for r in records for x in (*r.rows.values(), *(r.writes or ()))]
        assert {r.length for r in records} == {9} and kept
        held.append(sum(x.untyped_storage().nbytes() for x in kept))
    assert held[0] == held[1]


def test_the_older_form_of_crop_gives_the_number_to_keep():
    model, ids = make_model(), tokens(1, 12)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = HydraHeadCache(model.config)
        record_past(cache, True)
        model(tokens(1, 9), past_key_values=cache)
        cache.reset()
        model(torch.cat((ids[:, :7], tokens(1, 3, seed=5)), dim=1), past_key_values=cache)
        cache.crop(7)
        close(model(ids[:, 7:], past_key_values=cache).logits, whole[:, 7:])


@pytest.mark.parametrize("kind", ["head", "token", "dense"])
def test_tokens_that_were_not_recorded_cannot_be_removed(kind):
    model, ids = make_model(*KINDS[kind]), tokens(2, 12)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        if kind == "dense":  # the layers have only keys
            cache.crop(-3)
            logits = model(ids[:, 5:], past_key_values=cache).logits
            close(logits, model(ids, use_cache=False).logits[:, 5:])
            return
        with pytest.raises(
            ValueError, match=r"3 of them were not recorded.*activate_past_recording"
        ):
            cache.crop(-3)
        record_past(cache, True)
        model(ids[:, 8:10], past_key_values=cache)
        with pytest.raises(ValueError, match="1 of them were not recorded"):
            cache.crop(-3)
        logits = model(ids[:, 10:], past_key_values=cache).logits
        close(logits, model(ids, use_cache=False).logits[:, 10:])  # nothing was removed in part
        static = StaticCache(config=model.config, max_cache_len=20)
        model(ids, past_key_values=static)
        with pytest.raises(ValueError, match="static cache of a HydraHead model cannot be cropped"):
            static.crop(-1)


def doubtful(model, share=0.02):
    """A draft model that sometimes agrees with the model."""
    draft = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(share * torch.randn_like(parameter))
    return draft


def qwen3():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_parameters=rope())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def counted(monkeypatch):
    """Number of tokens that each ``crop`` of our layers removed."""
    removed = []
    crop = cache_hydrahead.HydraHeadCacheLayer.crop

    def noted(layer, number):
        before = layer.length
        crop(layer, number)
        removed.append(before - layer.length)

    monkeypatch.setattr(cache_hydrahead.HydraHeadCacheLayer, "crop", noted)
    return removed


@pytest.mark.parametrize(
    "kind", [k if k == "head" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_assisted_decoding_gives_the_models_own_tokens(kind, monkeypatch):
    """A HydraHead model as the main model, as the draft model, and as both; also prompt lookup."""
    model, dense = make_model(*KINDS[kind]), qwen3()
    text = torch.cat(
        [tokens(1, 6, seed=3)] * 3, dim=1
    )  # it repeats itself, so that a lookup finds something
    new = 16
    options = {**GREEDY, "max_new_tokens": new, "attention_mask": torch.ones_like(text)}
    options["eos_token_id"] = 10**6  # transformers 5.0 requires one; the model never produces it
    cases = {
        "lookup": (model, {"prompt_lookup_num_tokens": 4}),
        "own draft": (model, {"assistant_model": doubtful(model)}),
        "other draft": (model, {"assistant_model": dense}),
        "as draft": (dense, {"assistant_model": model}),
        "as draft of its like": (doubtful(model), {"assistant_model": model}),
    }
    for name, (target, extra) in cases.items():
        removed = counted(monkeypatch)
        out = target.generate(text, **options, **extra)
        assert out[0, -new:].tolist() == truth(target, text, new), name
        assert sum(removed) > 0, name  # some drafts were refused
        monkeypatch.undo()


def test_assisted_decoding_of_a_padded_prompt_and_the_turn_after():
    model = make_model()
    text, mask = tokens(1, 14), torch.ones(1, 14, dtype=torch.long)
    mask[0, :4] = 0
    options = {**GREEDY, "max_new_tokens": 12, "return_dict_in_generate": True}
    draft = doubtful(model)
    turn = model.generate(text, attention_mask=mask, assistant_model=draft, **options)
    assert turn.sequences[0, -12:].tolist() == truth(model, text[:, 4:], 12)
    text = torch.cat((turn.sequences, tokens(1, 3, seed=4)), dim=1)
    mask = torch.cat((mask, torch.ones(1, 15, dtype=torch.long)), dim=1)
    follow = model.generate(
        text, attention_mask=mask, past_key_values=turn.past_key_values, **options
    )
    assert follow.sequences[0, -12:].tolist() == truth(model, text[:, 4:], 12)
    assert not any(layer.records for layer in follow.past_key_values.layers)


# -- what is refused ------------------------------------------------------------------------------


def test_a_cache_without_support_for_states_is_refused():
    model, dense, ids = make_model(), qwen3(), tokens(1, 6)
    with torch.no_grad():
        filled = dense(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="DynamicCache holds another model's tokens"):
        model(ids, past_key_values=filled)
    with pytest.raises(ValueError, match="the cache is a tuple"):
        model(ids, past_key_values=((ids, ids),))
    other = DynamicCache(config=Qwen3Config(**{**SHAPE, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="the cache has 2 layers, the model has 3"):
        model(ids, past_key_values=other)
    sliding = Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer cannot store states"):
        model(ids, past_key_values=DynamicCache(config=sliding))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.kv_bytes() == cache.state_bytes() == 0


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dynamic", "offloaded", "static", "offloaded_static"])
@pytest.mark.parametrize("kind", ["head", "token"])
def test_every_cache_generates_what_no_cache_does_on_a_gpu(kind, name):
    """On a GPU generate() compiles the steps of a static cache with CUDA graphs."""
    model = make_model(*KINDS[kind], head_dim=64).cuda()
    batch = {k: v.cuda() for k, v in batch_of(SEQUENCES).items()}
    expected = [truth(model, sequence.cuda()) for sequence in SEQUENCES]
    for _ in range(2):
        out = model.generate(**batch, **GREEDY, cache_implementation=name)
        assert out[:, -NEW:].tolist() == expected
