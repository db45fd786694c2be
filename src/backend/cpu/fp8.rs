//! Keys and values as they travel: blocks of 8-bit numbers with a power of two, see [`Fp8`]. Plain loops that the compiler vectorises for each instruction set.

use crate::dtype::{DType, Fp8};

/// The numbers of a format, as bits of the fp32 numbers that they are.
struct Numbers {
    /// Mantissa bits that fp32 has more.
    shift: u32,
    /// What fp32's exponent bias is more.
    bias: u32,
    /// Exponent of the largest number.
    top: u32,
    /// Largest mantissa, as fp32's, with which a number of that exponent still rounds to one of the format.
    last: u32,
}

const E4M3: Numbers = Numbers { shift: 20, bias: 120, top: 8, last: 0x68_0000 };
const E5M2: Numbers = Numbers { shift: 21, bias: 112, top: 15, last: 0x6f_ffff };

/// The scale byte of a block that is NaN, and its elements.
const NAN: (u8, u8) = (0xff, 0x7f);

impl Numbers {
    /// Smallest normal number.
    const fn least(&self) -> f32 {
        f32::from_bits((self.bias + 1) << 23)
    }

    /// A number whose unit in the last place is the format's smallest step.
    const fn coarse(&self) -> f32 {
        f32::from_bits((self.bias + 1 + self.shift) << 23)
    }

    /// Rounds x to nearest even; it is not above what still rounds to the largest number.
    #[inline(always)]
    fn code(&self, x: f32) -> u8 {
        let (sign, x) = (x.to_bits() >> 24 & 0x80, x.abs());
        let bits = x.to_bits();
        let even = (1 << (self.shift - 1)) - 1 + (bits >> self.shift & 1);
        let normal = ((bits + even) >> self.shift).wrapping_sub(self.bias << (23 - self.shift));
        let small = (x + self.coarse()).to_bits() - self.coarse().to_bits();
        (sign | if x < self.least() { small } else { normal }) as u8
    }

    /// The number of a code that is not NaN.
    #[inline(always)]
    fn number(&self, code: u8) -> f32 {
        let (sign, bits) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7f));
        let normal = (bits << self.shift) + (self.bias << 23);
        let step = f32::from_bits((self.bias + 1 - (23 - self.shift)) << 23);
        let small = bits as i32 as f32 * step;
        let normal_from = 1 << (23 - self.shift);
        f32::from_bits(sign | if bits < normal_from { small.to_bits() } else { normal })
    }

    #[inline(always)]
    fn encode(&self, from: &[f32], to: &mut [u8]) {
        let (codes, scales) = to.split_at_mut(from.len());
        let blocks = from.chunks(Fp8::BLOCK).zip(codes.chunks_mut(Fp8::BLOCK));
        for ((from, codes), scale) in blocks.zip(scales) {
            // Bits of numbers without sign compare as the numbers do; infinities and NaN come last.
            let largest = from.iter().fold(0, |largest, x| x.abs().to_bits().max(largest));
            if largest >= f32::INFINITY.to_bits() {
                *scale = NAN.0;
                codes.fill(NAN.1);
                continue;
            }
            let exponent = (largest + (0x7f_ffff - self.last)) >> 23;
            *scale = exponent.saturating_sub(self.top) as u8;
            let inverse = f32::from_bits((254 - u32::from(*scale)) << 23);
            for (x, code) in from.iter().zip(codes) {
                *code = self.code(x * inverse);
            }
        }
    }

    #[inline(always)]
    fn decode(&self, from: &[u8], to: &mut [f32], largest: f32) {
        let (codes, scales) = from.split_at(to.len());
        let blocks = codes.chunks(Fp8::BLOCK).zip(to.chunks_mut(Fp8::BLOCK));
        for ((codes, to), scale) in blocks.zip(scales) {
            let scale = match *scale {
                0 => f32::from_bits(1 << 22),
                byte if byte == NAN.0 => f32::NAN,
                byte => f32::from_bits(u32::from(byte) << 23),
            };
            for (x, code) in to.iter_mut().zip(codes) {
                *x = (self.number(*code) * scale).clamp(-largest, largest);
            }
        }
    }
}

/// Largest finite number of a storage type.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::MAX,
        DType::Bf16 => half::bf16::MAX.to_f32(),
        DType::F16 => half::f16::MAX.to_f32(),
        DType::Fp8(_) => unreachable!("decoded numbers are stored as others are"),
    }
}

/// A row of a head to bytes: format, numbers, how many, destination.
///
/// # Safety
/// `from` has `dim` readable numbers, and `to` has room for [`Fp8::bytes`] of them.
#[inline(always)]
pub unsafe fn encode(format: Fp8, from: *const f32, dim: usize, to: *mut u8) {
    // SAFETY: the caller's promise.
    let (from, to) = unsafe {
        let bytes = dim + dim.div_ceil(Fp8::BLOCK);
        (std::slice::from_raw_parts(from, dim), std::slice::from_raw_parts_mut(to, bytes))
    };
    match format {
        Fp8::E4m3 => E4M3.encode(from, to),
        Fp8::E5m2 => E5M2.encode(from, to),
    }
}

