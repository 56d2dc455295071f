#!/usr/bin/env python3
"""The kernels for Hopper (llama-model/src/backend/cube/**/wgmma.cu) by themselves, without building the library: compiled by NVRTC, checked
against PyTorch in float64 and timed beside PyTorch's own product and attention. Needs torch, numpy and cuda-bindings, and such a card.

    python3 benches/hopper.py                 # checks and times everything
    python3 benches/hopper.py --checks        # only checks
"""
import argparse, os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cuda.bindings import driver, nvrtc

CUBE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "llama-model", "src", "backend", "cube")
BF16, F32 = torch.bfloat16, torch.float32
WRONG = []


def ok(result):
    assert result[0] == driver.CUresult.CUDA_SUCCESS, result[0]
    return result[1] if len(result) > 1 else None


def wgmma(columns, registers, a_outer, b_outer):
    """The instruction as a macro's body; llama-model/src/backend/cube/hopper.rs has the same."""
    n = columns // 2
    sums = ", ".join(f"%{i}" for i in range(n))
    outputs = ", ".join(f'"+f"((sums)[{i}])' for i in range(n))
    if registers:
        a, b, add, transposed = f"{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}", n + 4, "1", f"{b_outer}"
        inputs = ", ".join(f'"r"((a)[{i}])' for i in range(4)) + ', "l"(b)'
    else:
        a, b, add, transposed = f"%{n}", n + 1, f"%{n + 2}", f"{a_outer}, {b_outer}"
        inputs = '"l"(a), "l"(b), "r"((u32)(add))'
    return (f'asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, {add}, 0;\\nwgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 '
            f'{{{sums}}}, {a}, %{b}, add, 1, 1, {transposed};\\n}}\\n" : {outputs} : {inputs})')


