//! LaTeX papers: arXiv's source tars (a tar of papers, each a gzipped tar or a single gzipped file), other tars, and folders.
//!
//! Nothing is unpacked to the disk: a paper's files are held in memory up to the limit, and `\input` finds only those.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{Broken, Record, Records, too_long};
use crate::DataError;
use crate::clean::latex;
use crate::input::{self, Limits};
use crate::source::Document;

/// Files of a paper by their path inside it.
type Paper = BTreeMap<String, String>;

/// `\input` inside `\input`, at most.
const MAX_DEPTH: usize = 16;

pub(super) fn read(path: &Path, limits: Limits) -> Result<Records, DataError> {
    if path.is_dir() {
        let mut papers = Vec::new();
        folders(path, &mut papers)?;
        return Ok(Box::new(papers.into_iter().map(move |folder| from_folder(&folder, limits))));
    }
    // A tar is read entry by entry on the way; its iterator borrows the archive, so the papers of a file are passed on from a thread.
    let owned = path.to_path_buf();
    std::fs::File::open(path).map_err(|error| DataError::io(path, error))?;
    let (sender, receiver) = std::sync::mpsc::sync_channel(4);
    std::thread::spawn(move || {
        // Ends early when the receiver is gone.
        let _ = from_file(&owned, limits, &mut |record| sender.send(record).is_ok());
    });
    Ok(Box::new(receiver.into_iter()))
}

/// The folders with `.tex` files that have none above them.
fn folders(folder: &Path, papers: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let io = |error| DataError::io(folder, error);
    let mut inner = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if entry.file_type().map_err(io)?.is_dir() {
            inner.push(entry.path());
        } else if entry.path().extension().is_some_and(|extension| extension == "tex") {
            papers.push(folder.into());
            return Ok(());
        }
    }
    inner.sort();
    inner.iter().try_for_each(|inner| folders(inner, papers))
}

fn from_folder(folder: &Path, limits: Limits) -> Record {
    let broken = |reason: String| Broken { path: folder.into(), offset: Some(0), reason };
    let mut paper = Paper::new();
    let mut left = limits.record;
    let mut open = vec![folder.to_path_buf()];
    while let Some(inner) = open.pop() {
        for entry in std::fs::read_dir(&inner).map_err(|error| broken(error.to_string()))? {
            let entry = entry.map_err(|error| broken(error.to_string()))?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(|error| broken(error.to_string()))?);
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_file() && is_tex(&path) {
                let bytes = std::fs::read(&path).map_err(|error| broken(format!("{}: {error}", path.display())))?;
                left = left.checked_sub(bytes.len()).ok_or_else(|| broken(too_long(limits.record)))?;
                let name = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
                paper.insert(name, decode(bytes));
            }
        }
    }
    assemble(&folder.display().to_string(), paper).map_err(broken)
}

/// Sends the papers of a file; an error means that the receiver is gone.
fn from_file(path: &Path, limits: Limits, send: &mut dyn FnMut(Record) -> bool) -> Result<(), ()> {
    let broken = |offset: u64, reason: String| Err(Broken { path: path.into(), offset: Some(offset), reason });
    let mut send = |record| if send(record) { Ok(()) } else { Err(()) };
    let stream = match input::open(path, limits) {
        Ok(stream) => stream,
        Err(error) => return send(broken(0, error.to_string())),
    };
    let origin = path.display().to_string();
    match unpack(stream, limits) {
        Unpacked::Single(Ok(text)) => {
            send(assemble(&origin, Paper::from([("main.tex".into(), text)])).or_else(|e| broken(0, e)))
        }
        Unpacked::Single(Err(reason)) => send(broken(0, reason)),
        Unpacked::Tar(mut archive) => {
            let entries = match archive.entries() {
                Ok(entries) => entries,
                Err(error) => return send(broken(0, error.to_string())),
            };
            // Files that are not papers of their own belong to one paper: the tar itself.
            let mut own = Paper::new();
            let mut left = limits.record;
            let mut offset = 0;
            for entry in entries {
                let mut entry = match entry {
                    Ok(entry) => entry,
                    Err(error) => {
                        send(broken(offset, error.to_string()))?;
                        break;
                    }
                };
                offset = entry.raw_header_position();
                let name = entry.path().map(|name| name.display().to_string()).unwrap_or_default();
                if !entry.header().entry_type().is_file() {
                    continue;
                }
                if is_tex(Path::new(&name)) {
                    let text = text(&mut entry, left);
                    match text {
                        Ok(text) => {
                            left -= text.len();
                            own.insert(name, text);
                        }
                        Err(reason) => send(broken(offset, format!("{name}: {reason}")))?,
                    }
                } else if name.ends_with(".gz") || name.ends_with(".tar") {
                    let inner = input::decompress(&mut entry, limits).map_err(|error| error.to_string());
                    let paper = inner.and_then(|inner| paper(inner, limits));
                    let record = paper.and_then(|paper| assemble(&format!("{origin}:{name}"), paper));
                    send(record.or_else(|reason| broken(offset, format!("{name}: {reason}"))))?;
                }
            }
            if own.is_empty() {
                return Ok(());
            }
            send(assemble(&origin, own).or_else(|reason| broken(0, reason)))
        }
    }
}

enum Unpacked<R: Read> {
    Single(Result<String, String>),
    Tar(tar::Archive<std::io::Chain<std::io::Cursor<Vec<u8>>, R>>),
}

