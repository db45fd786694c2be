//! The compiled shapes: what `kernels/shapes.h` says, in Rust. A test compares them.

use super::Tiling;
use crate::dtype::DType;
use crate::error::{Error, Result};

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
    /// What the backward kernel's name ends in.
    pub backward_suffix: &'static str,
}

/// What the big backward kernels need to be able to ask for.
pub const BIG_SHARED: u32 = 163 * 1024;

/// For GPUs with [`BIG_SHARED`] bytes of shared memory per block; smallest first: a problem takes the first that it fits in.
pub static SHAPES: [Shape; 5] = [
    shape(64, 64, [128, 64, 4], [128, 128, 8, 2, 1], ""),
    shape(96, 96, [128, 64, 4], [64, 128, 8, 2, 2], ""),
    shape(128, 128, [128, 64, 4], [64, 128, 8, 2, 2], ""),
    shape(192, 128, [128, 64, 4], [64, 96, 8, 2, 1], ""),
    shape(256, 256, [64, 64, 4], [64, 64, 8, 1, 1], ""),
];

/// For others.
static SMALL_SHAPES: [Shape; 5] = [
    shape(64, 64, [128, 64, 4], [64, 128, 8, 2, 2], "_small"),
    shape(96, 96, [128, 64, 4], [64, 64, 8, 2, 2], "_small"),
    shape(128, 128, [128, 64, 4], [64, 64, 8, 2, 1], "_small"),
    shape(192, 128, [128, 64, 4], [32, 64, 8, 2, 2], "_small"),
    shape(256, 256, [64, 64, 4], [32, 32, 4, 2, 1], "_small"),
];

/// Forward: query rows, key rows, warps. Backward: the same, and stages of Q and of dO.
const fn shape(
    dim_qk: u32,
    dim_v: u32,
    forward: [u32; 3],
    backward: [u32; 5],
    backward_suffix: &'static str,
) -> Shape {
    let [q, k, warps] = forward;
    let shared = q * dim_qk * 2 + k * (dim_qk + dim_v) * 2 + q * 8;
    let forward_block = block(q, k, warps, shared);
    let [q, k, warps, q_stages, d_out_stages] = backward;
    let shared = k * (dim_qk + dim_v) * 2
        + q * (q_stages * dim_qk + d_out_stages * dim_v) * 2
        + q * k * 4
        + q * 28
        + 64;
    let backward_block = block(q, k, warps, shared);
    Shape { dim_qk, dim_v, forward_block, backward_block, backward_suffix }
}

const fn block(q_rows: u32, k_rows: u32, warps: u32, shared: u32) -> Block {
    Block { tiling: Tiling { q_rows, k_rows }, threads: 32 * warps, shared }
}

impl Shape {
    /// The shape for these tensors, of the big or the small set, or the reason why there is none.
    pub fn of(dtype: DType, dim_qk: usize, dim_v: usize, big: bool) -> Result<&'static Shape> {
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
        let shapes = if big { &SHAPES } else { &SMALL_SHAPES };
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
        int main(void) {
            const char* name = "b";
            CP_FORWARD_SHAPES(F)
            CP_BACKWARD_SHAPES(B)
            name = "s";
            CP_BACKWARD_SHAPES_SMALL(B)
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
            + &list("s", &SMALL_SHAPES, |s| s.backward_block);
        assert_eq!(mine, String::from_utf8(output.stdout).unwrap());
        assert_eq!(
            list("f", &SHAPES, |s| s.forward_block),
            list("f", &SMALL_SHAPES, |s| s.forward_block)
        );
    }

    #[test]
    fn every_supported_dimension_has_the_smallest_shape() {
        for qk in 0..300 {
            for v in 0..300 {
                let valid = |d: usize| d.is_multiple_of(8) && (8..=256).contains(&d);
                match Shape::of(DType::F16, qk, v, true) {
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
        let refused = Shape::of(DType::F32, 64, 64, true).unwrap_err();
        assert_eq!(refused.text, "dtype: got fp32, on CUDA bf16 or fp16");
        let refused = Shape::of(DType::F16, 64, 12, true).unwrap_err();
        assert_eq!(refused.text, "head dimension of v: got 12, on CUDA a multiple of 8 up to 256");
    }

    /// What each set is for: the forward kernels and the small set run everywhere.
    #[test]
    fn shared_memory_is_what_the_devices_have() {
        for (big, small) in SHAPES.iter().zip(&SMALL_SHAPES) {
            assert!(big.forward_block.shared <= 99 * 1024, "{big:?}");
            assert!(big.backward_block.shared <= BIG_SHARED, "{big:?}");
            assert!(small.backward_block.shared <= 99 * 1024, "{small:?}");
        }
        let suffix = |big| Shape::of(DType::Bf16, 128, 128, big).unwrap().backward_suffix;
        assert_eq!((suffix(true), suffix(false)), ("", "_small"));
    }
}
