//! HTML to plain text, with the paragraphs, lists and code blocks it had: the bodies of StackExchange posts ("we [..] removed the
//! HTML tags from text", paper, section 2.1) and HTML pages in WARC files.

use html5gum::emitters::default::DefaultEmitter;
use html5gum::{Token, Tokenizer};

use super::{Clean, Tally};
use crate::source::Document;

/// Turns documents of HTML into text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Html;

impl Clean for Html {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let before = document.text.len();
        document.text = to_text(&document.text);
        match document.text.is_empty() {
            true => tally.drop("html: no text", before),
            false => Some(document),
        }
    }
}

/// Elements whose content is not text of the page.
const HIDDEN: [&[u8]; 11] = [
    b"script",
    b"style",
    b"head",
    b"noscript",
    b"template",
    b"svg",
    b"math",
    b"object",
    b"iframe",
    b"select",
    b"button",
];
/// Elements that begin and end a paragraph.
const PARAGRAPH: [&[u8]; 22] = [
    b"p",
    b"div",
    b"h1",
    b"h2",
    b"h3",
    b"h4",
    b"h5",
    b"h6",
    b"ul",
    b"ol",
    b"dl",
    b"blockquote",
    b"table",
    b"section",
    b"article",
    b"header",
    b"footer",
    b"form",
    b"figure",
    b"main",
    b"nav",
    b"hr",
];
/// Elements that begin and end a line.
const LINE: [&[u8]; 7] = [b"tr", b"dt", b"dd", b"option", b"caption", b"figcaption", b"address"];

/// The text of a page.
///
/// ```
/// use llama_data::clean::html::to_text;
///
/// assert_eq!(to_text("<p>a &lt; b</p><ul><li>one<li>two</ul><pre>x\n  y</pre>"), "a < b\n\n- one\n- two\n\nx\n  y");
/// ```
pub fn to_text(html: &str) -> String {
    let mut emitter = DefaultEmitter::default();
    emitter.naively_switch_states(true);
    let mut out = Text::default();
    // Depth inside a hidden element of one name; nested ones of other names do not count.
    let mut hidden: Option<(Vec<u8>, usize)> = None;
    let mut preformatted = 0usize;
    let Ok(tokens) = Tokenizer::new_with_emitter(html, emitter).collect::<Result<Vec<_>, _>>();
    for token in tokens {
        match token {
            Token::StartTag(tag) => {
                let name: &[u8] = &tag.name;
                match &mut hidden {
                    Some((inside, depth)) => *depth += usize::from(inside == name && !tag.self_closing),
                    None if HIDDEN.contains(&name) && !tag.self_closing => hidden = Some((name.to_vec(), 1)),
                    None => match name {
                        b"br" => out.raw("\n"),
                        b"li" => {
                            out.line();
                            out.raw("- ");
                        }
                        b"td" | b"th" => out.collapsed(" "),
                        b"pre" => {
                            out.paragraph();
                            preformatted += 1;
                        }
                        _ if PARAGRAPH.contains(&name) => out.paragraph(),
                        _ if LINE.contains(&name) => out.line(),
                        _ => {}
                    },
                }
            }
            Token::EndTag(tag) => {
                let name: &[u8] = &tag.name;
                match &mut hidden {
                    Some((inside, depth)) => {
                        *depth -= usize::from(inside == name);
                        if *depth == 0 {
                            hidden = None;
                        }
                    }
                    None => match name {
                        b"pre" => {
                            out.paragraph();
                            preformatted = preformatted.saturating_sub(1);
                        }
                        b"li" => out.line(),
                        _ if PARAGRAPH.contains(&name) => out.paragraph(),
                        _ if LINE.contains(&name) => out.line(),
                        _ => {}
                    },
                }
            }
            Token::String(text) if hidden.is_none() => {
                let text = String::from_utf8_lossy(&text);
                match preformatted {
                    0 => out.collapsed(&text),
                    _ => out.raw(&text),
                }
            }
            _ => {}
        }
    }
    super::tidy(&out.text)
}

/// Replaces character references and removes tags; the rest, spaces and line ends included, stays as it is.
pub(crate) fn unescape(text: &str) -> String {
    if !text.contains(['<', '&']) {
        return text.to_string();
    }
    let mut out = String::with_capacity(text.len());
    let Ok(tokens) = Tokenizer::new(text).collect::<Result<Vec<_>, _>>();
    for token in tokens {
        match token {
            Token::String(text) => out.push_str(&String::from_utf8_lossy(&text)),
            Token::StartTag(tag) if *tag.name == b"br"[..] => out.push('\n'),
            _ => {}
        }
    }
    out
}

#[derive(Default)]
struct Text {
    text: String,
}

impl Text {
    fn raw(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Appends text with its runs of white space as one space, and none at the start of a line.
    fn collapsed(&mut self, text: &str) {
        for c in text.chars() {
            if !c.is_ascii_whitespace() {
                self.text.push(c);
            } else if !self.text.is_empty() && !self.text.ends_with([' ', '\n']) {
                self.text.push(' ');
            }
        }
    }

    fn line(&mut self) {
        if !self.text.is_empty() && !self.text.ends_with('\n') {
            self.text.push('\n');
        }
    }

    fn paragraph(&mut self) {
        self.line();
        if !self.text.is_empty() && !self.text.ends_with("\n\n") {
            self.text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_goes_and_structure_stays() {
        let html = "<html><head><title>t</title></head><body><!-- c --><h1>Head</h1>\n<p>One\n  two <a href=\"x\">link</a><br/>next</p>\
            <script>if (a < b) { </p> }</script><blockquote><p>said</p></blockquote><pre><code>a  b\n &amp;c</code></pre>\
            <table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>&eacute;&nbsp;&#x41;</body></html>";
        let text = "Head\n\nOne two link\nnext\n\nsaid\n\na  b\n &c\n\n1 2\n3\n\né\u{a0}A";
        assert_eq!(to_text(html), text);
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(html in "(<(/)?(p|pre|li|script|svg|table|!--)( a=.)?>?|&(amp|#x)?;?|[<>&a \né]){0,40}") {
            to_text(&html);
            unescape(&html);
        }
    }

    #[test]
    fn broken_html_is_read_as_far_as_it_goes() {
        assert_eq!(to_text("<p>a<b>c</p></div></i>d<"), "ac\n\nd<");
        assert_eq!(to_text("<svg><svg></svg>x</svg>y"), "y");
        assert_eq!(unescape("a &amp; b <ref name=x>c</ref>\n d<br>e"), "a & b c\n d\ne");
    }
}
