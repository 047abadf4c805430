#!/usr/bin/env python3
"""How fast data is prepared and opened.

``tokenize``: Megatron-LM's ``tools/preprocess_data.py`` against ``data_prep/tokenize.py``, in
turns, with the same tokenizer, input and number of workers; whole commands are timed, imports
included, and the two outputs must be the same files. ``index``: time and memory to open a
ten-million-document pair and to get a first batch, each in a fresh process. ``waste``: padding of
every packing strategy on a log-normal corpus. ``stream``: batches per second.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
from megatron_hydra.data.indexed import IndexedDocuments, write_index
from megatron_hydra.data.packing import pack_documents
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.errors import HydraError, command

EXAMPLES = """\
examples:
  git -C Megatron-LM checkout core_v0.16.1; pip install six    # which its script imports
  python benchmarks/data.py tokenize --megatron-lm Megatron-LM --megabytes 60 --workers 1
  python benchmarks/data.py index --documents 10000000
  python benchmarks/data.py waste
  python benchmarks/data.py stream --length 4096
"""
ROOT = Path(__file__).resolve().parents[1]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_corpus(path: Path, megabytes: float) -> None:
    """JSONL of log-normal documents cut from the text of the installed Python packages."""
    folders = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    suffixes = (".py", ".md", ".rst", ".txt")
    files = (p for f in folders for p in sorted(Path(f).rglob("*")) if p.suffix in suffixes)
    rng = np.random.default_rng(0)
    left = int(megabytes * 1e6)
    with open(path, "w", encoding="utf-8") as stream:
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            start = 0
            while start < len(text) and left > 0:
                size = int(rng.lognormal(7.8, 1.0)) + 50
                piece, start = text[start : start + size], start + size
                if piece.strip():
                    left -= stream.write(json.dumps({"text": piece}) + "\n")
            if left <= 0:
                return
    raise HydraError(
        f"--megabytes {megabytes}: the installed packages hold less text; give --input"
    )


def make_tokenizer(corpus: Path, folder: Path, vocab_size: int = 32_000) -> None:
    """Train a byte-level BPE tokenizer with the pre-tokenizer and normaliser of Qwen3."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(corpus, encoding="utf-8") as stream:
        texts = (json.loads(line)["text"] for line in itertools.islice(stream, 0, None, 4))
        tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


def timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(
        arguments, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise HydraError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench_tokenize(args: argparse.Namespace) -> None:
    """Both commands, in turns."""
    theirs_script = Path(args.megatron_lm) / "tools" / "preprocess_data.py"
    if not theirs_script.exists():
        raise HydraError(f"--megatron-lm: {theirs_script} does not exist")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, tokenizer = args.input, args.tokenizer
        if corpus is None:
            corpus = str(folder / "corpus.jsonl")
            make_corpus(Path(corpus), args.megabytes)
        if tokenizer is None:
            tokenizer = str(folder / "tokenizer")
            make_tokenizer(Path(corpus), Path(tokenizer))
        ours = [sys.executable, str(ROOT / "data_prep" / "tokenize.py"), "--input", corpus]
        ours += ["--tokenizer", tokenizer, "--output", str(folder / "ours"), "--force"]
        ours += ["--workers", str(args.workers), "--keep-empty"]
        theirs = [sys.executable, str(theirs_script), "--input", corpus, "--append-eod"]
        theirs += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
        theirs += ["--output-prefix", str(folder / "theirs"), "--workers", str(args.workers)]
        path = os.pathsep.join(filter(None, [args.megatron_lm, os.environ.get("PYTHONPATH")]))
        ratios = []
        for repeat in range(args.repeats):
            slow, slow_cpu = timed(theirs, {"PYTHONPATH": path})
            fast, fast_cpu = timed(ours, {})
            tokens = IndexedDocuments(str(folder / "ours")).num_tokens
            for suffix in (".bin", ".idx"):
                pair = folder / f"ours{suffix}", folder / f"theirs_text_document{suffix}"
                if not filecmp.cmp(*pair, shallow=False):
                    raise HydraError(f"the two {suffix} files differ")
            ratios.append(slow / fast)
            print(
                f"run {repeat}: {tokens:,} tokens, {args.workers} workers; Megatron-LM "
                f"{tokens / slow:,.0f} tokens/s ({slow:.1f} s, CPU {slow_cpu:.1f} s), ours "
                f"{tokens / fast:,.0f} tokens/s ({fast:.1f} s, CPU {fast_cpu:.1f} s): "
                f"{slow / fast:.2f}x wall, {slow_cpu / fast_cpu:.2f}x CPU; same files",
                flush=True,
            )
        print(f"median {statistics.median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})")


OPEN = """\
import sys, time, torch, megatron.core.datasets.indexed_dataset, resource
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.config.run import *
def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() / 2**20
before = resident()
begin = time.perf_counter()
documents = IndexedDocuments(sys.argv[1])
opened = time.perf_counter() - begin
memory = resident() - before
begin = time.perf_counter()
blend = (SourceConfig(path=sys.argv[1]),)
data = DataConfig(blend=blend, sequence_length=4096, packing="split_long")
stream = PackedStream(data, BatchConfig(1, 8), dp_rank=0, dp_size=1, vocab_size=65536)
stream.micro_batches(0)
first = time.perf_counter() - begin
print(f"open {opened:.3f} s, {memory:.1f} MB more resident; first batch {first:.3f} s after that, "
      f"{resident() - before:.1f} MB more resident in all, {resident():.0f} MB with the libraries")
"""


def bench_index(args: argparse.Namespace) -> None:
    """A large pair: building its packing, opening it, the first batch."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(args.median), 1.0, args.documents), 1).astype(
        np.int64
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        prefix = str(Path(name) / "large")
        with open(prefix + ".bin", "wb") as stream:
            left = int(lengths.sum())
            while left:
                size = min(left, 1 << 24)
                stream.write(rng.integers(0, 50_000, size, dtype=np.uint16).tobytes())
                left -= size
        write_index(prefix + ".idx", np.uint16, lengths, np.arange(len(lengths) + 1))
        print(f"{args.documents:,} documents, {lengths.sum():,} tokens", flush=True)
        pack = [sys.executable, str(ROOT / "data_prep" / "pack.py"), "--input", prefix]
        seconds, _ = timed([*pack, "--packing", "split_long"], {})
        print(f"packing index built in {seconds:.1f} s (once, start of the process included)")
        for _ in range(args.repeats):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", OPEN, prefix],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise HydraError(done.stderr[-2000:])
            print(done.stdout.strip(), flush=True)


def bench_waste(args: argparse.Namespace) -> None:
    """Padding and cut documents, by strategy and sequence length."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(args.median), args.sigma, args.documents).astype(np.int64) + 1
    print(
        f"{args.documents:,} documents, {drawn.sum():,} tokens: log-normal, median "
        f"{np.median(drawn):,.0f}, mean {drawn.mean():,.0f}, longest {drawn.max():,}"
    )
    for size in args.lengths:
        whole = drawn[drawn <= size]
        for packing in ("best_fit", "split_long", "concat_chunk"):
            lengths = whole if packing == "best_fit" else drawn
            offsets = np.cumsum(lengths) - lengths
            begin = time.perf_counter()
            packs = pack_documents(offsets, lengths, size, packing, 0, "corpus")
            seconds = time.perf_counter() - begin
            ends = packs.offsets + packs.lengths
            cut = (~np.isin(ends, offsets + lengths)).sum()
            print(
                f"{size:>7,} {packing:<12} {packs.waste():8.4%} padding, {cut:>9,} cuts inside "
                f"documents, {len(packs):>9,} packs, {seconds:.2f} s",
                flush=True,
            )


def bench_stream(args: argparse.Namespace) -> None:
    """Batches from text and from generated tasks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder / "corpus.jsonl", 8)
        make_tokenizer(folder / "corpus.jsonl", folder / "tokenizer", 8_000)
        rng = np.random.default_rng(0)
        lengths = np.minimum(rng.lognormal(6.4, 1.0, 20_000), 4096).astype(np.int64) + 1
        rng.integers(0, 8000, lengths.sum(), dtype=np.uint16).tofile(folder / "text.bin")
        write_index(str(folder / "text.idx"), np.uint16, lengths, np.arange(len(lengths) + 1))
        shutil.rmtree(folder / ".packs", ignore_errors=True)
        parts = {"indexed": SourceConfig(path=str(folder / "text"))}
        for task in ("needles", "multi_key", "variable_tracking", "word_extraction"):
            parts[task] = SourceConfig(kind="synthetic", task=task)
        for label, part in parts.items():
            data = DataConfig(
                blend=(part,),
                sequence_length=args.length,
                packing="split_long",
                tokenizer=str(folder / "tokenizer") if part.task else "",
            )
            stream = PackedStream(data, BatchConfig(1, 1), dp_rank=0, dp_size=1, vocab_size=8_001)
            stream.micro_batches(0)
            begin = time.perf_counter()
            for step in range(args.steps):
                stream.micro_batches(step)
            each = (time.perf_counter() - begin) / args.steps
            rate = args.length / each
            print(
                f"{label}: {1000 * each:.2f} ms per {args.length:,} tokens ({rate:,.0f} tokens/s)"
            )


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    tokenize = verbs.add_parser("tokenize", help="against Megatron-LM's script")
    tokenize.add_argument("--megatron-lm", required=True, help="checkout of Megatron-LM")
    tokenize.add_argument("--input", help="JSONL with a field text; default: generated")
    tokenize.add_argument("--tokenizer", help="HF tokenizer; default: trained on the input")
    tokenize.add_argument("--megabytes", type=float, default=60, help="of a generated input")
    tokenize.add_argument("--workers", type=int, default=1)
    tokenize.add_argument("--repeats", type=int, default=3)
    tokenize.set_defaults(run=bench_tokenize)
    index = verbs.add_parser("index", help="opening ten million documents")
    index.add_argument("--documents", type=int, default=10_000_000)
    index.add_argument("--median", type=int, default=60, help="tokens per document")
    index.add_argument("--folder", help="where the pair is written; default: temporary folder")
    index.add_argument("--repeats", type=int, default=3)
    index.set_defaults(run=bench_index)
    waste = verbs.add_parser("waste", help="padding of every packing strategy")
    waste.add_argument("--documents", type=int, default=1_000_000)
    waste.add_argument("--median", type=float, default=600, help="tokens of a document")
    waste.add_argument("--sigma", type=float, default=1.2, help="of the logarithm")
    waste.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 32_768, 65_536, 524_288]
    )
    waste.set_defaults(run=bench_waste)
    stream = verbs.add_parser("stream", help="batches per second")
    stream.add_argument("--steps", type=int, default=200)
    stream.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    stream.set_defaults(run=bench_stream)
    args = parser.parse_args(arguments)
    args.run(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
