#!/usr/bin/env python3
"""Speed of preparing and opening data.

``tokenize``: Megatron-LM's ``tools/preprocess_data.py`` against ``data_prep/tokenize.py``, in turns, with the
same tokenizer, input and number of workers. Whole commands are timed with imports, and both outputs must be
equal. ``index``: opening a pair of ten million documents with our reader and with Megatron-Core's, and our
first batch, each in a new process. ``waste``: time, padding and cuts of every packing strategy on a log-normal
corpus, against cutting every S tokens. ``stream``: batches of text and of generated tasks. ``memory``: peak
memory of ``data_prep/tokenize.py`` (main process and a worker) by size of the corpus. ``shards``: opening a
blend of so many pairs for the first and the second time, resuming it, and merging the pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import _harness as harness
from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
from megatron_hydra.data.indexed import IndexedDocuments, write_index
from megatron_hydra.data.manifest import Manifest, file_record
from megatron_hydra.data.merging import merge
from megatron_hydra.data.packing import pack_documents
from megatron_hydra.data.parts import Counts
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.errors import HydraError, command

EXAMPLE = """\
git -C Megatron-LM checkout core_v0.16.1; pip install six    # which its script imports
  python -m benchmarks.data tokenize --megatron-lm Megatron-LM --sizes 60 --workers 1
  python -m benchmarks.data index --sizes 10000000
  python -m benchmarks.data waste --sizes 2K,4K,32K
  python -m benchmarks.data stream --sizes 4K --steps 100
  python -m benchmarks.data memory --sizes 30,120,480 --tokenizer models/Qwen3-1.7B --input corpus.jsonl
  python -m benchmarks.data shards --sizes 100,1000"""
ROOT = Path(__file__).resolve().parents[1]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_corpus(path: Path, megabytes: float) -> None:
    """Write JSONL of log-normal documents, cut from the text of the installed Python packages."""
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


def timed(arguments: list[str], environment: dict[str, str], sample: harness.Sample) -> None:
    """Add wall seconds, and CPU seconds of a command and its children, to a sample."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    run_command(arguments, environment)
    sample.wall.append(time.perf_counter() - begin)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    sample.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def run_command(arguments: list[str], environment: dict[str, str] | None = None) -> str:
    """The output of a command.

    Raises:
        HydraError: the command failed.
    """
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode:
        raise HydraError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def bench_tokenize(args: argparse.Namespace, report: harness.Report) -> None:
    """Run both commands in turns, for every size of a generated input or for ``--input``."""
    script = Path(args.megatron_lm or "") / "tools" / "preprocess_data.py"
    if not args.megatron_lm or not script.exists():
        raise HydraError(f"--megatron-lm: {script} does not exist; give a checkout of Megatron-LM")
    sizes = args.sizes if args.input is None else [round(Path(args.input).stat().st_size / 1e6)]
    for megabytes in sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            corpus, tokenizer = args.input, args.tokenizer
            if corpus is None:
                corpus = str(folder / "corpus.jsonl")
                make_corpus(Path(corpus), megabytes)
            if tokenizer is None:
                tokenizer = str(folder / "tokenizer")
                make_tokenizer(Path(corpus), Path(tokenizer))
            samples = time_tokenizers(folder, corpus, tokenizer, args)
            tokens = IndexedDocuments(str(folder / "ours")).num_tokens
            report.add(megabytes, samples, tokens=tokens, workers=args.workers)
            rates = ", ".join(f"{n} {tokens / s.median:,.0f}" for n, s in samples.items())
            report.note(f"{tokens:,} tokens, {args.workers} workers; tokens/s: {rates}; same files")


