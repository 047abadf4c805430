"""Generate training text with a model: a student learns best from its teacher's own text.

Prompts are the rows of a corpus in any format of :mod:`megatron_hydra.data.corpus`. The output are JSON lines
for ``data_prep/tokenize.py``. Prompts are processed in batches. The content and the random numbers of a batch
depend only on the seed and on its number. So a resumed run writes the same lines as an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.arguments import real, seed_argument, whole
from megatron_hydra.data.chat import ChatError, render_prompt
from megatron_hydra.data.corpus import CorpusConfig, Row, input_identity
from megatron_hydra.data.rows import read_unit
from megatron_hydra.data.sampling import derive_key
from megatron_hydra.data.tokenizer import (
    chat_template_fingerprint,
    end_tokens_of,
    tokenizer_fingerprint,
)
from megatron_hydra.data.units import plan_units
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sync, write_json_atomic
from megatron_hydra.head_map import fingerprint_tensors
from megatron_hydra.options import option
from megatron_hydra.out_of_memory import convert_out_of_memory
from megatron_hydra.stopping import exit_if_stopped

_SHOWN = 5
_REPORT_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of the generation.

    Attributes:
        samples: texts for each prompt.
        max_new_tokens: maximum length of a text.
        temperature: logits are divided by it; 0: greedy.
        top_p: sample from the most likely tokens with this total probability; 1: all tokens.
        top_k: sample from this number of most likely tokens; 0: all tokens.
        seed: decides every random number.
        batch_size: number of texts per batch. Another size changes rounding and random numbers.
        max_bad_rows: number of rows without a usable prompt to skip; one more is an error.
        shard: (i, n): generate only the i-th of every n batches.
    """

    samples: int = option(1, "texts per prompt (%(default)s)", parse=whole(1), group="writing")
    max_new_tokens: int = option(
        1024,
        "largest number of generated tokens (%(default)s)",
        parse=whole(1),
        metavar="N",
        group="writing",
    )
    temperature: float = option(
        1.0, "sampling temperature; 0: greedy (%(default)s)", parse=real(0), group="writing"
    )
    top_p: float = option(
        1.0,
        "nucleus sampling threshold (%(default)s: all)",
        parse=real(0, above=True),
        group="writing",
    )
    top_k: int = option(
        0, "sample from the K likeliest tokens (%(default)s: all)", parse=whole(0), group="writing"
    )
    seed: int = option(1234, "sampling seed (%(default)s)", parse=seed_argument, group="writing")
    batch_size: int = option(
        16,
        "texts per batch (%(default)s); the size changes the sampled texts",
        parse=whole(1),
        group="writing",
    )
    max_bad_rows: int = option(
        0, "skip up to this many unusable rows", parse=whole(0), metavar="N", group="rows"
    )
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.top_p > 1:
            raise HydraError(f"--top-p {self.top_p}: it must be at most 1")


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """The prompt of one text: one sample of a row."""

    row: int
    sample: int
    value: Any
    tools: list[Any] | None
    text: str
    ids: list[int]


@dataclasses.dataclass
class _Counts:
    batches: int = 0
    rows: int = 0
    texts: int = 0
    tokens: int = 0
    unfinished: int = 0
    bytes: int = 0


