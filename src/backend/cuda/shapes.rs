//! The compiled shapes: what `kernels/shapes.h` says, in Rust. A test compares them.

use super::Tiling;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::score::Score;

/// A block of a compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    /// Rows of its tiles.
    pub tiling: Tiling,
    /// Threads.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// Head dimensions that kernels are compiled for, on one kind of GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Columns of Q and K; kernels are named after it.
    pub dim_qk: u32,
    /// Columns of V and O.
    pub dim_v: u32,
    /// Forward.
    pub forward_block: Block,
    /// Backward.
    pub backward_block: Block,
    /// What the forward kernel's name ends in.
    pub forward_suffix: &'static str,
    /// What the backward kernel's name ends in.
    pub backward_suffix: &'static str,
}

/// What kernels a layer needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scores {
    /// Plain attention.
    Plain,
    /// Forward has sinks or is asked for the largest scores; backward is plain, because both are in the LSE or beside it.
    Noted,
    /// Scores or weights are changed, forward and backward.
    Changed,
}

impl Scores {
    /// Of a formula.
    pub fn of(score: &Score) -> Scores {
        match (score.changes(), score.needs_origins()) {
            (true, _) => Scores::Changed,
            (false, true) => Scores::Noted,
            (false, false) => Scores::Plain,
        }
    }
}

/// What the big backward kernels need to be able to ask for.
pub const BIG_SHARED: u32 = 163 * 1024;

/// Query rows, key rows, warps.
type ForwardTile = [u32; 3];
/// The same, and stages of Q and of dO.
type BackwardTile = [u32; 5];

const DIMS: [[u32; 2]; 5] = [[64, 64], [96, 96], [128, 128], [192, 128], [256, 256]];
const FORWARD: [ForwardTile; 5] =
    [[128, 64, 4], [128, 64, 4], [128, 64, 4], [128, 64, 4], [64, 64, 4]];
/// With features of scores.
const FORWARD_SCORE: [ForwardTile; 5] =
    [[128, 64, 8], [128, 64, 8], [128, 64, 8], [128, 64, 8], [64, 64, 4]];
/// For GPUs with [`BIG_SHARED`] bytes of shared memory per block.
const BACKWARD: [BackwardTile; 5] = [
    [128, 128, 8, 2, 1],
    [64, 128, 8, 2, 2],
    [64, 128, 8, 2, 2],
    [64, 96, 8, 2, 1],
    [64, 64, 8, 1, 1],
];
/// For others.
const BACKWARD_SMALL: [BackwardTile; 5] = [
    [64, 128, 8, 2, 2],
    [64, 64, 8, 2, 2],
    [64, 64, 8, 2, 1],
    [32, 64, 8, 2, 2],
    [32, 32, 4, 2, 1],
];
/// With features of scores.
const BACKWARD_SCORE: [BackwardTile; 5] =
    [[64, 64, 8, 2, 2], [64, 64, 8, 2, 2], [64, 64, 8, 2, 1], [32, 64, 8, 2, 2], [32, 32, 4, 2, 1]];

/// Smallest first: a problem takes the first that it fits in.
pub static SHAPES: [Shape; 5] = shapes(FORWARD, "", BACKWARD, "");
static SMALL_SHAPES: [Shape; 5] = shapes(FORWARD, "", BACKWARD_SMALL, "_small");
static NOTED_SHAPES: [Shape; 5] = shapes(FORWARD_SCORE, "_score", BACKWARD, "");
static SMALL_NOTED_SHAPES: [Shape; 5] = shapes(FORWARD_SCORE, "_score", BACKWARD_SMALL, "_small");
static CHANGED_SHAPES: [Shape; 5] = shapes(FORWARD_SCORE, "_score", BACKWARD_SCORE, "_score");

