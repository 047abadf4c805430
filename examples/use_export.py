#!/usr/bin/env python3
"""Use an exported hybrid with transformers.

    python examples/use_export.py                          # first exports the tiny teacher
    python examples/use_export.py --export exports/hydra --trust-remote-code --prompt "Once upon a time"

An export has its own modelling code, so that it works without megatron_hydra:
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True). Read the code first if it is not yours.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import megatron_hydra as mh


def make_export(folder: Path) -> Path:
    """An untrained student of the tiny teacher, with random FA heads."""
    head_map = mh.select_heads(mh.shipped_teacher(), ratio="3:1", strategy="global_random")
    head_map.save(folder / "head_map.json")
    student = mh.StudentOptions(folder / "head_map.json", calibrate=False)
    mh.hf_to_megatron(mh.shipped_teacher(), folder / "student", student)
    mh.megatron_to_hf(folder / "student", folder / "export")
    return folder / "export"


def main(argv: list[str] | None = None) -> str:
    """Continue a prompt greedily, and print the size of its cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", type=Path, help="the folder; default: make a tiny one")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code in the export's folder"
    )
    parser.add_argument("--prompt", default="the key of the box is")
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        made = args.export is None
        export = make_export(Path(folder)) if made else args.export
        model = mh.load_hf_model(export, trust_remote_code=made or args.trust_remote_code)
        tokenizer = mh.load_tokenizer(str(export))
    tokens = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        ids = model.generate(**tokens, max_new_tokens=args.new_tokens, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    heads = sum(map(len, model.config.full_attention_heads))
    of_all = model.config.num_hidden_layers * model.config.num_attention_heads
    print(f"{heads} of {of_all} heads keep full attention; the others need no cache of past tokens")
    print(text)
    return text


if __name__ == "__main__":
    main()
