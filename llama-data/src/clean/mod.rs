//! Cleaning, source by source (paper, section 2.1). A rule takes a document and returns it cleaned, or drops it, and a [`Tally`] counts
//! what each rule dropped and trimmed. Every threshold stands in its module beside the paper's words and its origin.
//!
//! | source | module | rule of the paper |
//! | --- | --- | --- |
//! | CommonCrawl | [`ccnet`], [`crate::filter`] | line deduplication, language identification, language-model quality, reference classifier |
//! | C4 | [`c4`] | "heuristics such as presence of punctuation marks or the number of words and sentences" |
//! | GitHub | [`github`] | permissive licences; "line length or proportion of alphanumeric characters"; boilerplate such as headers |
//! | Wikipedia | [`wikitext`] | "remove hyperlinks, comments and other formatting boilerplate" |
//! | Gutenberg and Books3 | [`books`] | "removing books with more than 90% content overlap" |
//! | ArXiv | [`latex`] | nothing before the first section, no bibliography, no comments, macros expanded |
//! | StackExchange | [`html`] | "removed the HTML tags"; answers sorted by score when they are read |

pub mod books;
pub mod c4;
pub mod ccnet;
pub mod github;
pub mod html;
pub mod latex;
mod macros;
pub mod wikitext;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::source::Document;

/// A cleaning rule.
pub trait Clean: Send + Sync {
    /// The document, cleaned; `None` if it is dropped, which is counted in `tally` under the reason.
    fn clean(&self, document: Document, tally: &mut Tally) -> Option<Document>;
}

/// Documents, or parts of them, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// How many.
    pub number: u64,
    /// Bytes of UTF-8 text.
    pub bytes: u64,
}

impl Count {
    /// Counts one more.
    pub fn add(&mut self, bytes: usize) {
        self.number += 1;
        self.bytes += bytes as u64;
    }
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.number += other.number;
        self.bytes += other.bytes;
    }
}

/// What rules did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tally {
    /// Documents dropped, by reason.
    pub dropped: BTreeMap<String, Count>,
    /// Parts removed from documents that were kept, by reason.
    pub trimmed: BTreeMap<String, Count>,
}

impl Tally {
    /// Counts a dropped document of `bytes`, and drops it.
    pub fn drop(&mut self, reason: &str, bytes: usize) -> Option<Document> {
        entry(&mut self.dropped, reason).add(bytes);
        None
    }

    /// Counts a part of `bytes` that was removed.
    pub fn trim(&mut self, reason: &str, bytes: usize) {
        entry(&mut self.trimmed, reason).add(bytes);
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: &Self) {
        for (into, from) in [(&mut self.dropped, &other.dropped), (&mut self.trimmed, &other.trimmed)] {
            for (reason, count) in from {
                *entry(into, reason) += *count;
            }
        }
    }
}

fn entry<'a>(counts: &'a mut BTreeMap<String, Count>, reason: &str) -> &'a mut Count {
    if !counts.contains_key(reason) {
        counts.insert(reason.to_string(), Count::default());
    }
    counts.get_mut(reason).expect("it was inserted")
}

/// Joins lines: no space at their ends, at most one empty line between two, none at the start and the end.
pub(crate) fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut blank = 0;
    for line in text.lines().map(str::trim_end) {
        if line.is_empty() {
            blank += 1;
            continue;
        }
        if !out.is_empty() {
            out.push_str(if blank > 0 { "\n\n" } else { "\n" });
        }
        blank = 0;
        out.push_str(line);
    }
    out
}

/// A document of a text.
#[cfg(test)]
pub(crate) fn document(text: &str) -> Document {
    Document { text: text.into(), origin: "test".into(), meta: BTreeMap::new() }
}
