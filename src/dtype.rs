//! Storage types of tensors, and the 8-bit format that keys and values may travel in.

/// How an element is stored. Arithmetic and running state are fp32 whatever this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// Bytes of keys or values on their way, in blocks of a common scale: never a caller's tensor, never computed with.
    Fp8(Fp8),
}

/// A format of 8-bit numbers, by exponent and mantissa bits. On the wire 32 consecutive elements of a row and head, the last block of a head as
/// many as are left, share a power of two, as in OCP Microscaling (MX 1.0). A row of a head is its elements, a byte each, and then the scales, a byte
/// each (E8M0: 2^(byte − 127)).
///
/// The scale is the smallest power of two with which rounding to nearest even gives no number beyond the format's largest. (MX lets the largest
/// saturate: its scale is 2^(⌊log2 largest⌋ − the format's largest exponent), by which a block may lose up to an eighth of its largest element.) So the
/// error of an element is at most 1/16 (E4M3), 1/8 (E5M2) of it, or half the format's smallest step times the scale. Coding what was decoded gives the same bytes. A
/// block that holds a NaN or an infinity is NaN throughout, scale byte 255. A number that would round to one beyond the storage type's largest is that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fp8 {
    /// 4 and 3 bits, up to 448, without infinities (E4M3FN).
    E4m3,
    /// 5 and 2 bits, up to 57344.
    E5m2,
}

impl Fp8 {
    /// Every format.
    pub const ALL: [Fp8; 2] = [Fp8::E4m3, Fp8::E5m2];

    /// Elements that share a scale.
    pub const BLOCK: usize = 32;

    /// Bytes of a row of a head with `dim` elements.
    pub fn bytes(dim: u32) -> u32 {
        dim + dim.div_ceil(Fp8::BLOCK as u32)
    }

    /// Name as users write it.
    pub fn name(self) -> &'static str {
        match self {
            Fp8::E4m3 => "e4m3",
            Fp8::E5m2 => "e5m2",
        }
    }

    /// The format with this name.
    pub fn parse(name: &str) -> Option<Fp8> {
        Fp8::ALL.into_iter().find(|f| f.name() == name)
    }
}

impl DType {
    /// Every storage type of tensors.
    pub const ALL: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::Fp8(_) => 1,
        }
    }

    /// Name as users write it.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "fp32",
            DType::Bf16 => "bf16",
            DType::F16 => "fp16",
            DType::Fp8(format) => format.name(),
        }
    }

    /// The type with this name.
    pub fn parse(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == name)
    }
}
