//! Perturb one token: only the rows that may see it change, and they do.

use super::case::Case;
use super::exact::dot;
use super::inputs::Inputs;
use super::metric::{Tensor, reference};
use context_parallel::dtype::DType;
use context_parallel::partition::Side;

/// Changes one key head of one key token after another and runs again: rows of O that see that token through
/// that head with a weight of at least a thousandth must change, rows of O or dQ that may not see it must keep every bit. `run` maps
/// inputs to the global tensor. The tokens are the first, the last and two between, over all sequences.
pub fn leakage(
    case: &Case,
    dtype: DType,
    tensor: Tensor,
    mut run: impl FnMut(&Inputs) -> Vec<f32>,
) -> Result<(), String> {
    assert!(matches!(tensor, Tensor::O | Tensor::Dq), "rows of {tensor:?} are not queries");
    let reference = reference(case, dtype);
    let before = run(&reference.inputs);
    let keys: Vec<(usize, usize)> = (0..case.seqs.len())
        .flat_map(|seq| (0..case.seqs[seq].k.len as usize).map(move |j| (seq, j)))
        .collect();
    let samples = keys.len().min(4);
    for n in 0..samples {
        let (seq, j) = keys[n * (keys.len() - 1) / (samples - 1).max(1)];
        let kv_head = n % case.kv_heads;
        let key = (case.first(seq, Side::Key) + j) * case.kv_heads + kv_head;
        let mut changed = reference.inputs.clone();
        // Large enough to show in bf16 wherever the weight is a thousandth; K changes too, so that a leak through the sum shows.
        changed.v[key * case.dim_v..][..case.dim_v].fill(2000.0);
        changed.k[key * case.dim_qk..][..case.dim_qk].iter_mut().for_each(|k| *k *= 0.5);
        let after = run(&changed);
        let group = case.heads / case.kv_heads;
        let dim = tensor.shape(case).1;
        for row in 0..case.tokens(Side::Query) {
            for head in 0..case.heads {
                let query = row * case.heads + head;
                let bits = |x: &[f32]| -> Vec<u32> {
                    x[query * dim..][..dim].iter().map(|x| x.to_bits()).collect()
                };
                let same = bits(&before) == bits(&after);
                let first = case.first(seq, Side::Query);
                let inside = (first..first + case.seqs[seq].q.len as usize).contains(&row);
                let sees = head / group == kv_head && inside && case.sees(seq, row - first, j);
                let says = |what: &str| {
                    Err(format!(
                        "case {}, {}, {tensor:?}, row {row}, head {head} {what} when key {j} of sequence {seq}, key head {kv_head} was changed",
                        case.name,
                        dtype.name()
                    ))
                };
                if !sees && !same {
                    return says("must not see it, but changed");
                }
                let weight = || {
                    let x = &reference.inputs;
                    let s = dot(
                        &x.q[query * case.dim_qk..][..case.dim_qk],
                        &x.k[key * case.dim_qk..][..case.dim_qk],
                    );
                    (f64::from(case.scale) * s - reference.exact.right.lse[query]).exp()
                };
                // How large a weight is where scores are changed, dropped or have a sink is not asked here.
                let plain = !case.is("score");
                if plain && sees && same && tensor == Tensor::O && weight() >= 1e-3 {
                    return says("sees it, but did not change");
                }
            }
        }
    }
    Ok(())
}
