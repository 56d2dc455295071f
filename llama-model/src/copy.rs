//! Large buffers on the host, written once and by all threads. The system makes new memory's pages when they are first touched, which
//! takes longer than most that is written there; so each thread touches its own.

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use burn::tensor::{DType, Element, TensorData};
use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Bytes that are worth a thread's while.
const PIECE: usize = 256 << 10;

/// Runs a task that asks for rayon's threads. Where there is one, it may be the program's first ([`tune_process`](crate::tune_process)), which
/// waits for this one and would never come: then there is another.
pub(crate) fn on_threads<R: Send>(task: impl FnOnce() -> R + Send) -> R {
    static ANOTHER: OnceLock<Option<ThreadPool>> = OnceLock::new();
    if rayon::current_num_threads() > 1 || rayon::current_thread_index().is_some() {
        return task();
    }
    match ANOTHER.get_or_init(|| ThreadPoolBuilder::new().num_threads(1).build().ok()) {
        Some(another) => another.install(task),
        None => task(),
    }
}

/// A vector that `write` fills piece by piece, each with an item of `from`.
pub(crate) fn fill<T: Pod + Send, I: IndexedParallelIterator>(
    len: usize,
    piece: usize,
    from: I,
    write: impl Fn(&mut [T], I::Item) + Sync,
) -> Vec<T> {
    let mut all = Vec::with_capacity(len);
    let pieces = all.spare_capacity_mut()[..len].par_chunks_mut(piece.max(1));
    assert_eq!(pieces.len(), from.len(), "each piece has an item");
    on_threads(|| {
        pieces.zip(from).for_each(|(piece, from)| {
            piece.fill(MaybeUninit::zeroed());
            // SAFETY: all of it was just zeroed, which is a value of this type.
            write(unsafe { &mut *(piece as *mut [MaybeUninit<T>] as *mut [T]) }, from);
        });
    });
    // SAFETY: the pieces are the whole of this length, and each has been zeroed: who panics on the way does not come here.
    unsafe { all.set_len(len) };
    all
}

/// Little-endian numbers of a float type as data, whatever the alignment of their bytes, one slice after the other.
///
/// Unlike `TensorData::from_bytes_vec`, which copies what it gets since a vector of bytes may be aligned as bytes are.
///
/// # Panics
/// If they are not as many as the shape has.
pub(crate) fn concat<'a>(dtype: DType, slices: impl IntoIterator<Item = &'a [u8]>, shape: &[usize]) -> TensorData {
    let len = shape.iter().product();
    let pieces = slices.into_iter().flat_map(|slice| slice.chunks(PIECE));
    match dtype {
        DType::F64 => TensorData::new(numbers::<f64>(len, pieces), shape),
        DType::F16 => TensorData::new(numbers::<f16>(len, pieces), shape),
        DType::BF16 => TensorData::new(numbers::<bf16>(len, pieces), shape),
        DType::F32 | DType::Flex32 => TensorData::new(numbers::<f32>(len, pieces), shape),
        DType::I32 => TensorData::new(numbers::<i32>(len, pieces), shape),
        other => unreachable!("no file and no model has matrices of {other:?}"),
    }
}

fn numbers<'a, T: Element + Pod>(len: usize, pieces: impl Iterator<Item = &'a [u8]>) -> Vec<T> {
    let mut all = Vec::<T>::with_capacity(len);
    let mut rest: &mut [MaybeUninit<T>] = &mut all.spare_capacity_mut()[..len];
    let places = pieces.map(|from| {
        let (to, after) = std::mem::take(&mut rest).split_at_mut(from.len() / size_of::<T>());
        rest = after;
        (to, from)
    });
    let places: Vec<_> = places.collect();
    assert!(rest.is_empty(), "{} of {len} numbers are missing", rest.len());
    let copy = |(to, from): (&mut [MaybeUninit<T>], &[u8])| {
        assert_eq!(size_of_val(to), from.len(), "whole numbers");
        // SAFETY: both have this length, and any bytes are a number.
        unsafe { to.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from.as_ptr(), from.len()) };
    };
    let tasks = len * size_of::<T>() / PIECE;
    if tasks < 2 {
        // Asking for threads would take longer: what members of a team exchange may be a few rows.
        places.into_iter().for_each(copy);
    } else {
        // Rows may be short.
        let least = places.len().div_ceil(tasks);
        on_threads(|| places.into_par_iter().with_min_len(least).for_each(copy));
    }
    // SAFETY: the places are the whole of this length, and each is written.
    unsafe { all.set_len(len) };
    all
}

