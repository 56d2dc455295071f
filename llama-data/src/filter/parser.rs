//! The fields of a fastText file.

use std::io::Read;

use super::quantized::Matrix;

/// Larger sizes than any model has; a file that states them is broken.
const MAX_ENTRIES: i64 = 1 << 31;

/// Reads the fields of a model; every length is checked against what is left.
pub(super) struct Parser<'a>(&'a [u8]);

impl<'a> Parser<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        if len > self.0.len() {
            return Err(format!("the file is cut short: {len} bytes are missing or wrong"));
        }
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn int(&mut self) -> Result<i32, String> {
        Ok(i32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    pub(super) fn long(&mut self) -> Result<i64, String> {
        Ok(i64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes")))
    }

    pub(super) fn len(&mut self) -> Result<usize, String> {
        let len = self.long()?;
        usize::try_from(len).ok().filter(|_| len <= MAX_ENTRIES).ok_or_else(|| format!("a length of {len}"))
    }

    pub(super) fn floats(&mut self, len: usize) -> Result<Vec<f32>, String> {
        let mut bytes = self.take(len.checked_mul(4).ok_or("too large")?)?;
        let mut values = vec![0.0; len];
        bytes.read_exact(bytemuck::cast_slice_mut(&mut values)).map_err(|error| error.to_string())?;
        Ok(values)
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<Vec<u8>, String> {
        self.take(len).map(<[u8]>::to_vec)
    }

    pub(super) fn text(&mut self) -> Result<String, String> {
        let end = self.0.iter().position(|&byte| byte == 0).ok_or("the file is cut short in a word")?;
        let text = String::from_utf8_lossy(&self.0[..end]).into_owned();
        self.0 = &self.0[end + 1..];
        Ok(text)
    }

    pub(super) fn matrix(&mut self) -> Result<Matrix, String> {
        match self.byte()? {
            0 => Matrix::parse_dense(self),
            _ => Matrix::parse_quantized(self),
        }
    }
}
