//! The report as a page: one file, no script, nothing to load.

use std::fmt::Write;

use super::report::{PipelineReport, ShardReport, SourceReport};
use crate::clean::Count;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}\
th:first-child,td:first-child{text-align:left}td:first-child{width:15rem}td.bar{width:38%}\
.bar div{height:.9rem;border-radius:2px}.kept{background:#2a7f62}.dropped{background:#c8553d}.trimmed{background:#e0a458}.tokens{background:#33658a}\
pre{background:#f6f6f6;padding:.8rem;overflow-x:auto;font-size:13px}";

/// The whole page.
pub(super) fn page(report: &PipelineReport) -> String {
    let mut out = format!(
        "<!doctype html><meta charset=utf-8><title>Prepared data</title><style>{STYLE}</style><h1>Prepared data</h1>\n"
    );
    overview(&mut out, report);
    for source in &report.sources {
        details(&mut out, source);
    }
    out
}

fn overview(out: &mut String, report: &PipelineReport) {
    out.push_str(
        "<table><tr><th>source<th>documents<th>text<th>kept<th>text kept<th>broken<th>tokens<th>bytes/token<th>share\n",
    );
    for source in &report.sources {
        let ShardReport { read, kept, broken, train_tokens, valid_tokens, .. } = source.total;
        let _ = writeln!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{broken}<td>{}<td>{:.2}<td>{:.1}%",
            escape(&source.name),
            read.number,
            megabytes(read.bytes),
            kept.number,
            megabytes(kept.bytes),
            train_tokens + valid_tokens,
            source.bytes_per_token(),
            100.0 * source.share,
        );
    }
    out.push_str("</table>\n<h2>Tokens</h2><table>\n");
    let tokens = |source: &SourceReport| source.total.train_tokens + source.total.valid_tokens;
    let most = report.sources.iter().map(tokens).max().unwrap_or(0);
    for source in &report.sources {
        bar(out, &source.name, "tokens", tokens(source), most, &tokens(source).to_string());
    }
    out.push_str("</table>\n");
}

fn details(out: &mut String, source: &SourceReport) {
    let ShardReport { read, kept, tally, broken, broken_records, .. } = &source.total;
    let _ = writeln!(out, "<h2>{}</h2><table>", escape(&source.name));
    let label = |count: &Count| format!("{} · {}", count.number, megabytes(count.bytes));
    bar(out, "kept", "kept", kept.bytes, read.bytes, &label(kept));
    for (class, counts) in [("dropped", &tally.dropped), ("trimmed", &tally.trimmed)] {
        for (reason, count) in counts {
            bar(out, reason, class, count.bytes, read.bytes, &label(count));
        }
    }
    out.push_str("</table>\n");
    if *broken > 0 {
        let _ = writeln!(out, "<p>{broken} broken records:<pre>");
        broken_records.iter().for_each(|record| {
            let _ = writeln!(out, "{}", escape(&record.to_string()));
        });
        out.push_str("</pre>\n");
    }
}

fn bar(out: &mut String, name: &str, class: &str, value: u64, whole: u64, label: &str) {
    let percent = 100.0 * value as f64 / whole.max(1) as f64;
    let _ = writeln!(
        out,
        "<tr><td>{}<td class=bar><div class={class} style=\"width:{:.2}%\"></div><td>{percent:.1}%<td>{label}",
        escape(name),
        percent.min(100.0)
    );
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
