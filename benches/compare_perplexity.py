#!/usr/bin/env python3
"""Perplexity of a text by this library and by transformers, the same windows in one run, alternating.

    pip install torch transformers
    python3 benches/compare_perplexity.py MODEL TEXT                     # a Hugging Face folder and a file
    python3 benches/compare_perplexity.py MODEL TEXT --precision bf16

Every token is predicted once, in windows that do not overlap, the first after the token that texts begin with, the others after the
last token of the one before. Weights stay as the checkpoint has them here, and are in the precision there. The table has the best of
each side's processes: tokens a second without loading, and the process's memory.
"""
import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time


def transformers_side(args):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(os.cpu_count())
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    with open(args.text, encoding="utf-8", newline="") as text:
        ids = tokenizer(text.read(), add_special_tokens=False).input_ids
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start, loss = time.perf_counter(), 0.0
    with torch.inference_mode():
        for at in range(0, len(ids), args.window):
            targets = ids[at : at + args.window]
            inputs = [ids[at - 1] if at else first] + targets[:-1]
            logits = model(torch.tensor([inputs])).logits[0].float()
            loss += torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens": len(ids), "perplexity": math.exp(loss / len(ids)), "seconds": seconds, "memory": peak}))


def ours(args):
    command = [os.path.join(args.binaries, "evaluate"), "--model", args.model, "--precision", args.precision]
    command += ["--window", str(args.window), "--perplexity"]

    def once(text):
        start = time.perf_counter()
        process = subprocess.Popen(command + [text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit("evaluate failed")
        return time.perf_counter() - start, out, usage.ru_maxrss * 1024

    # Loading is what a text of one token takes.
    loading = min(once(args.one_token)[0] for _ in range(2))
    seconds, out, peak = once(args.text)
    tokens, perplexity = re.search(r"(\d+) tokens.*perplexity ([\d.]+) a token", out).groups()
    return {"tokens": int(tokens), "perplexity": float(perplexity), "seconds": seconds - loading, "memory": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("text", help="a text file")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--binaries", default="target/release/examples", help="folder with `evaluate`")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return transformers_side(args)

    args.model, args.text = os.path.abspath(args.model), os.path.abspath(args.text)
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    if args.binaries == parser.get_default("binaries"):
        subprocess.run(["cargo", "build", "--release", "--example", "evaluate"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        args.one_token = os.path.join(folder, "a.txt")
        with open(args.one_token, "w") as text:
            text.write("a")
        found = {"this library": [], "transformers": []}
        command = [sys.executable, os.path.join("benches", os.path.basename(__file__)), args.model, args.text, "--one"]
        command += ["--window", str(args.window), "--precision", args.precision]
        for _ in range(args.rounds):
            found["this library"].append(ours(args))
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
            found["transformers"].append(json.loads(out))
    print("| | tokens | perplexity | tokens/s | memory, MB |\n" + "|" + " --- |" * 5)
    for side, results in found.items():
        best = min(results, key=lambda result: result["seconds"])
        rate = best["tokens"] / best["seconds"]
        print(f"| {side}, {args.precision} | {best['tokens']} | {best['perplexity']:.4f} | {rate:.0f} | {best['memory'] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