const fn shapes(
    forward: [ForwardTile; 5],
    forward_suffix: &'static str,
    backward: [BackwardTile; 5],
    backward_suffix: &'static str,
) -> [Shape; 5] {
    // A token of 16 bytes for every query row.
    let more = if matches!(backward_suffix.as_bytes(), b"_score") { 16 } else { 0 };
    let none = block(0, 0, 0, 0);
    let empty = Shape {
        dim_qk: 0,
        dim_v: 0,
        forward_block: none,
        backward_block: none,
        forward_suffix,
        backward_suffix,
    };
    let mut out = [empty; 5];
    let mut i = 0;
    while i < out.len() {
        let [dim_qk, dim_v] = DIMS[i];
        let [q, k, warps] = forward[i];
        let shared = q * dim_qk * 2 + k * (dim_qk + dim_v) * 2 + q * 8;
        out[i].forward_block = block(q, k, warps, shared);
        let [q, k, warps, q_stages, d_out_stages] = backward[i];
        let shared = k * (dim_qk + dim_v) * 2
            + q * (q_stages * dim_qk + d_out_stages * dim_v) * 2
            + q * k * 4
            + q * (28 + more)
            + 64;
        out[i].backward_block = block(q, k, warps, shared);
        (out[i].dim_qk, out[i].dim_v) = (dim_qk, dim_v);
        i += 1;
    }
    out
}

const fn block(q_rows: u32, k_rows: u32, warps: u32, shared: u32) -> Block {
    Block { tiling: Tiling { q_rows, k_rows }, threads: 32 * warps, shared }
}

