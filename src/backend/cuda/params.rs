//! What kernels are given: the structs of `kernels/params.h`, laid out the same. A test compares them with the header.

use crate::backend;
use crate::dtype::{DType, Fp8};
use crate::mask;

/// `CP_F32`, `CP_BF16`, `CP_F16`, `CP_E4M3`, `CP_E5M2`.
pub fn type_code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
        DType::Fp8(Fp8::E4m3) => 3,
        DType::Fp8(Fp8::E5m2) => 4,
    }
}

/// Forward: start from the empty state.
pub const FIRST: u32 = 1;
/// Forward: write the result.
pub const LAST: u32 = 2;
/// Backward: dQ is added in the order of the tiles.
pub const DETERMINISTIC: u32 = 4;
/// Forward: the state's maximum is the true one.
pub const LARGEST: u32 = 8;
/// The dropout's seed is given by its address.
pub const SEED_AT: u32 = 16;

/// `cp_view`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    pub ptr: u64,
    pub stride_batch: i64,
    pub stride_row: i64,
    pub stride_head: i64,
    pub rows_per_batch: u32,
    pub rows: u32,
}

impl View {
    /// A view of one batch entry has no batches at all, which saves the kernel a division per row.
    pub fn of(view: &backend::View) -> View {
        let batches = view.rows > view.rows_per_batch;
        View {
            ptr: view.ptr as u64,
            stride_batch: view.stride_batch as i64,
            stride_row: view.stride_row as i64,
            stride_head: view.stride_head as i64,
            rows_per_batch: if batches { view.rows_per_batch as u32 } else { 0 },
            rows: view.rows as u32,
        }
    }
}

/// `cp_slice`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    pub q: u32,
    pub q_len: u32,
    pub k: u32,
    pub k_len: u32,
    pub lo: i32,
    pub hi: i32,
}

impl Slice {
    /// The same numbers.
    pub fn of(s: &mask::Slice) -> Slice {
        Slice { q: s.q, q_len: s.q_len, k: s.k, k_len: s.k_len, lo: s.lo, hi: s.hi }
    }
}

/// `cp_part`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    pub begin: u32,
    pub end: u32,
    pub full_begin: u32,
    pub full_end: u32,
    pub slice: u32,
    pub slices: u32,
    pub turn: u32,
    pub reserved: u32,
}

/// `cp_tile`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tile {
    pub row: u32,
    pub rows: u32,
    pub part: u32,
    pub parts: u32,
}

/// `cp_token`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Token {
    pub position: u32,
    pub sequence: u32,
}

/// `CP_NO_TOKEN`: the position of a row that is no token.
pub const NO_TOKEN: u32 = u32::MAX;

/// `cp_sequence`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    pub diagonal: i32,
    pub number: u32,
    pub padding: u32,
    pub reserved: u32,
}

/// `cp_attention_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attention {
    pub q: View,
    pub k: View,
    pub v: View,
    pub out: View,
    pub lse: View,
    pub acc_out: View,
    pub acc_max: View,
    pub acc_sum: View,
    pub d_out: View,
    pub delta: View,
    pub dq: View,
    pub dk: View,
    pub dv: View,
    pub tiles: u64,
    pub parts: u64,
    pub slices: u64,
    pub q_used: u64,
    pub k_used: u64,
    pub turns: u64,
    pub counters: u64,
    pub bias_counters: u64,
    pub tile_count: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub q_first: u32,
    pub head_group: u32,
    pub kv_first: u32,
    pub dim_qk: u32,
    pub dim_v: u32,
    pub flags: u32,
    pub scale: f32,
    pub scale_log2: f32,
    pub softcap: f32,
    pub softcap_inverse: f32,
    pub drop_below: u32,
    pub grow: f32,
    pub head_offset: u32,
    pub dropout_seed: u64,
    pub q_tokens: u64,
    pub k_positions: u64,
    pub sequences: u64,
    pub alibi: u64,
    pub sinks: View,
    pub top: View,
    pub bias: View,
    pub d_bias: View,
    pub k_scale: u64,
    pub v_scale: u64,
    pub reserved: [u64; 4],
}

/// `cp_run`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    pub src: u32,
    pub src_step: u32,
    pub dst: u32,
    pub dst_step: u32,
    pub rows: u32,
    pub before: u32,
}

/// `cp_rows_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rows {
    pub src: View,
    pub dst: View,
    pub runs: u64,
    pub run_count: u32,
    pub row_count: u32,
    pub src_type: u32,
    pub dst_type: u32,
    pub src_head: u32,
    pub dst_head: u32,
    pub heads: u32,
    pub dim: u32,
    pub add: u32,
    pub value: u32,
}

/// `cp_delta_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta {
    pub out: View,
    pub d_out: View,
    pub delta: View,
    pub row_count: u32,
    pub heads: u32,
    pub dim: u32,
    pub dtype: u32,
}

/// `cp_sink_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Sink {
    pub sinks: View,
    pub lse: View,
    pub delta: View,
    pub terms: View,
    pub row_count: u32,
    pub heads: u32,
}

