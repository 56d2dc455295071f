//! Bytes of a file as a stream, decompressed by its first bytes: gzip (any number of members), zstd (any number of frames) and
//! bzip2. A stream that unpacks to absurdly more than was read is cut with an error, and a line longer than a limit is
//! skipped, so memory stays flat whatever a file holds.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use crate::DataError;

/// What a hostile or broken file may cost at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one record (a line, a page, a paper). A longer one is reported and passed over.
    pub record: usize,
    /// A compressed file may unpack to this many times its size (after the first 64 MB). Text seldom exceeds 20, gzip cannot
    /// exceed 1,032.
    pub ratio: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { record: 64 << 20, ratio: 250 }
    }
}

/// Unpacked bytes a stream may have whatever its ratio.
const FREE: u64 = 64 << 20;

/// Opens a file for reading, decompressed if its first bytes say so.
///
/// # Errors
/// [`DataError::Io`] if the file cannot be opened. What is wrong inside the stream is an error of reading it.
pub fn open(path: &Path, limits: Limits) -> Result<Box<dyn BufRead>, DataError> {
    let file = File::open(path).map_err(|error| DataError::io(path, error))?;
    decompress(file, limits).map_err(|error| DataError::io(path, error))
}

/// Decompresses a stream if its first bytes say so.
///
/// # Errors
/// Those of reading the first bytes.
pub fn decompress<'a>(source: impl Read + 'a, limits: Limits) -> io::Result<Box<dyn BufRead + 'a>> {
    let read = Rc::new(Cell::new(0));
    let mut source = BufReader::with_capacity(1 << 18, Counted { inner: source, count: read.clone() });
    let start = source.fill_buf()?;
    let guarded =
        |inner: Box<dyn Read + 'a>| BufReader::with_capacity(1 << 18, Guarded { inner, read, out: 0, limits });
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(guarded(Box::new(flate2::bufread::MultiGzDecoder::new(source)))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(guarded(Box::new(ZstdFrames::new(source)))),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Box::new(guarded(Box::new(bzip2::bufread::MultiBzDecoder::new(source)))),
        _ => Box::new(source),
    })
}

struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count.set(self.count.get() + n as u64);
        Ok(n)
    }
}

/// Stops a stream that unpacks to far more than was read.
struct Guarded<R> {
    inner: R,
    read: Rc<Cell<u64>>,
    out: u64,
    limits: Limits,
}

impl<R: Read> Read for Guarded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.out += n as u64;
        if self.out > FREE.saturating_add(self.read.get().saturating_mul(self.limits.ratio)) {
            let message = format!(
                "{} compressed bytes unpack to more than {} times as many; the stream is cut here",
                self.read.get(),
                self.limits.ratio
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(n)
    }
}

/// A zstd file may hold several frames, one after the other; the decoder reads one.
struct ZstdFrames<R: BufRead> {
    decoder: Option<ruzstd::decoding::StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>,
    source: Option<R>,
}

impl<R: BufRead> ZstdFrames<R> {
    fn new(source: R) -> Self {
        Self { decoder: None, source: Some(source) }
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(decoder) = &mut self.decoder {
                let n = decoder.read(buffer)?;
                if n > 0 {
                    return Ok(n);
                }
                self.source = self.decoder.take().map(|decoder| decoder.into_inner());
            }
            let Some(mut source) = self.source.take() else { return Ok(0) };
            if source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            let decoder = ruzstd::decoding::StreamingDecoder::new(source)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            self.decoder = Some(decoder);
        }
    }
}

/// The lines of a stream with their offsets. A line longer than the limit is read to its end and passed over.
pub struct Lines<R> {
    reader: R,
    offset: u64,
    limit: usize,
    failed: bool,
}

/// What a step over a stream finds.
#[derive(Debug)]
pub enum Line {
    /// A line was put into the buffer, its end included; it began at this byte of the unpacked stream.
    Read(u64),
    /// The line that began at this byte is too long and was passed over.
    TooLong(u64),
    /// The stream failed at this byte; nothing follows.
    Failed(u64, io::Error),
}

impl<R: BufRead> Lines<R> {
    /// Lines of up to `limit` bytes.
    pub fn new(reader: R, limit: usize) -> Self {
        Self { reader, offset: 0, limit, failed: false }
    }

    /// The longest line that is read.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes read so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Reads a line into `buffer`, in place of what is there; `None` at the end, and after a failure.
    pub fn next(&mut self, buffer: &mut Vec<u8>) -> Option<Line> {
        buffer.clear();
        let start = self.offset;
        let mut too_long = false;
        while !self.failed {
            let available = match self.reader.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    self.failed = true;
                    return Some(Line::Failed(self.offset, error));
                }
            };
            if available.is_empty() {
                break;
            }
            let end = available.iter().position(|&byte| byte == b'\n');
            let used = end.map_or(available.len(), |end| end + 1);
            if buffer.len() + used > self.limit {
                too_long = true;
            } else if !too_long {
                buffer.extend_from_slice(&available[..used]);
            }
            self.reader.consume(used);
            self.offset += used as u64;
            if end.is_some() {
                break;
            }
        }
        match (too_long, self.offset > start) {
            (true, _) => Some(Line::TooLong(start)),
            (false, true) => Some(Line::Read(start)),
            (false, false) => None,
        }
    }

    /// Reads exactly `len` bytes, or passes over as many if they exceed the limit: then the buffer is left empty.
    pub fn take(&mut self, len: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.clear();
        let mut part = self.reader.by_ref().take(len);
        let read = match len <= self.limit as u64 {
            true => part.read_to_end(buffer)? as u64,
            false => io::copy(&mut part, &mut io::sink())?,
        };
        self.offset += read;
        match read == len {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{read} of {len} bytes are there"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_bomb_is_cut() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        let zeros = vec![0; 1 << 20];
        for _ in 0..300 {
            encoder.write_all(&zeros).unwrap();
        }
        let bomb = encoder.finish().unwrap();
        let mut reader = decompress(bomb.as_slice(), Limits::default()).unwrap();
        let error = io::copy(&mut reader, &mut io::sink()).unwrap_err().to_string();
        assert!(error.contains("250 times"), "{error}");
    }

    #[test]
    fn long_lines_are_passed_over() {
        let text = format!("one\n{}\nthree", "x".repeat(1000));
        let mut lines = Lines::new(BufReader::with_capacity(16, text.as_bytes()), 100);
        let mut buffer = Vec::new();
        assert!(matches!(lines.next(&mut buffer), Some(Line::Read(0))));
        assert!(matches!(lines.next(&mut buffer), Some(Line::TooLong(4))));
        assert!(matches!(lines.next(&mut buffer), Some(Line::Read(1005))));
        assert_eq!(buffer, b"three");
        assert!(lines.next(&mut buffer).is_none());
    }

    #[test]
    fn a_cut_stream_fails_once() {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        for line in 0..20_000 {
            writeln!(encoder, "line {line}").unwrap();
        }
        let mut bytes = encoder.finish().unwrap();
        bytes.truncate(bytes.len() / 2);
        let mut lines = Lines::new(decompress(bytes.as_slice(), Limits::default()).unwrap(), 100);
        let mut buffer = Vec::new();
        let mut failed = 0;
        while let Some(line) = lines.next(&mut buffer) {
            failed += usize::from(matches!(line, Line::Failed(..)));
        }
        assert_eq!(failed, 1);
    }
}
