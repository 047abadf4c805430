"""A transformer whose circuit is known, because its weights are written by hand.

It is a Qwen3 with grouped-query attention that does induction in two steps. The residual stream has these
blocks: a constant; ``CURRENT``, the code of the current token; ``P1`` and ``P2``, the code of the previous
token, each written by its own previous-token head (the senders); ``OUT``, which the LM head reads; and for
every head a junk block that nothing reads. Induction heads (the receivers) match their ``CURRENT`` with the
``P`` of earlier positions and copy ``CURRENT`` from there to ``OUT``. One receiver is a redundant backup of
half the strength. All other heads are distractors, which write large vectors to their junk blocks. One of them,
the decoy, attends like a receiver, but more sharply.
"""

from __future__ import annotations

import dataclasses
import random

import torch
import transformers

from megatron_hydra.selection.prompts import PromptPair

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 5, 6, 3, 32
GROUP = HEADS // KV_HEADS
CODE = 16
CURRENT, P1, P2, OUT = (slice(1 + i * CODE, 1 + (i + 1) * CODE) for i in range(4))
HIDDEN = 1 + 4 * CODE + LAYERS * HEADS * CODE + 3
IS_FIRST, NOT_FIRST, FLAG = range(HIDDEN - 3, HIDDEN)
"""Channels that mark: the first token; all other tokens; "a head has answered"."""

THETA = 1e6
SINK_DIM = 7
MATCH_DIMS = [*range(8, 16), *range(24, 32)]
"""Channels of a head whose rotary frequency is so low that codes match at any distance."""

Head = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Planted:
    """A model and the heads of its circuit.

    Attributes:
        senders: previous-token heads, of P1 and P2.
        receivers: induction heads; the last one is the backup.
        decoy: the head that attends like the receivers and writes junk.
    """

    model: torch.nn.Module
    senders: list[Head]
    receivers: list[Head]
    decoy: Head


def codes() -> torch.Tensor:
    """Orthogonal ±1 codes of 16 tokens (a Hadamard matrix), ``[16, 16]``."""
    block = torch.ones(1, 1)
    for _ in range(4):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return block


def plant(seed: int) -> Planted:
    """A random placement for each seed; the senders are below all receivers."""
    return _place(_empty(), random.Random(seed))


