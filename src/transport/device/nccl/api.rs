//! NCCL's symbols, opened at run time: nothing is linked, and a machine without NCCL gets an error that says where it was looked for.
//!
//! Status codes are integers, because newer libraries have newer codes. All that is needed has been in NCCL since 2.14; non-blocking
//! communicators have too, and without them no wait on NCCL could have a deadline.

use crate::error::{Error, Result, Status};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, OsString, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `ncclComm_t`.
pub type Comm = *mut c_void;
/// `ncclResult_t`.
pub type Code = c_int;

/// `ncclSuccess`.
pub const SUCCESS: Code = 0;
/// `ncclInProgress`: a non-blocking communicator is not through with a call yet.
pub const IN_PROGRESS: Code = 7;
/// `ncclUint8`.
pub const UINT8: c_int = 1;
/// Environment variable with the library to open.
pub const VARIABLE: &str = "CP_NCCL";

/// `ncclUniqueId`, which NCCL takes by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as of 2.28.3. Older libraries read the part that they know, newer ones take defaults for the fields that came later.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    /// 0: calls return `IN_PROGRESS` instead of blocking.
    pub blocking: c_int,
    /// Blocks of a cluster on GPUs that have clusters.
    pub cga_cluster_size: c_int,
    /// Fewest blocks of a kernel.
    pub min_ctas: c_int,
    /// Most blocks of a kernel: each takes a multiprocessor from the computation.
    pub max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

const _: () = assert!(size_of::<Config>() == 80);

/// `NCCL_CONFIG_UNDEF_INT`.
pub const UNSET: c_int = c_int::MIN;

impl Default for Config {
    /// `NCCL_CONFIG_INITIALIZER`: everything is NCCL's choice.
    fn default() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 22803,
            blocking: UNSET,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: std::ptr::null(),
            split_share: UNSET,
            traffic_class: UNSET,
            comm_name: std::ptr::null(),
            collnet_enable: UNSET,
            cta_policy: UNSET,
            shrink_share: UNSET,
            nvls_ctas: UNSET,
            channels_per_net_peer: UNSET,
            nvlink_centric_sched: UNSET,
        }
    }
}

/// `cudaStream_t`, the same as the driver's `CUstream`.
type StreamHandle = *mut c_void;
type OfComm = unsafe extern "C" fn(Comm) -> Code;
type NumberOf = unsafe extern "C" fn(Comm, *mut c_int) -> Code;
type InitRankConfig = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> Code;
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, StreamHandle) -> Code;
type Recv = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, StreamHandle) -> Code;
type MemStats = unsafe extern "C" fn(Comm, c_int, *mut u64) -> Code;

/// An open NCCL. Fields are its functions, by NCCL's names without the prefix.
#[allow(missing_docs)]
pub struct Api {
    pub get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    pub comm_init_rank_config: InitRankConfig,
    pub comm_count: NumberOf,
    pub comm_user_rank: NumberOf,
    pub comm_cu_device: NumberOf,
    pub comm_get_async_error: NumberOf,
    pub comm_finalize: OfComm,
    pub comm_destroy: OfComm,
    pub comm_abort: OfComm,
    pub group_start: unsafe extern "C" fn() -> Code,
    pub group_end: unsafe extern "C" fn() -> Code,
    pub send: Send,
    pub recv: Recv,
    /// Since 2.29.7.
    pub comm_mem_stats: Option<MemStats>,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    version: i32,
    path: String,
    /// Never closed: communicators and NCCL's threads outlive everything that could close it.
    _library: Library,
}

/// NCCL, opened at the first call that finds it; later calls return the same. Looked for: what [`VARIABLE`] names, a copy that this process has
/// already (torch's, usually), `libnccl.so.2`, `libnccl.so`.
pub fn find() -> Result<&'static Api> {
    find_at("")
}

/// Version and file of the library that [`find`] returns or would, without settling for it.
pub fn look() -> Result<(i32, String)> {
    let of = |api: &Api| (api.version(), api.path().to_string());
    if let Some(api) = OPENED.get() {
        return Ok(of(api));
    }
    match std::env::var_os(VARIABLE).filter(|v| !v.is_empty()) {
        Some(name) => Api::open(&name, RTLD_NOW | RTLD_LOCAL).map_err(Error::unsupported),
        None => search(),
    }
    .map(|api| of(&api))
}

static OPENED: OnceLock<Api> = OnceLock::new();

