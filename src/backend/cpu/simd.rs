//! Which instruction set the kernels use: found at run time, or named by `CP_SIMD`.

use crate::error::{Error, Result};

/// An instruction set the kernels are written for, from plain to wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Simd {
    /// Plain Rust and libm's exp: the reference, on every CPU and under valgrind.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with the bf16 dot product; other storage types run as with [`Simd::Avx512`].
    Avx512Bf16,
}

impl Simd {
    /// Every level, from plain to wide.
    pub const ALL: [Simd; 4] = [Simd::Scalar, Simd::Avx2, Simd::Avx512, Simd::Avx512Bf16];

    /// The widest level this CPU has.
    pub fn detect() -> Simd {
        Simd::ALL.into_iter().rev().find(|s| s.available()).unwrap_or(Simd::Scalar)
    }

    /// Does this CPU have it?
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match self {
                Simd::Scalar => true,
                Simd::Avx2 => avx2,
                Simd::Avx512 => avx512,
                Simd::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Simd::Scalar
        }
    }

    /// Name as users write it.
    pub fn name(self) -> &'static str {
        match self {
            Simd::Scalar => "scalar",
            Simd::Avx2 => "avx2",
            Simd::Avx512 => "avx512",
            Simd::Avx512Bf16 => "avx512_bf16",
        }
    }

    /// The level with this name, whether this CPU has it or not.
    pub fn parse(name: &str) -> Option<Simd> {
        Simd::ALL.into_iter().find(|s| s.name() == name)
    }

    /// The level named by the environment variable `CP_SIMD`, else the widest one this CPU has.
    ///
    /// Fails with `InvalidArgument` on an unknown word and with `Unsupported` when this CPU lacks the level.
    pub fn from_env() -> Result<Simd> {
        match std::env::var("CP_SIMD") {
            Ok(word) => Simd::from_word(&word),
            Err(_) => Ok(Simd::detect()),
        }
    }

    fn from_word(word: &str) -> Result<Simd> {
        let simd = Simd::parse(word).ok_or_else(|| {
            let known = Simd::ALL.map(Simd::name).join(", ");
            Error::argument(format!("CP_SIMD: got \"{word}\", allowed: {known}"))
        })?;
        simd.require().map(|()| simd)
    }

    /// `Unsupported` unless this CPU has it.
    pub(super) fn require(self) -> Result<()> {
        if self.available() {
            return Ok(());
        }
        let (name, best) = (self.name(), Simd::detect().name());
        Err(Error::unsupported(format!("SIMD level {name}: this CPU has at most {best}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn names_round_trip_and_unknown_words_are_refused() {
        for simd in Simd::ALL {
            assert_eq!(Simd::parse(simd.name()), Some(simd));
            let got = Simd::from_word(simd.name());
            assert_eq!(got.is_ok(), simd.available(), "{got:?}");
            assert_eq!(got.map_err(|e| e.status).unwrap_or(simd), simd);
        }
        assert_eq!(Simd::from_word("sse9").unwrap_err().status, Status::InvalidArgument);
        assert_eq!(Simd::from_word("").unwrap_err().status, Status::InvalidArgument);
        assert!(Simd::detect().available());
    }
}
