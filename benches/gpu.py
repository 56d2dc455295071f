#!/usr/bin/env python3
"""All of a GPU in one call of under ten minutes: parity with the reference, training and decoding at several sizes, and PyTorch beside it
where it is installed. Prints one table.

    python3 benches/gpu.py                            # CUDA: builds what it needs first
    python3 benches/gpu.py --device vulkan --sizes tiny
    python3 benches/gpu.py --pack gpu                 # builds and strips the programs into a folder and gpu.tar.xz
    python3 gpu/gpu.py --binaries gpu                 # on a machine with a GPU, without a toolchain or a network

The raw output goes to gpu.log.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..")
LOG = None


def run(command, env=None, limit=None, cwd=None):
    """Output of a command; what it prints is logged. None if it fails or takes too long, which is printed."""
    LOG.write(f"$ {' '.join(command)}\n")
    LOG.flush()
    try:
        done = subprocess.run(command, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit, cwd=cwd)
    except subprocess.TimeoutExpired as error:
        LOG.write((error.stdout or b"").decode(errors="replace"))
        print(f"{os.path.basename(command[0])} took longer than {limit:.0f} s")
        return None
    LOG.write(done.stdout)
    return done.stdout if done.returncode == 0 else None


def build(feature, folder):
    """The programs, stripped, as files of a folder."""
    os.makedirs(folder, exist_ok=True)
    command = ["cargo", "build", "--release", "--message-format=json-render-diagnostics", "--features", feature,
               "--test", "main", "--bench", "training", "--bench", "decoding"]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in out.splitlines():
        artifact = json.loads(line)
        name = artifact.get("target", {}).get("name")
        if artifact.get("executable") and name in ("main", "training", "decoding"):
            path = os.path.join(folder, {"main": "parity"}.get(name, name))
            shutil.copy(artifact["executable"], path)
            subprocess.run(["strip", path], check=True)
    shutil.copytree(os.path.join(ROOT, "tests", "fixtures"), os.path.join(folder, "fixtures"), dirs_exist_ok=True)
    for script in ("gpu.py", "compare_torch.py"):
        shutil.copy(os.path.join(HERE, script), folder)


def lines(bench, binaries, device, arguments, limit):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "results.jsonl")
        run([os.path.join(binaries, bench), "--bench", "--device", device, "--json", path, *arguments], limit=limit)
        if not os.path.exists(path):
            return []
        return [json.loads(line) for line in open(path)]


def torch_row(size, precision, compiled, limit):
    command = [sys.executable, os.path.join(HERE, "compare_torch.py"), "--device", "cuda", "--precision", precision, "--steps", "10"]
    out = run(command + ["--one", size, "compile" if compiled else "eager"], limit=limit)
    return json.loads(out.splitlines()[-1]) if out else None


def main():
    global LOG
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--sizes", default="110m,350m,1.1b,7b")
    parser.add_argument("--binaries", help="folder with the programs, made by --pack")
    parser.add_argument("--pack", metavar="FOLDER", help="only builds the programs")
    parser.add_argument("--seconds", type=int, default=570, help="for everything")
    args = parser.parse_args()
    feature = args.device.split(":")[0]
    if args.pack:
        build(feature, args.pack)
        return print(shutil.make_archive(args.pack.rstrip("/"), "xztar", args.pack))
    LOG = open("gpu.log", "a")
    binaries = args.binaries
    if not binaries:
        binaries = tempfile.mkdtemp()
        build(feature, binaries)
    end = time.time() + args.seconds
    left = lambda: max(10, end - time.time())

    parity = run([os.path.join(os.path.abspath(binaries), "parity"), "ops::", "block::", "cached_block::", "parity::"],
                 env={"LLAMA_TEST_DEVICE": args.device, "CUBECL_AUTOTUNE_LEVEL": "minimal",
                      "LLAMA_TEST_FIXTURES": os.path.join(os.path.abspath(binaries), "fixtures")}, limit=left() * 0.6)
    result = [line for line in (parity or "").splitlines() if line.startswith("test result")]
    print("parity:", result[-1] if result else "no result, see gpu.log")

    try:
        import torch
        with_torch = feature == "cuda" and torch.cuda.is_available()
    except ImportError:
        with_torch = False
    formats = ["bf16" if args.precision == "bf16" else "f32", "q8", "q4"]
    columns = ["size", "tokens/s", "of peak", "memory, GB", "PyTorch eager", "compiled", "memory, GB", "ratio"]
    columns += [f"decoding {name}, tokens/s" for name in formats]
    print("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    sys.path.insert(0, HERE)
    from compare_torch import GpuMemory

    for size in args.sizes.split(","):
        memory = GpuMemory() if shutil.which("nvidia-smi") else None
        if memory:
            memory.start()
        ours = lines("training", binaries, args.device, ["--size", size, "--precision", args.precision], left())
        if memory:
            memory.done = True
        decoding = [lines("decoding", binaries, args.device, ["--size", size, "--weights", name], left()) for name in formats]
        eager, compiled = (torch_row(size, args.precision, c, left()) for c in (False, True)) if with_torch and size != "7b" else (None, None)
        rate = ours[0]["tokens_per_second"] if ours else None
        best = max((row["tokens_per_second"] for row in (eager, compiled) if row), default=None)
        show = lambda value, form: form.format(value) if value is not None else "–"
        print("| " + " | ".join([
            size, show(rate, "{:.0f}"), show(ours[0]["share_of_peak"] * 100 if ours else None, "{:.0f}%"),
            show(memory.peak / 1e9 if memory else None, "{:.1f}"),
            show(eager and eager["tokens_per_second"], "{:.0f}"), show(compiled and compiled["tokens_per_second"], "{:.0f}"),
            show(compiled and compiled["memory_bytes"] / 1e9, "{:.1f}"),
            show(rate / best if rate and best else None, "{:.2f}"),
            *(show(found[0]["tokens_per_second"] if found else None, "{:.0f}") for found in decoding),
        ]) + " |", flush=True)


if __name__ == "__main__":
    main()