/// The same, with a path from the caller's configuration that comes before all others (empty: none). A library that was named and cannot be
/// opened is an error; no other is taken in its place.
pub fn find_at(path: &str) -> Result<&'static Api> {
    static OPENING: Mutex<()> = Mutex::new(());
    let _one = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    if OPENED.get().is_none() {
        let variable = std::env::var_os(VARIABLE).filter(|v| !v.is_empty());
        let named = match path {
            "" => variable.map(|v| (VARIABLE, v)),
            path => Some(("configuration", OsString::from(path))),
        };
        let api = match named {
            Some((by, name)) => Api::open(&name, RTLD_NOW | RTLD_LOCAL)
                .map_err(|tried| Error::unsupported(format!("NCCL, named by {by}: {tried}")))?,
            None => search()?,
        };
        let _ = OPENED.set(api);
    }
    OPENED.get().ok_or_else(|| Error::internal("NCCL was opened and is not there"))
}

fn search() -> Result<Api> {
    let mut tried = Vec::new();
    let kinds = [
        ("libnccl.so.2", libc::RTLD_NOLOAD, "in this process already: "),
        ("libnccl.so.2", 0, ""),
        ("libnccl.so", 0, ""),
    ];
    for (name, flag, how) in kinds {
        match Api::open(&OsString::from(name), RTLD_NOW | RTLD_LOCAL | flag) {
            Ok(api) => return Ok(api),
            Err(why) => tried.push(format!("{how}{why}")),
        }
    }
    Err(Error::unsupported(format!(
        "NCCL was not found; {VARIABLE} can name its library. Tried: {}",
        tried.join("; ")
    )))
}

/// A symbol's address as a function, or what is missing.
macro_rules! symbol {
    ($library:expr, $name:literal) => {
        // SAFETY: the type of the field that it goes to is the function's in nccl.h.
        unsafe { $library.get($name) }.map(|s| *s)
    };
}

impl Api {
    pub(super) fn open(name: &OsString, flags: c_int) -> std::result::Result<Api, String> {
        let shown = name.to_string_lossy().into_owned();
        // The text of dlopen starts with the name already, or there is none.
        let why = |e: libloading::Error| {
            let text = std::error::Error::source(&e).map_or(e.to_string(), |s| s.to_string());
            if text.contains(&shown) { text } else { format!("{shown}: {text}") }
        };
        // SAFETY: initialisers of NCCL have no conditions.
        let library = unsafe { Library::open(Some(name), flags) }.map_err(why)?;
        let get_version: unsafe extern "C" fn(*mut c_int) -> Code =
            symbol!(library, c"ncclGetVersion").map_err(why)?;
        let mut version = 0;
        // SAFETY: writes one number.
        let code = unsafe { get_version(&mut version) };
        if code != SUCCESS {
            return Err(format!("{shown}: ncclGetVersion returned {code}"));
        }
        let old = |e: libloading::Error| {
            let has = version_text(version);
            format!("{shown}: NCCL {has} is too old, 2.14 is needed ({})", why(e))
        };
        Ok(Api {
            get_unique_id: symbol!(library, c"ncclGetUniqueId").map_err(old)?,
            comm_init_rank_config: symbol!(library, c"ncclCommInitRankConfig").map_err(old)?,
            comm_count: symbol!(library, c"ncclCommCount").map_err(old)?,
            comm_user_rank: symbol!(library, c"ncclCommUserRank").map_err(old)?,
            comm_cu_device: symbol!(library, c"ncclCommCuDevice").map_err(old)?,
            comm_get_async_error: symbol!(library, c"ncclCommGetAsyncError").map_err(old)?,
            comm_finalize: symbol!(library, c"ncclCommFinalize").map_err(old)?,
            comm_destroy: symbol!(library, c"ncclCommDestroy").map_err(old)?,
            comm_abort: symbol!(library, c"ncclCommAbort").map_err(old)?,
            group_start: symbol!(library, c"ncclGroupStart").map_err(old)?,
            group_end: symbol!(library, c"ncclGroupEnd").map_err(old)?,
            send: symbol!(library, c"ncclSend").map_err(old)?,
            recv: symbol!(library, c"ncclRecv").map_err(old)?,
            comm_mem_stats: symbol!(library, c"ncclCommMemStats").ok(),
            get_error_string: symbol!(library, c"ncclGetErrorString").map_err(old)?,
            get_last_error: symbol!(library, c"ncclGetLastError").map_err(old)?,
            version,
            path: path_of(get_version as *const c_void).unwrap_or_else(|| shown.clone()),
            _library: library,
        })
    }

