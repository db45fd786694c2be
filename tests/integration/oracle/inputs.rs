//! Inputs that every language computes to the same bits, and the moving of rows between global and local tensors.

use super::case::Case;
use super::latent::{Latents, latents};
use context_parallel::dtype::DType;
use context_parallel::partition::Side;

/// Global Q, K, V and dO, each element already a value of the storage type. Padding rows are NaN: nothing may read them.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[query token, head, dim_qk]`.
    pub q: Vec<f32>,
    /// `[key token, key head, dim_qk]`.
    pub k: Vec<f32>,
    /// `[key token, key head, dim_v]`.
    pub v: Vec<f32>,
    /// `[query token, head, dim_v]`.
    pub d_o: Vec<f32>,
    /// `[head]`, fp32; used where there are sinks.
    pub sinks: Vec<f32>,
    /// `[batch, head, query, key]`, 1 where one is for all. What no query and key use is NaN.
    pub bias: Vec<f32>,
    /// Of latents, whose K and V are then those that are made of them; else empty.
    pub latent: Latents,
}

/// SplitMix64's output for counter `n` (counting from 0).
pub fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Element `index` of tensor `id`: the sum of four 16-bit integers, which is nearly normal (deviation 1.15, within ±4) and exact in fp32.
pub fn element(id: u64, index: u64) -> f32 {
    let z = mix((id << 40) + index);
    let sum: u64 = (0..4).map(|i| (z >> (16 * i)) & 0xFFFF).sum();
    (sum as f32 - 131_070.0) / 32_768.0
}

/// The nearest value of the storage type, ties to even.
pub fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::Bf16 => half::bf16::from_f32(x).to_f32(),
        DType::F16 => half::f16::from_f32(x).to_f32(),
        DType::Fp8(_) => unreachable!("no tensor is stored so"),
    }
}

/// A case's inputs.
pub fn inputs(case: &Case, dtype: DType) -> Inputs {
    let tensor = |id: u64, side: Side, width: usize| {
        let mut values = vec![f32::NAN; case.tokens(side) * width];
        for token in case.true_tokens(side) {
            let first = token * width;
            for (n, value) in values[first..first + width].iter_mut().enumerate() {
                *value = round(element(id, (first + n) as u64), dtype);
            }
        }
        values
    };
    let latent = latents(case, dtype);
    let [made_k, made_v] = latent.expand(case, dtype);
    let or = |made: Vec<f32>, id, width| match case.latent {
        Some(_) => made,
        None => tensor(id, Side::Key, case.kv_heads * width),
    };
    Inputs {
        q: tensor(1, Side::Query, case.heads * case.dim_qk),
        k: or(made_k, 2, case.dim_qk),
        v: or(made_v, 3, case.dim_v),
        d_o: tensor(4, Side::Query, case.heads * case.dim_v),
        bias: bias(case, dtype),
        sinks: (0..case.heads as u64).map(|head| element(5, head)).collect(),
        latent,
    }
}

fn bias(case: &Case, dtype: DType) -> Vec<f32> {
    let mut values = vec![f32::NAN; case.bias_dims().iter().product()];
    for (seq, s) in case.seqs.iter().enumerate().filter(|_| case.bias.is_some()) {
        for (head, i) in (0..case.heads).flat_map(|h| (0..s.q.len as usize).map(move |i| (h, i))) {
            let first = case.bias_row(seq, head, i);
            for (j, value) in values[first..first + s.k.len as usize].iter_mut().enumerate() {
                *value = round(element(6, (first + j) as u64), dtype);
            }
        }
    }
    values
}

/// The rows `tokens` (see `partition::tokens`) of a global tensor with `width` elements per token.
pub fn gather(global: &[f32], tokens: &[u32], width: usize) -> Vec<f32> {
    tokens.iter().flat_map(|&t| &global[t as usize * width..][..width]).copied().collect()
}

/// The inverse of [`gather`]: writes a rank's rows to their places.
pub fn scatter(local: &[f32], tokens: &[u32], width: usize, global: &mut [f32]) {
    assert_eq!(local.len(), tokens.len() * width);
    for (row, &t) in local.chunks_exact(width).zip(tokens) {
        global[t as usize * width..][..width].copy_from_slice(row);
    }
}

/// Values as bytes of the storage type.
pub fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_ne_bytes()).collect(),
        DType::Fp8(_) => unreachable!("no tensor is stored so"),
    }
}

/// The inverse of [`encode`].
pub fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let two = |b: &[u8]| [b[0], b[1]];
    match dtype {
        DType::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        DType::Bf16 => {
            bytes.chunks_exact(2).map(|b| half::bf16::from_ne_bytes(two(b)).to_f32()).collect()
        }
        DType::F16 => {
            bytes.chunks_exact(2).map(|b| half::f16::from_ne_bytes(two(b)).to_f32()).collect()
        }
        DType::Fp8(_) => unreachable!("no tensor is stored so"),
    }
}
