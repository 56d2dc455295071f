//! Books: Project Gutenberg's frame around a text is cut; near-duplicates (paper: "more than 90% content overlap") are removed over all
//! books by [`crate::dedup`].

use super::{Clean, Tally, tidy};
use crate::source::Document;

/// Cuts a book out of its frame and drops what is too short to be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Books {
    /// Characters a book has at least.
    pub min_chars: usize,
}

impl Default for Books {
    fn default() -> Self {
        Self { min_chars: 1000 }
    }
}

const STARTS: [&str; 3] = ["*** START OF", "***START OF", "*END*THE SMALL PRINT"];
const ENDS: [&str; 4] = ["*** END OF", "***END OF", "End of the Project Gutenberg", "End of Project Gutenberg"];

impl Clean for Books {
    fn clean(&self, mut document: Document, tally: &mut Tally) -> Option<Document> {
        let bytes = document.text.len();
        document.text = tidy(inner(&document.text));
        if document.text.chars().take(self.min_chars).count() < self.min_chars {
            return tally.drop("books: short", bytes);
        }
        if bytes > document.text.len() {
            tally.trim("books: frame and spaces", bytes - document.text.len());
        }
        Some(document)
    }
}

/// The text between the lines that mark its start and its end.
fn inner(text: &str) -> &str {
    let start = STARTS.iter().filter_map(|mark| text.find(mark)).min();
    let start = start.and_then(|at| Some(at + text[at..].find('\n')? + 1)).unwrap_or(0);
    let end = ENDS.iter().filter_map(|mark| text[start..].rfind(mark)).min();
    &text[start..end.map_or(text.len(), |end| start + end)]
}

#[cfg(test)]
mod tests {
    use super::super::document;
    use super::*;

    #[test]
    fn the_frame_goes() {
        let text = "The Project Gutenberg eBook\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n\n\nChapter 1  \r\nIt was.\n\n*** END OF THE PROJECT ***\nLicence";
        let books = Books { min_chars: 5 };
        let mut tally = Tally::default();
        assert_eq!(books.clean(document(text), &mut tally).unwrap().text, "Chapter 1\nIt was.");
        assert!(books.clean(document("abc"), &mut tally).is_none());
    }
}
