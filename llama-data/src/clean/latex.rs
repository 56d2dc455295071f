//! ArXiv's LaTeX: "we removed everything before the first section, as well as the bibliography. We also removed the comments from
//! the .tex files, and inline-expanded definitions and macros written by users to increase consistency across papers" (paper, section 2.1,
//! after Lewkowycz et al., 2022).

use super::macros::{Macros, command_end};
use super::{Clean, Tally, tidy};
use crate::source::Document;

/// Cleans papers; a paper without a section is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arxiv {
    /// Characters a paper has at least.
    pub min_chars: usize,
}

impl Default for Arxiv {
    fn default() -> Self {
        Self { min_chars: 200 }
    }
}

/// Commands that begin the text proper.
const SECTIONS: [&str; 4] = ["\\section", "\\chapter", "\\subsection", "\\part"];
/// Environments whose text is kept as it stands.
const VERBATIM: [&str; 4] = ["verbatim", "lstlisting", "Verbatim", "minted"];

impl Clean for Arxiv {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        let text = strip_comments(&document.text);
        tally.trim("arxiv: comments", bytes - text.len());
        let (macros, text) = Macros::take(&text);
        let Some(start) = first_section(&text) else {
            return tally.drop("arxiv: no section", bytes);
        };
        tally.trim("arxiv: before the first section", start);
        let body = without_end(&text[start..]);
        let body = without_bibliography(body, tally);
        // `\xspace` is for macros: it puts back the space that TeX takes after a command, and here none was taken.
        document.text = tidy(&macros.expand(&body).replace("\\xspace", ""));
        if document.text.chars().take(self.min_chars).count() < self.min_chars {
            return tally.drop("arxiv: short", bytes);
        }
        Some(document)
    }
}

fn first_section(text: &str) -> Option<usize> {
    // A preamble may define what sections look like.
    let mut from = text.find("\\begin{document}").unwrap_or(0);
    while let Some(at) = text[from..].find('\\') {
        let start = from + at;
        let end = command_end(text, start);
        if SECTIONS.contains(&text[start..end].trim_end_matches('*')) {
            return Some(start);
        }
        from = end;
    }
    None
}

fn without_end(text: &str) -> &str {
    text.find("\\end{document}").map_or(text, |end| &text[..end])
}

/// Removes `thebibliography` and the commands that print one. What follows, an appendix for example, stays.
fn without_bibliography(text: &str, tally: &mut Tally) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let starts =
        ["\\begin{thebibliography}", "\\begin{references}", "\\bibliography", "\\printbibliography", "\\nocite"];
    loop {
        let found = starts.iter().filter_map(|start| Some((rest.find(start)?, *start))).min();
        let Some((at, start)) = found else {
            out.push_str(rest);
            return out;
        };
        let end = match start.strip_prefix("\\begin") {
            Some(environment) => {
                let close = format!("\\end{environment}");
                rest[at..].find(&close).map_or(rest.len(), |end| at + end + close.len())
            }
            None => argument_end(rest, command_end(rest, at)),
        };
        out.push_str(&rest[..at]);
        tally.trim("arxiv: bibliography", end - at);
        rest = &rest[end..];
    }
}

/// The end of the bracketed arguments that follow at once.
fn argument_end(text: &str, mut at: usize) -> usize {
    for (open, close) in [('[', ']'), ('{', '}')] {
        if text[at..].starts_with(open) {
            at = text[at..].find(close).map_or(at, |end| at + end + 1);
        }
    }
    at
}

/// Removes comments: from a `%` that no backslash precedes to the end of its line, and the whole line where nothing else stands on it.
/// Listings keep theirs.
///
/// ```
/// use llama_data::clean::latex::strip_comments;
///
/// assert_eq!(strip_comments("50\\% of % half\n% all\nit"), "50\\% of\nit");
/// ```
pub fn strip_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut verbatim: Option<String> = None;
    for line in text.split_inclusive('\n') {
        if let Some(end) = &verbatim {
            out.push_str(line);
            if line.contains(end) {
                verbatim = None;
            }
            continue;
        }
        let environment = VERBATIM.iter().find(|name| line.contains(&format!("\\begin{{{name}}}")));
        verbatim = environment.map(|name| format!("\\end{{{name}}}")).filter(|end| !line.contains(end));
        match comment_start(line) {
            None => out.push_str(line),
            Some(start) => {
                let before = line[..start].trim_end();
                if !before.is_empty() {
                    out.push_str(before);
                    out.push('\n');
                }
            }
        }
    }
    out
}

fn comment_start(line: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in line.bytes().enumerate() {
        match byte {
            b'%' if !escaped => return Some(at),
            b'\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::document;
    use super::*;

    #[test]
    fn a_paper_is_its_sections() {
        let paper = "\\documentclass{article}\n\\newcommand{\\R}{\\mathbb{R}} % reals\n\\newcommand{\\norm}[2][2]{\\|#2\\|_{#1}}\n\
            \\def\\pair#1#2{(#1, #2)}\n\\begin{document}\n\\title{T}\\maketitle\n\\begin{abstract}A\\end{abstract}\n\\section{One}\n\
            Let $x \\in \\R$, $\\norm{x}$, $\\norm[1]{\\pair x{y}}$. % why\n% gone\nEnd.\n\\bibliographystyle{a}\\bibliography{refs}\n\
            \\begin{thebibliography}{9}\\bibitem{a} A\\end{thebibliography}\n\\appendix\n\\section{Proof}\nText\n\\end{document}\nafter";
        let mut tally = Tally::default();
        let text = Arxiv { min_chars: 10 }.clean(document(paper), &mut tally).unwrap().text;
        assert_eq!(
            text,
            "\\section{One}\nLet $x \\in \\mathbb{R}$, $\\|x\\|_{2}$, $\\|(x, y)\\|_{1}$.\nEnd.\n\n\\appendix\n\\section{Proof}\nText"
        );
        assert!(Arxiv::default().clean(document("no section"), &mut tally).is_none());
    }

    #[test]
    fn listings_keep_their_comments() {
        let text = "\\begin{lstlisting}\na % b\n\\end{lstlisting}\nc % d\n\\\\% e\n";
        assert_eq!(strip_comments(text), "\\begin{lstlisting}\na % b\n\\end{lstlisting}\nc\n\\\\\n");
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(\\\\(def|newcommand|section|x|begin)|[{}\\[\\]#1%a \né])*") {
            Arxiv::default().clean(document(&text), &mut Tally::default());
        }
    }
}