    /// NCCL's number of its version, e.g. 22707.
    pub fn version(&self) -> i32 {
        self.version
    }

    /// The file it came from.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// For build information: `2.27.7 (/usr/lib/libnccl.so.2)`.
    pub fn description(&self) -> String {
        format!("{} ({})", version_text(self.version), self.path)
    }

    /// An error of NCCL in its own words. `comm` may be null.
    ///
    /// # Safety
    /// `comm` is null or a communicator that lives.
    pub unsafe fn check(&self, call: &str, code: Code, comm: Comm) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        Err(Error::new(Status::Nccl, format!("{call}: {}", unsafe { self.explain(code, comm) })))
    }

    /// NCCL's words for a code, and those for what happened last in this process.
    ///
    /// # Safety
    /// As [`Api::check`].
    pub unsafe fn explain(&self, code: Code, comm: Comm) -> String {
        let text = |ptr: *const c_char| {
            // SAFETY: NCCL returns null or a text that ends with 0 and stays.
            let text = (!ptr.is_null()).then(|| unsafe { CStr::from_ptr(ptr) }.to_string_lossy());
            text.map(|t| t.trim().to_string()).filter(|t| !t.is_empty())
        };
        // SAFETY: any number is allowed.
        let word = text(unsafe { (self.get_error_string)(code) }).unwrap_or_default();
        // SAFETY: the caller's promise; null is allowed.
        match text(unsafe { (self.get_last_error)(comm) }) {
            Some(last) => format!("NCCL error {code}, {word}: {last}"),
            None => format!("NCCL error {code}, {word}"),
        }
    }
}

fn version_text(version: i32) -> String {
    // Up to 2.8 a minor version counted 100, later 100 with a major of 10000.
    let major = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / major, version % major / 100, version % 100)
}

/// File of the library that an address belongs to.
fn path_of(address: *const c_void) -> Option<String> {
    // SAFETY: all zeros is a valid Dl_info.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: writes one struct.
    let found = unsafe { libc::dladdr(address, &mut info) } != 0 && !info.dli_fname.is_null();
    // SAFETY: dladdr wrote a text that ends with 0 and lives as long as the library.
    found.then(|| unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_library_that_is_not_there_is_named() {
        let error = Api::open(&OsString::from("/nowhere/libnccl.so.2"), RTLD_NOW).err();
        let text = error.expect("there is no such file");
        assert!(text.contains("/nowhere/libnccl.so.2: cannot open"), "{text}");
        let error = Api::open(&OsString::from("libc.so.6"), RTLD_NOW).err();
        let text = error.expect("not NCCL");
        assert!(text.contains("libc.so.6") && text.contains("ncclGetVersion"), "{text}");
    }

    /// Alone it asks, in processes of its own, because an answer stays for the life of a process.
    #[test]
    fn what_was_looked_for_is_said() {
        if std::env::var_os("CP_TEST_ALONE").is_some() {
            match find() {
                Ok(api) => println!("found {}", api.description()),
                Err(error) => println!("{error}"),
            }
            return;
        }
        let ask = |name: &str| {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "transport::device::nccl::api::tests::what_was_looked_for_is_said",
                ])
                .args(["--nocapture"])
                .env("CP_TEST_ALONE", "1")
                .env(VARIABLE, name)
                .env_remove("LD_LIBRARY_PATH")
                .output()
                .unwrap();
            assert!(output.status.success());
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let text = ask("/nowhere/libnccl.so.2");
        assert!(text.contains("not supported: NCCL, named by CP_NCCL: /nowhere/"), "{text}");
        let text = ask("");
        // Unless this machine has NCCL.
        let tried = [
            "NCCL was not found; CP_NCCL can name its library. Tried: ",
            "in this process already: libnccl.so.2",
            "; libnccl.so.2: cannot open",
            "; libnccl.so: cannot open",
        ];
        assert!(text.contains("found 2.") || tried.iter().all(|t| text.contains(t)), "{text}");
    }

    #[test]
    fn versions_read_as_nccl_writes_them() {
        for (number, text) in [(2708, "2.7.8"), (20905, "2.9.5"), (22707, "2.27.7")] {
            assert_eq!(version_text(number), text);
        }
    }
}
