//! Latents: what K and V are made of, and the gradients of that from dK and dV.

use super::Results;
use super::case::Case;
use super::exact::Exact;
use super::inputs::{Inputs, element, round};
use context_parallel::dtype::DType;
use context_parallel::partition::Side;

/// Latents and weights, empty without. Multiples of powers of two with so few bits that every sum of products is exact in fp32: what K and V are is not a
/// matter of rounding, but for the one to the storage type.
#[derive(Clone, Debug, Default)]
pub struct Latents {
    /// `[key token, dim + rope]`; padding is NaN.
    pub rows: Vec<f32>,
    /// `[head, dim_qk − rope, dim]`.
    pub up_k: Vec<f32>,
    /// `[head, dim_v, dim]`.
    pub up_v: Vec<f32>,
}

/// Element of a tensor, to an eighth.
fn eighths(id: u64, index: usize) -> f32 {
    (8.0 * element(id, index as u64) + 0.5).floor() / 8.0
}

/// A case's latents and weights.
pub fn latents(case: &Case, dtype: DType) -> Latents {
    let [dim, rope, nope] = case.latent_dims();
    if dim == 0 {
        return Latents::default();
    }
    // The least s with 4^s at least dim: keys are about as large as queries.
    let s = (0..).find(|s| 4usize.pow(*s) >= dim).expect("some power is larger");
    let scale = 0.5f32.powi(s as i32);
    let weights = |id, rows: usize| -> Vec<f32> {
        (0..case.heads * rows * dim).map(|i| scale * eighths(id, i)).collect()
    };
    let mut rows = vec![f32::NAN; case.tokens(Side::Key) * (dim + rope)];
    for token in case.true_tokens(Side::Key) {
        let first = token * (dim + rope);
        for (i, x) in rows[first..first + dim + rope].iter_mut().enumerate() {
            *x = eighths(7, first + i);
        }
    }
    let made = Latents { rows, up_k: weights(8, nope), up_v: weights(9, case.dim_v) };
    for x in made.rows.iter().chain(&made.up_k).chain(&made.up_v) {
        assert!(x.is_nan() || *x == round(*x, dtype), "{x} has too many bits for {}", dtype.name());
    }
    made
}

impl Latents {
    /// K and V as attention has them.
    pub fn expand(&self, case: &Case, dtype: DType) -> [Vec<f32>; 2] {
        let [dim, rope, nope] = case.latent_dims();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        if dim == 0 {
            return [k, v];
        }
        for token in self.rows.chunks_exact(dim + rope) {
            let (c, r) = token.split_at(dim);
            let made = |w: &[f32]| -> f32 {
                let sum: f64 = w.iter().zip(c).map(|(w, c)| f64::from(*w) * f64::from(*c)).sum();
                assert!(sum.is_nan() || f64::from(sum as f32) == sum, "exact in fp32");
                round(sum as f32, dtype)
            };
            for head in 0..case.heads {
                k.extend(self.up_k[head * nope * dim..][..nope * dim].chunks_exact(dim).map(made));
                k.extend(r);
                let of_head = &self.up_v[head * case.dim_v * dim..][..case.dim_v * dim];
                v.extend(of_head.chunks_exact(dim).map(made));
            }
        }
        [k, v]
    }
}

/// Sums that gradients of latents consist of: `add(sum, gradient of a key or value, what it meets)`, from dK and dV.
fn contract<T: Copy>(
    case: &Case,
    x: &Latents,
    seen: &[bool],
    from: [&[T]; 2],
    to: [&mut [T]; 3],
    add: impl Fn(&mut T, T, f32),
) {
    let [dim, rope, nope] = case.latent_dims();
    let [dk, dv] = from;
    let [d_latent, d_up_k, d_up_v] = to;
    for token in (0..seen.len()).filter(|t| dim > 0 && seen[*t]) {
        let width = dim + rope;
        let c = &x.rows[token * width..][..dim];
        let d_c = &mut d_latent[token * width..][..width];
        for head in 0..case.heads {
            let at = token * case.heads + head;
            let dk = &dk[at * case.dim_qk..][..case.dim_qk];
            let dv = &dv[at * case.dim_v..][..case.dim_v];
            for (gradient, weights, d_weights) in
                [(&dk[..nope], &x.up_k, &mut *d_up_k), (dv, &x.up_v, &mut *d_up_v)]
            {
                for (n, g) in gradient.iter().enumerate() {
                    let row = (head * gradient.len() + n) * dim;
                    for i in 0..dim {
                        add(&mut d_c[i], *g, weights[row + i]);
                        add(&mut d_weights[row + i], *g, c[i]);
                    }
                }
            }
            for (to, g) in d_c[dim..].iter_mut().zip(&dk[nope..]) {
                add(to, *g, 1.0);
            }
        }
    }
}

/// From the oracle's dK and dV, and from their terms.
pub fn exact(case: &Case, x: &Inputs, out: &mut Exact) {
    let r = &mut out.right;
    let to = [&mut r.d_latent[..], &mut r.d_up_k, &mut r.d_up_v];
    contract(case, &x.latent, &out.seen, [&r.dk, &r.dv], to, |sum, g, w| *sum += g * f64::from(w));
    let t = &mut out.terms;
    let to = [&mut t.d_latent[..], &mut t.d_up_k, &mut t.d_up_v];
    contract(case, &x.latent, &out.seen, [&t.dk, &t.dv], to, |sum, g, w| {
        *sum += g * f64::from(w.abs());
    });
}

/// What a model that attends expanded keys would do: products with dK and dV in the storage type, summed in fp32; the gradient of the latents is
/// rounded, that of the weights is fp32.
pub fn plain(case: &Case, x: &Inputs, dtype: DType, out: &mut Results<f32>) {
    let mut seen = vec![false; case.tokens(Side::Key)];
    case.true_tokens(Side::Key).into_iter().for_each(|t| seen[t] = true);
    let to = [&mut out.d_latent[..], &mut out.d_up_k, &mut out.d_up_v];
    contract(case, &x.latent, &seen, [&out.dk, &out.dv], to, |sum, g, w| *sum += g * w);
    out.d_latent.iter_mut().for_each(|g| *g = round(*g, dtype));
}