/// A tar, known by the magic of its first header, or a single file.
fn unpack<R: Read>(mut stream: R, limits: Limits) -> Unpacked<R> {
    let mut start = Vec::new();
    if let Err(error) = stream.by_ref().take(512).read_to_end(&mut start) {
        return Unpacked::Single(Err(error.to_string()));
    }
    let is_tar = start.get(257..262) == Some(b"ustar");
    let mut all = std::io::Cursor::new(start).chain(stream);
    match is_tar {
        true => Unpacked::Tar(tar::Archive::new(all)),
        false => Unpacked::Single(text(&mut all, limits.record)),
    }
}

/// The files of one paper's stream.
fn paper(stream: impl Read, limits: Limits) -> Result<Paper, String> {
    let mut archive = match unpack(stream, limits) {
        Unpacked::Single(text) => return Ok(Paper::from([("main.tex".into(), text?)])),
        Unpacked::Tar(archive) => archive,
    };
    let mut paper = Paper::new();
    let mut left = limits.record;
    for entry in archive.entries().map_err(|error| error.to_string())? {
        let mut entry = entry.map_err(|error| error.to_string())?;
        let name = entry.path().map_err(|error| error.to_string())?.display().to_string();
        if entry.header().entry_type().is_file() && is_tex(Path::new(&name)) {
            let text = text(&mut entry, left)?;
            left -= text.len();
            paper.insert(name, text);
        }
    }
    Ok(paper)
}

fn is_tex(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tex"))
}

fn text(reader: &mut impl Read, limit: usize) -> Result<String, String> {
    let mut bytes = Vec::new();
    reader.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    match bytes.len() <= limit {
        true => Ok(decode(bytes)),
        false => Err(too_long(limit)),
    }
}

/// UTF-8, or else Latin-1, which older papers are written in.
fn decode(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| error.into_bytes().iter().map(|&byte| byte as char).collect())
}

/// The main file with the files it includes in their places.
fn assemble(origin: &str, paper: Paper) -> Result<Document, String> {
    let main = paper
        .iter()
        .filter(|(_, text)| text.contains("\\documentclass") || text.contains("\\documentstyle"))
        .max_by_key(|(_, text)| text.len())
        .or_else(|| paper.iter().max_by_key(|(_, text)| text.len()));
    let (name, text) = main.ok_or("no .tex file")?;
    let folder = Path::new(name).parent().map(Path::to_path_buf).unwrap_or_default();
    let mut budget = 4 * paper.values().map(String::len).sum::<usize>();
    let text = include(text, &folder, &paper, MAX_DEPTH, &mut budget);
    Ok(Document { text, origin: origin.into(), meta: BTreeMap::from([("main".to_string(), name.clone())]) })
}

/// Puts the paper's own files in the place of `\input` and `\include`; other names print nothing and go. The budget bounds what files that include one
/// another many times can grow to.
fn include(text: &str, folder: &Path, paper: &Paper, depth: usize, budget: &mut usize) -> String {
    let text = latex::strip_comments(text);
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, name, after)) = next_include(rest) {
        out.push_str(before);
        let path = folder.join(name.trim()).display().to_string();
        let file = paper.get(&path).or_else(|| paper.get(&format!("{path}.tex")));
        if let Some(file) = file.filter(|file| depth > 0 && file.len() <= *budget) {
            *budget -= file.len();
            out.push_str(&include(file, folder, paper, depth - 1, budget));
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// The text before the next `\input{name}` or `\include{name}`, the name, and the text after.
fn next_include(text: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    loop {
        let at = from + text[from..].find("\\in")?;
        from = at + 3;
        for command in ["\\input", "\\include"] {
            if let Some(argument) = text[at..].strip_prefix(command).map(str::trim_start)
                && let Some((name, after)) = argument.strip_prefix('{').and_then(|inner| inner.split_once('}'))
            {
                return Some((&text[..at], name, after));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::Format;
    use super::super::tests::read_bytes;
    use super::*;

    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes) in files {
            let mut header = tar::Header::new_ustar();
            // Written raw: the builder itself refuses names that leave the folder.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append(&header, *bytes).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn papers_of_a_tar_of_gzipped_tars() {
        let first = gz(&tar(&[
            ("main.tex", b"\\documentclass{a}\\begin{document}\\input{part}\\input{../../etc/passwd}\\end{document}"),
            ("part.tex", b"Part % comment\n\\input{main}"),
        ]));
        let second = gz(b"\\documentclass{a} single");
        let file =
            tar(&[("9912/1.gz", &first), ("9912/2.gz", &second), ("9912/3.pdf", b"%PDF"), ("9912/4.gz", &first[..40])]);
        let (documents, broken) = read_bytes(Format::Latex, "arXiv.tar", &file);
        assert_eq!(documents.len(), 2);
        let text = &documents[0].text;
        assert!(text.contains("Part") && !text.contains("passwd") && !text.contains("comment"), "{text}");
        assert!(documents[1].origin.ends_with("arXiv.tar:9912/2.gz"));
        assert_eq!(broken.len(), 1, "{broken:?}");
    }

    #[test]
    fn names_that_leave_the_folder_write_nothing() {
        let file = tar(&[("../../evil.tex", b"\\documentclass{a} evil"), ("/abs.tex", b"text")]);
        let (documents, _) = read_bytes(Format::Latex, "a.tar", &file);
        assert_eq!(documents.len(), 1);
        assert!(!Path::new("/abs.tex").exists());
    }
}
