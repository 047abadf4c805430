#!/usr/bin/env python3
"""Compare our RULER tasks with NVIDIA's: generators and scorer, property by property.

    git clone https://github.com/NVIDIA/RULER peers/RULER
    pip install --target peers/site wonderwords tenacity scipy
    python benchmarks/ruler_peer.py --ruler peers/RULER --site peers/site

It runs NVIDIA/RULER's generators (every task of its ``synthetic.yaml``) in processes of their own, on the same
tokenizer and the same documents. It compares what does not depend on the seed: number of needles, form of
answers and keys, the wording around them, repetitions of words, and the length. RULER downloads its essays and
question files; here both sides get text and questions made offline. RULER's sentence splitter (nltk's, which
also needs a download) is replaced by one at full stops. Then both scorers score the same predictions. The exit
status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_hydra.arguments import command_parser, path_argument
from megatron_hydra.data.text import distinct_names, text_sentence
from megatron_hydra.errors import HydraError, command
from megatron_hydra.evaluation.finding import load_task
from megatron_hydra.evaluation.scoring import text_score
from megatron_hydra.evaluation.tasks import GenerationSample, SampleRequest

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
SEED = 7


@dataclasses.dataclass(frozen=True)
class Made:
    """One sample of either side: the whole prompt, its answers, and the number of tokens that may follow."""

    prompt: str
    answers: tuple[str, ...]
    new_tokens: int


# -- inputs of both sides --------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Essays and question files in RULER's forms, made offline."""
    rng = random.Random(SEED)
    sentences = [text_sentence(rng) for _ in range(4000)]
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": " ".join(sentences)}))
    names = distinct_names(rng, 120)
    articles, hotpot = [], []
    for number in range(20):
        paragraphs = []
        for name in names[6 * number : 6 * number + 6]:
            color = rng.choice(["red", "green", "blue", "white"])
            context = " ".join(text_sentence(rng) for _ in range(6))
            context += f" The ship {name} was painted {color}."
            question = f"Which color was the ship {name} painted?"
            answers = [{"text": color}, {"text": f"{color} paint"}]
            qas = [{"question": question, "answers": answers, "is_impossible": False}]
            qas.append({"question": "Unknown?", "answers": [], "is_impossible": True})
            paragraphs.append({"context": context, "qas": qas})
            pieces = [[name, [context]], [f"{name} II", [text_sentence(rng)]]]
            hotpot.append({"question": question, "answer": color, "context": pieces})
        articles.append({"paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    words = [f"{a}{b}{c}" for a in "bdfklm" for b in "aeiou" for c in ("lor", "nat", "rim", "sol")]
    (folder / "english_words.json").write_text(
        json.dumps({i: f"{a}{b}" for i, (a, b) in enumerate((a, b) for a in words for b in words)})
    )


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 2048 tokens on made-up text, digits split, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(SEED)
    core = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)]
    split.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text_sentence(rng) for _ in range(3000)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)


# -- the peer --------------------------------------------------------------------------------------


