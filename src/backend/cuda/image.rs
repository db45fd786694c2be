//! The compiled kernels inside this library, as build.rs left them: one fat binary per kernels/*.cu. Without an nvcc at build time there
//! are none.
//!
//! They lie in section `.nv_fatbin`, so that CUDA's own tools read the library: `cuobjdump --list-elf libcontext_parallel.so`.

/// The fat binary of one source file.
#[derive(Debug)]
pub struct Image {
    /// Name of the source file, without `.cu`.
    pub name: &'static str,
    /// What it has code for: `80` is machine code for sm_80, `ptx` is PTX for compute_80 and later.
    pub archs: &'static [&'static str],
    /// Its kernels.
    pub kernels: &'static [&'static str],
    /// What `cuModuleLoadData` takes; aligned to 16 bytes.
    pub bytes: &'static [u8],
}

// Unused when there are no images.
#[allow(dead_code)]
#[repr(C, align(16))]
struct Aligned<T>(T);

// pub const NVCC: Option<&str>: the compiler's version; pub static IMAGES: &[Image].
include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));

/// Every architecture that some image has code for, in `build.rs`'s words: machine code by number, then `ptx`.
pub fn archs() -> Vec<&'static str> {
    let mut archs: Vec<&str> = IMAGES.iter().flat_map(|image| image.archs).copied().collect();
    archs.sort_by_key(|arch| arch.parse().unwrap_or(u32::MAX));
    archs.dedup();
    archs
}

/// What was compiled in, as JSON: `null`, or `{"nvcc":"13.0.88","archs":["sm_80","ptx"],"kernels":46,"bytes":1234567}`.
pub fn json() -> String {
    let Some(nvcc) = NVCC else { return "null".into() };
    let names = archs().into_iter().map(|arch| format!("\"{}\"", spelled(arch)));
    format!(
        "{{\"nvcc\":\"{nvcc}\",\"archs\":[{}],\"kernels\":{},\"bytes\":{}}}",
        names.collect::<Vec<_>>().join(","),
        IMAGES.iter().map(|image| image.kernels.len()).sum::<usize>(),
        IMAGES.iter().map(|image| image.bytes.len()).sum::<usize>()
    )
}

/// An architecture as CUDA spells it.
pub fn spelled(arch: &str) -> String {
    if arch == "ptx" { "compute_80".into() } else { format!("sm_{arch}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_aligned_fat_binaries_that_name_their_kernels() {
        assert!(NVCC.is_some() || IMAGES.is_empty());
        for image in IMAGES {
            assert_eq!(image.bytes.as_ptr() as usize % 16, 0, "{}", image.name);
            // Little-endian 0xBA55ED50, the mark of a fat binary.
            assert_eq!(image.bytes[..4], [0x50, 0xED, 0x55, 0xBA], "{}", image.name);
            assert!(!image.kernels.is_empty(), "{} has no kernel", image.name);
            for kernel in image.kernels {
                let holders = IMAGES.iter().filter(|i| i.kernels.contains(kernel)).count();
                assert_eq!(holders, 1, "{kernel} is in several images");
            }
        }
    }
}
