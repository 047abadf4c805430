"""Train the quickstart's dense teacher: a Qwen3 of 4 layers and 32 query heads.

    python -m megatron_hydra.quickstart.teacher --output DIR --seed 0

It trains with a curriculum, because training on needles from scratch stays on a plateau. Copying comes first
(induction heads form within a minute), then few facts, then all facts mixed with real text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from typing import Any

import numpy as np
import torch

from megatron_hydra.arguments import path_argument, real, seed_argument
from megatron_hydra.errors import HydraError, command
from megatron_hydra.quickstart.tasks import PAIRS, TRAIN_LENGTH, Sample, TaskGenerator
from megatron_hydra.quickstart.vocabulary import build_tokenizer


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the curriculum: optimizer steps over a mixture of tasks; the rest is plain text.

    Attributes:
        name: for the log.
        steps: largest number of steps.
        length: tokens of a sequence.
        copying, needles: shares of the sequences.
        pairs: least and most facts of a needle sequence.
        enough: the phase ends early at this accuracy with the most facts; above 1: never.
    """

    name: str
    steps: int
    length: int
    copying: float
    needles: float
    pairs: tuple[int, int]
    enough: float


def teacher_config(vocab_size: int) -> Any:
    """The teacher's shape: 4 layers, 8 query and 4 KV heads of 16 channels, hidden size 96."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=TRAIN_LENGTH,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.05,
    )


CURRICULUM = (
    Phase("copying", 3000, 32, copying=0.7, needles=0.3, pairs=(3, 6), enough=0.95),
    Phase("few facts", 1000, 64, copying=0.2, needles=0.7, pairs=(6, 12), enough=0.95),
    Phase("all facts", 800, TRAIN_LENGTH, copying=0.1, needles=0.7, pairs=(12, PAIRS), enough=2),
)


def draw(tasks: TaskGenerator, phase: Phase, size: int, rng: np.random.Generator) -> list[Sample]:
    """``size`` sequences of a phase's mixture."""
    batch = []
    for _ in range(size):
        kind = rng.random()
        if kind < phase.copying:
            batch.append(tasks.copying(rng, phase.length))
        elif kind < phase.copying + phase.needles:
            pairs = int(rng.integers(phase.pairs[0], phase.pairs[1] + 1))
            queries = min(pairs, (phase.length - 2 * pairs) // 2, 16)
            batch.append(tasks.needles(rng, phase.length, pairs, queries))
        else:
            batch.append(tasks.plain_text(rng, phase.length))
    return batch


def loss_of(model: Any, batch: list[Sample]) -> torch.Tensor:
    """Next-token cross-entropy averaged over the batch's targets; a scalar, fp32."""
    tokens = torch.from_numpy(np.stack([s.tokens for s in batch])).to(model.device)
    mask = torch.from_numpy(np.stack([s.loss_mask for s in batch]))[:, 1:].to(model.device)
    hidden = model.model(tokens).last_hidden_state[:, :-1][mask]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), tokens[:, 1:][mask])


@torch.no_grad()
def accuracy(
    model: Any, tasks: TaskGenerator, length: int, sequences: int, seed: int, pairs: int = PAIRS
) -> float:
    """Share of needle answers that the model's argmax over the whole vocabulary gets right."""
    rng = np.random.default_rng(seed)
    samples = [tasks.needles(rng, length, pairs, min(pairs, 8)) for _ in range(sequences)]
    tokens = torch.from_numpy(np.stack([s.tokens for s in samples])).to(model.device)
    right = []
    for part, group in zip(tokens.split(8), _grouped(samples, 8), strict=True):
        answers = torch.from_numpy(np.stack([s.answers for s in group])).to(model.device)
        predicted = model(part).logits.argmax(-1).gather(1, answers - 1)
        right.append((predicted == part.gather(1, answers)).float().flatten())
    return torch.cat(right).mean().item()


def _grouped(samples: list[Sample], size: int) -> list[list[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def train(model: Any, tasks: TaskGenerator, seed: int, lr: float, batch: int) -> None:
    """Run the curriculum in place; warm-up at the start, cosine decay to 2 % in the last phase."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, done = time.time(), 0
    for number, phase in enumerate(CURRICULUM):
        for step in range(phase.steps):
            scale = min(1.0, (done + 1) / 50)
            if number == len(CURRICULUM) - 1:
                scale *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            loss = loss_of(model, draw(tasks, phase, batch, rng))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done % 50 == 0:
                score = accuracy(model, tasks, phase.length, 32, seed=1, pairs=phase.pairs[1])
                print(
                    f"{phase.name:10s} step {done:5d}  loss {loss.item():.3f}  "
                    f"{phase.pairs[1]} facts {score:.3f}  {time.time() - started:.0f} s",
                    flush=True,
                )
                if score >= phase.enough:
                    break


@command
def main() -> int:
    """Train and score the teacher, and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder to write (Hugging Face format)"
    )
    parser.add_argument("--seed", type=seed_argument, default=0)
    parser.add_argument("--lr", type=real(0), default=2e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    if args.output.exists() and any(args.output.glob("*.safetensors")):
        raise HydraError(f"--output {args.output} already holds a model; name another folder")
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    tasks = TaskGenerator.of(tokenizer)
    model = Qwen3ForCausalLM(teacher_config(len(tokenizer))).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens")
    train(model, tasks, args.seed, args.lr, args.batch)
    scores = {
        str(length): accuracy(model, tasks, length, 64, seed=2)
        for length in (TRAIN_LENGTH * m for m in (1, 2, 4, 8))
    }
    print(json.dumps(scores))
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