/// The data in another float type; as `TensorData::convert_dtype`, but by all threads.
pub(crate) fn convert(data: TensorData, dtype: DType) -> TensorData {
    const SHORT: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    let (from, len) = (data.dtype, data.num_elements());
    // What has more digits than f32 is rounded once.
    if from == dtype || !SHORT.contains(&from) || !SHORT.contains(&dtype) {
        return data.convert_dtype(dtype);
    }
    let piece = PIECE / from.size();
    let (pieces, shape) = (data.as_bytes().par_chunks(PIECE), data.shape.clone());
    match dtype {
        DType::F16 => {
            let narrow = |to: &mut [f16], bytes: &[u8]| to.convert_from_f32_slice(&widen(from, bytes));
            TensorData::new(fill(len, piece, pieces, narrow), shape)
        }
        DType::BF16 => {
            let narrow = |to: &mut [bf16], bytes: &[u8]| to.convert_from_f32_slice(&widen(from, bytes));
            TensorData::new(fill(len, piece, pieces, narrow), shape)
        }
        _ => {
            let widen = |to: &mut [f32], bytes: &[u8]| to.copy_from_slice(&widen(from, bytes));
            TensorData::new(fill(len, piece, pieces, widen), shape)
        }
    }
}

/// Values in f32.
///
/// # Panics
/// If they are no floats.
pub(crate) fn floats(data: TensorData) -> Vec<f32> {
    convert(data, DType::F32).into_vec().expect("it was just converted")
}

/// Little-endian floats in f32.
///
/// # Panics
/// If they are no floats.
pub(crate) fn widen(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|bytes| value(*bytes)).collect()
    }
    match dtype {
        DType::F64 => each(bytes, |bytes| f64::from_le_bytes(bytes) as f32),
        DType::F32 => each(bytes, f32::from_le_bytes),
        DType::BF16 => each(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        // This conversion is one instruction, where a CPU has it.
        DType::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).to_f32_vec(),
        other => panic!("{other:?} is no float"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_come_one_after_the_other() {
        let values: Vec<f32> = (0..300_000).map(|i| i as f32).collect();
        let bytes = bytemuck::cast_slice::<f32, u8>(&values);
        // Not aligned, in uneven parts and in one that is larger than a piece.
        let moved = [&[0], bytes].concat();
        let (first, rest) = moved[1..].split_at(4 * 7);
        let data = concat(DType::F32, [first, &[], rest], &[300, 1000]);
        assert_eq!(data, TensorData::new(values, [300, 1000]));
        assert_eq!(concat(DType::BF16, [], &[0, 4]).shape[..], [0, 4]);
    }

    #[test]
    #[should_panic(expected = "1 of 3 numbers are missing")]
    fn missing_numbers_are_not_made_up() {
        concat(DType::F32, [[0u8; 8].as_slice()], &[3]);
    }

    /// Of every float to every other, whatever is in it.
    #[test]
    fn conversions_are_burns() {
        let mut values: Vec<f32> = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
        values.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 65_519.9, 65_520.0, 1e-8, f32::MAX]);
        // Numbers that are none compare as nothing does.
        values.iter_mut().filter(|value| value.is_nan()).for_each(|value| *value = 1.5);
        let data = TensorData::new(values, [200_008 / 8, 8]);
        for from in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let data = data.clone().convert_dtype(from);
            for to in [DType::F32, DType::F16, DType::BF16, DType::F64] {
                assert_eq!(convert(data.clone(), to), data.clone().convert_dtype(to), "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn pieces_are_written_once() {
        let from: Vec<i32> = (0..100).collect();
        let all = fill(298, 3, from.par_iter(), |piece: &mut [i32], from| {
            assert_eq!(piece.iter().sum::<i32>(), 0);
            piece.fill(*from);
        });
        assert!(all.iter().enumerate().all(|(i, value)| *value == i as i32 / 3));
    }
}
