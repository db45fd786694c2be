//! Where the numbers come from: a text's bytes, or a seed. Every rank makes its own rows; all make the same.

use context_parallel::plan::Tensor;
use context_parallel::problem::Problem;

/// The seed of everything.
const SEED: u64 = 0x6370_2d64_656d_6f31;

/// What fills Q, K, V and dO.
pub enum Source {
    /// One sequence; every byte is a token.
    ///
    /// A fixed table gives every byte a vector per key head, with elements nearly normal and of variance 1. K is that vector, turned
    /// by its position (RoPE, arXiv 2104.09864: elements i and i + D/2 are a pair, base 10000). Q is the mean of the key vector and
    /// one of its own, turned likewise: a byte looks for bytes of its kind that are near. V is a third vector, and dO, the gradient of a
    /// loss that wants to know the next byte, is the next byte's vector of a fourth table. K and V have one vector per key head.
    Text(Vec<u8>),
    /// Independent, nearly normal, variance 1.
    Random,
}

impl Source {
    /// The values of one token and head. `token` counts over all padded sequences, and is the position in a text.
    pub fn fill(&self, p: &Problem, tensor: Tensor, token: u32, head: u32, out: &mut [f32]) {
        let Source::Text(text) = self else {
            let row = u64::from(token) * 4096 + u64::from(head);
            return normal(key(tensor), row, out);
        };
        let at = |token: u32| u64::from(text.get(token as usize).copied().unwrap_or(0));
        let entry = |byte: u64, head: u32| byte * 4096 + u64::from(head);
        match tensor {
            Tensor::Q => {
                let mut own = vec![0.0; out.len()];
                normal(key(Tensor::Q), entry(at(token), head), &mut own);
                normal(key(Tensor::K), entry(at(token), head / p.group()), out);
                let half = 0.5f32.sqrt();
                out.iter_mut().zip(own).for_each(|(x, y)| *x = half * (*x + y));
                turn(token, out);
            }
            Tensor::K => {
                normal(key(Tensor::K), entry(at(token), head), out);
                turn(token, out);
            }
            Tensor::DOut => normal(key(Tensor::DOut), entry(at(token + 1), head), out),
            _ => normal(key(tensor), entry(at(token), head), out),
        }
    }
}

/// A table's seed.
fn key(tensor: Tensor) -> u64 {
    mix(SEED ^ tensor as u64)
}

/// SplitMix64's finaliser.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A row of a table: sums of four 16-bit integers, scaled to variance 1.
fn normal(seed: u64, row: u64, out: &mut [f32]) {
    let first = mix(seed ^ row.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    for (i, x) in out.iter_mut().enumerate() {
        let z = mix(first.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let sum: u64 = (0..4).map(|part| (z >> (16 * part)) & 0xffff).sum();
        *x = (sum as f32 - 131_070.0) / 37_837.0;
    }
}

/// Rotary position embedding.
fn turn(position: u32, x: &mut [f32]) {
    let half = x.len() / 2;
    for i in 0..half {
        let frequency = 10_000f64.powf(-(i as f64) / half as f64);
        let (sin, cos) = (f64::from(position) * frequency).sin_cos();
        let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
        x[i] = (a * cos - b * sin) as f32;
        x[i + half] = (a * sin + b * cos) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_nearly_normal_and_turning_keeps_lengths() {
        let mut x = vec![0.0; 4096];
        normal(1, 2, &mut x);
        let mean = x.iter().sum::<f32>() / 4096.0;
        let variance = x.iter().map(|v| v * v).sum::<f32>() / 4096.0;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.08, "{mean} {variance}");
        let before: f32 = x[..64].iter().map(|v| v * v).sum();
        turn(1234, &mut x[..64]);
        let after: f32 = x[..64].iter().map(|v| v * v).sum();
        assert!((before - after).abs() < 1e-3 * before);
    }
}
