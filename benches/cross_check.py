#!/usr/bin/env python3
"""Exports a checkpoint and compares it in the programs that others use: transformers and llama.cpp must continue the same
prompt with the same tokens as this library, and cut the same lines into the same tokens.

    pip install torch transformers llama-cpp-python
    python3 benches/cross_check.py MODEL [--prompt TEXT] [--lines FILE] [--adapter FOLDER]

MODEL is any checkpoint that `convert` reads. Weights are exported in f32. Adapters that `finetune` made are read by PEFT (`pip
install peft`) on top of the export, and merged into the file for llama.cpp. A program that is not installed is passed over.
"""
import argparse, os, subprocess, sys, tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
NEW = 32


def program(name, *args):
    command = [os.path.join(ROOT, "target", "release", "examples", name), *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def ours(model, prompt, adapter):
    """Ids that `generate` shows with their log-probabilities: the prompt's text is before them."""
    out = program("generate", "--model", model, *adapter, "--prompt", prompt, "--temperature", "0", "--max-new-tokens", str(NEW), "--log-probs")
    ids = []
    for line in out[len(prompt):].splitlines():
        parts = line.split(maxsplit=2)
        if len(parts) == 3 and parts[1].isdigit():
            ids.append(int(parts[1]))
    return ids


def lines_ours(model, file):
    return [[int(i) for i in line.split()] for line in program("tokenize", "encode", "--tokenizer", model, "--lines", file).splitlines()]


def transformers(folder, prompt, lines, adapter):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1]:].tolist()
    return out, [tokenizer(line, add_special_tokens=False).input_ids for line in lines]


def llama_cpp(file, prompt, lines, adapter):
    from llama_cpp import Llama

    model = Llama(file, n_ctx=512, logits_all=False, verbose=False)
    ids = model.tokenize(prompt.encode(), add_bos=True, special=False)
    out = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        if token == model.token_eos() or len(out) == NEW:
            break
        out.append(token)
    return out, [model.tokenize(line.encode(), add_bos=False, special=False) for line in lines]


def report(name, what, found, expected):
    equal = sum(a == b for a, b in zip(found, expected))
    same = found == expected
    print(f"| {name} | {what} | {equal} of {len(expected)} | {'yes' if same else 'NO'} |", flush=True)
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--lines", help="a text file, of which the first 1,000 lines that are not empty are compared")
    parser.add_argument("--adapter", help="a folder in PEFT's layout")
    args = parser.parse_args()
    adapter = ["--adapter", args.adapter] if args.adapter else []
    subprocess.run(["cargo", "build", "--release", "--examples"], cwd=ROOT, check=True)
    lines = []
    if args.lines:
        with open(args.lines, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file if line.strip()][:1000]
    ok = True
    print("| program | compared | equal | all |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        hf, gguf, text = (os.path.join(folder, name) for name in ("hf", "model.gguf", "lines.txt"))
        program("convert", args.model, hf)
        program("convert", args.model, gguf, *adapter)
        with open(text, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
        expected, expected_lines = ours(args.model, args.prompt, adapter), lines_ours(args.model, text)
        for name, run, path in (("transformers", transformers, hf), ("llama.cpp", llama_cpp, gguf)):
            try:
                found, found_lines = run(path, args.prompt, lines, args.adapter)
            except ImportError as error:
                print(f"| {name} | not installed ({error}) | | |")
                continue
            ok &= report(name, f"{NEW} greedy tokens", found[: len(expected)], expected)
            if lines:
                ok &= report(name, f"{len(lines)} lines of text", found_lines, expected_lines)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
