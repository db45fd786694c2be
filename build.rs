//! Link settings of the C library.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Threads and their thread-local data outlive a dlclose, so the library stays mapped.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
