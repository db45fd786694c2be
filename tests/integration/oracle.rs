//! What is right, and how far from it a result may be. Nothing here uses the library's masks, slices or kernels: the oracle is a
//! double loop over positions, written from the definition in `tests/data/README.md`, which also describes the corpus and its inputs.
//!
//! ```text
//! cases()                       the corpus
//! case.problem(P, comm, …)      a case as the library's problem
//! reference(case, dtype)        inputs, float64 oracle and plain attention, computed once per run
//! reference.check(tensor, got)  the error contract; the failure names case, tensor, head, rows, got and bound
//! gather, scatter               a rank's rows of a global tensor, and back
//! leakage(case, …)              changing one key changes exactly the rows that may see it
//! ```
//! All tensors are global: `[token, head, dim]` (LSE: `[token, head]`) over the padded sequences laid one after another.

mod case;
mod exact;
mod inputs;
mod latent;
mod leakage;
mod metric;
mod plain;
mod selftest;
mod wire;

pub use case::{Case, Dealing, Format, SEED, cases, number};
pub use inputs::{Inputs, decode, element, encode, gather, inputs, mix, scatter};
pub use latent::Latents;
pub use leakage::leakage;
pub use metric::{Reference, Tensor, reference};
pub use plain::{Variation, plain};
pub use wire::attended;

/// Outputs and gradients, global.
#[derive(Clone, Debug)]
pub struct Results<T> {
    /// `[query token, head, dim_v]`.
    pub o: Vec<T>,
    /// `[query token, head]`, natural logarithm; −inf for padding and for rows that see no key.
    pub lse: Vec<T>,
    /// `[query token, head, dim_qk]`.
    pub dq: Vec<T>,
    /// `[key token, key head, dim_qk]`.
    pub dk: Vec<T>,
    /// `[key token, key head, dim_v]`.
    pub dv: Vec<T>,
    /// `[head]`; empty without sinks.
    pub d_sinks: Vec<T>,
    /// `[head]`, −inf of heads that see nothing; empty where it is not asked for.
    pub max_logit: Vec<T>,
    /// `[batch, head, query, key]`, 1 where one is for all; empty where there is no gradient of the bias.
    pub d_bias: Vec<T>,
    /// `[key token, dim + rope]`; empty without latents, as those below.
    pub d_latent: Vec<T>,
    /// `[head, dim_qk − rope, dim]`.
    pub d_up_k: Vec<T>,
    /// `[head, dim_v, dim]`.
    pub d_up_v: Vec<T>,
}

impl<T: Copy> Results<T> {
    /// What padding and unseen rows have.
    fn empty(case: &Case, zero: T, minus_infinity: T) -> Results<T> {
        let [dim, rope, nope] = case.latent_dims();
        let (nq, nk) = (case.tokens(Side::Query), case.tokens(Side::Key));
        Results {
            o: vec![zero; nq * case.heads * case.dim_v],
            lse: vec![minus_infinity; nq * case.heads],
            dq: vec![zero; nq * case.heads * case.dim_qk],
            dk: vec![zero; nk * case.kv_heads * case.dim_qk],
            dv: vec![zero; nk * case.kv_heads * case.dim_v],
            d_sinks: vec![zero; case.sinks.map_or(0, |_| case.heads)],
            d_bias: match case.bias {
                Some(bias) if bias.gradient => vec![zero; case.bias_dims().iter().product()],
                _ => Vec::new(),
            },
            d_latent: vec![zero; nk * (dim + rope)],
            d_up_k: vec![zero; case.heads * nope * dim],
            d_up_v: vec![zero; case.heads * case.dim_v * dim],
            max_logit: vec![minus_infinity; case.max_logit.map_or(0, |_| case.heads)],
        }
    }

    /// By name.
    pub fn get(&self, tensor: Tensor) -> &[T] {
        match tensor {
            Tensor::O => &self.o,
            Tensor::Lse => &self.lse,
            Tensor::Dq => &self.dq,
            Tensor::Dk => &self.dk,
            Tensor::Dv => &self.dv,
            Tensor::DLatent => &self.d_latent,
        }
    }
}

use context_parallel::partition::Side;
