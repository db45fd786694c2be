//! The C ABI's data for meshes, communication types per layer, and padding.

// These docs are the C header's, where [in] and [out] say who writes.
#![allow(rustdoc::broken_intra_doc_links)]

use libc::c_char;

/// Ranks in a grid with the axes tp, cp, ep, dp, pp (tensor, context, expert, data, pipeline parallel), as Megatron numbers them.
///
/// A mesh has cp > 1 or ep > 1, not both: experts have a mesh of their own over the same ranks, with cp = 1, see cp_mesh_expert.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_mesh {
    /// sizeof(cp_mesh), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Tensor-parallel ranks; 0: 1.
    pub tp: u32,
    /// Context-parallel ranks; 0: 1.
    pub cp: u32,
    /// Expert-parallel ranks; 0: 1.
    pub ep: u32,
    /// Data-parallel ranks; 0: what `world_size` leaves, or 1 where that is 0.
    pub dp: u32,
    /// Pipeline-parallel ranks; 0: 1.
    pub pp: u32,
    /// Number of ranks; 0: the product of the sizes.
    pub world_size: u32,
    /// Number of the first rank.
    pub first_rank: u32,
    /// 0.
    pub reserved: u32,
    /// Axes joined by -, the first with stride 1; NULL: "tp-cp-ep-dp-pp". Axes of size 1 may be left out. (Megatron's other order is
    /// "tp-cp-ep-pp-dp".)
    pub order: *const c_char,
}

/// FP8 recipe of the matrix products, as far as it asks for a number of rows.
pub type cp_fp8 = u32;
/// No FP8.
pub const CP_FP8_OFF: u32 = 0;
/// Scales per tensor or per block: rows in multiples of 16.
pub const CP_FP8_ROWS_16: u32 = 1;
/// MXFP8: rows in multiples of 32.
pub const CP_FP8_ROWS_32: u32 = 2;

/// cp_padding_config.flags: sequence parallelism, that is every tensor-parallel rank holds its part of the rank's sequence between the layers' products.
pub const CP_PADDING_SEQUENCE_PARALLEL: u32 = 1;
/// cp_padding_config.flags: Megatron's formula as it is: FP8 counts only where neither context nor sequence parallelism does. Without it every need
/// is met at once. Also a flag of cp_padding_image_bounds.
pub const CP_PADDING_MEGATRON: u32 = 2;
/// cp_padding_config.flags: tensor-parallel communication overlaps the matrix products; with sequence parallelism the length is then `decoder_length`.
pub const CP_PADDING_TP_OVERLAP: u32 = 4;

/// How a layer is split, as far as it decides about padding.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_padding_config {
    /// sizeof(cp_padding_config), set by the caller.
    pub struct_size: u32,
    /// CP_PADDING_* flags.
    pub flags: u32,
    /// Tensor-parallel ranks; 0: 1.
    pub tp: u32,
    /// Context-parallel ranks; 0: 1. Their partition is zigzag.
    pub cp: u32,
    /// FP8 recipe.
    pub fp8: cp_fp8,
    /// 0.
    pub reserved: u32,
    /// With CP_PADDING_TP_OVERLAP and CP_PADDING_SEQUENCE_PARALLEL: the length to pad to.
    pub decoder_length: u64,
}

/// What becomes of the rows between the end of a pack and its target.
pub type cp_tail = u32;
/// They are a sequence of their own, of true tokens.
pub const CP_TAIL_APPEND_DUMMY: u32 = 0;
/// They are padding of the last sequence.
pub const CP_TAIL_EXTEND_LAST: u32 = 1;

/// How a pack of sequences is filled up. Exactly one of `multiple` and `rows` is given.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_tail_config {
    /// sizeof(cp_tail_config), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Context-parallel ranks.
    pub ranks: u32,
    /// CP_PARTITION_ZIGZAG or CP_PARTITION_CONTIGUOUS.
    pub partition: u32,
    /// What the tail is.
    pub tail: cp_tail,
    /// Sequences in the result, the dummy included, missing ones empty: shapes that do not depend on the batch. 0: as many as there are.
    pub slots: u32,
    /// Rows of every rank: a multiple of this.
    pub multiple: u64,
    /// Rows of every rank: so many.
    pub rows: u64,
}