def time_tokenizers(
    folder: Path, corpus: str, tokenizer: str, args: argparse.Namespace
) -> dict[str, harness.Sample]:
    """Timings of both whole commands.

    Raises:
        HydraError: one failed, or they wrote different files.
    """
    ours = [sys.executable, str(ROOT / "data_prep" / "tokenize.py"), "--input", corpus]
    ours += ["--tokenizer", tokenizer, "--output", str(folder / "ours"), "--force"]
    ours += ["--workers", str(args.workers), "--keep-empty"]
    script = Path(args.megatron_lm) / "tools" / "preprocess_data.py"
    theirs = [sys.executable, str(script), "--input", corpus, "--append-eod"]
    theirs += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    theirs += ["--output-prefix", str(folder / "theirs"), "--workers", str(args.workers)]
    path = os.pathsep.join(filter(None, [args.megatron_lm, os.environ.get("PYTHONPATH")]))
    samples = {"Megatron-LM": harness.Sample(), "ours": harness.Sample()}
    for _ in range(args.repeats):
        timed(theirs, {"PYTHONPATH": path}, samples["Megatron-LM"])
        timed(ours, {}, samples["ours"])
        for suffix in (".bin", ".idx"):
            pair = folder / f"ours{suffix}", folder / f"theirs_text_document{suffix}"
            if not filecmp.cmp(*pair, shallow=False):
                raise HydraError(f"the two {suffix} files differ")
    return samples


OPEN = """\
import json, resource, sys, time, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
reader, path = sys.argv[1:]
def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()
def first_batch(step=0):
    data = DataConfig(blend=(SourceConfig(path=path),), sequence_length=4096, packing="split_long")
    stream = PackedStream(data, BatchConfig(1, 8), dp_rank=0, dp_size=1, vocab_size=65536)
    return stream, stream.micro_batches(step)
def counted():
    stream, _ = first_batch()
    begin = time.perf_counter()
    return stream.sources[0].content(1, 1_000_001), time.perf_counter() - begin
work = {"ours": lambda: IndexedDocuments(path), "Megatron-Core": lambda: IndexedDataset(path),
        "ours, first batch": first_batch, "ours, batch of step 1,000,000": lambda: first_batch(10**6),
        "ours, counting a million sequences": counted}[reader]
before, begin, cpu = resident(), time.perf_counter(), time.process_time()
kept = work()
print(json.dumps([time.perf_counter() - begin, time.process_time() - cpu, resident() - before]))
"""
READERS = (
    "Megatron-Core", "ours", "ours, first batch", "ours, batch of step 1,000,000",
    "ours, counting a million sequences",
)  # fmt: skip


def bench_index(args: argparse.Namespace, report: harness.Report) -> None:
    """A large pair: time building its packing, opening it, and the first batch."""
    for documents in [args.documents] if args.documents else args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            prefix = str(Path(name) / "large")
            tokens = write_random_pair(prefix, documents, args)
            pack = [sys.executable, str(ROOT / "data_prep" / "pack.py"), "--input", prefix]
            packing = harness.Sample()
            most = watch([*pack, "--packing", "split_long"], packing)["main"]
            report.add(documents, {"packing, once, whole command": packing}, tokens=tokens)
            report.note(
                f"packing: {most / 1e6:,.0f} MB resident, {most / documents:,.0f} bytes a document"
            )
            samples = {reader: harness.Sample() for reader in READERS}
            resident: dict[str, list[int]] = {reader: [] for reader in READERS}
            for _ in range(args.repeats):
                for reader, sample in samples.items():
                    command_line = [sys.executable, "-W", "ignore", "-c", OPEN, reader, prefix]
                    answer = json.loads(run_command(command_line).splitlines()[-1])
                    sample.wall.append(answer[0])
                    sample.cpu.append(answer[1])
                    resident[reader].append(answer[2])
            report.add(documents, samples, tokens=tokens)
            for reader, grown in resident.items():
                low, high = min(grown) / 1e6, max(grown) / 1e6
                report.note(f"{reader}: {low:.1f} to {high:.1f} MB more resident")


def write_random_pair(prefix: str, documents: int, args: argparse.Namespace) -> int:
    """Write log-normal documents of random tokens as ``.bin`` and ``.idx``; returns the number of tokens."""
    rng = np.random.default_rng(args.seed)
    drawn = rng.lognormal(np.log(args.median or 60), 1.0, documents)
    lengths = np.maximum(drawn, 1).astype(np.int64)
    left = int(lengths.sum())
    with open(prefix + ".bin", "wb") as stream:
        while left:
            size = min(left, 1 << 24)
            stream.write(rng.integers(0, 50_000, size, dtype=np.uint16).tobytes())
            left -= size
    write_index(prefix + ".idx", np.uint16, lengths, np.arange(len(lengths) + 1))
    return int(lengths.sum())


