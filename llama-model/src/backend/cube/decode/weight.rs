//! Weights as decoding reads them: a cube reads two rows, once and in order, for all rows of the input.
//!
//! A unit reads 16 bytes of floats at a time, or a word of blocks; the inputs that these are multiplied with come in fours.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::ir::StorageType;
use cubecl::prelude::*;

use super::super::reduce::{UNITS, lanes};
use super::super::{cubes, empty_like};
use crate::backend::{Bits, QUANT_BLOCK};

/// Inputs that are read at once.
pub(super) type Four = Const<4>;

/// Units of a cube that multiplies: the rows of small models are not longer than what they read at once.
pub(super) const CUBE: usize = 128;

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Format {
    /// Floats, so many in 16 bytes.
    Floats(usize),
    /// Blocks; see [`backend::quantized`](crate::backend::quantized).
    Blocks(Bits),
}

impl Format {
    /// Fours that belong to what a unit reads at a time.
    fn fours(self) -> usize {
        match self {
            Self::Floats(values) => values / 4,
            Self::Blocks(Bits::Eight) => 1,
            Self::Blocks(Bits::Four | Bits::FourSymmetric) => 2,
        }
    }

    /// Values of its array that are read as one vector.
    pub(super) fn vector_size(self) -> usize {
        match self {
            Self::Floats(values) => values,
            Self::Blocks(_) => 1,
        }
    }

    /// Words of a block.
    fn words(self) -> usize {
        match self {
            Self::Floats(_) => 1,
            Self::Blocks(bits) => bits.words(),
        }
    }

    fn has_minima(self) -> bool {
        self == Self::Blocks(Bits::Four)
    }

    fn has_low_and_high(self) -> bool {
        matches!(self, Self::Blocks(Bits::Four | Bits::FourSymmetric))
    }
}

/// What a kernel that multiplies with weights is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    /// Rows of the input.
    pub(super) rows: usize,
    /// Their length.
    pub(super) d_in: usize,
    /// Of the weights.
    pub(super) format: Format,
    /// Units of a cube, and most planes that they may be.
    units: usize,
    planes: usize,
}

impl Product {
    /// Parts that units read of a row of the weight.
    fn parts(self) -> usize {
        self.d_in / 4 / self.format.fours()
    }
}

/// A weight `[d_out, d_in]`; there may be padding between its rows.
#[derive(Clone)]
pub(super) struct Weight<R: CubeRuntime> {
    pub(super) d_out: usize,
    pub(super) d_in: usize,
    pub(super) format: Format,
    pub(super) values: CubeTensor<R>,
    pub(super) scales: Option<CubeTensor<R>>,
}

impl<R: CubeRuntime> Weight<R> {
    /// A matrix of floats, unless it is transposed, of doubles or has rows of broken vectors.
    pub(super) fn floats(values: &CubeTensor<R>) -> Option<Self> {
        let [d_out, d_in] = values.shape().dims();
        let format = Format::Floats(16 / values.dtype.size());
        let whole = |length: usize| length.is_multiple_of(format.vector_size());
        let fits = values.dtype != DType::F64 && in_rows(values) && whole(d_in) && whole(values.meta.strides()[0]);
        fits.then(|| Self { d_out, d_in, format, values: values.clone(), scales: None })
    }

    /// A matrix in blocks, unless its parts are transposed.
    pub(super) fn blocks(bits: Bits, words: &CubeTensor<R>, scales: &CubeTensor<R>) -> Option<Self> {
        let [d_out, width] = words.shape().dims();
        let (d_in, format) = (width / bits.words() * QUANT_BLOCK, Format::Blocks(bits));
        let fits = in_rows(words) && in_rows(scales);
        fits.then(|| Self { d_out, d_in, format, values: words.clone(), scales: Some(scales.clone()) })
    }

    /// Types of its values and scales.
    pub(super) fn dtypes(&self) -> [StorageType; 2] {
        let scales = self.scales.as_ref().map_or(DType::F32, |scales| scales.dtype);
        [self.values.dtype.into(), scales.into()]
    }

    /// Vectors of values, and scales, between the beginnings of two rows.
    pub(super) fn pitches(&self) -> [usize; 2] {
        let scales = self.scales.as_ref().map_or(0, |scales| scales.meta.strides()[0]);
        [self.values.meta.strides()[0] / self.format.vector_size(), scales]
    }