def _empty() -> torch.nn.Module:
    """Embeddings and LM head, without any circuit between them."""
    config = transformers.Qwen3Config(
        vocab_size=CODE,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # QK-norm with a gain of 4 makes attention sharp for any size of the residual stream.
        gain = 4.0 if "q_norm" in name or "k_norm" in name else 1.0
        parameter.fill_(gain if "norm" in name else 0.0)
    embeddings = model.model.embed_tokens.weight
    embeddings[:, 0] = 1.0
    embeddings[:, CURRENT] = codes()
    embeddings[0, IS_FIRST] = 1.0
    embeddings[1:, NOT_FIRST] = 1.0
    model.lm_head.weight[:, OUT] = codes()
    return model


# -- circuits that are difficult for the paper's scoring ------------------------------------------

EVEN, ODD = tuple(range(2, CODE, 2)), tuple(range(1, CODE, 2))
"""The tokens that one of the two specialists knows."""


def plant_chain(seed: int) -> tuple[torch.nn.Module, Head, Head, Head]:
    """A receiver, its sender, and a sender to this sender, which a second round finds.

    The answer is two places after the earlier occurrence of the last token. One head writes the previous token.
    A second one writes what the first wrote one place before. The receiver matches with the result.
    """
    generator, model = random.Random(seed), _empty()
    slots = {(layer, group) for layer in range(LAYERS) for group in range(KV_HEADS)}
    places = [_take(generator, slots, layers) for layers in (range(1), range(1, 3), range(3, 5))]
    heads = [(layer, GROUP * group + generator.randrange(GROUP)) for layer, group in places]
    kinds = [("previous", CURRENT, P1), ("previous", P1, P2), ("match", P2, OUT)]
    for (layer, group), head, (kind, block, writes) in zip(places, heads, kinds, strict=True):
        _write_group(model, layer, group, kind, block, generator)
        if kind == "previous":
            _write_value(model, layer, group, block)
        _write_output(model, head, writes, 1.0)
    for layer, group in slots:
        _write_group(model, layer, group, "distractor", CURRENT, generator)
    return (model, *heads)


def plant_specialists(backup: bool) -> tuple[torch.nn.Module, Head, Head, Head]:
    """A sender and two receivers: each knows half of the tokens, or the second is a backup.

    A specialist that does not know the last token attends to the first one and writes nothing. The backup knows
    all tokens; it attends to the first one if the other receiver has answered.
    """
    model = _empty()
    sender, first, second = (0, 1), (2, 2), (3, 4)
    _write_group(model, 0, 0, "previous", CURRENT, random.Random(0))
    _write_output(model, sender, P1, 1.0)
    for head, known in ((first, EVEN), (second, (*EVEN, *ODD) if backup else ODD)):
        layer, group = head[0], head[1] // GROUP
        attention = model.model.layers[layer].self_attn
        rows = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        key, value = attention.k_proj.weight[rows], attention.v_proj.weight[rows]
        key[MATCH_DIMS, P1] = torch.eye(CODE)
        key[SINK_DIM, IS_FIRST] = 30.0
        # The first token has no value: a head that attends to it writes nothing.
        value[:CODE, CURRENT] = torch.eye(CODE) - _projector((0,))
        value[CODE, NOT_FIRST] = 1.0
        query = attention.q_proj.weight[head[1] * HEAD_DIM : (head[1] + 1) * HEAD_DIM]
        query[MATCH_DIMS, CURRENT] = _projector(known)
        query[SINK_DIM, 0] = 1.0
        _write_output(model, head, OUT, 1.0)
        if backup and head == first:
            columns = attention.o_proj.weight[:, head[1] * HEAD_DIM : (head[1] + 1) * HEAD_DIM]
            columns[FLAG, CODE] = 1.0
        if backup and head == second:
            query[SINK_DIM, FLAG] = 100.0
    return model, sender, first, second


def _projector(tokens: tuple[int, ...]) -> torch.Tensor:
    """Projection onto the codes of some tokens, ``[16, 16]``."""
    rows = codes()[list(tokens)]
    return rows.T @ rows / CODE


def pairs_two_behind(count: int, seed: int) -> list[PromptPair]:
    """As :func:`induction_pairs`, but the answer is two places later."""
    return induction_pairs(count, seed, length=12, behind=2)


def pairs_asking(known: tuple[int, ...], count: int, seed: int) -> list[PromptPair]:
    """Induction pairs whose last token is one of these."""
    pairs = [pair for pair in induction_pairs(20 * count, seed) if pair.clean[-1] in known]
    return pairs[:count]


def pairs_of_three(count: int, seed: int) -> list[PromptPair]:
    """Answers of three tokens, the first one odd, after an even token; corrupted: three other tokens."""
    generator, pairs = random.Random(seed), []
    while len(pairs) < count:
        asked, *rest = generator.sample(range(1, CODE), 14)
        answer, wrong, others = rest[:3], rest[3:6], rest[6:]
        if asked % 2 or not answer[0] % 2 or answer[1] % 2:
            continue
        clean = (0, *others[:4], asked, *answer, *others[4:], asked)
        corrupted = (0, *others[:4], asked, *wrong, *others[4:], asked)
        pairs.append(PromptPair(clean, corrupted, tuple(answer), tuple(wrong)))
    return pairs


def _place(model: torch.nn.Module, generator: random.Random) -> Planted:
    border = generator.randint(1, LAYERS - 2)  # senders are below it, receivers from it on
    slots = {(layer, group) for layer in range(LAYERS) for group in range(KV_HEADS)}
    senders, receivers = [], []
    for block in (P1, P2):
        layer, group = _take(generator, slots, range(border))
        _write_group(model, layer, group, "previous", block, generator)
        senders.append((layer, group * GROUP + generator.randrange(GROUP)))
        _write_output(model, senders[-1], block, 1.0)
    backup_layer = generator.randint(border, LAYERS - 1)
    plans = [
        (P1, range(border, LAYERS), 1.0),
        (P2, range(border, LAYERS), 1.0),
        (P1, range(backup_layer, backup_layer + 1), 0.5),
    ]
    siblings = []
    for block, layers, strength in plans:
        layer, group = _take(generator, slots, layers)
        _write_group(model, layer, group, "match", block, generator)
        first = generator.randrange(GROUP)
        head = (layer, group * GROUP + first)
        receivers.append(head)
        _write_output(model, head, OUT, strength)
        sibling = (layer, group * GROUP + (first + 1) % GROUP)
        siblings.append(sibling)
        _write_query(model, sibling, "uniform", block)
        _write_output(model, sibling, _junk(sibling), generator.uniform(2, 4))
    # It shares keys and values with a receiver and so attends alike, but nothing reads its output.
    decoy = generator.choice(siblings)
    _write_query(model, decoy, "match", CURRENT, blunt=0.0)
    _write_output(model, decoy, _junk(decoy), 3.0)
    for layer, group in slots:
        _write_group(model, layer, group, "distractor", CURRENT, generator)
    return Planted(model, senders, receivers, decoy)


def _junk(head: Head) -> slice:
    """The block of a distractor. It is its own, so that the norm of the stream does not depend on tokens;
    otherwise the head would have a true effect through the final norm.
    """
    first = 1 + (4 + head[0] * HEADS + head[1]) * CODE
    return slice(first, first + CODE)


def _take(generator: random.Random, slots: set[Head], layers: range) -> Head:
    slot = generator.choice(sorted(s for s in slots if s[0] in layers))
    slots.remove(slot)
    return slot


def _write_group(
    model: torch.nn.Module,
    layer: int,
    group: int,
    kind: str,
    block: slice,
    generator: random.Random,
) -> None:
    """Set a KV group's keys and values, its heads' queries, and the outputs of its distractors."""
    attention = model.model.layers[layer].self_attn
    rows = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
    _write_value(model, layer, group, CURRENT)
    key = attention.k_proj.weight[rows]
    if kind == "match":
        key[MATCH_DIMS, block] = torch.eye(CODE)
    else:
        # The key is rotated forward by `distance` steps, so queries attend that many tokens back.
        distance = 1 if kind == "previous" else generator.choice([0, 2, 3])
        angles = distance * THETA ** (-torch.arange(4) / (HEAD_DIM / 2))
        key[:4, 0], key[16:20, 0] = angles.cos(), angles.sin()
    for head in range(group * GROUP, (group + 1) * GROUP):
        _write_query(model, (layer, head), kind, block)
        if kind == "distractor":
            _write_output(model, (layer, head), _junk((layer, head)), generator.uniform(2, 4))


def _write_value(model: torch.nn.Module, layer: int, group: int, block: slice) -> None:
    """A KV group's values: the code in a block."""
    value = model.model.layers[layer].self_attn.v_proj.weight
    value = value[group * HEAD_DIM : (group + 1) * HEAD_DIM]
    value.zero_()
    value[:CODE, block] = torch.eye(CODE)


def _write_query(
    model: torch.nn.Module, head: Head, kind: str, block: slice, blunt: float = 40.0
) -> None:
    layer, h = head
    query = model.model.layers[layer].self_attn.q_proj.weight[h * HEAD_DIM : (h + 1) * HEAD_DIM]
    query.zero_()
    if kind == "match":
        # A constant beside the code takes a share of the norm, so the match has less weight.
        query[MATCH_DIMS, CURRENT] = torch.eye(CODE)
        query[0, 0] = blunt
    elif kind != "uniform":
        query[:4, 0] = 1.0


def _write_output(model: torch.nn.Module, head: Head, block: slice, strength: float) -> None:
    layer, h = head
    output = model.model.layers[layer].self_attn.o_proj.weight
    columns = output[:, h * HEAD_DIM : (h + 1) * HEAD_DIM]
    columns.zero_()
    columns[block, :CODE] = strength * torch.eye(CODE)


def induction_pairs(count: int, seed: int, length: int = 11, behind: int = 1) -> list[PromptPair]:
    """A begin token, ``length`` others, and one of them again; corrupted: two tokens exchanged.

    The answer is ``behind`` places after the first occurrence of the repeated token.
    """
    generator = random.Random(seed)
    pairs = []
    while len(pairs) < count:
        segment = generator.sample(range(1, CODE), length)
        # The last tokens do not change, so that heads that attend a few tokens back see no difference.
        asked, other = sorted(generator.sample(range(8), 2))
        if other - asked <= behind:
            continue
        exchanged = list(segment)
        exchanged[asked], exchanged[other] = segment[other], segment[asked]
        query = segment[asked]
        pairs.append(
            PromptPair(
                (0, *segment, query),
                (0, *exchanged, query),
                answer=(segment[asked + behind],),
                wrong=(segment[other + behind],),
            )
        )
    return pairs
