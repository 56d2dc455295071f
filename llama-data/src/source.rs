//! Documents from plain text, folders, JSONL, each also compressed (`.gz`, `.zst`, `.bz2`), and Parquet.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::input::Limits;
use crate::read::Format;

/// A text with the place it came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// The text.
    pub text: String,
    /// File, and line for JSONL.
    pub origin: String,
    /// What else is known of it: its address, title, licence, language, ..
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub meta: BTreeMap<String, String>,
}

/// What to read.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Files, and folders that are searched for files.
    pub paths: Vec<PathBuf>,
    /// Endings of the files taken from folders, without dot and compression (`txt`, `jsonl`, ..); none stands for all. A file that is named
    /// in `paths` is always read.
    pub extensions: Vec<String>,
}

impl Sources {
    /// Text, Markdown, JSONL and Parquet at `paths`.
    pub fn new(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self {
            paths: paths.into_iter().map(Into::into).collect(),
            extensions: ["txt", "md", "jsonl", "parquet"].map(String::from).into(),
        }
    }

    /// All files, in the order they are read: as given, folders sorted by path.
    ///
    /// # Errors
    /// [`DataError::Io`] for a path that does not exist, [`DataError::Empty`] if there is no file at all.
    pub fn files(&self) -> Result<Vec<SourceFile>, DataError> {
        let mut files = Vec::new();
        for path in &self.paths {
            let meta = std::fs::metadata(path).map_err(|error| DataError::io(path, error))?;
            if meta.is_dir() {
                self.walk(path, &mut files)?;
            } else {
                files.push(SourceFile { path: path.clone(), bytes: meta.len(), found: false });
            }
        }
        if files.is_empty() {
            return Err(DataError::Empty {
                path: self.paths.first().cloned().unwrap_or_default(),
                hint: format!("folders are searched for files ending in {}", self.extensions.join(", ")),
            });
        }
        Ok(files)
    }

    fn walk(&self, folder: &Path, files: &mut Vec<SourceFile>) -> Result<(), DataError> {
        let entries = std::fs::read_dir(folder).map_err(|error| DataError::io(folder, error))?;
        let mut entries = entries.collect::<Result<Vec<_>, _>>().map_err(|error| DataError::io(folder, error))?;
        entries.sort_by_key(|entry| entry.file_name());
        for entry in entries {
            let path = entry.path();
            if entry.file_type().map_err(|error| DataError::io(&path, error))?.is_dir() {
                self.walk(&path, files)?;
            } else if self.extensions.is_empty() || self.extensions.contains(&inner_extension(&path)) {
                // Links to files are followed, as the Hugging Face hub's cache has them; those to folders may lead in circles.
                let meta = std::fs::metadata(&path).map_err(|error| DataError::io(&path, error))?;
                files.extend(meta.is_file().then_some(SourceFile { path, bytes: meta.len(), found: true }));
            }
        }
        Ok(())
    }
}

/// A file to read.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its size on disk.
    pub bytes: u64,
    /// Whether it was found in a folder, rather than named.
    pub found: bool,
}

impl SourceFile {
    /// The file's documents: one for each line of JSONL and each row of Parquet, else one.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for text that is not UTF-8, and lines and rows that have no string `text` or `content`
    /// or are longer than 64 MB.
    pub fn documents(&self) -> Result<Box<dyn Iterator<Item = Result<Document, DataError>>>, DataError> {
        let format = match inner_extension(&self.path).as_str() {
            "jsonl" => Format::Jsonl,
            "parquet" => Format::Parquet,
            _ => {
                let reader = crate::input::open(&self.path, Limits::default())?;
                return Ok(Box::new(std::iter::once(read_text(reader, &self.path))));
            }
        };
        let documents = format.read(&self.path, Limits::default())?;
        Ok(Box::new(documents.map(|document| document.map_err(DataError::from))))
    }
}

/// The ending below a compression's: `jsonl` for `a.jsonl.gz`.
pub fn inner_extension(path: &Path) -> String {
    let extension = |path: &Path| path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match extension(path).as_str() {
        "gz" | "zst" | "bz2" => extension(Path::new(path.file_stem().unwrap_or_default())),
        plain => plain.to_string(),
    }
}

fn read_text(mut reader: Box<dyn BufRead>, path: &Path) -> Result<Document, DataError> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).map_err(|error| DataError::io(path, error))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        DataError::format(path, format!("not UTF-8 text: byte {} is invalid", error.utf8_error().valid_up_to()))
    })?;
    Ok(Document { text, origin: path.display().to_string(), meta: BTreeMap::new() })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn texts(sources: &Sources) -> Vec<String> {
        let files = sources.files().unwrap();
        files.iter().flat_map(|file| file.documents().unwrap()).map(|doc| doc.unwrap().text).collect()
    }

    #[test]
    fn reads_plain_and_compressed_text_and_json_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let lines = "{\"text\": \"one\", \"meta\": 1}\n\n{\"text\": \"two\"}";
        std::fs::write(path("a.txt"), "plain").unwrap();
        std::fs::write(path("b.jsonl"), lines).unwrap();
        // Two members, as `cat a.gz b.gz` makes.
        let mut gz = Vec::new();
        for part in ["{\"text\": \"gz one\"}\n", "{\"text\": \"gz two\"}\n"] {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(part.as_bytes()).unwrap();
            gz.extend(encoder.finish().unwrap());
        }
        std::fs::write(path("c.jsonl.gz"), gz).unwrap();
        let mut zst = Vec::new();
        for part in ["zst ", "text"] {
            zst.extend(ruzstd::encoding::compress_to_vec(part.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest));
        }
        std::fs::write(path("d.txt.zst"), zst).unwrap();
        std::fs::write(path("e.bin"), [0xff, 0xfe]).unwrap();
        assert_eq!(texts(&Sources::new([folder.path()])), ["plain", "one", "two", "gz one", "gz two", "zst text"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_to_files_are_followed_and_links_to_folders_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("blob"), "text").unwrap();
        std::os::unix::fs::symlink(path("blob"), path("a.txt")).unwrap();
        std::os::unix::fs::symlink(folder.path(), path("circle.txt")).unwrap();
        assert_eq!(texts(&Sources::new([folder.path()])), ["text"]);
        std::os::unix::fs::symlink(path("nothing"), path("b.txt")).unwrap();
        assert!(Sources::new([folder.path()]).files().unwrap_err().to_string().contains("b.txt"));
    }

    #[test]
    fn bad_inputs_say_where() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let missing = Sources::new([path("nothing.txt")]).files().unwrap_err().to_string();
        assert!(missing.contains("nothing.txt"), "{missing}");
        assert!(matches!(Sources::new([folder.path()]).files(), Err(DataError::Empty { .. })));

        let first_error = |name: &str, bytes: &[u8]| {
            std::fs::write(path(name), bytes).unwrap();
            let file = &Sources::new([path(name)]).files().unwrap()[0];
            file.documents().unwrap().find_map(Result::err).unwrap().to_string()
        };
        let error = first_error("bad.jsonl", b"{\"text\": \"good\"}\n{\"txt\": 1}\n");
        assert!(error.contains("line 2") && error.contains("text"), "{error}");
        let error = first_error("bad.txt", b"ok \xff");
        assert!(error.contains("byte 3"), "{error}");
        let error = first_error("cut.txt.gz", &[0x1f, 0x8b, 8, 0]);
        assert!(error.contains("cut.txt.gz"), "{error}");
        let error = first_error("cut.txt.zst", &[0x28, 0xb5, 0x2f, 0xfd, 0x04]);
        assert!(error.contains("cut.txt.zst"), "{error}");
    }
}
