#!/usr/bin/env python3
"""Training steps and forward passes of this library against PyTorch on the same machine in one run, alternating.

    pip install torch
    python3 benches/compare_torch.py                      # every size
    python3 benches/compare_torch.py --size 15m --rounds 3
    python3 benches/compare_torch.py --size 60m --seq-len 4096    # one sequence of so many tokens
    python3 benches/compare_torch.py --device cuda --precision bf16 --size 350m

Both sides train the same LLaMA (f32 weights, AdamW on all parameters, one global clip at 1.0) on the same shapes. PyTorch is
a plain model with scaled_dot_product_attention and fused AdamW, eager and compiled, with glibc told to keep its memory
(without that it is slower). A cell is the median step of a process; the table has the best of a side's processes, so that
neither side is shown on a bad moment of the machine. Memory is the process's on a CPU; on a GPU what the device has in use for us, and
what PyTorch's allocator has reserved.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, threading, time

# width, layers, heads, key heads, inner width, vocabulary, seq_len, batch, tied head: the sizes of benches/training.rs
SIZES = {
    "tiny": (128, 4, 4, 4, 352, 512, 256, 8, True),
    "15m": (288, 6, 6, 6, 768, 32000, 256, 8, True),
    "60m": (512, 8, 8, 8, 1376, 32000, 512, 4, False),
    "110m": (768, 12, 12, 12, 2048, 32000, 1024, 1, True),
    "135m": (576, 30, 9, 3, 1536, 49152, 128, 1, True),
}
# On a GPU, in batches that fill it.
GPU_SIZES = {
    "110m": (768, 12, 12, 12, 2048, 32000, 1024, 16, True),
    "350m": (1024, 24, 16, 16, 2816, 32000, 2048, 8, False),
    "1.1b": (2048, 24, 16, 16, 5632, 32000, 2048, 4, False),
}
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1",
}


def torch_model(shape, device):
    """A plain LLaMA of `shape`, as in SIZES, with its initial weights."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    dim, n_layers, n_heads, n_kv_heads, ffn, vocab, seq_len, batch, tied = shape
    head_dim = dim // n_heads
    torch.manual_seed(0)

    def linear(i, o):
        return nn.Linear(i, o, bias=False)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim))

        def forward(self, x):
            return F.rms_norm(x, (dim,), self.weight, 1e-6)

    def rotate(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.ffn_norm = Norm(), Norm()
            self.wq, self.wo = linear(dim, dim), linear(dim, dim)
            self.wk, self.wv = (linear(dim, n_kv_heads * head_dim) for _ in range(2))
            self.w1, self.w3, self.w2 = linear(dim, ffn), linear(dim, ffn), linear(ffn, dim)

        def forward(self, x, cos, sin):
            h = self.attention_norm(x)
            q, k, v = (w(h).view(batch, seq_len, -1, head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
            grouped = n_kv_heads < n_heads
            y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=grouped)
            x = x + self.wo(y.transpose(1, 2).reshape(batch, seq_len, -1))
            h = self.ffn_norm(x)
            return x + self.w2(F.silu(self.w1(h)) * self.w3(h))

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(vocab, dim), Norm(), linear(dim, vocab)
            self.layers = nn.ModuleList(Block() for _ in range(n_layers))
            if tied:
                self.head.weight = self.embed.weight
            angle = torch.outer(torch.arange(seq_len).float(), 10000 ** -(torch.arange(0, head_dim, 2).float() / head_dim))
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)

        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            return self.head(self.norm(x))

    model = Llama().to(device)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, 0, 0.02)
    return model


def shape_of(size, args):
    """A size's numbers, as in SIZES, with one sequence of `--seq-len` if that is asked for."""
    shape = (SIZES if args.device == "cpu" else GPU_SIZES)[size]
    return shape[:6] + (args.seq_len, 1) + shape[8:] if args.seq_len else shape


def torch_step(shape, compiled, steps, precision, device):
    import torch
    import torch.nn.functional as F

    vocab, seq_len, batch = shape[5:8]
    torch.set_num_threads(os.cpu_count())
    model = torch_model(shape, device)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def loss_of(x, y):
        return F.cross_entropy(model(x).view(-1, vocab), y.view(-1))

    forward = torch.compile(model) if compiled else model
    loss_of = torch.compile(loss_of) if compiled else loss_of
    bf16 = torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")
    times = []
    for step in range(2 + steps):
        x, y = torch.randint(0, vocab, (2, batch, seq_len), device=device)
        wait(device)
        start = time.perf_counter()
        with bf16:
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        if step >= 2:
            times.append(time.perf_counter() - start)
    passes = []
    for step in range(2 + steps):
        x = torch.randint(0, vocab, (batch, seq_len), device=device)
        wait(device)
        start = time.perf_counter()
        with torch.no_grad(), bf16:
            forward(x)
        wait(device)
        if step >= 2:
            passes.append(time.perf_counter() - start)
    if device == "cpu":
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    else:
        peak = torch.cuda.max_memory_reserved()
    rate, forward_rate = (batch * seq_len / statistics.median(seconds) for seconds in (times, passes))
    print(json.dumps({"tokens_per_second": rate, "forward_tokens_per_second": forward_rate, "memory_bytes": peak}))