class Peer:
    """RULER's scripts in a temporary folder, with the files that they would download."""

    def __init__(self, checkout: Path, site: str, scratch: Path) -> None:
        if not (checkout / "scripts" / "synthetic.yaml").is_file():
            raise HydraError(f"--ruler {checkout} is no checkout of NVIDIA/RULER")
        shutil.copytree(checkout / "scripts", scratch / "scripts")
        self.scripts = scratch / "scripts"
        self.data = self.scripts / "data" / "synthetic"
        write_data(self.data / "json")
        # A script's own folder comes first on its path: this stands in for nltk.
        (self.data / "nltk").mkdir()
        (self.data / "nltk" / "__init__.py").write_text("")
        (self.data / "nltk" / "tokenize.py").write_text(
            "import re\n\n\ndef sent_tokenize(text):\n"
            "    return [s for s in re.split(r'(?<=[.!?])\\s+', text) if s]\n"
        )
        self.environment = os.environ | {"PYTHONPATH": site, "HF_HUB_OFFLINE": "1"}
        self.tasks: dict[str, Any] = yaml.safe_load((self.scripts / "synthetic.yaml").read_text())
        self.constants = _load(self.data / "constants.py").TASKS
        self.metrics = _load(self.scripts / "eval" / "synthetic" / "constants.py").TASKS

    def samples(self, task: str, length: int, count: int, tokenizer: Path) -> list[Made]:
        """The samples that RULER's generator writes."""
        facts = self.tasks[task]
        base = self.constants[facts["task"]]
        out = self.scripts / "out" / str(length)
        words = [f"--{key}={value}" for key, value in facts["args"].items()]
        done = subprocess.run(
            [
                sys.executable,
                str(self.data / f"{facts['task']}.py"),
                f"--save_dir={out}",
                f"--save_name={task}",
                f"--tokenizer_path={tokenizer}",
                "--tokenizer_type=hf",
                f"--max_seq_length={length}",
                f"--tokens_to_generate={base['tokens_to_generate']}",
                f"--num_samples={count}",
                f"--template={base['template']}{base['answer_prefix']}",
                *words,
                *(["--pre_samples=0"] if facts["task"] == "qa" else []),
            ],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise HydraError(f"RULER's generator of {task} failed:\n{done.stderr[-2000:]}")
        lines = (out / task / "validation.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [
            Made(r["input"] + r["answer_prefix"], tuple(r["outputs"]), base["tokens_to_generate"])
            for r in rows
        ]


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"ruler_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_samples(
    task: str, length: int, count: int, tokenizer: Any, peer: Peer
) -> tuple[list[Made], list[GenerationSample]]:
    """The samples of our task, on the same documents."""
    files = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}
    made = load_task(f"qa:{peer.data / 'json' / files[task]}" if task in files else task)
    request = SampleRequest(
        length=length, count=count, seed=SEED, depths=(0.5,), tokenizer=tokenizer, lengths=(length,)
    )
    samples: list[GenerationSample] = list(made.samples(request))  # type: ignore[arg-type]
    found = [Made(str(s.prompt), tuple(map(str, s.answers)), s.max_new_tokens) for s in samples]
    return found, samples


# -- properties ------------------------------------------------------------------------------------


def _shape(words: list[str]) -> str:
    """The form of a value: a number of n digits, a UUID, two joined words, or its letters."""
    kinds = set()
    for word in words:
        if re.fullmatch(UUID, word):
            kinds.add("uuid")
        elif word.isdecimal():
            kinds.add(f"{len(word)} digits")
        elif re.fullmatch(r"[A-Za-z' .]+(-[A-Za-z' .]+)+", word):
            kinds.add("words joined by -")
        elif word.isupper():
            kinds.add(f"{len(word)} capitals")
        else:
            kinds.add("words")
    return ", ".join(sorted(kinds))


def niah(made: Made) -> dict[str, Any]:
    """Needles, keys, values, wording."""
    head, _, rest = made.prompt.partition("\n")
    context, _, question = rest.rpartition("\nWhat ")
    facts = re.findall(r"special magic (\w+) for (.+?) is: (\S+?)\.", context)
    asked = re.search(r"for (.+?) mentioned", question)
    assert asked is not None
    keys = re.split(r", and |, ", asked[1])
    others = [fact for fact in facts if fact[1] not in keys]
    wanted = {value for _, key, value in facts if key in keys}
    lines = context.split("\n")
    many_lines = len(lines) > 1 and all(line.startswith("One of the special") for line in lines)
    return {
        "needles asked for": len(facts) - len(others),
        "other needles": "all lines" if many_lines else len(others),
        "keys asked for": len(keys),
        "answers": len(made.answers),
        "answers are the values": wanted == set(made.answers),
        "key": _shape([key for _, key, _ in facts]),
        "value": _shape([value for _, _, value in facts]),
        "wording": f"{head} | {question.replace(asked[1], '<keys>')}",
    }