class Generation:
    """Writes one file.

    Args:
        corpus: the prompts; with ``corpus.chat``, conversations, whose last answers are removed.
        settings: settings of the generation.
        output: the JSON-lines file; ``OUTPUT.manifest`` records how it was made.
        model: a causal model of transformers, in eval mode.
        tokenizer: its tokenizer.
        identity: JSON that identifies the model.
        force: replace an existing output.

    Raises:
        HydraError: ``output`` exists and has another origin, or another process is writing it.
    """

    def __init__(
        self,
        corpus: CorpusConfig,
        settings: GenerationSettings,
        output: str | Path,
        model: Any,
        tokenizer: Any,
        identity: dict[str, Any],
        force: bool = False,
    ) -> None:
        self.corpus, self.settings = corpus, settings
        self.model, self.tokenizer = model, tokenizer
        self.output = _shard_name(Path(output), settings.shard)
        self.work = Path(f"{self.output}.work")
        self.manifest = Path(f"{self.output}.manifest")
        self.force = force
        self._bad: list[str] = []
        self._ends = end_tokens_of(model, tokenizer)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        vectors = {n: p for n, p in model.named_parameters() if p.ndim == 1}
        self.recipe = json.loads(
            json.dumps(
                {
                    "format": "megatron-hydra-generated",
                    "model": {**identity, "weights": fingerprint_tensors(vectors), "dtype": str(model.dtype)},
                    "tokenizer": tokenizer_fingerprint(tokenizer),
                    "chat_template": chat_template_fingerprint(tokenizer) if corpus.chat else "",
                    "prompts": input_identity(corpus),
                    "column": corpus.column,
                    "tools_column": corpus.tools_column,
                    "chat": corpus.chat,
                    **{
                        key: value
                        for key, value in dataclasses.asdict(settings).items()
                        if key != "max_bad_rows"
                    },
                }
            )
        )  # fmt: skip

    def run(self, report: Callable[[str], None] = print) -> dict[str, Any]:
        """Generate all texts, or resume with the remaining ones.

        Args:
            report: takes lines of progress.

        Returns:
            The manifest: the recipe and counts of rows, texts, tokens.

        Raises:
            HydraError: too many rows without a usable prompt, or the disk is full.
            Stopped: the process received a request to stop; finished texts are kept.
        """
        if self._is_done():
            report(f"{self.output} is complete, nothing to do")
            return json.loads(self.manifest.read_text(encoding="utf-8"))
        try:
            with self._claim_work_folder():
                counts = self._write(report)
                return self._publish(counts, report)
        except OSError as error:
            raise HydraError(
                f"cannot write {self.output}: {error}; fix this and run the same command again; it resumes"
            ) from error

    # -- the output -------------------------------------------------------------------------------

    def _is_done(self) -> bool:
        if self.output.is_dir():
            raise HydraError(f"{self.output} is a folder; give a file name")
        if self.force or not self.output.exists():
            return False
        try:
            found = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        different = self._different(found)
        if different:
            raise HydraError(
                f"{self.output} exists and has another origin (different: {', '.join(different)}); choose "
                "another --output, or replace it with --force"
            )
        return True

    def _different(self, other: dict[str, Any]) -> list[str]:
        """Keys in which another recipe (or the manifest with it) differs from this one."""
        return [key for key, value in self.recipe.items() if other.get(key) != value]

    def _claim_work_folder(self) -> Any:
        """Create or reuse the work folder, and lock it."""
        recipe = self.work / "recipe.json"
        if recipe.exists():
            different = self._different(json.loads(recipe.read_text(encoding="utf-8")))
            if different and not self.force:
                raise HydraError(
                    f"{self.work} holds unfinished work of another generation (different: "
                    f"{', '.join(different)}); finish that one, or start again with --force"
                )
            if different:
                shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        lock = open(self.work / "lock", "w", encoding="utf-8")  # noqa: SIM115  # the caller closes it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise HydraError(f"{self.output} is being written by another process") from None
        write_json_atomic(recipe, self.recipe)
        return lock

    def _publish(self, counts: _Counts, report: Callable[[str], None]) -> dict[str, Any]:
        if counts.texts == 0:
            raise HydraError(f"{', '.join(self.corpus.inputs)}: no usable prompt; nothing to write")
        numbers = {
            k: v for k, v in dataclasses.asdict(counts).items() if k not in ("batches", "bytes")
        }
        body = {**self.recipe, "counts": {**numbers, "bad_rows": len(self._bad)}}
        write_json_atomic(self.manifest, body)
        os.replace(self.work / "rows.jsonl", self.output)
        sync(self.output.resolve().parent)
        shutil.rmtree(self.work)
        for line in self._bad[:_SHOWN]:
            report(f"left out {line}")
        report(
            f"{self.output}: {counts.texts:,} texts for {counts.rows:,} prompts, {counts.tokens:,} tokens "
            f"written; {counts.unfinished:,} cut off after {self.settings.max_new_tokens:,} tokens; "
            f"{len(self._bad):,} rows left out"
        )
        return body

    # -- the loop -----------------------------------------------------------------------------------

    def _write(self, report: Callable[[str], None]) -> _Counts:
        state = self.work / "state.json"
        counts = _Counts()
        if state.exists():
            counts = _Counts(**json.loads(state.read_text(encoding="utf-8")))
        own, shards = self.settings.shard
        reported = time.monotonic()
        with open(self.work / "rows.jsonl", "ab") as stream:
            stream.truncate(counts.bytes)
            for number, batch in enumerate(_batched(self._prompts(), self.settings.batch_size)):
                if number % shards != own or number < counts.batches:
                    continue
                exit_if_stopped()
                for line, tokens, finished in self._texts(number, batch):
                    stream.write(line)
                    counts.texts += 1
                    counts.tokens += tokens
                    counts.unfinished += not finished
                counts.rows += sum(prompt.sample == 0 for prompt in batch)
                stream.flush()
                os.fsync(stream.fileno())
                counts.batches, counts.bytes = number + 1, stream.tell()
                write_json_atomic(state, dataclasses.asdict(counts))
                if time.monotonic() - reported > _REPORT_SECONDS:
                    reported = time.monotonic()
                    report(f"{counts.texts:,} texts, {counts.tokens:,} tokens written")
        return counts

    def _prompts(self) -> Iterator[_Prompt]:
        rows = itertools.chain.from_iterable(
            read_unit(unit, self.corpus) for unit in plan_units(self.corpus)
        )
        for number, row in enumerate(rows):
            try:
                text, ids, value = self._encode(row)
            except ValueError as error:
                self._record_bad_row(f"{row.where}: {error}")
                continue
            for sample in range(self.settings.samples):
                yield _Prompt(number, sample, value, row.tools, text, ids)

    def _record_bad_row(self, line: str) -> None:
        self._bad.append(line)
        if len(self._bad) > self.settings.max_bad_rows:
            shown = "".join(f"\n  {bad}" for bad in self._bad[:_SHOWN])
            raise HydraError(
                f"{len(self._bad)} rows without a usable prompt, above --max-bad-rows "
                f"{self.settings.max_bad_rows}. The first:{shown}\nRepair them, or skip them: run the same "
                "command with a higher --max-bad-rows (finished work is kept)"
            )

    def _encode(self, row: Row) -> tuple[str, list[int], Any]:
        """Text and ids of a prompt, and the row's value without the answer at its end.

        Raises:
            ValueError: the row has no usable prompt; gives the reason.
        """
        if row.error:
            raise ValueError(row.error)
        value, text = row.value, row.value
        if self.corpus.chat:
            value = list(itertools.dropwhile(_is_answer, reversed(row.value)))[::-1]
            if not value:
                raise ChatError("all messages are the assistant's: the prompt is empty")
            text = render_prompt(self.tokenizer, value, row.tools)
        encoded = self.tokenizer(text, add_special_tokens=not self.corpus.chat)
        ids = list(encoded["input_ids"])
        if not ids:
            raise ValueError("the prompt is empty, and the tokenizer adds no token before it")
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise HydraError(
                f"{row.where}: token id {max(ids):,} is outside the model's vocabulary of "
                f"{self._vocabulary:,}: the tokenizer belongs to another model; give --tokenizer"
            )
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and len(ids) + self.settings.max_new_tokens > longest:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens; with --max-new-tokens "
                f"{self.settings.max_new_tokens:,} this exceeds the model's {longest:,}"
            )
        return text, ids, value

    # -- one batch ----------------------------------------------------------------------------------

    def _texts(self, number: int, batch: list[_Prompt]) -> Iterator[tuple[bytes, int, bool]]:
        """Yield for each prompt: its line, the number of generated tokens, and whether the model ended it."""
        for prompt, new in zip(batch, self._generate(number, batch), strict=True):
            end = next((i for i, token in enumerate(new) if token in self._ends), None)
            said = new if end is None else new[:end]
            completion = self._decode(prompt, said)
            body: dict[str, Any] = {
                "row": prompt.row,
                "sample": prompt.sample,
                "finished": end is not None,
            }
            if self.corpus.chat:
                answer = {"role": "assistant", "content": completion}
                body[self.corpus.column] = [*prompt.value, answer]
                if self.corpus.tools_column:
                    body[self.corpus.tools_column] = prompt.tools
            else:
                body[self.corpus.column] = prompt.text + completion
                body["prompt_characters"] = len(prompt.text)
            yield json.dumps(body, ensure_ascii=False).encode() + b"\n", len(said), end is not None

    def _decode(self, prompt: _Prompt, said: list[int]) -> str:
        """Decode the generated text after its prompt: some tokenizers drop a space at the start of a text."""
        before = self.tokenizer.decode(prompt.ids, skip_special_tokens=True)
        both = self.tokenizer.decode(prompt.ids + said, skip_special_tokens=True)
        if both.startswith(before):
            return both[len(before) :]
        return self.tokenizer.decode(said, skip_special_tokens=True)

    @torch.inference_mode()
    def _generate(self, number: int, batch: list[_Prompt]) -> list[list[int]]:
        """The generated tokens of each prompt, padded after an end token."""
        from transformers import GenerationConfig

        settings = self.settings
        width = max(len(prompt.ids) for prompt in batch)
        pad = self._ends[0] if self._ends else 0
        ids = torch.tensor([[pad] * (width - len(p.ids)) + p.ids for p in batch])
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in batch])
        random = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
        how = GenerationConfig(
            do_sample=settings.temperature > 0,
            **(random if settings.temperature > 0 else {}),
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=self._ends or None,
        )
        device = self.model.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_key(settings.seed, "batch", number) % 2**63)
            with convert_out_of_memory(
                lambda error: (
                    f"a batch of {len(batch)} texts does not fit into the GPU's memory: give a smaller "
                    f"--batch-size (with --force) or a smaller --max-new-tokens ({error})"
                )
            ):
                out = self.model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=how
                )
        return out[:, width:].tolist()


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _shard_name(output: Path, shard: tuple[int, int]) -> Path:
    index, count = shard
    if not 0 <= index < count:
        raise HydraError(f"--shard {index}/{count}: the first number must be 0..{count - 1}")
    if count == 1:
        return output
    return output.with_name(f"{output.stem}-{index:05d}-of-{count:05d}{output.suffix}")


def _batched(items: Iterator[_Prompt], size: int) -> Iterator[list[_Prompt]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
