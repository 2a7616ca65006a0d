//! Masters beside bf16 parameters, random rounding and fingerprints: what is done with the bits of numbers, a chunk of the
//! flat buffers at a time.

use tch::{Device, Kind, Tensor};

use crate::{
    kernels::{KernelError, mix},
    optim::chunks,
};

/// The quiet NaN. Others are made it before their lower halves go: what is left of them could be an infinity.
const NAN: i64 = 0x7fc0_0000;

/// Splits masters (fp32) into what the model computes on, `param_m` (bf16), and `remainder_m` (i16): the master to the nearest
/// bf16 number, ties away from zero, and the lower half of its bits. Nothing is lost: the parameter's bits, 16 places up,
/// plus the signed remainder are the master's bits. Any NaN becomes the quiet one, whose half is a NaN.
pub fn split(master_m: &Tensor, param_m: &Tensor, remainder_m: &Tensor) {
    for (start, length) in chunks(master_m.size()[0]) {
        let [master, param, mut remainder] =
            [master_m, param_m, remainder_m].map(|flat_m| flat_m.narrow(0, start, length));
        let bits = bits(&master);
        keep_upper(&bits.g_add_scalar(0x8000), &param);
        let lower = bits
            .bitwise_left_shift_tensor_scalar(16)
            .bitwise_right_shift_tensor_scalar_(16);
        remainder.copy_(&lower);
    }
}

/// The masters again, to the bit, from what [`split`] or [`adamw`](crate::kernels::Kernels::adamw) made.
pub fn join(param_m: &Tensor, remainder_m: &Tensor, master_m: &Tensor) {
    for (start, length) in chunks(master_m.size()[0]) {
        let [param, remainder, master] =
            [param_m, remainder_m, master_m].map(|flat_m| flat_m.narrow(0, start, length));
        let bits = param
            .view_dtype(Kind::Int16)
            .to_kind(Kind::Int)
            .bitwise_left_shift_tensor_scalar_(16)
            .g_add_(&remainder);
        master.view_dtype(Kind::Int).copy_(&bits);
    }
}

pub fn fingerprint(flat_m: &Tensor, first: i64, key: u64) -> Result<[u64; 4], KernelError> {
    let (whole, mask) = match flat_m.kind() {
        Kind::Float => (Kind::Int, 0xffff_ffff),
        Kind::BFloat16 | Kind::Int16 => (Kind::Int16, 0xffff),
        kind => {
            let problem = format!("it is {kind:?}, not Float, BFloat16 or Int16");
            return Err(KernelError::Tensor {
                tensor: "flat_m",
                problem,
            });
        }
    };
    let mut sums = [0u64; 4];
    for (start, length) in chunks(flat_m.size()[0]) {
        let bits = flat_m.narrow(0, start, length).view_dtype(whole);
        let bits = bits.to_kind(Kind::Int64).bitwise_and(mask);
        for (sum, lane) in sums.iter_mut().zip(0..) {
            let states = states(mix::number(key, lane), first + start, &bits).g_add_(&bits);
            let total = finish(states).sum(Kind::Int64).int64_value(&[]);
            *sum = sum.wrapping_add(total.cast_unsigned());
        }
    }
    Ok(sums)
}

/// The numbers of `key` at as many indices as `like` has elements, from `first` on: i64.
pub fn random(key: u64, first: i64, like: &Tensor) -> Tensor {
    finish(states(key, first, like))
}

/// Rounds fp32 to bf16, up if the 16 bits of `random` from `place` on carry over the lower half, so as often as the mean
/// asks for.
pub fn round(from: &Tensor, random: &Tensor, place: i64, to: &Tensor) {
    let noise = random
        .bitwise_right_shift_tensor_scalar(place)
        .bitwise_and(0xffff);
    keep_upper(&bits(from).g_add_(&noise), to);
}

/// Bits of fp32 numbers, with one NaN.
fn bits(x: &Tensor) -> Tensor {
    x.view_dtype(Kind::Int).masked_fill(&x.isnan(), NAN)
}

/// The upper halves of 32 bits each, as bf16.
fn keep_upper(bits: &Tensor, to: &Tensor) {
    to.view_dtype(Kind::Int16)
        .copy_(&bits.bitwise_right_shift_tensor_scalar(16));
}

/// States of [`mix::number`].
fn states(key: u64, first: i64, like: &Tensor) -> Tensor {
    let (length, device): (i64, Device) = (like.numel() as i64, like.device());
    Tensor::arange_start(first, first + length, (Kind::Int64, device))
        .g_mul_scalar_(mix::STEP.cast_signed())
        .g_add_scalar_(key.cast_signed())
}