def variable_tracking(made: Made) -> dict[str, Any]:
    """Assignments of example and question."""
    parts = made.prompt.split("Memorize and track")[1:]
    found: dict[str, Any] = {"questions (example first)": len(parts)}
    for name, part in zip(("example", "question"), parts[-2:], strict=True):
        right = re.findall(r"VAR ([A-Z]+) = (VAR [A-Z]+|\d+)", part)
        found[f"{name}: assignments"] = len(right)
        found[f"{name}: variable"] = _shape([left for left, _ in right])
        found[f"{name}: from a number"] = sum(value.isdecimal() for _, value in right)
        found[f"{name}: number"] = _shape([value for _, value in right if value.isdecimal()])
    listed = re.search(r"they are:\s+(.*?)\n", parts[0])
    found["example: variables listed"] = len(listed[1].split()) if listed else 0
    found["answers"] = len(made.answers)
    assigned = {left for left, _ in re.findall(r"VAR ([A-Z]+) = (VAR [A-Z]+|\d+)", parts[-1])}
    found["answers are the variables"] = assigned == set(made.answers)
    question = parts[-1].rpartition("\nQuestion:")[2]
    found["wording"] = re.sub(r"\d{5}", "<n>", question).rstrip()
    return found


def common_words(made: Made) -> dict[str, Any]:
    """How often words are repeated in example and question."""
    parts = made.prompt.split("Below is a numbered list")[1:]
    found: dict[str, Any] = {"questions (example first)": len(parts)}
    for name, part in zip(("example", "question"), parts[-2:], strict=True):
        listed = part.partition("\n")[2].partition("\nQuestion:")[0]
        counts = collections.Counter(re.split(r"\s*\d+\. ", listed)[1:])
        repeats = sorted(set(counts.values()), reverse=True)
        found[f"{name}: repeats"] = repeats
        found[f"{name}: most repeated"] = sum(n == repeats[0] for n in counts.values())
        if name == "question":
            top = {word for word, n in counts.items() if n == repeats[0]}
            found["answers are the most repeated"] = top == set(made.answers)
    found["answers"] = len(made.answers)
    found["wording"] = parts[-1].rpartition("\nQuestion:")[2]
    return found


def frequent_words(made: Made) -> dict[str, Any]:
    """Letters of the coded words, and the order of their counts."""
    head, _, rest = made.prompt.partition("frequently appeared coded words. ")
    text, _, question = rest.rpartition("\nQuestion:")
    counts = collections.Counter(text.split())
    noise = counts.pop("...", 0)
    order = [n for _, n in counts.most_common(4)]
    return {
        "answers": len(made.answers),
        "answers are the most frequent": {w for w, _ in counts.most_common(3)} == set(made.answers),
        "noise is more frequent": noise > order[0],
        "letters": sorted({len(word) for word in counts}),
        "falls as 1, 1/4, 1/9, 1/16": all(
            abs(n / noise - 1 / rank**2) < 1.5 / order[-1] for rank, n in enumerate(order, 2)
        ),
        "wording": f"{head} | {question}",
    }


def question_answering(made: Made) -> dict[str, Any]:
    """Documents, their numbers, the answer among them."""
    head, _, rest = made.prompt.partition("\n\nThe following are given documents.\n\n")
    context, _, question = rest.rpartition("\n\nAnswer the question based")
    numbers = [int(n) for n in re.findall(r"^Document (\d+):$", context, re.MULTILINE)]
    asked = re.search(r"Question: (.*?) Answer:", question)
    assert asked is not None
    ship = re.search(r"the ship (\S+)", asked[1])
    assert ship is not None
    return {
        "documents are numbered from 1": numbers == list(range(1, len(numbers) + 1)),
        "the document with the answer is there": f"The ship {ship[1]} was painted" in context,
        "question": asked[1],
        "answers": made.answers,
        "wording": f"{head} | {question.replace(asked[1], '<question>')}",
    }


PROPERTIES: dict[str, Callable[[Made], dict[str, Any]]] = {
    "niah": niah,
    "variable_tracking": variable_tracking,
    "common_words_extraction": common_words,
    "freq_words_extraction": frequent_words,
    "qa": question_answering,
}


@dataclasses.dataclass
class Comparison:
    """One task at one length."""

    task: str
    length: int
    differing: dict[str, tuple[Any, Any]]
    compared: int
    fill: tuple[float, float]
    over: tuple[int, int]


