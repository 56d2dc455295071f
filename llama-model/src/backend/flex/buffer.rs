//! Memory of results: not cleared where every element is written anyway, and on the boundaries of cache lines, so that
//! no vector of a row crosses one more line than it must.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use burn::tensor::{Shape, TensorData};
use burn_flex::FlexTensor;
use burn_std::{AllocationController, AllocationProperty, Bytes};

use super::vector::Number;

/// A cache line, and a vector of AVX-512.
const ALIGN: usize = 64;

/// Elements that will be a tensor's.
///
/// The boundary is found inside a block that is a little larger: asked for an aligned block, glibc leaves splinters
/// around it, which cost a training step a tenth more memory.
pub(super) struct Buffer<T: Number = f32> {
    block: NonNull<u8>,
    ptr: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its elements, as a `Vec` does.
unsafe impl<T: Number> Send for Buffer<T> {}
unsafe impl<T: Number> Sync for Buffer<T> {}

impl<T: Number> Buffer<T> {
    pub(super) fn zeros(len: usize) -> Self {
        Self::allocate(len, alloc_zeroed)
    }

    /// # Safety
    /// Every element must be written before it is read.
    pub(super) unsafe fn unwritten(len: usize) -> Self {
        Self::allocate(len, alloc)
    }

    fn allocate(len: usize, allocate: unsafe fn(Layout) -> *mut u8) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout is never empty, and has room for the way to the boundary.
        unsafe {
            let block = NonNull::new(allocate(layout)).unwrap_or_else(|| handle_alloc_error(layout));
            Self { block, ptr: block.add(block.align_offset(ALIGN)).cast(), len }
        }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(size_of::<T>() * len + ALIGN, align_of::<f32>()).expect("a size that memory can have")
    }

    pub(super) fn into_tensor(self, shape: Shape) -> FlexTensor {
        debug_assert_eq!(shape.num_elements(), self.len);
        let len = size_of::<T>() * self.len;
        // SAFETY: all elements are written, see `unwritten`.
        let bytes = unsafe { Bytes::from_controller(Box::new(self), len) };
        FlexTensor::from_data(TensorData::from_bytes(bytes, shape, T::dtype()))
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the elements are this buffer's.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Number> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Number> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.block.as_ptr(), Self::layout(self.len)) }
    }
}

impl<T: Number> AllocationController for Buffer<T> {
    fn alloc_align(&self) -> usize {
        ALIGN
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: the bytes are this buffer's.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), size_of::<T>() * self.len) }
    }

    fn memory(&self) -> &[MaybeUninit<u8>] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), size_of::<T>() * self.len) }
    }
}

/// Where threads write disjoint parts of a result.
pub(super) struct Output<T = f32>(pub *mut T);

impl<T> Clone for Output<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Output<T> {}

// SAFETY: every task writes elements of its own only.
unsafe impl<T> Send for Output<T> {}
unsafe impl<T> Sync for Output<T> {}

impl<T> Output<T> {
    pub(super) fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }

    /// # Safety
    /// The range must be inside the result and nobody else's.
    pub(super) unsafe fn slice<'a>(self, offset: usize, len: usize) -> &'a mut [T] {
        unsafe { std::slice::from_raw_parts_mut(self.at(offset), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_becomes_a_tensor_and_is_read_back() {
        for len in [0, 1, 1000] {
            let mut buffer = Buffer::zeros(len);
            assert!(buffer.iter().all(|x| *x == 0.0));
            assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
            buffer.iter_mut().zip(0..).for_each(|(x, i)| *x = i as f32);
            let tensor = buffer.into_tensor(Shape::new([len]));
            let copy = tensor.clone();
            let expected: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(copy.into_data().to_vec::<f32>().unwrap(), expected);
            assert_eq!(tensor.into_data().into_vec::<f32>().unwrap(), expected);
        }
    }
}