STRATEGIES = ("concat_chunk", "best_fit", "split_long")


def bench_waste(args: argparse.Namespace, report: harness.Report) -> None:
    """Time, padding and cut documents, by strategy and sequence length."""
    rng = np.random.default_rng(args.seed)
    documents = args.documents or 1_000_000
    drawn = rng.lognormal(np.log(args.median or 600), args.sigma, documents).astype(np.int64) + 1
    report.note(
        f"{documents:,} documents, {drawn.sum():,} tokens: log-normal, median "
        f"{np.median(drawn):,.0f}, mean {drawn.mean():,.0f}, longest {drawn.max():,}"
    )
    for size in args.sizes:
        peers, corpora = {}, {}
        for packing in STRATEGIES:
            lengths = drawn[drawn <= size] if packing == "best_fit" else drawn
            corpora[packing] = np.cumsum(lengths) - lengths, lengths
            peers[packing] = functools.partial(
                pack_documents, *corpora[packing], size, packing, args.seed, "corpus"
            )
        report.measure(size, peers, memory=False)
        for packing, (offsets, lengths) in corpora.items():
            packs = peers[packing]()
            cut = int((~np.isin(packs.offsets + packs.lengths, offsets + lengths)).sum())
            report.note(
                f"{size:>7,} {packing:<12} {packs.waste():8.4%} padding, {cut:>9,} cuts inside "
                f"documents, {len(packs):>9,} packs"
            )


TASKS = ("needles", "multi_key", "variable_tracking", "word_extraction")