def compare(
    task: str, length: int, ours: list[Made], theirs: list[Made], kind: str, tokenizer: Any
) -> Comparison:
    """For each property, the values of both sides' samples."""
    read = PROPERTIES[kind]
    seen: list[dict[str, set[str]]] = []
    for side in (ours, theirs):
        values: dict[str, set[str]] = {"tokens to generate": {str(m.new_tokens) for m in side}}
        for made in side:
            for name, value in read(made).items():
                values.setdefault(name, set()).add(str(value))
        seen.append(values)
    differing = {
        name: (sorted(seen[0][name]), sorted(seen[1][name]))
        for name in seen[0]
        if seen[0][name] != seen[1][name]
    }
    used = [
        [len(tokenizer(m.prompt)["input_ids"]) + m.new_tokens for m in side]
        for side in (ours, theirs)
    ]
    fill = tuple(sum(side) / len(side) / length for side in used)
    over = tuple(sum(n > length for n in side) for side in used)
    return Comparison(task, length, differing, len(seen[0]), fill, over)  # type: ignore[arg-type]


# -- scores ----------------------------------------------------------------------------------------


def predictions(answers: tuple[str, ...], rng: random.Random) -> str:
    """A continuation that is right, partly right, in another case, or wrong."""
    kept = [answer for answer in answers if rng.random() < 0.6]
    if rng.random() < 0.2:
        kept = [answer[:-1] for answer in kept]
    text = rng.choice([" ", ": ", " The answer is "]) + rng.choice([", ", " and ", "\n"]).join(kept)
    return rng.choice([str, str.upper, str.title])(text) if rng.random() < 0.9 else ""


def compare_scores(
    task: str, samples: list[GenerationSample], metric: Callable[..., float], tries: int
) -> tuple[float, float]:
    """Our score and RULER's score of the same predictions, in percent."""
    rng = random.Random(f"{SEED}/{task}")
    drawn = [rng.choice(samples) for _ in range(tries)]
    said = [predictions(tuple(map(str, s.answers)), rng) for s in drawn]
    ours = sum(text_score(s, p) for s, p in zip(drawn, said, strict=True)) / tries * 100
    return round(ours, 2), metric(said, [list(map(str, s.answers)) for s in drawn])


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        description=__doc__,
        epilog="example:\n  python benchmarks/ruler_peer.py --ruler peers/RULER --site peers/site\n",
    )
    add = parser.add_argument
    add("--ruler", type=path_argument, default=os.environ.get("RULER"), help="checkout (or $RULER)")
    add("--site", default=os.environ.get("RULER_SITE", ""), help="folder with its packages")
    add(
        "--tokenizer",
        type=path_argument,
        help="Hugging Face folder (default: a BPE made on the spot)",
    )
    add("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    add("--samples", type=int, default=10, help="of each task and length (default 10)")
    add("--predictions", type=int, default=400, help="scored by both, for each task (default 400)")
    add("--tasks", nargs="+", help="default: all of synthetic.yaml")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Compare both sides; prints one line for each task and length."""
    args = _parser().parse_args(argv)
    if args.ruler is None:
        print("skipped: give --ruler (or $RULER), a checkout of NVIDIA/RULER")
        return 0
    from transformers import AutoTokenizer

    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        peer = Peer(Path(args.ruler), args.site, Path(scratch))
        folder = args.tokenizer or Path(scratch) / "tokenizer"
        if args.tokenizer is None:
            make_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        print(
            "| task | length | properties | differing | filled, ours | theirs | over, ours | theirs |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        scores = []
        for task in args.tasks or peer.tasks:
            kind = peer.tasks[task]["task"]
            for length in args.lengths:
                ours, samples = our_samples(task, length, args.samples, tokenizer, peer)
                theirs = peer.samples(task, length, args.samples, folder)
                found = compare(task, length, ours, theirs, kind, tokenizer)
                print(
                    f"| {task} | {length} | {found.compared} | {len(found.differing)} | "
                    f"{found.fill[0]:.3f} | {found.fill[1]:.3f} | {found.over[0]} | {found.over[1]} |",
                    flush=True,
                )
                for name, (mine, their) in found.differing.items():
                    print(f"    {name}: ours {mine}, RULER's {their}")
                wrong += len(found.differing) + found.over[0]
            pair = compare_scores(task, samples, peer.metrics[kind]["metric_fn"], args.predictions)
            scores.append((task, *pair))
        print(f"\n| score of {args.predictions} predictions | ours | RULER's |\n|---|---:|---:|")
        for task, mine, their in scores:
            print(f"| {task} | {mine:.2f} | {their:.2f} |")
            wrong += mine != their
    print("all agree" if not wrong else f"{wrong} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
