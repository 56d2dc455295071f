#!/usr/bin/env python3
"""Steps that several processes share, here and in PyTorch (gloo), on the CPUs of one machine in one run.

    pip install torch
    python3 benches/compare_parallel.py --preset 15m --processes 2
    python3 benches/compare_parallel.py --preset 15m --processes 2 --tensor-parallel

A step has one micro-batch for each process. Alone, one process with all threads takes them one after the other; together, each process
has its part of the threads and one of them, and they meet over TCP on this machine. PyTorch has the model of compare_torch.py, eager
and compiled, with fused AdamW, and one global clip, in DistributedDataParallel; "divided" is with ZeroRedundancyOptimizer, which divides the moments
as this library does. With --tensor-parallel the processes divide the model and take all micro-batches together; PyTorch by its tensor and sequence
parallelism (parallelize_module and loss_parallel, as in torchtitan). A speed is the median step of the best of several runs, memory the most
that one process had.

With --gbit the processes meet over a slower network: Linux's `tc` (which asks for root) limits the loopback device to that many Gbit/s in each direction,
as between two machines, until the script ends.
"""
import argparse, contextlib, json, os, shutil, statistics, subprocess, sys, tempfile, threading, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from compare_torch import ADAMW, KEEP_MEMORY, torch_model

ADDRESS = "127.0.0.1:29511"


