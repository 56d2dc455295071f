//! Large buffers on the host, written once and by all threads. The system makes new memory's pages when they are first touched, which
//! takes longer than most that is written there; so each thread touches its own.

use std::mem::MaybeUninit;

use burn::tensor::{DType, Element, TensorData};
use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;

/// Bytes that are worth a thread's while.
const PIECE: usize = 256 << 10;

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
    pieces.zip(from).for_each(|(piece, from)| {
        piece.fill(MaybeUninit::zeroed());
        // SAFETY: all of it was just zeroed, which is a value of this type.
        write(unsafe { &mut *(piece as *mut [MaybeUninit<T>] as *mut [T]) }, from);
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
    // Rows may be short.
    let least = places.len().div_ceil(1 + len * size_of::<T>() / PIECE);
    places.into_par_iter().with_min_len(least).for_each(|(to, from)| {
        assert_eq!(size_of_val(to), from.len(), "whole numbers");
        // SAFETY: both have this length, and any bytes are a number.
        unsafe { to.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from.as_ptr(), from.len()) };
    });
    // SAFETY: the places are the whole of this length, and each is written.
    unsafe { all.set_len(len) };
    all
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
