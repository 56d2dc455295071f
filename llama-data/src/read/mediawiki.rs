//! Wikipedia's `pages-articles.xml`: the pages of the article namespace that are no redirects.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::PathBuf;

use super::{Record, broken_record, too_long, xml};
use crate::input::{Line, Lines};
use crate::source::Document;

pub(super) struct MediaWiki {
    path: PathBuf,
    lines: Lines<Box<dyn BufRead>>,
    line: Vec<u8>,
    page: Vec<u8>,
}

impl MediaWiki {
    pub(super) fn new(path: PathBuf, lines: Lines<Box<dyn BufRead>>) -> Self {
        Self { path, lines, line: Vec::new(), page: Vec::new() }
    }

    /// Collects the lines of the next `<page>`. In an export the tags stand on lines of their own, and page text has its `<` escaped.
    fn page(&mut self) -> Option<Result<u64, (u64, String)>> {
        self.page.clear();
        let mut start = None;
        let mut excess = false;
        loop {
            match self.lines.next(&mut self.line) {
                None => return start.map(|start| Err((start, "the file ends inside a page".into()))),
                Some(Line::Failed(offset, error)) => return Some(Err((offset, error.to_string()))),
                Some(Line::TooLong(_)) => excess = start.is_some(),
                Some(Line::Read(offset)) => {
                    let line = self.line.trim_ascii();
                    if line.starts_with(b"<page>")
                        && let Some(start) = start.replace(offset)
                    {
                        return Some(Err((start, "a page begins inside another".into())));
                    }
                    if let Some(start) = start {
                        match self.page.len() + self.line.len() <= self.lines.limit() {
                            true => self.page.extend_from_slice(&self.line),
                            false => excess = true,
                        }
                        if line.ends_with(b"</page>") {
                            return Some(match excess {
                                false => Ok(start),
                                true => Err((start, too_long(self.lines.limit()))),
                            });
                        }
                    }
                }
            }
        }
    }
}

impl Iterator for MediaWiki {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        loop {
            let offset = match self.page()? {
                Ok(offset) => offset,
                Err((offset, reason)) => return broken_record(&self.path, offset, reason),
            };
            let mut page = match xml::texts(&self.page) {
                Ok(page) => page,
                Err(reason) => return broken_record(&self.path, offset, reason),
            };
            if page.get("page/ns").is_some_and(|namespace| namespace != "0") || page.contains_key("page/redirect@title")
            {
                continue;
            }
            let (Some(text), Some(title)) = (page.remove("page/revision/text"), page.remove("page/title")) else {
                return broken_record(&self.path, offset, "the page has no title or no text".into());
            };
            let origin = format!("{}:{title}", self.path.display());
            let mut meta = BTreeMap::from([("title".to_string(), title)]);
            meta.extend(page.remove("page/id").map(|id| ("id".to_string(), id)));
            return Some(Ok(Document { text, origin, meta }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::super::tests::read_bytes;

    fn page(title: &str, namespace: u32, text: &str) -> String {
        format!(
            "  <page>\n    <title>{title}</title>\n    <ns>{namespace}</ns>\n    <revision>\n      <text xml:space=\"preserve\">{text}</text>\n    </revision>\n  </page>\n"
        )
    }

    #[test]
    fn articles_are_read_and_broken_pages_reported() {
        let file = [
            "<mediawiki>\n".to_string(),
            page("A &amp; B", 0, "'''A''' &lt;ref&gt;x&lt;/ref&gt; &#65;"),
            page("Talk:A", 1, "no article"),
            page("Bomb", 0, "&lol9;"),
            page("Long", 0, &"x\n".repeat(1 << 16)),
            page("B", 0, "second"),
            "  <page>\n    <title>C</title>\n".to_string(),
        ]
        .concat();
        let (documents, broken) = read_bytes(Format::MediaWiki, "wiki.xml", file.as_bytes());
        assert_eq!(documents.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), ["'''A''' <ref>x</ref> A", "second"]);
        assert_eq!(documents[0].meta["title"], "A & B");
        assert_eq!(broken.len(), 3, "{broken:?}");
        assert!(broken[0].reason.contains("lol9"), "{broken:?}");
        assert!(broken[1].reason.contains("longer"), "{broken:?}");
    }
}