/// From states to numbers.
fn finish(mut x: Tensor) -> Tensor {
    for (shift, factor) in mix::ROUNDS {
        // libtorch's shift brings copies of the sign.
        let mask = i64::MAX >> (shift - 1);
        let shifted = x
            .bitwise_right_shift_tensor_scalar(i64::from(shift))
            .bitwise_and_(mask);
        let _ = x
            .bitwise_xor_tensor_(&shifted)
            .g_mul_scalar_(factor.cast_signed());
    }
    x
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::optim::CHUNK;

    fn on_cpu(kind: Kind) -> (Kind, Device) {
        (kind, Device::Cpu)
    }

    fn floats(bits: &[u32]) -> Tensor {
        let bits: Vec<i32> = bits.iter().map(|bits| bits.cast_signed()).collect();
        Tensor::from_slice(&bits).view_dtype(Kind::Float)
    }

    fn bits_of(x: &Tensor) -> Vec<u32> {
        let bits = Vec::<i32>::try_from(x.view_dtype(Kind::Int)).unwrap();
        bits.into_iter().map(i32::cast_unsigned).collect()
    }

    fn halves_of(x: &Tensor) -> Vec<u16> {
        let bits = Vec::<i16>::try_from(x.view_dtype(Kind::Int16)).unwrap();
        bits.into_iter().map(i16::cast_unsigned).collect()
    }

    fn split_of(masters: &Tensor) -> (Tensor, Tensor) {
        let count = masters.size();
        let param = Tensor::full(&count, f64::NAN, on_cpu(Kind::BFloat16));
        let remainder = Tensor::full(&count, 77, on_cpu(Kind::Int16));
        split(masters, &param, &remainder);
        (param, remainder)
    }

    fn joined(param: &Tensor, remainder: &Tensor) -> Tensor {
        let master = Tensor::full(param.size(), f64::NAN, on_cpu(Kind::Float));
        join(param, remainder, &master);
        master
    }

    /// Bits of any number but a NaN, as often as not close to where rounding turns, or to the ends of the exponents.
    fn number() -> impl Strategy<Value = u32> {
        let lower = prop_oneof![
            any::<u16>(),
            prop::sample::select(vec![0, 1, 0x7fff, 0x8000, 0x8001, 0xffff]),
        ];
        let exponent = prop_oneof![0u16..255, Just(0), Just(1), Just(254)];
        (any::<bool>(), exponent, 0u16..128, lower).prop_map(
            |(minus, exponent, fraction, lower)| {
                let upper = u16::from(minus) << 15 | exponent << 7 | fraction;
                u32::from(upper) << 16 | u32::from(lower)
            },
        )
    }

    /// The nearest bf16 number, ties away from zero, by arithmetic in fp64, where all of this is exact.
    fn nearest(x: f32) -> u16 {
        let toward_zero = (x.to_bits() >> 16) as u16;
        let value = |half: u16| match bf16::from_bits(half).to_f64() {
            // What is beyond the largest number is nearer to it or to its successor, were there one.
            infinite if infinite.is_infinite() => 2f64.powi(128).copysign(infinite),
            finite => finite,
        };
        let [down, up] =
            [toward_zero, toward_zero + 1].map(|half| (value(half) - f64::from(x)).abs());
        if down < up {
            toward_zero
        } else {
            toward_zero + 1
        }
    }

    proptest! {
        #[test]
        fn masters_come_back_to_the_bit(numbers in prop::collection::vec(number(), 1..200)) {
            let (param, remainder) = split_of(&floats(&numbers));
            let rounded: Vec<u16> = numbers.iter().map(|&bits| nearest(f32::from_bits(bits))).collect();
            prop_assert_eq!(halves_of(&param), rounded);
            prop_assert_eq!(bits_of(&joined(&param, &remainder)), numbers);
        }

        #[test]
        fn rounding_at_random_takes_a_neighbour(
            numbers in prop::collection::vec(number(), 1..100), key: u64, first in 0..1i64 << 40,
        ) {
            let from = floats(&numbers);
            let to = Tensor::full(from.size(), f64::NAN, on_cpu(Kind::BFloat16));
            round(&from, &random(key, first, &from), 48, &to);
            for ((index, bits), half) in (first..).zip(&numbers).zip(halves_of(&to)) {
                let noise = (mix::number(key, index.cast_unsigned()) >> 48) as u32;
                prop_assert_eq!(u32::from(half), (bits + noise) >> 16);
            }
        }

        #[test]
        fn fingerprints_of_parts_add_up(
            numbers in prop::collection::vec(any::<u32>(), 1..100), first in 0..1i64 << 40, key: u64, cut in 0..100i64,
        ) {
            let count = numbers.len() as i64;
            let cut = cut.min(count);
            let flat = floats(&numbers);
            let of = |kind: Kind, start: i64, length: i64| {
                fingerprint(&flat.view_dtype(kind).narrow(0, start, length), first + start, key).unwrap()
            };
            for (kind, length) in [(Kind::Float, 1), (Kind::Int16, 2), (Kind::BFloat16, 2)] {
                let [whole, left, right] = [(0, count), (0, cut), (cut, count - cut)]
                    .map(|(start, part)| of(kind, length * start, length * part));
                let sum = [0, 1, 2, 3].map(|lane: usize| left[lane].wrapping_add(right[lane]));
                prop_assert_eq!(sum, whole);
            }
            let plainly = [0, 1, 2, 3].map(|lane| {
                let lane = mix::number(key, lane);
                let hashes = (first..).zip(&numbers).map(|(index, &bits)| {
                    mix::number(lane.wrapping_add(bits.into()), index.cast_unsigned())
                });
                hashes.fold(0, u64::wrapping_add)
            });
            prop_assert_eq!(of(Kind::Float, 0, count), plainly);
        }
    }

    #[test]
    fn a_nan_stays_one_in_either_form_and_infinity_stays_infinite() {
        let masters = floats(&[
            0x7fff_ffff,
            0xffff_ffff,
            0x7f80_0001,
            0x7f80_0000,
            0xff80_0000,
        ]);
        let (param, remainder) = split_of(&masters);
        let back = joined(&param, &remainder);
        let rounded = Tensor::zeros([5], on_cpu(Kind::BFloat16));
        round(
            &masters,
            &Tensor::full([5], -1, on_cpu(Kind::Int64)),
            48,
            &rounded,
        );
        for form in [param, back, rounded] {
            let found = Vec::<f32>::try_from(form.to_kind(Kind::Float)).unwrap();
            assert!(found[..3].iter().all(|x| x.is_nan()), "{found:?}");
            assert_eq!(found[3..], [f32::INFINITY, f32::NEG_INFINITY]);
        }
    }

    #[test]
    fn rounding_at_random_has_the_right_mean_and_forgets_neighbours() {
        const COUNT: i64 = 1 << 20;
        // A quarter, a tie, nearly the next one; negative; subnormal.
        for bits in [
            0x3f80_4000u32,
            0x4049_8000,
            0x3f80_f000,
            0xbf80_4000,
            0x0000_2000,
        ] {
            let share = f64::from(bits & 0xffff) / 65536.0;
            let from = floats(&[bits]).expand([COUNT], false).contiguous();
            let to = Tensor::zeros([COUNT], on_cpu(Kind::BFloat16));
            round(&from, &random(5, 0, &from), 48, &to);
            let up = to
                .view_dtype(Kind::Int16)
                .ne(i64::from(((bits >> 16) as u16).cast_signed()))
                .to_kind(Kind::Double);
            let deviation = (share * (1.0 - share) / COUNT as f64).sqrt();
            let mean = up.mean(Kind::Double).double_value(&[]);
            assert!(
                (mean - share).abs() < 5.0 * deviation,
                "{bits:x}: {mean} for {share}"
            );
            let both = &up.narrow(0, 0, COUNT - 1) * &up.narrow(0, 1, COUNT - 1);
            let both = both.mean(Kind::Double).double_value(&[]);
            assert!(
                (both - share * share).abs() < 5.0 * deviation,
                "{bits:x}: {both}"
            );
        }
    }

    #[test]
    fn a_fingerprint_sees_values_places_and_keys() {
        let flat = Tensor::randn([1000], on_cpu(Kind::Float));
        let whole = fingerprint(&flat, 0, 1).unwrap();
        assert_eq!(whole, fingerprint(&flat.copy(), 0, 1).unwrap());
        let swapped = flat.copy();
        let (a, b) = (flat.double_value(&[3]), flat.double_value(&[998]));
        let _ = swapped.get(3).fill_(b);
        let _ = swapped.get(998).fill_(a);
        let signed_zero = Tensor::zeros([1000], on_cpu(Kind::Float));
        let zero = fingerprint(&signed_zero, 0, 1).unwrap();
        let _ = signed_zero.get(500).fill_(-0.0);
        let mut seen = vec![
            whole,
            fingerprint(&swapped, 0, 1).unwrap(),
            fingerprint(&flat, 1, 1).unwrap(),
            fingerprint(&flat, 0, 2).unwrap(),
            zero,
            fingerprint(&signed_zero, 0, 1).unwrap(),
        ];
        seen.iter().for_each(|lanes| {
            let mut lanes = lanes.to_vec();
            lanes.sort_unstable();
            lanes.dedup();
            assert_eq!(lanes.len(), 4, "lanes are independent of each other");
        });
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 6);
    }

    #[test]
    fn chunks_leave_no_seam() {
        let masters = Tensor::randn([CHUNK + 5], on_cpu(Kind::Float));
        let (param, remainder) = split_of(&masters);
        assert!(joined(&param, &remainder) == masters);
        let of = |start, length| fingerprint(&masters.narrow(0, start, length), start, 9).unwrap();
        let (whole, left, right) = (of(0, CHUNK + 5), of(0, 7), of(7, CHUNK - 2));
        assert_eq!(whole[3], left[3].wrapping_add(right[3]));
    }

    #[test]
    fn numbers_of_another_kind_have_no_fingerprint() {
        let error = fingerprint(&Tensor::zeros([4], on_cpu(Kind::Double)), 0, 0).unwrap_err();
        assert!(error.to_string().contains("it is Double"), "{error}");
    }
}