    /// Whether one kernel reads both.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let Self { d_in, format, .. } = *self;
        (d_in, format) == (other.d_in, other.format)
            && self.dtypes() == other.dtypes()
            && self.pitches() == other.pitches()
    }

    pub(super) fn product(&self, rows: usize) -> Product {
        let smallest = self.values.client.properties().hardware.plane_size_min as usize;
        Product { rows, d_in: self.d_in, format: self.format, units: CUBE, planes: CUBE.div_ceil(smallest.max(1)) }
    }
}

fn in_rows<R: CubeRuntime>(tensor: &CubeTensor<R>) -> bool {
    tensor.meta.strides()[1] == 1
}

/// What a unit reads of a row at a time, in f32.
#[cube]
pub(super) fn read<W: Numeric, S: Float, N: Size>(
    values: &Array<Vector<W, N>>,
    scales: &ComptimeOption<Array<S>>,
    pitches: (usize, usize),
    row: usize,
    part: usize,
    #[comptime] format: Format,
) -> Array<Vector<f32, Four>> {
    let mut fours = Array::<Vector<f32, Four>>::new(comptime!(format.fours()));
    let vector = values[row * pitches.0 + part];
    #[comptime]
    match scales {
        ComptimeOption::None =>
        {
            #[unroll]
            for four in 0..comptime!(format.fours()) {
                let mut values = Vector::<f32, Four>::cast_from(0.0f32);
                #[unroll]
                for lane in 0..4usize {
                    values[lane] = f32::cast_from(vector[comptime!(4 * four + lane)]);
                }
                fours[four] = values;
            }
        }
        ComptimeOption::Some(scales) => {
            let word = i32::cast_from(vector[0]);
            let block = part / comptime!(format.words());
            if comptime!(format.has_low_and_high()) {
                let mut low = Vector::<f32, Four>::cast_from(0.0f32);
                let mut high = Vector::<f32, Four>::cast_from(0.0f32);
                #[unroll]
                for lane in 0..4usize {
                    low[lane] = f32::cast_from((word >> comptime!(8 * lane as i32)) & 15);
                    high[lane] = f32::cast_from((word >> comptime!(8 * lane as i32 + 4)) & 15);
                }
                if comptime!(format.has_minima()) {
                    let scale = Vector::<f32, Four>::cast_from(scales[row * pitches.1 + 2 * block]);
                    let min = Vector::<f32, Four>::cast_from(scales[row * pitches.1 + 2 * block + 1]);
                    fours[0] = low * scale + min;
                    fours[1] = high * scale + min;
                } else {
                    let scale = Vector::<f32, Four>::cast_from(scales[row * pitches.1 + block]);
                    let zero = Vector::<f32, Four>::cast_from(8.0f32);
                    fours[0] = (low - zero) * scale;
                    fours[1] = (high - zero) * scale;
                }
            } else {
                let mut values = Vector::<f32, Four>::cast_from(0.0f32);
                #[unroll]
                for lane in 0..4usize {
                    // The byte to the top and back, with its sign.
                    values[lane] = f32::cast_from((word << comptime!(24 - 8 * lane as i32)) >> 24);
                }
                fours[0] = values * Vector::cast_from(scales[row * pitches.1 + block]);
            }
        }
    }
    fours
}

/// The number in a row of the four inputs that are multiplied with those values.
#[cube]
fn place(part: usize, #[comptime] four: usize, #[comptime] format: Format) -> usize {
    if comptime!(format.has_low_and_high()) {
        // A word has four values of the block's first half and four of its second.
        part / 4 * 8 + part % 4 + comptime!(4 * four)
    } else {
        part * comptime!(format.fours()) + four
    }
}

