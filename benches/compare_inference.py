#!/usr/bin/env python3
"""Reading a prompt (of 128 tokens unless told) and decoding, of one sequence or several at once, of this library against llama.cpp
and PyTorch, with weights of one width, on the same machine in one run, alternating.

    pip install torch transformers llama-cpp-python
    python3 benches/compare_inference.py model.gguf --rounds 3
    python3 benches/compare_inference.py model.gguf --weights q4 --prompt 4000
    python3 benches/compare_inference.py model.gguf --batch 8

The model is any checkpoint that `convert` reads. llama.cpp gets files that this library writes (4 bits: the model itself if it is
a `Q4_1` file, else `Q4_0`, which is a tenth smaller than our 4 bits), PyTorch an exported folder through transformers. Tokens per
second are those of the median step of a process, and the table has each side's best process. Everything is computed with the
same number of threads. A program that is not installed is passed over.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
STEPS, PREFILLS = 48, 5
# Our name of a weight's width, llama.cpp's, PyTorch's.
WIDTHS = [("f32", "f32", "float32"), ("bf16", "bf16", "bfloat16"), ("q8", "q8_0", None), ("q4", "q4_0", None)]


def run(command):
    return subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def ours(model, weights, prompt, batch):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "results.jsonl")
        run(["cargo", "bench", "--bench", "decoding", "--", "--model", model, "--weights", weights, "--prompt", str(prompt),
             "--batch", str(batch), "--json", path])
        with open(path) as results:
            result = json.loads(results.readline())
        return result["prefill_tokens_per_second"], result["tokens_per_second"]


def llama_cpp(count, sequences, file):
    import llama_cpp as lib

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = sequences * (count + STEPS), sequences * count, 512, sequences
    params.n_threads = params.n_threads_batch = os.cpu_count()
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(sequences * count, 0, sequences)

    def read(tokens):
        """Of each token its number, position and sequence, and whether its logits are wanted."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token % vocab, position, 1, wanted
            batch.seq_id[i][0] = sequence
        start = time.perf_counter()
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        lib.llama_get_logits_ith(context, len(tokens) - 1)
        return time.perf_counter() - start

    def prefill():
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        return read([(37 * i + s, i, s, i == count - 1) for s in range(sequences) for i in range(count)])

    prefills = [prefill() for _ in range(1 + PREFILLS)][1:]
    steps = [read([(100 + i + s, count + i, s, True) for s in range(sequences)]) for i in range(STEPS)]
    return sequences * count / statistics.median(prefills), sequences / statistics.median(steps)


def torch(count, sequences, folder, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    prompt = torch.tensor([[(37 * i + s) % model.config.vocab_size for i in range(count)] for s in range(sequences)])

    def read(tokens, past):
        start = time.perf_counter()
        out = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start, out.past_key_values

    with torch.no_grad():
        prefills = [read(prompt, None)[0] for _ in range(1 + PREFILLS)][1:]
        _, past = read(prompt, None)
        steps = []
        for i in range(STEPS):
            seconds, past = read(torch.tensor([[100 + i + s] for s in range(sequences)]), past)
            steps.append(seconds)
    return sequences * count / statistics.median(prefills), sequences / statistics.median(steps)


def other(prompt, batch, what, *args):
    """A process of another program: its two rates, or None if it is not installed."""
    command = [sys.executable, os.path.abspath(__file__), "-", "--prompt", str(prompt), "--batch", str(batch),
               "--one", what, *args]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{what} {' '.join(args)}: {reason}", file=sys.stderr)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--weights", choices=[width[0] for width in WIDTHS], help="only this width")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--json", help="append the best of each side to this file, for table.py")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, *rest = args.one
        print(json.dumps((llama_cpp if what == "llama.cpp" else torch)(args.prompt, args.batch, *rest)))
        return
    args.model = os.path.abspath(args.model)
    run(["cargo", "build", "--release", "--examples"])
    run(["cargo", "bench", "--bench", "decoding", "--no-run"])
    convert = os.path.join(ROOT, "target", "release", "examples", "convert")
    kinds = run([os.path.join(ROOT, "target", "release", "examples", "inspect"), args.model])
    print("| weights | | ours tok/s | llama.cpp | ratio | PyTorch | ratio |\n| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        hf = os.path.join(folder, "hf")
        run([convert, args.model, hf])
        for weights, gguf_type, dtype in WIDTHS:
            if args.weights not in (None, weights):
                continue
            gguf = os.path.join(folder, f"{weights}.gguf")
            if weights == "q4" and "of Q4_1" in kinds:
                gguf = args.model
            else:
                run([convert, args.model, gguf, "--type", gguf_type])
            found = {"ours": [], "llama.cpp": [], "torch": []}
            for _ in range(args.rounds):
                found["ours"].append(ours(args.model, weights, args.prompt, args.batch))
                found["llama.cpp"].append(other(args.prompt, args.batch, "llama.cpp", gguf))
                found["torch"].append(other(args.prompt, args.batch, "torch", hf, dtype) if dtype else None)
            most = {side: [max(rates) for rates in zip(*filter(None, results))] for side, results in found.items()}
            if args.json:
                with open(args.json, "a") as results:
                    for side, name in (("ours", "ours"), ("llama.cpp", "llama.cpp"), ("torch", "PyTorch")):
                        if most[side]:
                            rates = dict(zip(("prefill_tokens_per_second", "tokens_per_second"), most[side]))
                            name_of_model = os.path.splitext(os.path.basename(args.model))[0]
                            line = {"bench": "decoding", "device": name, "model": name_of_model, "weights": weights, **rates}
                            results.write(json.dumps(line) + "\n")
            for index, what in enumerate(("prefill", "decoding")):
                best = {side: rates[index] if rates else None for side, rates in most.items()}
                cells = "".join(
                    f" {best[side]:.1f} | {best['ours'] / best[side]:.2f} |" if best[side] else " | |"
                    for side in ("llama.cpp", "torch")
                )
                print(f"| {weights} | {what} | {best['ours']:.1f} |{cells}", flush=True)


if __name__ == "__main__":
    main()
