#!/usr/bin/env python3
"""The evaluation beside EleutherAI's harness: the same files, every log-likelihood, and the time of both.

    pip install lm_eval transformers datasets torch
    cargo build --release --example evaluate
    python3 benches/compare_eval.py MODEL_FOLDER --hellaswag hellaswag_val.jsonl --winogrande dev.jsonl --mmlu DATA --limit 100

MODEL_FOLDER is a Hugging Face folder (`convert` makes one of any checkpoint), DATA a folder with MMLU's `test` and `dev`.
The harness's tasks are its own, with files in place of the hub's. Both compute in f32 on the CPU.
"""
import argparse
import json
import os
import pathlib
import subprocess
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("--hellaswag")
parser.add_argument("--winogrande")
parser.add_argument("--mmlu")
parser.add_argument("--subject", default="anatomy", help="of MMLU")
parser.add_argument("--limit", type=int, default=100)
parser.add_argument("--batch", default="8", help="rows of a batch of the harness")
parser.add_argument("--evaluate", default="target/release/examples/evaluate")
args = parser.parse_args()

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import lm_eval  # noqa: E402  (after the environment)
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TASKS = pathlib.Path(lm_eval.__file__).parent / "tasks"


def task_file(folder, name, include, extra):
    """A task of the harness that reads files instead of the hub."""
    text = f"include: {TASKS / include}\ntask: {name}\ntag: null\ndataset_name: null\ntraining_split: null\n{extra}"
    (folder / f"{name}.yaml").write_text(text)


def theirs(model, folder, name):
    """Log-likelihoods of each question's completions, and seconds."""
    start = time.time()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=[name], limit=args.limit, task_manager=manager, log_samples=True, bootstrap_iters=0)
    rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
    return [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows], time.time() - start


def ours(folder, task, *arguments):
    """The same of ours; loading the model is in the seconds."""
    log = folder / "log.jsonl"
    start = time.time()
    command = [args.evaluate, "--model", args.model, "--task", task, "--limit", str(args.limit), "--log", log, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.time() - start
    return [json.loads(line)["log_likelihoods"] for line in open(log)], seconds


def main():
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if args.hellaswag:
            files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {os.path.abspath(args.hellaswag)}}}}}\n"
            task_file(folder, "file_hellaswag", "hellaswag/hellaswag.yaml", files)
            runs.append(("hellaswag", "file_hellaswag", ["--data", args.hellaswag]))
        if args.winogrande:
            files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {os.path.abspath(args.winogrande)}}}}}\n"
            task_file(folder, "file_winogrande", "winogrande/default.yaml", files)
            runs.append(("winogrande", "file_winogrande", ["--data", args.winogrande]))
        if args.mmlu:
            data = pathlib.Path(args.mmlu).absolute()
            test, dev = (data / split / f"{args.subject}_{split}.csv" for split in ("test", "dev"))
            subject = args.subject.replace("_", " ")
            extra = (
                f"dataset_path: csv\ndataset_kwargs: {{data_files: {{test: {test}, dev: {dev}}}, "
                "column_names: [question, a, b, c, d, answer]}\nnum_fewshot: 5\n"
                f'description: "The following are multiple choice questions (with answers) about {subject}.\\n\\n"\n'
                'doc_to_text: "{{question.strip()}}\\nA. {{a}}\\nB. {{b}}\\nC. {{c}}\\nD. {{d}}\\nAnswer:"\n'
            )
            task_file(folder, "file_mmlu", "mmlu/default/_default_template_yaml", extra)
            runs.append(("mmlu", "file_mmlu", ["--data", test, "--shots", "5", "--shots-from", data / "dev"]))
        model = HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=int(args.batch))
        print("| benchmark | questions | largest difference of a log-likelihood | s | harness, s | harness / ours |")
        print("| --- | --- | --- | --- | --- | --- |")
        for task, name, arguments in runs:
            (a, mine), (b, its) = ours(folder, task, *arguments), theirs(model, folder, name)
            assert [len(row) for row in a] == [len(row) for row in b], "other questions or completions"
            most = max(abs(x - y) for row, other in zip(a, b) for x, y in zip(row, other))
            print(f"| {task} | {len(a)} | {most:.1e} | {mine:.1f} | {its:.1f} | {its / mine:.2f} |", flush=True)


main()
