//! fastText's matrices: dense, or product-quantised (a row is a code for each group of columns, and perhaps one for its length).

use super::parser::Parser;

/// Centroids of a quantizer.
const CENTROIDS: usize = 256;

#[derive(Clone, Debug)]
pub(super) enum Matrix {
    Dense { values: Vec<f32>, columns: usize },
    Quantized { codes: Vec<u8>, rows: usize, quantizer: Quantizer, norms: Option<(Vec<u8>, Quantizer)> },
}

#[derive(Clone, Debug)]
pub(super) struct Quantizer {
    columns: usize,
    groups: usize,
    group_columns: usize,
    /// `[groups, 256, group_columns]`; the last group may have fewer columns.
    centroids: Vec<f32>,
}

impl Matrix {
    pub(super) fn parse_dense(file: &mut Parser) -> Result<Self, String> {
        let (rows, columns) = (file.len()?, file.len()?);
        let len = rows.checked_mul(columns).ok_or("a matrix is too large")?;
        Ok(Self::Dense { values: file.floats(len)?, columns })
    }

    pub(super) fn parse_quantized(file: &mut Parser) -> Result<Self, String> {
        let with_norms = file.byte()? != 0;
        let (rows, columns) = (file.len()?, file.len()?);
        let code_count = file.int()?;
        let codes = file.bytes(usize::try_from(code_count).map_err(|_| format!("{code_count} codes"))?)?;
        let quantizer = Quantizer::parse(file)?;
        if quantizer.columns != columns || codes.len() != rows * quantizer.groups {
            return Err(format!("{} codes for {rows} rows of {columns} columns", codes.len()));
        }
        let norms = match with_norms {
            true => {
                let codes = file.bytes(rows)?;
                let quantizer = Quantizer::parse(file)?;
                (quantizer.columns == 1).then_some(()).ok_or("lengths of rows have one column")?;
                Some((codes, quantizer))
            }
            false => None,
        };
        Ok(Self::Quantized { codes, rows, quantizer, norms })
    }

    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Dense { values, columns } => values.len().checked_div(*columns).unwrap_or(0),
            Self::Quantized { rows, .. } => *rows,
        }
    }

    pub(super) fn columns(&self) -> usize {
        match self {
            Self::Dense { columns, .. } => *columns,
            Self::Quantized { quantizer, .. } => quantizer.columns,
        }
    }

    pub(super) fn add_row(&self, row: usize, to: &mut [f32]) {
        match self {
            Self::Dense { values, columns } => {
                to.iter_mut().zip(&values[row * columns..]).for_each(|(to, value)| *to += value);
            }
            Self::Quantized { .. } => self.centroids(row, |at, centroid, norm| {
                to[at..].iter_mut().zip(centroid).for_each(|(to, value)| *to += norm * value);
            }),
        }
    }

    pub(super) fn dot_row(&self, row: usize, with: &[f32]) -> f32 {
        let mut sum = 0.0;
        match self {
            Self::Dense { values, columns } => {
                with.iter().zip(&values[row * columns..]).for_each(|(a, b)| sum += a * b);
            }
            Self::Quantized { .. } => {
                let mut length = 1.0;
                self.centroids(row, |at, centroid, norm| {
                    length = norm;
                    with[at..].iter().zip(centroid).for_each(|(a, b)| sum += a * b);
                });
                sum *= length;
            }
        }
        sum
    }

    /// Calls with the first column, the centroid and the row's length, group after group.
    fn centroids(&self, row: usize, mut each: impl FnMut(usize, &[f32], f32)) {
        let Self::Quantized { codes, quantizer, norms, .. } = self else { return };
        let norm = norms.as_ref().map_or(1.0, |(codes, quantizer)| quantizer.centroid(0, codes[row])[0]);
        for group in 0..quantizer.groups {
            let code = codes[row * quantizer.groups + group];
            each(group * quantizer.group_columns, quantizer.centroid(group, code), norm);
        }
    }
}

impl Quantizer {
    fn parse(file: &mut Parser) -> Result<Self, String> {
        let mut ints = [0; 4];
        for value in &mut ints {
            let int = file.int()?;
            *value = usize::try_from(int)
                .ok()
                .filter(|&value| value < 1 << 20)
                .ok_or_else(|| format!("a quantizer's size is {int}"))?;
        }
        let [columns, groups, group_columns, last] = ints;
        if groups == 0 || last == 0 || last > group_columns || (groups - 1) * group_columns + last != columns {
            return Err(format!("{groups} groups of {group_columns} and {last} columns are not {columns}"));
        }
        Ok(Self { columns, groups, group_columns, centroids: file.floats(columns * CENTROIDS)? })
    }

    fn centroid(&self, group: usize, code: u8) -> &[f32] {
        let start = group * CENTROIDS * self.group_columns;
        let columns = match group + 1 == self.groups {
            true => self.columns - group * self.group_columns,
            false => self.group_columns,
        };
        &self.centroids[start + usize::from(code) * columns..][..columns]
    }
}