@contextlib.contextmanager
def network(gbit):
    """Loopback with as many Gbit/s in each direction; both directions go through one queue of it."""
    limit = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", f"{2000 * gbit:.0f}mbit", "burst", "1mb", "latency", "100ms"]
    subprocess.run(limit, check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


def divide(model, processes):
    """The plan of torchtitan for a LLaMA."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel, PrepareModuleOutput, RowwiseParallel, SequenceParallel, parallelize_module)

    mesh = init_device_mesh("cpu", (processes,))
    tied = model.head.weight is model.embed.weight
    parallelize_module(model, mesh, {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    })
    if tied:
        model.head.weight = model.embed.weight
    # One gather for the products that read a norm.
    gather = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    for layer in model.layers:
        plan = {name: ColwiseParallel() for name in ("wq", "wk", "wv", "w1", "w3")}
        plan |= {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("wo", "w2")}
        plan |= {name: SequenceParallel() for name in ("attention_norm", "ffn_norm")}
        parallelize_module(layer, mesh, plan)
        parallelize_module(layer, mesh, {name: gather for name in ("attention_norm", "ffn_norm")})
    return model


def torch_run(shape, mode, processes, steps):
    """The part of one process; the first prints the result."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor.parallel import loss_parallel
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(max(1, os.cpu_count() // (1 if mode == "alone" else processes)))
    vocab, seq_len, batch = shape[5:8]
    model = torch_model(shape, "cpu")
    divided = mode.startswith("tensor")
    if mode != "alone":
        dist.init_process_group("gloo")
    if divided:
        model = divide(model, processes)
    elif mode != "alone":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if mode == "divided":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def loss_of(x, y):
        return F.cross_entropy(model(x).view(-1, vocab), y.view(-1))

    loss_of = torch.compile(loss_of) if mode.endswith("compiled") else loss_of
    parallel_loss = loss_parallel if divided else contextlib.nullcontext
    times = []
    for step in range(2 + steps):
        start = time.perf_counter()
        for _ in range(processes if divided or mode == "alone" else 1):
            x, y = torch.randint(0, vocab, (2, batch, seq_len))
            with parallel_loss():
                loss_of(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 2:
            times.append(time.perf_counter() - start)
    if mode == "alone" or dist.get_rank() == 0:
        print(processes * batch * seq_len / statistics.median(times))


def together(commands, environments):
    """Runs processes at the same time. Returns what the first says, and the most memory that one of them had."""
    children, outputs, peaks = [], [], []
    for command, environment in zip(commands, environments):
        environment = {**os.environ, **environment}
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))

    def wait(child):
        outputs.append((child, *child.communicate()))

    def watch():
        while any(child.poll() is None for child in children):
            for child in children:
                try:
                    with open(f"/proc/{child.pid}/status") as status:
                        peaks.extend(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
                except (FileNotFoundError, ProcessLookupError):
                    pass
            time.sleep(0.02)

    threads = [threading.Thread(target=wait, args=(child,)) for child in children] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for child, _, error in outputs:
        if child.returncode != 0:
            sys.exit(error)
    return next(out for child, out, _ in outputs if child is children[0]), max(peaks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="15m")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tensor-parallel", action="store_true", help="processes divide the model instead of the micro-batches")
    parser.add_argument("--gbit", type=float, help="of the network between the processes, in each direction")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--torch", nargs=2, metavar=("SHAPE", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch:
        return torch_run(json.loads(args.torch[0]), args.torch[1], args.processes, args.steps)

    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    subprocess.run(["cargo", "build", "-q", "--release", "--example", "pretrain"], check=True)
    program = os.path.abspath("target/release/examples/pretrain")
    threads = str(max(1, os.cpu_count() // args.processes))
    with tempfile.TemporaryDirectory() as folder:
        at = lambda name: os.path.join(folder, name)
        shared = ["--preset", args.preset, "--seq-len", str(args.seq_len), "--sequences", str(args.sequences)]
        shared += ["--accumulation", str(args.processes), "--warmup", "1", "--checkpoint-every", "0", "--eval-every", "0", "--prompt", "a"]
        # Tokenizer and shards, once.
        command = [program, *shared, "--vocab-size", str(args.vocab_size), "--steps", "1", "--run", at("first")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        model = json.load(open(os.path.join(at("first"), "checkpoints/step-00000001/state.json")))["config"]["model"]
        shape = [model[key] for key in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab_size")]
        shape = json.dumps([*shape, args.seq_len, args.sequences, model["tied_head"]])

        def ours(count):
            run = at(f"run-{count}")
            shutil.rmtree(run, ignore_errors=True)
            command = [program, *shared, "--data", at("first/data"), "--steps", str(2 + args.steps), "--run", run]
            nodes = [["--nodes", str(count), "--node", str(node), "--address", ADDRESS] for node in range(count)] if count > 1 else [[]]
            if args.tensor_parallel:
                command += ["--tensor-parallel", str(count)]
            environment = {"RAYON_NUM_THREADS": threads} if count > 1 else {}
            _, memory = together([command + node for node in nodes], [environment] * count)
            lines = [json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))]
            return statistics.median(line["tokens_per_second"] for line in lines[2:]), memory

        def theirs(mode):
            count = 1 if mode == "alone" else args.processes
            command = [sys.executable, os.path.abspath(os.path.join("benches", os.path.basename(__file__))), "--torch", shape, mode]
            command += ["--processes", str(args.processes), "--steps", str(args.steps)]
            host, port = ADDRESS.split(":")
            environment = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(count), **KEEP_MEMORY}
            rate, memory = together([command] * count, [{**environment, "RANK": str(rank)} for rank in range(count)])
            return float(rate.split()[-1]), memory

        together_here = f"ours, {args.processes} processes"
        sides = {
            "ours, alone": lambda: ours(1), together_here: lambda: ours(args.processes), "PyTorch, alone": lambda: theirs("alone"),
        }
        if args.tensor_parallel:
            sides[f"PyTorch tensor parallel, {args.processes} processes"] = lambda: theirs("tensor")
            sides[f"PyTorch tensor parallel, compiled, {args.processes} processes"] = lambda: theirs("tensor compiled")
        else:
            sides[f"PyTorch DDP, {args.processes} processes"] = lambda: theirs("whole")
            sides[f"PyTorch DDP, compiled, {args.processes} processes"] = lambda: theirs("compiled")
            sides[f"PyTorch DDP, moments divided, {args.processes} processes"] = lambda: theirs("divided")
        found = {side: [] for side in sides}
        with network(args.gbit) if args.gbit else contextlib.nullcontext():
            for _ in range(args.rounds):
                for side, run in sides.items():
                    found[side].append(run())
        best = {side: (max(rate for rate, _ in runs), min(memory for _, memory in runs)) for side, runs in found.items()}
        mine, ours_memory = best[together_here]
        print(f"{model['d_model']} x {model['n_layers']}, {args.vocab_size} tokens, {args.seq_len} x {args.sequences} for each process")
        print("| side | tokens/s | ours together / this | MB of a process | ours together / this |\n| --- | --- | --- | --- | --- |")
        for side, (rate, memory) in best.items():
            print(f"| {side} | {rate:.0f} | {mine / rate:.2f} | {memory / 1e6:.0f} | {ours_memory / memory:.2f} |")


if __name__ == "__main__":
    main()