/// `cp_reduce_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Reduce {
    pub src: View,
    pub dst: View,
    pub row_count: u32,
    pub heads: u32,
    pub dst_row: u32,
    pub dst_head: u32,
    pub largest: u32,
    pub reserved: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::any::type_name_of_val;
    use std::collections::BTreeMap;
    use std::mem::{offset_of, size_of};

    const HEADER: &str = include_str!("../../../kernels/params.h");

    /// Name, offset and C type of every field.
    type Fields = Vec<(String, usize, String)>;

    /// The header's structs as C lays them out: fields in order, each at the next multiple of its alignment; and their sizes.
    fn header_structs() -> BTreeMap<String, (Fields, usize)> {
        let without_comment = |line: &str| line.split("//").next().unwrap().to_string() + "\n";
        let code: String = HEADER.lines().map(without_comment).collect();
        let mut structs: BTreeMap<String, (Fields, usize)> = BTreeMap::new();
        for text in code.split("struct ").skip(1) {
            let (name, body) = text.split_once('{').unwrap();
            let body = body.split('}').next().unwrap();
            let (mut fields, mut at, mut most) = (Fields::new(), 0, 1);
            for line in body.split(';').map(str::trim).filter(|l| !l.is_empty()) {
                let (c_type, names) = line.split_once(' ').unwrap();
                let (size, align) = match c_type {
                    "uint32_t" | "int32_t" | "float" => (4, 4),
                    "uint64_t" | "int64_t" => (8, 8),
                    other => (structs[other].1, 8),
                };
                for field in names.split(',').map(str::trim) {
                    let (field, count) = match field.split_once('[') {
                        Some((f, n)) => (f, n.trim_end_matches(']').parse().unwrap()),
                        None => (field, 1),
                    };
                    at = usize::next_multiple_of(at, align);
                    fields.push((field.into(), at, c_type.into()));
                    (at, most) = (at + count * size, most.max(align));
                }
            }
            structs.insert(name.trim().into(), (fields, at.next_multiple_of(most)));
        }
        structs
    }

    /// A Rust type, spelled in C; of an array its element.
    fn in_c(rust: &str) -> &'static str {
        match rust.trim_start_matches('[').split(';').next().unwrap() {
            "u32" => "uint32_t",
            "i32" => "int32_t",
            "u64" => "uint64_t",
            "i64" => "int64_t",
            "f32" => "float",
            other if other.ends_with("params::View") => "cp_view",
            other => panic!("{other}"),
        }
    }

    /// Compares a struct with the header's; `fields` is all of them, in order.
    macro_rules! same {
        ($c:literal, $rust:ty, $($field:ident)*) => {{
            let structs = header_structs();
            let (mut fields, size) = structs[$c].clone();
            // `type` is a word of Rust.
            fields.iter_mut().filter(|f| f.0 == "type").for_each(|f| f.0 = "dtype".into());
            let x = <$rust>::default();
            let mine: Fields = vec![$((
                stringify!($field).into(),
                offset_of!($rust, $field),
                in_c(type_name_of_val(&x.$field)).into(),
            )),*];
            assert_eq!(mine, fields, "{}", $c);
            assert_eq!(size_of::<$rust>(), size, "{}", $c);
        }};
    }

    #[test]
    fn structs_are_those_of_the_header() {
        same!("cp_view", View, ptr stride_batch stride_row stride_head rows_per_batch rows);
        same!("cp_slice", Slice, q q_len k k_len lo hi);
        same!("cp_part", Part, begin end full_begin full_end slice slices turn reserved);
        same!("cp_tile", Tile, row rows part parts);
        same!("cp_attention_params", Attention,
            q k v out lse acc_out acc_max acc_sum d_out delta dq dk dv
            tiles parts slices q_used k_used turns counters bias_counters tile_count heads kv_heads
            q_first head_group kv_first dim_qk dim_v flags scale scale_log2
            softcap softcap_inverse drop_below grow head_offset dropout_seed
            q_tokens k_positions sequences alibi sinks top bias d_bias k_scale v_scale reserved);
        same!("cp_token", Token, position sequence);
        same!("cp_sequence", Sequence, diagonal number padding reserved);
        same!("cp_sink_params", Sink, sinks lse delta terms row_count heads);
        same!("cp_reduce_params", Reduce, src dst row_count heads dst_row dst_head largest reserved);
        same!("cp_run", Run, src src_step dst dst_step rows before);
        same!("cp_rows_params", Rows,
            src dst runs run_count row_count src_type dst_type src_head dst_head heads dim add value);
        same!("cp_delta_params", Delta, out d_out delta row_count heads dim dtype);
        assert_eq!(header_structs().len(), 12, "a struct that this test does not know");
    }

    #[test]
    fn numbers_are_those_of_the_header() {
        let define = |name: &str| -> u32 {
            let line = HEADER.lines().find(|l| l.starts_with(&format!("#define {name} "))).unwrap();
            let number = line.split_whitespace().nth(2).unwrap().trim_end_matches('u');
            let hex = number.strip_prefix("0x").map(|n| u32::from_str_radix(n, 16));
            hex.unwrap_or_else(|| number.parse()).unwrap()
        };
        assert_eq!(define("CP_F32"), type_code(DType::F32));
        assert_eq!(define("CP_BF16"), type_code(DType::Bf16));
        assert_eq!(define("CP_F16"), type_code(DType::F16));
        assert_eq!(define("CP_FIRST"), FIRST);
        assert_eq!(define("CP_LAST"), LAST);
        assert_eq!(define("CP_DETERMINISTIC"), DETERMINISTIC);
        assert_eq!(define("CP_LARGEST"), LARGEST);
        assert_eq!(define("CP_SEED_AT"), SEED_AT);
        assert_eq!(define("CP_NO_TOKEN"), NO_TOKEN);
    }
}