def wait(device):
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


class GpuMemory(threading.Thread):
    """The most memory in use on the first NVIDIA GPU while a process runs, less what was in use before."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.peak, self.done = self.used(), 0, False

    @staticmethod
    def used():
        command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.split()[0]) << 20

    def run(self):
        while not self.done:
            self.peak = max(self.peak, self.used() - self.before)
            time.sleep(0.05)


def ours(size, precision, device, binaries, seq_len):
    """A run of the bench `training`: its line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "results.jsonl")
        command = [os.path.join(binaries, "training"), "--bench"] if binaries else ["cargo", "bench", "--bench", "training"]
        if not binaries:
            command += ["--features", device.split(":")[0]] if device != "cpu" else []
            command += ["--"]
        command += ["--size", size, "--precision", precision, "--json", path, "--device", "flex" if device == "cpu" else device]
        command += ["--seq-len", str(seq_len)] if seq_len else []
        memory = GpuMemory() if device != "cpu" else None
        if memory:
            memory.start()
        run(command)
        with open(path) as results:
            result = json.loads(results.readline())
        if memory:
            memory.done = True
            result["memory_bytes"] = memory.peak
        return result


def run(command, env=None):
    return subprocess.run(command, env={**os.environ, **(env or {})}, check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIZES | GPU_SIZES, help="only this size; again for another")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--binaries", help="folder with a `training` that was built elsewhere")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32", help="bf16: PyTorch's autocast")
    parser.add_argument("--seq-len", type=int, help="one sequence of so many tokens")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a PyTorch process")
    parser.add_argument("--json", help="append the best of each side to this file, for table.py")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return torch_step(shape_of(args.one[0], args), args.one[1] == "compile", args.steps, args.precision, args.device)

    args.json = args.json and os.path.abspath(args.json)
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    sizes = SIZES if args.device == "cpu" else GPU_SIZES
    if not args.binaries:
        features = ["--features", args.device] if args.device != "cpu" else []
        run(["cargo", "bench", "--bench", "training", "--no-run", *features])
    print("| size | training: ours tok/s | torch eager | torch compile | ours / best torch | forward: ours | best torch | ratio "
          "| ours MB | torch MB (least) | ratio |")
    print("|" + " --- |" * 11)
    for size in args.size or sizes:
        found = {"ours": [], "eager": [], "compile": []}
        for _ in range(args.rounds):
            found["ours"].append(ours(size, args.precision, args.device, args.binaries, args.seq_len))
            for mode in ("eager", "compile"):
                command = [sys.executable, os.path.join("benches", os.path.basename(__file__)), "--steps", str(args.steps)]
                command += ["--precision", args.precision, "--device", args.device]
                command += ["--seq-len", str(args.seq_len)] if args.seq_len else []
                found[mode].append(json.loads(run(command + ["--one", size, mode], KEEP_MEMORY)))
        def most(key):
            return {side: max(r[key] for r in results) for side, results in found.items()}

        rate, forward = most("tokens_per_second"), most("forward_tokens_per_second")
        memory = {side: min(r["memory_bytes"] for r in results) / 1e6 for side, results in found.items()}
        if args.json:
            _, _, _, _, _, _, seq_len, batch, _ = shape_of(size, args)
            with open(args.json, "a") as results:
                for side, name in (("ours", "ours"), ("eager", "PyTorch eager"), ("compile", "PyTorch compiled")):
                    name += "" if args.device == "cpu" else f" on {args.device}"
                    results.write(json.dumps({
                        "bench": "training", "device": name, "size": size, "precision": args.precision, "seq_len": seq_len,
                        "batch": batch, "tokens_per_second": rate[side], "forward_tokens_per_second": forward[side],
                        "memory_bytes": memory[side] * 1e6,
                    }) + "\n")
        best, best_forward = (max(rates["eager"], rates["compile"]) for rates in (rate, forward))
        least = min(memory["eager"], memory["compile"])
        print(f"| {size} | {rate['ours']:.0f} | {rate['eager']:.0f} | {rate['compile']:.0f} | {rate['ours'] / best:.2f} "
              f"| {forward['ours']:.0f} | {best_forward:.0f} | {forward['ours'] / best_forward:.2f} "
              f"| {memory['ours']:.0f} | {least:.0f} | {memory['ours'] / least:.2f} |", flush=True)


if __name__ == "__main__":
    main()
