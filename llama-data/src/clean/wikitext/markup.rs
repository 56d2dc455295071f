//! Links, templates and tables.

use std::collections::HashMap;

use super::names::HIDDEN_LINKS;

/// Wikitext with the partner of every bracket, found in one pass, so that no text is scanned more than once a level.
pub(super) struct Markup<'a> {
    text: &'a str,
    /// Start of each `{{`, `{|` and `[[` that has an end, with the start of its end.
    ends: HashMap<usize, usize>,
}

/// Brackets inside brackets, at most; deeper ones go.
const MAX_DEPTH: usize = 40;

impl<'a> Markup<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        let bytes = text.as_bytes();
        let mut ends = HashMap::new();
        let mut open: Vec<(u8, usize)> = Vec::new();
        let mut at = 0;
        while at + 1 < bytes.len() {
            let pair = (bytes[at], bytes[at + 1]);
            let opens = match pair {
                (b'{', b'{') => Some(b'}'),
                (b'{', b'|') if at == 0 || matches!(bytes[at - 1], b'\n' | b':' | b' ') => Some(b'|'),
                (b'[', b'[') => Some(b']'),
                _ => None,
            };
            let closes = match pair {
                (b'}', b'}') => Some(b'}'),
                (b'|', b'}') => Some(b'|'),
                (b']', b']') => Some(b']'),
                _ => None,
            };
            if let Some(close) = opens {
                open.push((close, at));
                at += 2;
            } else if let Some(place) = closes.and_then(|close| open.iter().rposition(|(wanted, _)| *wanted == close)) {
                // `|}}` ends a template with an empty argument, unless a table is open inside it.
                let inner_table = closes == Some(b'|') && bytes.get(at + 2) == Some(&b'}') && place + 1 < open.len();
                if inner_table {
                    at += 1;
                    continue;
                }
                // What was opened inside and not closed stays without an end.
                ends.insert(open[place].1, at);
                open.truncate(place);
                at += 2;
            } else {
                at += 1;
            }
        }
        Self { text, ends }
    }

    pub(super) fn render(&self) -> String {
        let mut out = String::with_capacity(self.text.len());
        self.range(0, self.text.len(), 0, &mut out);
        out
    }

    /// Appends the text of a part.
    fn range(&self, start: usize, end: usize, depth: usize, out: &mut String) {
        let bytes = self.text.as_bytes();
        let (mut at, mut plain) = (start, start);
        while at < end {
            let skip = match bytes[at] {
                b'{' if self.ends.get(&at).is_some_and(|&close| close < end) => {
                    out.push_str(&self.text[plain..at]);
                    let close = self.ends[&at];
                    if bytes[at + 1] == b'{' && depth < MAX_DEPTH {
                        self.template(at + 2, close, depth, out);
                    }
                    close + 2
                }
                b'[' if self.ends.get(&at).is_some_and(|&close| close < end) => {
                    out.push_str(&self.text[plain..at]);
                    let close = self.ends[&at];
                    if depth < MAX_DEPTH {
                        self.link(at + 2, close, depth, out);
                    }
                    close + 2
                }
                b'[' if is_url(&self.text[at + 1..end]) => {
                    out.push_str(&self.text[plain..at]);
                    // `[http://x text]` is its text.
                    let close = self.text[at..end].find([']', '\n']).map_or(end, |close| at + close);
                    if let Some(space) = self.text[at..close].find(' ') {
                        self.range(at + space + 1, close, depth + 1, out);
                    }
                    (close + usize::from(bytes.get(close) == Some(&b']'))).min(end)
                }
                b'\'' if self.text[at..end].starts_with("''") => {
                    out.push_str(&self.text[plain..at]);
                    at + bytes[at..end].iter().take(5).take_while(|&&b| b == b'\'').count()
                }
                _ => {
                    at += 1;
                    continue;
                }
            };
            at = skip;
            plain = skip;
        }
        out.push_str(&self.text[plain.min(end)..end]);
    }

    /// The arguments of a template or link: its parts between `|` that stand in no inner bracket.
    fn arguments(&self, start: usize, end: usize) -> Vec<(usize, usize)> {
        let bytes = self.text.as_bytes();
        let mut parts = Vec::new();
        let (mut at, mut from) = (start, start);
        while at < end {
            match self.ends.get(&at).filter(|&&close| close < end) {
                Some(close) => at = close + 2,
                None => {
                    if bytes[at] == b'|' {
                        parts.push((from, at));
                        from = at + 1;
                    }
                    at += 1;
                }
            }
        }
        parts.push((from.min(end), end));
        parts
    }

    /// The few templates that stand for words of a sentence.
    fn template(&self, start: usize, end: usize, depth: usize, out: &mut String) {
        let arguments = self.arguments(start, end);
        let name = self.text[arguments[0].0..arguments[0].1].trim().to_lowercase();
        // Arguments without a name.
        let plain: Vec<(usize, usize)> =
            arguments[1..].iter().copied().filter(|&(from, to)| !self.text[from..to].contains('=')).collect();
        let mut show = |argument: Option<&(usize, usize)>| {
            if let Some(&(from, to)) = argument {
                self.range(from, to, depth + 1, out);
            }
        };
        match name.as_str() {
            "lang" | "transl" | "transliteration" | "abbr" if name == "abbr" => show(plain.first()),
            "lang" | "transl" | "transliteration" => show(plain.last()),
            "nowrap" | "nobr" | "small" | "smallcaps" | "sc" | "em" | "strong" | "as of" | "okina" | "linktext"
            | "wikt-lang" | "ill" | "interlanguage link" | "quote" | "blockquote" | "cquote" | "quotation"
            | "section link" | "visible anchor" => {
                if name == "as of" {
                    out.push_str("As of ");
                }
                if let Some(&(from, to)) = plain.first() {
                    self.range(from, to, depth + 1, out);
                }
            }
            "convert" | "cvt" => {
                show(plain.first());
                if let Some(&(from, to)) = plain.get(1) {
                    out.push(' ');
                    self.range(from, to, depth + 1, out);
                }
            }
            "ndash" | "spaced ndash" | "snd" | "–" => out.push_str(" – "),
            "mdash" | "—" => out.push('—'),
            "nbsp" | "space" | "spaces" => out.push(' '),
            "'" => out.push('\''),
            "=" => out.push('='),
            "!" => out.push('|'),
            _ => {}
        }
    }

    /// A link is its text, or its target where it has none.
    fn link(&self, start: usize, end: usize, depth: usize, out: &mut String) {
        let arguments = self.arguments(start, end);
        let target = self.text[arguments[0].0..arguments[0].1].trim();
        if let Some((namespace, _)) = target.split_once(':') {
            let namespace = namespace.trim().to_lowercase();
            // `[[:File:x]]` is a link to a file, and not the file.
            let language = arguments.len() == 1
                && (2..=3).contains(&namespace.len())
                && namespace.bytes().all(|b| b.is_ascii_lowercase());
            if HIDDEN_LINKS.contains(&namespace.as_str()) || language {
                return;
            }
        }
        let (from, to) = arguments[arguments.len() - 1];
        match arguments.len() {
            1 => out.push_str(target.trim_start_matches(':')),
            _ => self.range(from, to, depth + 1, out),
        }
    }
}

fn is_url(text: &str) -> bool {
    ["http://", "https://", "//", "ftp://", "mailto:"].iter().any(|scheme| text.starts_with(scheme))
}