impl Shape {
    /// The shape for these tensors, or the reason why there is none. `big`: the GPU has `BIG_SHARED`.
    pub fn of(
        dtype: DType,
        [dim_qk, dim_v]: [usize; 2],
        scores: Scores,
        big: bool,
    ) -> Result<&'static Shape> {
        if dtype == DType::F32 {
            return Err(Error::unsupported("dtype: got fp32, on CUDA bf16 or fp16"));
        }
        for (name, dim) in [("head dimension of q and k", dim_qk), ("head dimension of v", dim_v)] {
            if dim == 0 || dim % 8 != 0 || dim > 256 {
                return Err(Error::unsupported(format!(
                    "{name}: got {dim}, on CUDA a multiple of 8 up to 256"
                )));
            }
        }
        let shapes = match (scores, big) {
            (Scores::Plain, true) => &SHAPES,
            (Scores::Plain, false) => &SMALL_SHAPES,
            (Scores::Noted, true) => &NOTED_SHAPES,
            (Scores::Noted, false) => &SMALL_NOTED_SHAPES,
            (Scores::Changed, _) => &CHANGED_SHAPES,
        };
        let fits = |s: &&Shape| dim_qk <= s.dim_qk as usize && dim_v <= s.dim_v as usize;
        shapes.iter().find(fits).ok_or_else(|| Error::internal("the largest shape fits all"))
    }

    /// Tiles of the forward kernel.
    pub fn forward(&self) -> Tiling {
        self.forward_block.tiling
    }

    /// Tiles of the backward kernel.
    pub fn backward(&self) -> Tiling {
        self.backward_block.tiling
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// The header's tables, printed by a program made of it: dqk, dv, query rows, key rows, threads, bytes of shared memory.
    const PROGRAM: &str = r#"
        #include <stdio.h>
        #include "shapes.h"
        #define F(d, v, q, k, w) printf("f %d %d %d %d %d %d\n", d, v, q, k, w * 32, CP_FORWARD_SHARED(d, v, q, k));
        #define B(d, v, q, k, w, a, b, c, s, t) \
            printf("%s %d %d %d %d %d %d\n", name, d, v, q, k, w * 32, CP_BACKWARD_SHARED(d, v, q, k, s, t));
        #define X(d, v, q, k, w, a, b, c, s, t) \
            printf("x %d %d %d %d %d %d\n", d, v, q, k, w * 32, CP_BACKWARD_SHARED_SCORE(d, v, q, k, s, t));
        int main(void) {
            const char* name = "b";
            CP_FORWARD_SHAPES(F)
            CP_BACKWARD_SHAPES(B)
            name = "s";
            CP_BACKWARD_SHAPES_SMALL(B)
            CP_FORWARD_SHAPES_SCORE(F)
            CP_BACKWARD_SHAPES_SCORE(X)
            return 0;
        }
    "#;

    #[test]
    fn shapes_are_those_of_the_header() {
        let folder = std::env::temp_dir().join(format!("cp-shapes-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (source, program) = (folder.join("shapes.c"), folder.join("shapes"));
        std::fs::write(&source, PROGRAM).unwrap();
        let include = concat!("-I", env!("CARGO_MANIFEST_DIR"), "/kernels");
        let built = Command::new("cc").arg(include).arg(&source).arg("-o").arg(&program).status();
        assert!(built.expect("cc").success());
        let output = Command::new(&program).output().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let list = |name: &str, shapes: &[Shape], block: fn(&Shape) -> Block| -> String {
            let line = |s: &Shape| {
                let Block { tiling: Tiling { q_rows, k_rows }, threads, shared } = block(s);
                format!("{name} {} {} {q_rows} {k_rows} {threads} {shared}\n", s.dim_qk, s.dim_v)
            };
            shapes.iter().map(line).collect()
        };
        let mine = list("f", &SHAPES, |s| s.forward_block)
            + &list("b", &SHAPES, |s| s.backward_block)
            + &list("s", &SMALL_SHAPES, |s| s.backward_block)
            + &list("f", &CHANGED_SHAPES, |s| s.forward_block)
            + &list("x", &CHANGED_SHAPES, |s| s.backward_block);
        assert_eq!(mine, String::from_utf8(output.stdout).unwrap());
    }

    #[test]
    fn every_supported_dimension_has_the_smallest_shape() {
        for qk in 0..300 {
            for v in 0..300 {
                let valid = |d: usize| d.is_multiple_of(8) && (8..=256).contains(&d);
                match Shape::of(DType::F16, [qk, v], Scores::Plain, true) {
                    Ok(s) => {
                        assert!(valid(qk) && valid(v), "{qk} {v}");
                        assert!(s.dim_qk as usize >= qk && s.dim_v as usize >= v);
                        let area = |s: &Shape| s.dim_qk + s.dim_v;
                        let fits = |o: &&Shape| o.dim_qk as usize >= qk && o.dim_v as usize >= v;
                        let least = SHAPES.iter().filter(fits).map(area).min();
                        assert_eq!(Some(area(s)), least);
                    }
                    Err(e) => assert!(!valid(qk) || !valid(v), "{qk} {v}: {e}"),
                }
            }
        }
        let refused = Shape::of(DType::F32, [64, 64], Scores::Plain, true).unwrap_err();
        assert_eq!(refused.text, "dtype: got fp32, on CUDA bf16 or fp16");
        let refused = Shape::of(DType::F16, [64, 12], Scores::Plain, true).unwrap_err();
        assert_eq!(refused.text, "head dimension of v: got 12, on CUDA a multiple of 8 up to 256");
    }

    /// What each set is for: all but the big one run everywhere.
    #[test]
    fn shared_memory_is_what_the_devices_have() {
        for (big, small) in SHAPES.iter().zip(&SMALL_SHAPES) {
            assert!(big.forward_block.shared <= 99 * 1024, "{big:?}");
            assert!(big.backward_block.shared <= BIG_SHARED, "{big:?}");
            assert!(small.backward_block.shared <= 99 * 1024, "{small:?}");
        }
        assert!(CHANGED_SHAPES.iter().all(|s| s.backward_block.shared <= 99 * 1024));
        let suffixes = |scores, big| {
            let shape = Shape::of(DType::Bf16, [128, 128], scores, big).unwrap();
            (shape.forward_suffix, shape.backward_suffix)
        };
        assert_eq!(suffixes(Scores::Plain, true), ("", ""));
        assert_eq!(suffixes(Scores::Plain, false), ("", "_small"));
        assert_eq!(suffixes(Scores::Noted, true), ("_score", ""));
        assert_eq!(suffixes(Scores::Noted, false), ("_score", "_small"));
        assert_eq!(suffixes(Scores::Changed, true), ("_score", "_score"));
    }
}
