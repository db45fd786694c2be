//! Version, build information, errors.

use super::abi::*;
use super::guard::last_error;
use crate::backend::cpu::Simd;
use crate::backend::cuda::image;
use crate::driver;
use crate::error::Status;
use crate::transport::device::nccl;
use libc::c_char;
use std::ffi::CString;
use std::sync::OnceLock;

/// Version of the library as major*1000000 + minor*1000 + patch. Local. Any thread, any time, also after fork.
#[unsafe(no_mangle)]
pub extern "C" fn cp_version() -> u32 {
    const fn number(text: &str) -> u32 {
        let bytes = text.as_bytes();
        let (mut i, mut value) = (0, 0);
        while i < bytes.len() {
            value = value * 10 + (bytes[i] - b'0') as u32;
            i += 1;
        }
        value
    }
    number(env!("CARGO_PKG_VERSION_MAJOR")) * 1_000_000
        + number(env!("CARGO_PKG_VERSION_MINOR")) * 1_000
        + number(env!("CARGO_PKG_VERSION_PATCH"))
}

/// What the library was built with and what it found, as one line of JSON: version, backends, simd, kernels (the CUDA kernels compiled in: by
/// which nvcc, for which GPUs; null if none), cuda (the installed driver's version; null if none), nccl (version and file of the library that
/// a group would use; null if none). The text lives as long as the library. Local. Any thread, any time; starts neither CUDA nor NCCL.
#[unsafe(no_mangle)]
pub extern "C" fn cp_build_info() -> *const c_char {
    static INFO: OnceLock<CString> = OnceLock::new();
    let make = || CString::new(build_info()).unwrap_or_default();
    INFO.get_or_init(make).as_ptr()
}

/// The text of [`cp_build_info`].
pub fn build_info() -> String {
    let simd: Vec<String> =
        Simd::ALL.iter().filter(|s| s.available()).map(|s| format!("\"{}\"", s.name())).collect();
    let cuda = driver::installed().map_or("null".into(), |v| format!("{{\"driver\":{v}}}"));
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let nccl = nccl::api::look().map_or("null".into(), |(version, path)| {
        format!("{{\"version\":{version},\"library\":\"{}\"}}", quoted(&path))
    });
    let kernels = image::json();
    let backends = if kernels == "null" { "\"cpu\"" } else { "\"cpu\",\"cuda\"" };
    format!(
        "{{\"version\":\"{}\",\"backends\":[{backends}],\"transports\":[\"local\",\"shm\",\"user\",\"nccl\",\"staged\"],\"simd\":\"{}\",\"simd_available\":[{}],\"kernels\":{kernels},\"cuda\":{cuda},\"nccl\":{nccl},\"profile\":\"{}\",\"target\":\"{}-{}\"}}",
        env!("CARGO_PKG_VERSION"),
        Simd::detect().name(),
        simd.join(","),
        if cfg!(debug_assertions) { "debug" } else { "release" },
        std::env::consts::ARCH,
        std::env::consts::OS
    )
}

/// A status as a short phrase; "unknown status" for any other number. Static text. Local. Any thread, any time.
#[unsafe(no_mangle)]
pub extern "C" fn cp_status_string(status: cp_status) -> *const c_char {
    let text = Status::from_i32(status).map_or(c"unknown status", Status::as_c_str);
    text.as_ptr()
}

/// Text of this thread's last error: what, which argument, got and allowed, the rank. Empty before the first; never NULL. Valid until the
/// thread's next call of this library that fails. Local. Any time.
#[unsafe(no_mangle)]
pub extern "C" fn cp_last_error() -> *const c_char {
    last_error()
}

/// Copies the text of this thread's last error, cut to fit and always ended by 0, and returns its full length without the 0. With NULL or
/// capacity 0 only the length is returned. Local. Any time.
///
/// # Safety
/// `text` is NULL or has room for `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_last_error_copy(text: *mut c_char, capacity: usize) -> usize {
    // SAFETY: the thread's own text, ended by 0.
    let last = unsafe { std::ffi::CStr::from_ptr(last_error()) }.to_bytes();
    if !text.is_null() && capacity > 0 {
        let count = last.len().min(capacity - 1);
        // SAFETY: room for `capacity` bytes, by the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(last.as_ptr().cast(), text, count);
            *text.add(count) = 0;
        }
    }
    last.len()
}
