#!/usr/bin/env python3
"""The results of benches side by side: one table for each bench, a column for each backend or other program, and a picture.

    cargo bench --bench training -- --json results.jsonl
    cargo bench --features vulkan --bench training -- --device vulkan --json results.jsonl
    python3 benches/compare_torch.py --json results.jsonl
    python3 benches/table.py results.jsonl --svg results.svg

Files of `--json` from the benches, `compare_torch.py` and `compare_inference.py` can be
given in any number; of equal measurements the last one counts. In brackets is the rate as a multiple of the first column's.
Needs nothing but Python.
"""
import argparse, html, json, sys


class Section:
    """The cells of one table: by what was measured, then by who did."""

    def __init__(self, title, digits, less=False):
        self.title, self.digits, self.less = title, digits, less
        self.rows, self.columns = {}, []

    def add(self, row, column, value):
        if column not in self.columns:
            self.columns.append(column)
        self.rows.setdefault(row, {})[column] = value

    def ratio(self, value, first):
        """How many times as good."""
        return first / value if self.less else value / first

    def text(self, value):
        return f"{value:,.{self.digits}f}"

    def markdown(self):
        lines = [f"**{self.title}**", "", "| | " + " | ".join(self.columns) + " |", "| --- |" + " ---: |" * len(self.columns)]
        for row, cells in self.rows.items():
            first = cells.get(self.columns[0])
            line = f"| {row} |"
            for column in self.columns:
                value = cells.get(column)
                ratio = f" ({self.ratio(value, first):.2f})" if value and first and column != self.columns[0] else ""
                line += f" {self.text(value)}{ratio} |" if value is not None else " |"
            lines.append(line)
        return "\n".join(lines) + "\n"


def read(paths):
    """The sections of all lines of the files, in the order of their first line."""
    sections = {}

    def add(title, digits, row, column, value, less=False):
        sections.setdefault(title, Section(title, digits, less)).add(row, column, value)

    def line(r):
        bench, device = r["bench"], r.get("device", "CPU")
        if bench == "data":
            add("Text, MB/s", 1, r["what"], "one thread", r["one"])
            add("Text, MB/s", 1, r["what"], "all threads", r["all"])
        elif bench == "operations":
            row = f"{r['operation']} {r['shape']}"
            add("Operations with their gradients, ms", 2, row, device, r["ours_ms"], less=True)
            add("Operations with their gradients, ms", 2, row, f"{device}, plain Burn", r["plain_ms"], less=True)
        elif bench == "products":
            row = f"{r['size']} {r['weight']} {r['product']}, {r['rows']} rows"
            for kind in ("f32", "bf16"):
                add("Products, GFLOP/s", 0, row, f"{device} {kind}", r[f"{kind}_gflops"])
            add("Products, GFLOP/s", 0, row, f"{device}, plain Burn f32", r["plain_gflops"])
        elif bench == "training":
            row = f"{r['size']} {r['precision']}, {r['batch']} x {r['seq_len']}"
            if r.get("recompute", "selective") != "selective":
                row += f", recompute {r['recompute']}"
            add("Training, tokens/s", 0, row, device, r["tokens_per_second"])
            add("Forward passes with all logits, tokens/s", 0, row, device, r["forward_tokens_per_second"])
            add("Training, memory in MB", 0, row, device, r["memory_bytes"] / 1e6, less=True)
        elif bench == "decoding":
            row = f"{r['model']} {r['weights']}"
            add("Reading a prompt of 128, tokens/s", 0, row, device, r["prefill_tokens_per_second"])
            add("Decoding, tokens/s", 1, row, device, r["tokens_per_second"])
        else:
            raise KeyError(f"no bench is called {bench}")

    for path in paths:
        with open(path) as results:
            for number, text in enumerate(results, 1):
                try:
                    line(json.loads(text))
                except (KeyError, TypeError, ValueError) as error:
                    sys.exit(f"{path}, line {number}: not a result of these benches: {error}")
    return list(sections.values())


COLORS = ["#2f6f9f", "#d98c3f", "#6a9a4f", "#a05a8c", "#8a8a8a", "#b5534a"]
LABELS, BARS, NUMBERS, BAR, LINE = 250, 330, 120, 12, 15


def svg(sections):
    """Bars, each as long as its share of the longest in the row."""
    width, parts, y = LABELS + BARS + NUMBERS, [], 0
    columns = list(dict.fromkeys(column for section in sections for column in section.columns))
    color = {column: COLORS[i % len(COLORS)] for i, column in enumerate(columns)}

    def text(x, y, content, extra=""):
        parts.append(f'<text x="{x:.0f}" y="{y:.0f}" {extra}>{html.escape(content)}</text>')

    for section in sections:
        y += 28
        less = " (less is better)" if section.less else ""
        text(8, y, section.title + less, 'font-weight="bold" font-size="14"')
        x = LABELS
        y += 20
        for column in section.columns:
            parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{color[column]}"/>')
            text(x + 14, y, column)
            x += 30 + 7 * len(column)
        y += 8
        for row, cells in section.rows.items():
            most = max(cells.values()) or 1
            text(LABELS - 8, y + LINE * len(cells) / 2 + 4, row, 'text-anchor="end"')
            for column in section.columns:
                if column not in cells:
                    continue
                length = max(1, BARS * cells[column] / most)
                parts.append(f'<rect x="{LABELS}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color[column]}"/>')
                text(LABELS + length + 5, y + BAR - 2, section.text(cells[column]))
                y += LINE
            y += 7
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 8}" width="{width}" height="{y + 8}" '
    style = 'font-family="sans-serif" font-size="11" fill="#222">'
    return head + style + '<rect width="100%" height="100%" fill="white"/>' + "\n".join(parts) + "</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="files of JSON lines")
    parser.add_argument("--svg", help="write the picture there")
    parser.add_argument("--only", nargs="+", help="only tables whose title contains one of these")
    args = parser.parse_args()
    sections = [s for s in read(args.results) if not args.only or any(o.lower() in s.title.lower() for o in args.only)]
    print("\n".join(section.markdown() for section in sections))
    if args.svg:
        with open(args.svg, "w") as picture:
            picture.write(svg(sections))


if __name__ == "__main__":
    main()
