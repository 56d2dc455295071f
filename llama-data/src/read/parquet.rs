//! Parquet, the form of most data sets on the Hugging Face hub.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use serde_json::{Map, Value};

use super::{Broken, Records, broken_record, json_lines, too_long};
use crate::DataError;

/// The rows of a file as JSON objects, without the fields that are null. What is wrong with one is told with its number.
pub struct ParquetRows {
    path: PathBuf,
    /// None after an error: what comes after it cannot be told.
    rows: Option<RowIter<'static>>,
    /// The number of the row that was read last.
    number: u64,
}

impl ParquetRows {
    /// Opens a file. Pages may be compressed by snappy, gzip, brotli or lz4.
    ///
    /// # Errors
    /// [`DataError::Io`], or [`DataError::Format`] for what is no Parquet.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|error| DataError::io(path, error))?;
        let reader = guarded(|| SerializedFileReader::new(file)).and_then(|reader| reader.map_err(|e| e.to_string()));
        let reader = reader.map_err(|reason| DataError::format(path, reason))?;
        Ok(Self { path: path.into(), rows: Some(reader.into_iter()), number: 0 })
    }
}

impl Iterator for ParquetRows {
    type Item = Result<Map<String, Value>, Broken>;

    fn next(&mut self) -> Option<Self::Item> {
        let rows = self.rows.as_mut()?;
        let row =
            guarded(|| rows.next().map(|row| row.map(|row| row.to_json_value()).map_err(|error| error.to_string())));
        self.number += 1;
        match row.transpose()?.flatten() {
            Ok(Value::Object(mut fields)) => {
                fields.retain(|_, value| !value.is_null());
                Some(Ok(fields))
            }
            other => {
                self.rows = None;
                let reason = other.err().unwrap_or_else(|| "not a row of fields".into());
                Some(Err(broken_row(&self.path, self.number, reason)))
            }
        }
    }
}

fn broken_row(path: &Path, number: u64, reason: String) -> Broken {
    Broken { path: path.into(), offset: None, reason: format!("row {number}: {reason}") }
}

/// The reader panics at some damaged files.
fn guarded<T>(read: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).map_err(|_| "the file is damaged".into())
}

/// A document from each row. A file that is none is one broken record, as in other formats.
pub(super) fn documents(path: &Path, limit: usize) -> Result<Records, DataError> {
    let path = path.to_path_buf();
    let rows = match ParquetRows::open(&path) {
        Ok(rows) => rows,
        Err(DataError::Format { reason, .. }) => return Ok(Box::new(broken_record(&path, 0, reason).into_iter())),
        Err(error) => return Err(error),
    };
    Ok(Box::new((1..).zip(rows).map(move |(number, row)| {
        let document = json_lines::document(row?, || format!("{}:{number}", path.display()));
        let reason = match document {
            Ok(document) if document.text.len() <= limit => return Ok(document),
            Ok(_) => too_long(limit),
            Err(reason) => reason,
        };
        Err(broken_row(&path, number, reason))
    })))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::super::tests::read_bytes;
    use super::super::{Format, Limits};
    use super::*;

    /// A file with a text, an optional address and a number in each row.
    pub fn sample() -> Vec<u8> {
        let schema = "message rows { required binary text (UTF8); optional binary url (UTF8); required int64 score; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
        for texts in [["one", "two"], ["three", "a text that is longer than all others"]] {
            let mut group = writer.next_row_group().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            let texts = texts.map(ByteArray::from);
            column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
            column.close().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            let url = [ByteArray::from("http://a")];
            column.typed::<ByteArrayType>().write_batch(&url, Some(&[1, 0]), None).unwrap();
            column.close().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&[3, -4], None, None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
        bytes
    }

    #[test]
    fn rows_become_documents_with_metadata() {
        let (documents, broken) = read_bytes(Format::Parquet, "a.parquet", &sample());
        assert!(broken.is_empty(), "{broken:?}");
        let texts: Vec<_> = documents.iter().map(|document| document.text.as_str()).collect();
        assert_eq!(texts, ["one", "two", "three", "a text that is longer than all others"]);
        assert_eq!(documents[0].meta["url"], "http://a");
        assert_eq!((documents[1].meta.get("url"), documents[1].meta["score"].as_str()), (None, "-4"));
        assert!(documents[2].origin.ends_with("a.parquet:3"));
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        std::fs::write(&path, b"not a table").unwrap();
        assert!(ParquetRows::open(&path).err().unwrap().to_string().contains("a.parquet"));
        std::fs::write(&path, sample()).unwrap();
        let records = Format::Parquet.read(&path, Limits { record: 8, ratio: 250 }).unwrap();
        let broken: Vec<Broken> = records.filter_map(Result::err).collect();
        assert_eq!(broken.iter().map(|broken| broken.offset).collect::<Vec<_>>(), [None]);
        assert!(broken[0].reason.contains("longer than 8"), "{}", broken[0]);
    }
}