def compiled(key):
    """A kernel of a folder with these definitions."""
    folder, name, definitions = key
    text = "".join(f"#define {k} {v}\n" for k, v in definitions)
    text += "".join(open(os.path.join(CUBE, file)).read() for file in ("hopper.cuh", f"{folder}/wgmma.cu"))
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"wgmma.cu", 0, [], [])
    options = [b"--gpu-architecture=sm_90a"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    if "C75" in log.decode(errors="replace"):
        WRONG.append(f"instructions of {key[0]} are serialized: {log.decode(errors='replace')}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = b" " * size
    nvrtc.nvrtcGetCUBIN(program, code)
    return code


FUNCTIONS = {}


def function(key, room):
    if key not in FUNCTIONS:
        found = ok(driver.cuModuleGetFunction(ok(driver.cuModuleLoadData(CODE.get(key) or compiled(key))), key[1].encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        ok(driver.cuFuncSetAttribute(found, attribute, room))
        FUNCTIONS[key] = found
    return FUNCTIONS[key]


CODE = {}


def tensor_map(matrix, lines):
    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    return ok(driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, matrix.data_ptr(), [u64(matrix.shape[1]), u64(matrix.shape[0])],
        [u64(matrix.shape[1] * 2)], [u32(64), u32(lines)], [u32(1), u32(1)], driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B, driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))


class Launch:
    """A kernel with its parameters: tensor maps, what they map, tensors, constants."""

    def __init__(self, key, cubes, units, room, maps, tensors, constants):
        self.function, self.cubes, self.units, self.room = function(key, room), cubes, units, room
        self.maps = [tensor_map(matrix, lines) for matrix, lines in maps]
        self.tensors = [matrix for matrix, _ in maps] + tensors
        self.pointers = [np.array([x.data_ptr()], dtype=np.uint64) for x in self.tensors]
        self.constants = np.array(constants, dtype=np.uint64)
        parameters = [int(m.getPtr()) for m in self.maps] + [p.ctypes.data for p in self.pointers] + [self.constants.ctypes.data]
        self.parameters = np.array(parameters, dtype=np.uint64)

    def __call__(self):
        stream = torch.cuda.current_stream().cuda_stream
        ok(driver.cuLaunchKernel(self.function, self.cubes, 1, 1, self.units, 1, 1, self.room, stream, self.parameters.ctypes.data, 0))


def time_of(run, times=30):
    """Milliseconds, the best of three rounds."""
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / times)
    return best


def report(what, errors, bound):
    wrong = not all(error < bound for error in errors)
    print(f"{'WRONG' if wrong else 'right'} {what}: {' '.join(f'{error:.1e}' for error in errors)}", flush=True)
    if wrong:
        WRONG.append(what)


def distance(ours, wanted):
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


def product_key(count, summed, columns, inner, out, add):
    listed = lambda item, count: ", ".join(item(i) for i in range(count))
    results = 1 if summed else count
    parameters = ", ".join([listed(lambda i: f"const __grid_constant__ TensorMap {name}_{i}", count) for name in "ab"]
                           + [listed(lambda i: "const void*", 2 * count), listed(lambda i: f"Out* out_{i}", results)])
    definitions = [("MEMBERS", count), ("SUM", int(summed)), ("COLUMNS", columns), ("A_SUMMED_INNER", inner[0]), ("B_SUMMED_INNER", inner[1]),
                   ("ADD", int(add)), ("OUT_F32" if out == F32 else "OUT_BF16", ""), ("PARAMETERS", parameters),
                   ("A_MAPS", listed(lambda i: f"&a_{i}", count)), ("B_MAPS", listed(lambda i: f"&b_{i}", count)),
                   ("OUTS", listed(lambda i: f"out_{i}", results)), ("WGMMA(sums, a, b, add)", wgmma(columns, False, 1 - inner[0], 1 - inner[1]))]
    return "product", "product", tuple(definitions + ([("ROUND_BF16", "")] if out == BF16 else []))


def products(sizes, inner, columns, summed=False, splits=1, out=F32, add=False, timed=False):
    """Products of `(rows, columns, length of the sum)`, checked, or with `timed` beside torch.matmul."""
    matrix = lambda a, b, first: torch.randn((a, b) if first else (b, a), device="cuda").to(BF16)
    pairs = [(matrix(m, k, inner[0]), matrix(n, k, inner[1])) for m, n, k in sizes]
    part = -(-max(k for _, _, k in sizes) // splits + 63) // 64 * 64 if splits > 1 else max(k for _, _, k in sizes) // 64 * 64 + 64
    splits = -(-sizes[0][2] // part)
    # What is not written stays wrong.
    outs = [torch.full((splits, m, n), 1.0 if add else float("nan"), device="cuda", dtype=out) for m, n, _ in sizes[:1 if summed else None]]
    pairs_of_tiles = sum(-(-m // 256) * -(-n // columns) for m, n, _ in sizes[:len(outs)]) * splits
    maps = [(a, 128 if inner[0] else 64) for a, _ in pairs] + [(b, columns // 2 if inner[1] else 64) for _, b in pairs]
    constants = [size[i] for i in range(3) for size in sizes] + [part, splits]
    cubes = 2 * min(pairs_of_tiles, torch.cuda.get_device_properties(0).multi_processor_count // 2)
    launch = Launch(product_key(len(sizes), summed, columns, inner, out, add), cubes, 288, 193 * 1024, maps, outs, constants)
    what = f"products {sizes} summed inner {inner}, tiles of {columns}" + ", summed" * summed + f", {splits} parts" * (splits > 1)
    left_right = [(a if inner[0] else a.T, b.T if inner[1] else b) for a, b in pairs]
    if timed:
        ours, torchs = time_of(launch), time_of(lambda: [torch.matmul(a, b) for a, b in left_right])
        flops = sum(2e-9 * m * n * k for m, n, k in sizes)
        print(f"{what}: {1e3 * ours:.1f} us, {flops / ours:.0f} TFLOP/s; torch {1e3 * torchs:.1f} us, {flops / torchs:.0f}", flush=True)
        return
    launch()
    wanted = [a.double() @ b.double() for a, b in left_right]
    wanted = [sum(wanted)] if summed else wanted
    report(what, [distance(o.double().sum(0) - add, w) for o, w in zip(outs, wanted)], 1e-5 if out == F32 else 5e-3)


def attention_launch(kind, head_dim, documents, cubes, fixed, passing, tensors, constants):
    tile = 128 if head_dim == 64 else 64
    tile = 128 if kind == "FORWARD" else tile
    definitions = [(kind, ""), ("HEAD_DIM", head_dim), ("TILE", tile), ("DOCUMENTS", int(documents)), ("ROUND_BF16", ""),
                   ("WGMMA_SCORES(sums, a, b, add)", wgmma(tile, False, 0, 0)), ("WGMMA_ACCUMULATE(sums, a, b)", wgmma(head_dim, True, 0, 1))]
    matrix = lambda x: x.reshape(-1, x.shape[2] * x.shape[3])
    maps = [(matrix(x), 128) for x in fixed] + [(matrix(x), tile) for x in passing]
    room = 1024 + (128 * len(fixed) + 4 * tile) * head_dim * 2
    return Launch(("attention", "attention", tuple(definitions)), cubes, 384, room, maps, tensors, constants)


def attention(batch, q_len, kv_len, heads, kv_heads, head_dim, documents=False, timed=False):
    random = lambda len, heads: torch.randn(batch, len, heads, head_dim, device="cuda").to(BF16)
    q, k, v, grad = random(q_len, heads), random(kv_len, kv_heads), random(kv_len, kv_heads), random(q_len, heads)
    scale = head_dim**-0.5
    positions = torch.arange(q_len, device="cuda")
    starts = torch.stack([positions // (37 + 61 * i) * (37 + 61 * i) * documents for i in range(batch)]).int()
    nothing = lambda x: torch.full_like(x, float("nan"))
    out, d_q, d_k, d_v = map(nothing, (q, q, k, v))
    lse = torch.full((batch, heads, q_len), float("nan"), device="cuda")
    delta = nothing(lse)
    constants = [batch, q_len, kv_len, heads, kv_heads, int(np.array([scale], dtype=np.float32).view(np.uint32)[0])]
    q_cubes, k_cubes = batch * heads * -(-q_len // 128), batch * kv_heads * -(-kv_len // 128)
    kernels = [
        attention_launch("FORWARD", head_dim, documents, q_cubes, [q], [k, v], [starts, out, lse], constants),
        attention_launch("QUERIES", head_dim, documents, q_cubes, [q, grad], [k, v], [starts, out, lse, delta, d_q], constants),
        attention_launch("KEYS", head_dim, documents, k_cubes, [k, v], [q, grad], [starts, lse, delta, d_k, d_v], constants),
    ]
    for kernel in kernels:
        kernel()
    what = f"attention {batch} x {q_len} of {kv_len}, heads {heads}/{kv_heads} of {head_dim}" + ", documents" * documents
    if timed:
        flops = 2e-9 * batch * heads * q_len * kv_len * head_dim
        times = [time_of(kernel) for kernel in kernels]
        q, k, v, grad = (x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v, grad))
        forward = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result = forward()
        torchs = [time_of(forward), time_of(lambda: torch.autograd.grad(result, (q, k, v), grad, retain_graph=True))]
        print(f"{what}: forward {1e3 * times[0]:.0f} us, {flops / times[0]:.0f} TFLOP/s, backward {1e3 * times[1]:.0f} + {1e3 * times[2]:.0f} us; "
              f"torch {1e3 * torchs[0]:.0f} and {1e3 * torchs[1]:.0f} us", flush=True)
        return
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(heads // kv_heads, 2)) * scale
    key = torch.arange(kv_len, device="cuda")
    seen = (key <= positions[:, None] + kv_len - q_len) & (key >= starts[:, :, None])
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(heads // kv_heads, 2))
    wanted.backward(grad.double())
    pairs = [(out, wanted), (lse, torch.logsumexp(scores, -1)), (d_q, q.grad), (d_k, k.grad), (d_v, v.grad)]
    report(what, [distance(ours, wanted) for ours, wanted in pairs], 1e-2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="no timings")
    args = parser.parse_args()
    torch.zeros(1, device="cuda")
    keys = [product_key(n, s, c, i, o, a) for c in (256, 128) for n, s, i, o, a in (
        (1, False, (1, 1), BF16, False), (1, False, (1, 0), F32, True), (1, False, (0, 0), F32, False), (3, False, (1, 1), BF16, False),
        (3, False, (0, 0), F32, False), (3, True, (1, 0), F32, False))]
    with ThreadPoolExecutor() as pool:
        CODE.update(zip(keys, pool.map(compiled, keys)))
    print(torch.cuda.get_device_name())
    for columns in (256, 128):
        products([(1000, 520, 200)], (1, 1), columns, out=BF16)
        products([(1000, 520, 200)], (1, 0), columns, add=True)
        products([(136, 264, 72)], (0, 0), columns)
        products([(1000, 520, 200), (1000, 264, 200), (1000, 136, 200)], (1, 1), columns, out=BF16)
        products([(1000, 520, 4096), (264, 520, 4096), (72, 520, 4096)], (0, 0), columns, splits=3)
        products([(1000, 520, 200), (1000, 520, 64), (1000, 520, 1032)], (1, 0), columns, summed=True)
    for head_dim in (64, 128):
        for shape in ((2, 256, 256, 4, 2), (2, 1000, 1000, 4, 2), (2, 129, 400, 4, 1), (2, 17, 17, 4, 2)):
            attention(*shape, head_dim)
        attention(3, 333, 333, 4, 4, head_dim, documents=True)
    if not args.checks:
        for columns in (256, 128):
            for size in ((16384, 768, 768), (16384, 2048, 768), (16384, 768, 2048), (8192, 8192, 8192)):
                products([size], (1, 1), columns, out=BF16, timed=True)
            products([(16384, 768, 768)] * 3, (1, 1), columns, out=BF16, timed=True)
            products([(16384, 768, 768)] * 3, (1, 0), columns, summed=True, timed=True)
            products([(768, 768, 16384)] * 3, (0, 0), columns, splits=2, timed=True)
        for shape in ((16, 1024, 1024, 12, 12, 64), (8, 2048, 2048, 16, 16, 64), (4, 2048, 2048, 16, 16, 128)):
            attention(*shape, timed=True)
    if WRONG:
        raise SystemExit("wrong: " + "; ".join(WRONG))


if __name__ == "__main__":
    main()
