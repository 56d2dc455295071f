#!/usr/bin/env python3
"""Compares text processing with the programs others use, on the same text in one run: the same answers, and megabytes per second.

    pip install sentencepiece tokenizers datatrove fasttext-wheel orjson
    python3 benches/compare_data.py --text wiki.jsonl [--tokenizer tokenizer.model] [--language lid.176.ftz]

The text is JSON lines with a string `text`. Without --tokenizer one of 4,096 pieces is trained on it by SentencePiece, and by this
library: the vocabularies must be equal. What is not installed is passed over.
"""
import argparse, json, os, random, subprocess, sys, tempfile, time
from multiprocessing import Pool

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
CORES = os.cpu_count()


def program(name, *args):
    command = [os.path.join(ROOT, "target", "release", "examples", name), *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def strings(count):
    """Random lines of letters, digits, spaces and characters of many scripts."""
    random.seed(1)
    ranges = [(32, 126), (32, 126), (97, 122), (0xA1, 0x24F), (0x370, 0x52F), (0x5D0, 0x6FF), (0x900, 0x97F),
              (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF), (32, 32), (0x2581, 0x2581)]
    lines = []
    for _ in range(count):
        parts = [random.choice(ranges) for _ in range(random.randint(1, 8))]
        lines.append("".join(chr(random.randint(*part)) for part in parts for _ in range(random.randint(1, 12))))
    # A line's own end would be cut by either side's reader.
    return [line for line in lines if len(line.splitlines()) == 1]


def train(texts, folder):
    import sentencepiece

    corpus, ours = os.path.join(folder, "corpus.txt"), os.path.join(folder, "ours.model")
    with open(corpus, "w") as file:
        file.write("\n".join(texts))
    start = time.time()
    sentencepiece.SentencePieceTrainer.train(
        input=corpus, model_prefix=os.path.join(folder, "reference"), model_type="bpe", vocab_size=4096, split_digits=True,
        allow_whitespace_only_pieces=True, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.9995, max_sentence_length=10**8, minloglevel=2)
    reference = time.time() - start
    start = time.time()
    program("tokenize", "train", "--text", corpus, "--vocab-size", "4096", "--character-coverage", "0.9995", "--out", ours)
    taken = time.time() - start
    pieces = []
    for model in ("reference.model", "ours.model"):
        processor = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, model))
        pieces.append([processor.id_to_piece(i) for i in range(processor.vocab_size())])
    same = sum(a == b for a, b in zip(*pieces))
    print(f"training: {same} of {len(pieces[0])} pieces equal and in the same place; ours {taken:.2f} s, SentencePiece {reference:.2f} s")
    return ours


def ids_equal(tokenizer, folder):
    import sentencepiece

    lines = strings(10_000)
    file = os.path.join(folder, "lines.txt")
    with open(file, "w") as out:
        out.write("\n".join(lines) + "\n")
    ours = [[int(i) for i in line.split()] for line in program("tokenize", "encode", "--tokenizer", tokenizer, "--lines", file).splitlines()]
    reference = sentencepiece.SentencePieceProcessor(model_file=tokenizer).encode(lines)
    print(f"ids: {sum(a == b for a, b in zip(ours, reference))} of {len(lines)} random lines equal SentencePiece's")


def languages_equal(model, texts, folder):
    import fasttext

    lines = [line for text in texts for line in text.splitlines() if line.strip()][:1000]
    # Short pieces of lines in many states of completeness are harder than whole ones.
    lines = [line[: 5 + 7 * i % 200] for i, line in enumerate(lines)]
    file = os.path.join(folder, "languages.txt")
    with open(file, "w") as out:
        out.write("\n".join(lines) + "\n")
    ours = [line.split() for line in program("prepare", "language", "--model", model, file).splitlines()]
    reference = fasttext.load_model(model).f
    equal, largest = 0, 0.0
    for (label, probability), line in zip(ours, lines):
        ((expected, name),) = reference.predict(line + "\n", 1, 0.0, "strict")
        equal += label == name
        largest = max(largest, abs(float(probability) - expected))
    print(f"language: {equal} of {len(lines)} lines equal fastText's, probabilities within {largest:.1e}")


def c4_filter():
    from datatrove.pipeline.filters import C4QualityFilter

    return C4QualityFilter(min_num_sentences=-1, min_words_per_line=3)


def c4_part(texts):
    from datatrove.data import Document

    rules, kept = c4_filter(), 0
    for text in texts:
        document = Document(text=text, id="")
        if rules.filter(document) is True:
            kept += len(document.text)
    return kept


def best(work, rounds=3):
    times = []
    for _ in range(rounds):
        start = time.time()
        work()
        times.append(time.time() - start)
    return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--language")
    args = parser.parse_args()
    build = ["cargo", "build", "-q", "--release", "--example", "tokenize", "--example", "prepare"]
    subprocess.run(build, check=True, cwd=ROOT)
    with open(args.text) as file:
        texts = [json.loads(line)["text"] for line in file]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        trained = train(texts, folder)
        tokenizer = os.path.abspath(args.tokenizer or trained)
        ids_equal(tokenizer, folder)
        if args.language:
            languages_equal(args.language, texts, folder)
        results = os.path.join(folder, "results.jsonl")
        command = ["cargo", "bench", "-q", "--bench", "data", "--", "--text", os.path.abspath(args.text), "--tokenizer", tokenizer, "--json", results]
        if args.language:
            command += ["--language", os.path.abspath(args.language)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        ours = {}
        for line in open(results):
            result = json.loads(line)
            ours[result["what"]] = result
        rows = []

        parts = [texts[i :: 4 * CORES] for i in range(4 * CORES)]
        with Pool(CORES) as pool:
            pool.map(c4_part, [[]] * CORES)
            rows.append(("c4", "datatrove", megabytes / best(lambda: c4_part(texts)), megabytes / best(lambda: pool.map(c4_part, parts))))

        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        rows.append(("tokens", "sentencepiece", megabytes / best(lambda: processor.encode(texts, num_threads=1)),
                     megabytes / best(lambda: processor.encode(texts, num_threads=CORES))))
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        import tokenizers

        exported = os.path.join(folder, "exported")
        program("tokenize", "export", "--tokenizer", tokenizer, "--out", exported)
        hf = tokenizers.Tokenizer.from_file(os.path.join(exported, "tokenizer.json"))
        rows.append(("tokens", "tokenizers", megabytes / best(lambda: [hf.encode(text) for text in texts]),
                     megabytes / best(lambda: hf.encode_batch(texts))))
        if args.language:
            import fasttext

            model = fasttext.load_model(args.language).f
            lines = [text.replace("\n", " ") + "\n" for text in texts]
            one = megabytes / best(lambda: [model.predict(line, 1, 0.0, "strict") for line in lines])
            rows.append(("language", "fastText", one, float("nan")))

        print(f"\n{len(texts)} documents, {megabytes:.1f} MB; MB/s of one thread and of {CORES}\n")
        print("| what | ours | | other | | | ratio | |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
        for what, name, one, all_cores in rows:
            mine = ours[what]
            print(f"| {what} | {mine['one']:.1f} | {mine['all']:.1f} | {name} | {one:.1f} | {all_cores:.1f} | {mine['one'] / one:.2f} | {mine['all'] / all_cores:.2f} |")


if __name__ == "__main__":
    main()