/// The way back, to fp32 numbers that the storage type holds exactly.
///
/// # Safety
/// `from` has the bytes of a row of `dim` elements, and `to` has room for these.
#[inline(always)]
pub unsafe fn decode(format: Fp8, from: *const u8, dim: usize, to: *mut f32, dtype: DType) {
    // SAFETY: the caller's promise.
    let (from, to) = unsafe {
        let bytes = dim + dim.div_ceil(Fp8::BLOCK);
        (std::slice::from_raw_parts(from, bytes), std::slice::from_raw_parts_mut(to, dim))
    };
    match format {
        Fp8::E4m3 => E4M3.decode(from, to, largest(dtype)),
        Fp8::E5m2 => E5M2.decode(from, to, largest(dtype)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::kernels::Kernels;
    use crate::backend::cpu::simd::Simd;
    use std::cmp::Ordering;

    /// All numbers of a format that are not below 0, from its definition.
    fn numbers(format: Fp8) -> Vec<f64> {
        let (mantissa, bias, count) = match format {
            Fp8::E4m3 => (3, 7, 0x7f),
            Fp8::E5m2 => (2, 15, 0x7c),
        };
        let number = |code: i32| {
            let (e, m) = (code >> mantissa, f64::from(code & ((1 << mantissa) - 1)));
            let m = m / 2f64.powi(mantissa);
            if e == 0 { m * 2f64.powi(1 - bias) } else { (1.0 + m) * 2f64.powi(e - bias) }
        };
        (0..count).map(number).collect()
    }

    /// The block format once more, from its definition: try scales from the smallest on, look for the nearest number.
    fn defined(format: Fp8, block: &[f32], dtype: DType) -> (u8, Vec<u8>, Vec<f32>) {
        let numbers = numbers(format);
        if block.iter().any(|x| !x.is_finite()) {
            return (0xff, vec![0x7f; block.len()], vec![f32::NAN; block.len()]);
        }
        // The next number that the format would have after its last.
        let step = numbers[numbers.len() - 1] - numbers[numbers.len() - 2];
        let beyond = numbers[numbers.len() - 1] + step;
        let all = [numbers.clone(), vec![beyond]].concat();
        let nearest = |x: f64| {
            let above = all.partition_point(|y| *y < x.abs());
            match above {
                0 => 0,
                _ if above == all.len() => above - 1,
                _ => match (all[above] - x.abs()).total_cmp(&(x.abs() - all[above - 1])) {
                    Ordering::Less => above,
                    Ordering::Greater => above - 1,
                    Ordering::Equal => above - above % 2,
                },
            }
        };
        let scaled = |x: f32, byte: i32| f64::from(x) * 2f64.powi(127 - byte);
        let largest_of = block.iter().fold(0f32, |a, x| a.max(x.abs()));
        let fits = |byte| nearest(scaled(largest_of, byte)) < numbers.len();
        let byte = (0..255).find(|byte| fits(*byte)).unwrap();
        let codes = block
            .iter()
            .map(|x| nearest(scaled(*x, byte)) as u8 | if x.is_sign_negative() { 0x80 } else { 0 });
        let codes: Vec<u8> = codes.collect();
        let largest = f64::from(largest(dtype));
        let values = codes.iter().map(|c| {
            let x = (numbers[usize::from(c & 0x7f)] * 2f64.powi(byte - 127)).min(largest);
            (if c & 0x80 == 0 { x } else { -x }) as f32
        });
        (byte as u8, codes.clone(), values.collect())
    }

    /// Numbers of a storage type, from 32-bit words.
    fn stored(dtype: DType, word: u32) -> f32 {
        match dtype {
            DType::Bf16 => half::bf16::from_bits((word >> 16) as u16).to_f32(),
            DType::F16 => half::f16::from_bits((word >> 16) as u16).to_f32(),
            _ => f32::from_bits(word),
        }
    }

    fn round_trip(simd: Simd, format: Fp8, row: &[f32], dtype: DType) -> (Vec<u8>, Vec<f32>) {
        let kernels = Kernels::of(simd, dtype);
        let mut bytes = vec![0xaa; Fp8::bytes(row.len() as u32) as usize];
        let mut back = vec![7.0; row.len()];
        // SAFETY: the vectors have room for a row.
        unsafe {
            (kernels.encode)(format, row.as_ptr(), row.len(), bytes.as_mut_ptr());
            (kernels.decode)(format, bytes.as_ptr(), row.len(), back.as_mut_ptr(), dtype);
        }
        (bytes, back)
    }

    fn assert_defined(format: Fp8, row: &[f32], dtype: DType) {
        let want: Vec<_> = row.chunks(Fp8::BLOCK).map(|b| defined(format, b, dtype)).collect();
        for simd in Simd::ALL.into_iter().filter(|s| s.available()) {
            let (bytes, back) = round_trip(simd, format, row, dtype);
            for (i, block) in row.chunks(Fp8::BLOCK).enumerate() {
                let (scale, codes, values) = &want[i];
                let at = i * Fp8::BLOCK..i * Fp8::BLOCK + block.len();
                let what = || format!("{simd:?} {format:?} {dtype:?} {block:?}");
                assert_eq!(bytes[row.len() + i], *scale, "{}", what());
                assert_eq!(bytes[at.clone()], **codes, "{}", what());
                let same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
                let got = &back[at];
                assert!(got.iter().zip(values).all(same), "{}: {got:?}, want {values:?}", what());
            }
            // What was decoded is held by the storage type, and coding it again changes nothing.
            let mut narrow = vec![0u8; row.len() * dtype.size()];
            let mut wide = vec![0f32; row.len()];
            let kernels = Kernels::of(simd, dtype);
            // SAFETY: the vectors have room for a row.
            unsafe {
                (kernels.narrow)(dtype, back.as_ptr(), narrow.as_mut_ptr(), row.len());
                (kernels.widen)(dtype, narrow.as_ptr(), wide.as_mut_ptr(), row.len());
            }
            let (again, still) = round_trip(simd, format, &wide, dtype);
            assert_eq!(again, bytes, "{simd:?} {format:?} {dtype:?} {row:?}");
            let bits = |v: &[f32]| {
                v.iter().map(|x| (!x.is_nan()).then(|| x.to_bits())).collect::<Vec<_>>()
            };
            assert_eq!(bits(&still), bits(&back), "{simd:?} {format:?} {dtype:?} {row:?}");
        }
    }

    /// Every number of every format with its neighbours and the middles between, at every scale.
    #[test]
    fn every_number_and_what_lies_between() {
        for format in Fp8::ALL {
            for exponent in -149..=127 {
                let mut numbers = numbers(format);
                numbers.reverse();
                let top = numbers[0];
                let scale = 2f64.powi(exponent) / 2f64.powi(top.log2().floor() as i32);
                let next = top + (numbers[0] - numbers[1]);
                for pair in [vec![next], numbers].concat().windows(2) {
                    let middle = ((pair[0] + pair[1]) / 2.0 * scale) as f32;
                    let mut row = vec![(top * scale) as f32, middle, -middle];
                    if middle > 0.0 && middle.is_finite() {
                        row.extend([middle.next_up(), -middle.next_down()]);
                    }
                    assert_defined(format, &row[1..], DType::F32);
                    assert_defined(format, &row, DType::F32);
                }
            }
        }
    }

    /// Rows of all lengths of random bits: all exponents, NaN and infinities; and of numbers near each other.
    #[test]
    fn rows_are_as_defined() {
        let mut state = 1u64;
        let mut word = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 32) as u32
        };
        for n in 0..400u32 {
            let dim = 8 * (1 + n as usize % 16);
            for dtype in DType::ALL {
                let wild: Vec<f32> = (0..dim).map(|_| stored(dtype, word())).collect();
                let centre = word() & 0x7f80_0000;
                let near: Vec<f32> = (0..dim)
                    .map(|_| {
                        let w = word();
                        let exponent = centre.wrapping_sub((w % 24) << 23) & 0x7f80_0000;
                        stored(dtype, w & 0x807f_0000 | exponent | w >> 16)
                    })
                    .collect();
                for format in Fp8::ALL {
                    assert_defined(format, &wild, dtype);
                    assert_defined(format, &near, dtype);
                }
            }
        }
    }

    /// Rows at both ends of what a storage type holds, of nothing but 0, and with a NaN in one of two blocks.
    #[test]
    fn ends_of_the_range() {
        for dtype in DType::ALL {
            let top = largest(dtype);
            let least = match dtype {
                DType::F32 => f32::from_bits(1),
                DType::Bf16 => half::bf16::from_bits(1).to_f32(),
                _ => half::f16::from_bits(1).to_f32(),
            };
            let mut nan = vec![1.0; 40];
            nan[35] = f32::NAN;
            let mut infinite = vec![-2.0; 40];
            infinite[3] = f32::NEG_INFINITY;
            for row in [
                vec![top, -top, 1.0, least],
                vec![least, -least, 3.0 * least, 0.0],
                vec![0.0, -0.0],
                nan,
                infinite,
            ] {
                Fp8::ALL.into_iter().for_each(|format| assert_defined(format, &row, dtype));
            }
            let (_, back) = round_trip(Simd::Scalar, Fp8::E4m3, &[top], dtype);
            assert_eq!(back, [top], "the largest number stays finite");
        }
    }
}
