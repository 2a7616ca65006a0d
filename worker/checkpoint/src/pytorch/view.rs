//! A tensor as PyTorch stores it: a window with strides on a storage, which it may share with others.

/// The kind of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE double precision.
    F64,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    BF16,
    /// Signed, 64 bits.
    I64,
    /// Signed, 32 bits.
    I32,
    /// Signed, 16 bits.
    I16,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 8 bits.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl Dtype {
    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }
}

/// A storage that a pickle speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage<'p> {
    /// Name of its record in the archive's folder `data`.
    pub key: &'p str,
    /// The kind of its elements.
    pub dtype: Dtype,
    /// How many there are.
    pub elements: u64,
}

/// A window on a storage that has been proved to lie inside of it, and to be no larger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Element of the storage that is the first of the tensor.
    pub first: u64,
    /// Elements along each axis.
    pub shape: Vec<u64>,
    /// Elements of the storage from one index of an axis to the next.
    pub strides: Vec<u64>,
}

impl Window {
    /// More axes than any weight has. A bound, because the same shape may be used again and again.
    pub const MOST_AXES: usize = 8;

    /// Checks a window on a storage of so many elements.
    ///
    /// # Errors
    /// In words, when it does not lie inside, or is larger than what it looks on.
    pub fn new(
        first: u64,
        shape: Vec<u64>,
        strides: Vec<u64>,
        storage: u64,
    ) -> Result<Window, String> {
        if shape.len() != strides.len() || shape.len() > Window::MOST_AXES {
            return Err(format!(
                "a tensor of {} axes and {} strides",
                shape.len(),
                strides.len()
            ));
        }
        let window = Window {
            first,
            shape,
            strides,
        };
        match (window.elements(), window.span()) {
            (Some(0), _) => Ok(window),
            // An expanded tensor repeats elements: a short file could ask for any amount of memory.
            (Some(elements), _) if elements > storage => Err(format!(
                "a tensor of {elements} elements on a storage of {storage}"
            )),
            (Some(_), Some(span)) if first.checked_add(span).is_some_and(|end| end <= storage) => {
                Ok(window)
            }
            _ => Err(format!(
                "a tensor of shape {:?} with strides {:?} from element {first} on, which reaches beyond its storage of \
                 {storage}",
                window.shape, window.strides
            )),
        }
    }

    /// How many elements there are; none if that fits no 64 bits.
    fn elements(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut sizes = self.shape.iter();
        sizes.try_fold(1_u64, |product, &size| product.checked_mul(size))
    }

    /// Elements of the storage from the first to the last that is looked on.
    fn span(&self) -> Option<u64> {
        let mut axes = self.shape.iter().zip(&self.strides);
        axes.try_fold(1_u64, |span, (&size, &stride)| {
            span.checked_add(size.checked_sub(1)?.checked_mul(stride)?)
        })
    }

    /// Elements of the storage that are read for it: 0 for an empty tensor.
    pub fn spanned(&self) -> u64 {
        match self.elements() {
            Some(0) | None => 0,
            Some(_) => self.span().unwrap_or(0),
        }
    }

    /// Whether the elements follow each other in the storage, the last axis fastest.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape
            .iter()
            .zip(&self.strides)
            .rev()
            .all(|(&size, &stride)| {
                let fits = size == 1 || stride == expected;
                expected = size.max(1).wrapping_mul(expected);
                fits
            })
    }

    /// Puts the elements in order, the last axis fastest; `spanned` is the storage from the first element on, of `width`
    /// bytes each.
    pub fn gather(&self, spanned: &[u8], width: usize) -> Vec<u8> {
        let elements = self.elements().unwrap_or(0) as usize;
        let mut gathered = Vec::with_capacity(elements * width);
        let mut index = vec![0; self.shape.len()];
        let mut place = 0_u64;
        for _ in 0..elements {
            gathered.extend_from_slice(&spanned[place as usize * width..][..width]);
            for axis in (0..index.len()).rev() {
                let (size, stride) = (self.shape[axis], self.strides[axis]);
                // The stride of an axis of one element may be anything; what it adds is taken back at once.
                index[axis] += 1;
                place = place.wrapping_add(stride);
                if index[axis] < size {
                    break;
                }
                place = place.wrapping_sub(stride.wrapping_mul(size));
                index[axis] = 0;
            }
        }
        gathered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_window_is_put_in_order() {
        let window = Window::new(0, vec![3, 2], vec![1, 3], 6).unwrap();
        assert!(!window.is_contiguous());
        assert_eq!(window.gather(&[0, 1, 2, 3, 4, 5], 1), [0, 3, 1, 4, 2, 5]);
        let every_other = Window::new(1, vec![2, 2], vec![4, 2], 8).unwrap();
        assert_eq!(every_other.spanned(), 7);
        assert_eq!(every_other.gather(b"bbccddeeffgghh", 2), b"bbddffhh");
    }

    #[test]
    fn what_does_not_lie_inside_its_storage_is_refused() {
        let big = u64::MAX;
        for (first, shape, strides) in [
            (0, vec![7], vec![1]),
            (1, vec![6], vec![1]),
            (0, vec![2, 3], vec![4, 1]),
            (0, vec![big, big], vec![1, 1]),
            (0, vec![2], vec![big]),
            (big, vec![1], vec![1]),
            (0, vec![1 << 40], vec![0]),
            (0, vec![7, 1], vec![0, 0]),
            (0, vec![1], vec![1, 1]),
            (0, vec![1; 9], vec![1; 9]),
        ] {
            let message = format!("{first} {shape:?} {strides:?}");
            assert!(Window::new(first, shape, strides, 6).is_err(), "{message}");
        }
        let empty = Window::new(0, vec![0, big], vec![big, 1], 0).unwrap();
        assert_eq!((empty.spanned(), empty.gather(&[], 4)), (0, vec![]));
        let huge_stride = Window::new(3, vec![1, 2], vec![big, 1], 6).unwrap();
        assert!(huge_stride.is_contiguous());
        assert_eq!(huge_stride.gather(&[7, 8], 1), [7, 8]);
        let scalar = Window::new(5, vec![], vec![], 6).unwrap();
        assert_eq!((scalar.spanned(), scalar.is_contiguous()), (1, true));
    }
}