def bench_stream(args: argparse.Namespace, report: harness.Report) -> None:
    """Batches from text and from generated tasks."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_corpus(folder / "corpus.jsonl", args.corpus_megabytes)
        make_tokenizer(folder / "corpus.jsonl", folder / "tokenizer", 8_000)
        rng = np.random.default_rng(args.seed)
        lengths = np.minimum(rng.lognormal(6.4, 1.0, 20_000), 4096).astype(np.int64) + 1
        rng.integers(0, 8000, lengths.sum(), dtype=np.uint16).tofile(folder / "text.bin")
        write_index(str(folder / "text.idx"), np.uint16, lengths, np.arange(len(lengths) + 1))
        for size in args.sizes:
            samples = report.measure(size, stream_peers(folder, size), memory=False)
            for part, sample in samples.items():
                report.note(f"{part}: {size / sample.median:,.0f} tokens/s")


def stream_peers(folder: Path, length: int) -> dict[str, harness.Peer]:
    """By kind of data: a function that returns the next batch of one sequence."""
    parts = {"text from disk": SourceConfig(path=str(folder / "text"))}
    parts |= {task: SourceConfig(kind="synthetic", task=task) for task in TASKS}

    def peer(part: SourceConfig) -> harness.Peer:
        data = DataConfig(
            blend=(part,),
            sequence_length=length,
            packing="split_long",
            tokenizer=str(folder / "tokenizer") if part.task else "",
        )
        stream = PackedStream(data, BatchConfig(1, 1), dp_rank=0, dp_size=1, vocab_size=8_001)
        steps = itertools.count()
        return lambda: stream.micro_batches(next(steps))

    return {label: peer(part) for label, part in parts.items()}


def bench_memory(args: argparse.Namespace, report: harness.Report) -> None:
    """Run the command on more and more of one corpus: peak resident size of each process."""
    for megabytes in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            corpus, tokenizer = folder / "corpus.jsonl", args.tokenizer
            if args.input is None:
                make_corpus(corpus, megabytes)
            else:
                copy_head(Path(args.input), corpus, megabytes)
            if tokenizer is None:
                tokenizer = str(folder / "tokenizer")
                make_tokenizer(corpus, Path(tokenizer))
            command_line = [
                sys.executable,
                str(ROOT / "data_prep" / "tokenize.py"),
                "--input",
                str(corpus),
            ]
            command_line += ["--tokenizer", tokenizer, "--output", str(folder / "out")]
            command_line += ["--workers", str(args.workers), "--max-bad-rows", "1000000"]
            sample = harness.Sample()
            most = watch(command_line, sample)
            tokens = IndexedDocuments(str(folder / "out")).num_tokens
            report.add(megabytes, {"whole command": sample}, tokens=tokens, most=most)
            shown = ", ".join(f"{kind} {size / 1e6:,.0f} MB" for kind, size in most.items())
            report.note(
                f"{megabytes:,} MB, {tokens:,} tokens: {shown} resident; "
                f"{tokens / sample.cpu[0]:,.0f} tokens a CPU-second of the whole command"
            )


def copy_head(source: Path, target: Path, megabytes: float) -> None:
    """The first lines of a file, up to a size."""
    left = megabytes * 1e6
    with open(source, "rb") as reading, open(target, "wb") as writing:
        for line in reading:
            left -= writing.write(line)
            if left <= 0:
                return
    raise HydraError(f"{source} holds less than {megabytes} MB; give smaller --sizes")


def watch(command_line: list[str], sample: harness.Sample) -> dict[str, int]:
    """Run and time a command; returns the peak resident size of its main process and of a child, in bytes."""
    most = {"main": 0, "worker": 0}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command_line, stdout=output, stderr=output)
        while process.poll() is None:
            for kind, pids in (("main", [process.pid]), ("worker", children_of(process.pid))):
                most[kind] = max([most[kind], *map(highest_resident, pids)])
            time.sleep(0.1)
        if process.returncode:
            output.seek(0)
            raise HydraError(f"{' '.join(command_line)} failed:\n{output.read()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    sample.wall.append(time.perf_counter() - begin)
    sample.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return most


def children_of(pid: int) -> list[int]:
    """Child processes, from /proc; none if the process has just ended."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def highest_resident(pid: int) -> int:
    """``VmHWM`` of a process in bytes; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(n.split()[1]) * 1024 for n in lines if n.startswith("VmHWM:")), 0)


def bench_shards(args: argparse.Namespace, report: harness.Report) -> None:
    """Time a blend of many small pairs."""
    for count in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            prefixes = write_shards(Path(name), count, args.seed)
            blend = tuple(SourceConfig(path=prefix) for prefix in prefixes)
            data = DataConfig(blend=blend, sequence_length=4096, packing="split_long")
            other = dataclasses.replace(data, blend=blend[1:], phase=2)

            def opened(data: DataConfig = data) -> PackedStream:
                return PackedStream(
                    data, BatchConfig(1, 8), dp_rank=0, dp_size=1, vocab_size=50_000
                )

            steps: dict[str, Callable[[], object]] = {
                "open the pairs": functools.partial(open_pairs, prefixes),
                "open the blend, packing": opened,
                "open the blend": opened,
                "merge": functools.partial(merge, prefixes, f"{name}/all", force=True),
            }
            samples = {label: harness.Sample() for label in steps}
            for label, step in steps.items():
                time_once(step, samples[label])
            state = opened().state(1000)
            for label, config in (("resume", data), ("resume without one", other)):
                stream = opened(config)
                samples[label] = harness.Sample()
                time_once(functools.partial(stream.check_state, state), samples[label])
            report.add(count, samples)
            shown = ", ".join(f"{label} {sample.cpu[0]:.2f}" for label, sample in samples.items())
            report.note(f"{count:,} pairs, CPU seconds: {shown}")


def open_pairs(prefixes: list[str]) -> list[IndexedDocuments]:
    """Time all pairs of one size."""
    return [IndexedDocuments(prefix) for prefix in prefixes]


def time_once(step: Callable[[], object], sample: harness.Sample) -> None:
    """Add the wall and CPU seconds of one call."""
    begin, cpu = time.perf_counter(), time.process_time()
    step()
    sample.wall.append(time.perf_counter() - begin)
    sample.cpu.append(time.process_time() - cpu)


def write_shards(folder: Path, count: int, seed: int) -> list[str]:
    """Pairs of 300 random documents with manifests."""
    rng, prefixes = np.random.default_rng(seed), []
    for number in range(count):
        prefix = str(folder / f"shard-{number:05d}")
        lengths = rng.integers(50, 2000, 300)
        rng.integers(0, 50_000, int(lengths.sum()), dtype=np.uint16).tofile(prefix + ".bin")
        write_index(prefix + ".idx", np.uint16, lengths, np.arange(len(lengths) + 1))
        counts = Counts(
            rows=300, documents=300, sequences=300, tokens=int(lengths.sum()), max_token_id=49_999,
            longest_document=int(lengths.max()),
        )  # fmt: skip
        tokenizer = {"name": "none", "fingerprint": "none", "vocab_size": 50_000, "eod_id": 0}
        records = file_record(prefix + ".bin"), file_record(prefix + ".idx")
        Manifest({}, tokenizer, dataclasses.asdict(counts), "all", *records).save(prefix + ".json")
        prefixes.append(prefix)
    return prefixes


SUBJECTS = {
    "tokenize": (bench_tokenize, {"speed-up of ours over Megatron-LM": ("Megatron-LM", "ours")},
                 "megabytes", "60", 3),
    "index": (bench_index, {"time to open of ours / Megatron-Core": ("ours", "Megatron-Core")},
              "documents", "10000000", 3),
    "waste": (bench_waste,
              {f"time of {s} / concat_chunk": (s, "concat_chunk") for s in STRATEGIES[1:]},
              "tokens of a sequence", "2K,4K,32K,64K,512K", 3),
    "stream": (bench_stream, {f"time of {t} / text": (t, "text from disk") for t in TASKS},
               "tokens of a sequence", "4K", 200),
    "memory": (bench_memory, {}, "megabytes", "8,32,128", 1),
    "shards": (bench_shards,
               {"time to open again / with packing": ("open the blend", "open the blend, packing")},
               "pairs", "100,1000", 1),
}  # fmt: skip
"""Name -> function, ratios, meaning of a size, default sizes, default rounds."""


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__, EXAMPLE)
    parser.add_argument("subject", choices=SUBJECTS, help="what to measure")
    defaults = "; ".join(
        f"{name}: {what}, {sizes}" for name, (*_, what, sizes, _) in SUBJECTS.items()
    )
    parser.add_argument("--sizes", "--length", "--lengths", "--megabytes", type=harness.sizes_of,
                        help=f"comma-separated, K for 1024 (defaults: {defaults})")  # fmt: skip
    parser.add_argument("--steps", dest="repeats", type=int, help="same as --repeats")
    parser.add_argument("--folder", help="where files are written; default: a temporary folder")
    tokenize = parser.add_argument_group("tokenize, memory")
    tokenize.add_argument("--megatron-lm", help="checkout of Megatron-LM")
    tokenize.add_argument("--input", help="JSONL with a field text; default: generated")
    tokenize.add_argument("--tokenizer", help="HF tokenizer; default: trained on the input")
    tokenize.add_argument("--workers", type=int, default=1)
    corpora = parser.add_argument_group("index, waste, stream")
    corpora.add_argument("--documents", type=int,
                         help="waste: of the corpus (default 1000000); index: same as --sizes")  # fmt: skip
    corpora.add_argument("--median", type=float,
                         help="tokens of a document (default: index 60, waste 600)")  # fmt: skip
    corpora.add_argument("--sigma", type=float, default=1.2, help="waste: of the logarithm")
    corpora.add_argument("--corpus-megabytes", type=float, default=8,
                         help="stream: text that its tokenizer is trained on")  # fmt: skip
    parser.set_defaults(repeats=None, warmup=1)
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    device = harness.cpu_only(args, "data")
    measure, ratios, what, sizes, repeats = SUBJECTS[args.subject]
    args.sizes = args.sizes or harness.sizes_of(sizes)
    args.repeats = args.repeats or repeats
    report = harness.Report(f"data_{args.subject}", args, device, ratios, unit=what)
    measure(args, report)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