/// Products of a cube's two rows of weights with all rows of the input, or of the input's norm where a gain is given:
/// `[rows, 2]`, the same in every unit.
#[cube]
pub(super) fn products<X: Float, W: Numeric, S: Float, N: Size>(
    x: &Array<Vector<X, Four>>,
    gain: &ComptimeOption<Array<Vector<X, Four>>>,
    eps: f32,
    first: &Array<Vector<W, N>>,
    first_scales: &ComptimeOption<Array<S>>,
    first_row: usize,
    second: &Array<Vector<W, N>>,
    second_scales: &ComptimeOption<Array<S>>,
    second_row: usize,
    pitches: (usize, usize),
    #[comptime] product: Product,
) -> Array<f32> {
    let rows = comptime!(product.rows);
    let format = comptime!(product.format);
    // Two sums for each row, and with a norm one of squares.
    let places = comptime!(if gain.is_some() { 3usize } else { 2usize });
    let mut sums = Array::<Vector<f32, Four>>::new(comptime!(places * rows));
    #[unroll]
    for i in 0..comptime!(places * rows) {
        sums[i] = Vector::cast_from(0.0f32);
    }
    let mut part = UNIT_POS as usize;
    while part < comptime!(product.parts()) {
        let a = read::<W, S, N>(first, first_scales, pitches, first_row, part, format);
        let b = read::<W, S, N>(second, second_scales, pitches, second_row, part, format);
        #[unroll]
        for four in 0..comptime!(format.fours()) {
            let at = place(part, four, format);
            #[unroll]
            for row in 0..rows {
                let mut value = Vector::<f32, Four>::cast_from(x[comptime!(row * product.d_in / 4) + at]);
                #[comptime]
                match gain {
                    ComptimeOption::Some(gain) => {
                        sums[comptime!(places * row + 2)] += value * value;
                        value *= Vector::cast_from(gain[at]);
                    }
                    ComptimeOption::None => {}
                }
                sums[comptime!(places * row)] += value * a[four];
                sums[comptime!(places * row + 1)] += value * b[four];
            }
        }
        part += comptime!(product.units);
    }

    let mut of_planes = SharedMemory::<f32>::new(comptime!(product.planes * places * rows));
    #[unroll]
    for i in 0..comptime!(places * rows) {
        let sum = plane_sum(lanes(sums[i]));
        if UNIT_POS_PLANE == 0 {
            of_planes[UNIT_POS as usize / PLANE_DIM as usize * comptime!(places * rows) + i] = sum;
        }
    }
    sync_cube();
    let planes = comptime!(product.units) / PLANE_DIM as usize;
    let mut results = Array::<f32>::new(comptime!(2 * rows));
    #[unroll]
    for row in 0..rows {
        // The reciprocal of the root of the mean square is a factor of the whole row.
        let mut factor = f32::new(1.0);
        if comptime!(gain.is_some()) {
            let squares = across(&of_planes, planes, comptime!(places * row + 2), comptime!(places * rows));
            factor = f32::new(1.0) / (squares / comptime!(product.d_in as f32) + eps).sqrt();
        }
        #[unroll]
        for i in 0..2usize {
            let sum = across(&of_planes, planes, comptime!(places * row + i), comptime!(places * rows));
            results[comptime!(2 * row + i)] = sum * factor;
        }
    }
    results
}

/// The sum of what each plane has in a place.
#[cube]
fn across(of_planes: &SharedMemory<f32>, planes: usize, #[comptime] place: usize, #[comptime] places: usize) -> f32 {
    let mut sum = of_planes[place];
    for plane in 1..planes {
        sum += of_planes[plane * places + place];
    }
    sum
}

#[cube(launch_unchecked)]
fn widen_kernel<O: Float, W: Numeric, S: Float, N: Size>(
    values: &Array<Vector<W, N>>,
    scales: &ComptimeOption<Array<S>>,
    out: &mut Array<Vector<O, Four>>,
    count: usize,
    pitch: usize,
    scale_pitch: usize,
    #[comptime] product: Product,
    #[define(O, W, S)] _dtypes: [StorageType; 3],
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let parts = comptime!(product.parts());
        let format = comptime!(product.format);
        let fours = read::<W, S, N>(values, scales, (pitch, scale_pitch), at / parts, at % parts, format);
        #[unroll]
        for four in 0..comptime!(format.fours()) {
            let place = place(at % parts, four, format);
            out[at / parts * comptime!(product.d_in / 4) + place] = Vector::cast_from(fours[four]);
        }
    }
}

/// A weight as floats.
pub(super) fn widen<R: CubeRuntime>(weight: Weight<R>, dtype: DType) -> CubeTensor<R> {
    let out = empty_like(&weight.values, Shape::new([weight.d_out, weight.d_in]), dtype);
    let client = out.client.clone();
    let ([values, scales], [pitch, scale_pitch]) = (weight.dtypes(), weight.pitches());
    let product = weight.product(1);
    let count = weight.d_out * product.parts();
    // SAFETY: units behind the last part do nothing, the others read what is within a row.
    unsafe {
        widen_kernel::launch_unchecked::<R>(
            &client,
            cubes(count.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            weight.format.vector_size(),
            weight.values.into_array_arg(),
            weight.scales.map(CubeTensor::into_array_arg).into(),
            out.clone().into_array_arg(),
            count,
            pitch,
            scale_pitch,
            product,
            [dtype.into(), values, scales],
        );
    }
    out
}
