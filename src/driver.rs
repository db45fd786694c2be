//! The CUDA driver, opened at run time: a device, and owners for what has to be given back. Errors are the driver's own names.
//!
//! cudarc panics where the library or a symbol is missing, so [`open`] looks for every symbol that this file uses before anything else.

use crate::error::{Error, Result, Status};
use cudarc::driver::sys;
pub use cudarc::driver::sys::{CUcontext, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream};
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Every symbol that this library calls.
const SYMBOLS: [&str; 37] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuCtxEnablePeerAccess",
    "cuDeviceCanAccessPeer",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuLaunchKernel",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamWaitEvent",
    "cuStreamSynchronize",
    "cuStreamIsCapturing",
    "cuThreadExchangeStreamCaptureMode",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
];

/// Opens the driver once per process. The error says what is missing; it is the same every time.
pub fn open() -> Result<()> {
    static OPENED: OnceLock<Result<()>> = OnceLock::new();
    OPENED.get_or_init(try_open).clone()
}

/// Version of the driver's CUDA if its library is there. Starts nothing: a process that has only asked may still fork.
pub fn installed() -> Option<i32> {
    // SAFETY: only opens a library of a fixed name.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    // SAFETY: the library is there; only asks whether the symbol is.
    unsafe { sys::culib().get::<*const c_void>(b"cuDriverGetVersion") }.ok()?;
    version().ok()
}

fn try_open() -> Result<()> {
    // SAFETY: only opens a library of a fixed name.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::unsupported(
            "CUDA: libcuda.so.1 was not found; it comes with the NVIDIA driver",
        ));
    }
    // SAFETY: the library is there.
    let library = unsafe { sys::culib() };
    for name in SYMBOLS {
        // SAFETY: only asks whether the symbol is there; nothing is called.
        if unsafe { library.get::<*const c_void>(name.as_bytes()) }.is_err() {
            return Err(Error::unsupported(format!(
                "CUDA: the driver's libcuda.so.1 lacks {name}; it is too old"
            )));
        }
    }
    // SAFETY: as the driver's documentation says: before all others, flags 0.
    check("cuInit", unsafe { sys::cuInit(0) })
        .map_err(|e| Error::unsupported(format!("CUDA: the driver does not start: {}", e.text)))
}

/// An error of the driver, by its own name.
pub fn check(call: &str, code: sys::CUresult) -> Result<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult| {
        let mut ptr = std::ptr::null();
        // SAFETY: writes the address of a static string, or null.
        unsafe { get(code, &mut ptr) };
        // SAFETY: not null, ended by 0, never freed.
        if ptr.is_null() { "?".into() } else { unsafe { CStr::from_ptr(ptr) }.to_string_lossy() }
    };
    let (name, meaning) = (text(sys::cuGetErrorName), text(sys::cuGetErrorString));
    let status = match code {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Status::OutOfMemory,
        _ => Status::Cuda,
    };
    Err(Error::new(status, format!("{call}: {name} ({meaning})")))
}

/// Version of the driver's CUDA, e.g. 13000; the driver's library must be there.
pub fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one number.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok(version)
}

/// Number of devices; the driver must be open.
pub fn device_count() -> Result<u32> {
    let mut count = 0;
    // SAFETY: writes one number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(count as u32)
}

/// A device with its primary context, the one that the CUDA runtime, torch and NCCL use too. One per process and ordinal; never released.
pub struct Device {
    /// CUDA's number of the device.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Compute capability, e.g. 90.
    pub arch: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block can ask for.
    pub shared_bytes: u32,
    context: CUcontext,
}

// SAFETY: the handle is a token for the driver, which is thread-safe; everything else never changes.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// The device with this number. The error tells what is missing.
    pub fn get(ordinal: u32) -> Result<Arc<Device>> {
        static DEVICES: Mutex<Vec<Arc<Device>>> = Mutex::new(Vec::new());
        open()?;
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = devices.iter().find(|d| d.ordinal == ordinal) {
            return Ok(known.clone());
        }
        let count = device_count()?;
        if ordinal >= count {
            return Err(Error::argument(format!(
                "device_id: got {ordinal}, this process sees {count} CUDA device(s), numbered from 0"
            )));
        }
        let device = Arc::new(Device::retain(ordinal)?);
        devices.push(device.clone());
        Ok(device)
    }

    fn retain(ordinal: u32) -> Result<Device> {
        let mut handle = 0;
        // SAFETY: writes one handle.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut handle, ordinal as c_int) })?;
        let mut name = [0 as std::ffi::c_char; 256];
        // SAFETY: writes at most 256 bytes, ended by 0.
        check("cuDeviceGetName", unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, handle)
        })?;
        use sys::CUdevice_attribute as Attribute;
        let attribute = |which: Attribute| -> Result<u32> {
            let mut value = 0;
            // SAFETY: writes one number.
            check("cuDeviceGetAttribute", unsafe {
                sys::cuDeviceGetAttribute(&mut value, which, handle)
            })?;
            Ok(value as u32)
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_bytes =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, handle)
        })?;
        // SAFETY: the name was written above, ended by 0.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let arch = 10 * major + minor;
        Ok(Device { ordinal, name, arch, multiprocessors, shared_bytes, context })
    }

    /// Makes the device current on this thread until the guard goes, and then what was current before.
    pub fn enter(&self) -> Result<Guard> {
        // SAFETY: a context that is never released.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        Ok(Guard(std::marker::PhantomData))
    }

    /// Lets work on this device use the memory of another one directly; false where the two cannot, and copies go through the host.
    pub fn reach(&self, ordinal: u32) -> Result<bool> {
        if ordinal == self.ordinal {
            return Ok(true);
        }
        let peer = Device::get(ordinal)?;
        let (mut this, mut other, mut can) = (0, 0, 0);
        // SAFETY: writes one handle.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut this, self.ordinal as c_int) })?;
        // SAFETY: writes one handle.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut other, ordinal as c_int) })?;
        // SAFETY: writes one number.
        check("cuDeviceCanAccessPeer", unsafe {
            sys::cuDeviceCanAccessPeer(&mut can, this, other)
        })?;
        if can == 0 {
            return Ok(false);
        }
        let _current = self.enter()?;
        // SAFETY: a context that is never released.
        match unsafe { sys::cuCtxEnablePeerAccess(peer.context, 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(true),
            sys::CUresult::CUDA_ERROR_TOO_MANY_PEERS => Ok(false),
            code => check("cuCtxEnablePeerAccess", code).map(|()| true),
        }
    }

    /// The primary context.
    pub fn context(&self) -> CUcontext {
        self.context
    }
}

/// The device is current on this thread as long as this lives.
pub struct Guard(std::marker::PhantomData<*const ()>);

impl Drop for Guard {
    fn drop(&mut self) {
        let mut old = std::ptr::null_mut();
        // SAFETY: `enter` pushed a context on this thread (a guard cannot move to another).
        unsafe { sys::cuCtxPopCurrent_v2(&mut old) };
    }
}

/// An owned stream, independent of the legacy default stream.
pub struct Stream {
    handle: CUstream,
    device: Arc<Device>,
}

// SAFETY: the handle is a token for the driver, which is thread-safe.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream; `urgent` ones are served first where kernels compete.
    pub fn new(device: &Arc<Device>, urgent: bool) -> Result<Stream> {
        let _current = device.enter()?;
        let mut handle = std::ptr::null_mut();
        // Out-of-range priorities are clamped by the driver to the most urgent.
        let priority = if urgent { -5 } else { 0 };
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: writes one handle.
        check("cuStreamCreateWithPriority", unsafe {
            sys::cuStreamCreateWithPriority(&mut handle, flags, priority)
        })?;
        Ok(Stream { handle, device: device.clone() })
    }

    /// The handle.
    pub fn raw(&self) -> CUstream {
        self.handle
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _current = self.device.enter();
        // SAFETY: owned; the driver ends it when its work is done.
        unsafe { sys::cuStreamDestroy_v2(self.handle) };
    }
}

/// An owned event, without timing.
pub struct Event {
    handle: CUevent,
    device: Arc<Device>,
}

// SAFETY: the handle is a token for the driver, which is thread-safe.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A new event.
    pub fn new(device: &Arc<Device>) -> Result<Event> {
        let _current = device.enter()?;
        let mut handle = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: writes one handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut handle, flags) })?;
        Ok(Event { handle, device: device.clone() })
    }

    /// The handle.
    pub fn raw(&self) -> CUevent {
        self.handle
    }

    /// Marks the work enqueued on `stream` so far.
    ///
    /// # Safety
    /// `stream` is a stream of the current device.
    pub unsafe fn record(&self, stream: CUstream) -> Result<()> {
        // SAFETY: the caller's promise.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.handle, stream) })
    }

    /// Is the marked work done (or was none marked)?
    pub fn is_done(&self) -> Result<bool> {
        // SAFETY: an event of this process.
        match unsafe { sys::cuEventQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Blocks until the marked work is done.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: an event of this process.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _current = self.device.enter();
        // SAFETY: owned; the driver frees it when it is not waited for any more.
        unsafe { sys::cuEventDestroy_v2(self.handle) };
    }
}

/// Later work on `stream` waits for what the event marks now.
///
/// # Safety
/// `stream` is a stream of the current device; `event` is an event of this process.
pub unsafe fn wait(stream: CUstream, event: CUevent) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, event, 0) })
}

/// Blocks until the stream is empty.
///
/// # Safety
/// `stream` is a stream of the current device.
pub unsafe fn synchronize(stream: CUstream) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })
}

/// Is the stream being captured into a graph?
///
/// # Safety
/// `stream` is a stream of the current device.
pub unsafe fn is_capturing(stream: CUstream) -> Result<bool> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the caller's promise; writes one number.
    check("cuStreamIsCapturing", unsafe { sys::cuStreamIsCapturing(stream, &mut status) })?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// While this lives, this thread may allocate and query events although a stream captures; what it does so is no part of the graph.
pub struct Relaxed {
    before: sys::CUstreamCaptureMode,
    thread: std::marker::PhantomData<*const ()>,
}

impl Relaxed {
    /// Begins.
    pub fn new() -> Result<Relaxed> {
        let before = exchange_mode(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        Ok(Relaxed { before, thread: std::marker::PhantomData })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // Cannot fail: it did not the first time.
        let _ = exchange_mode(self.before);
    }
}

fn exchange_mode(mut mode: sys::CUstreamCaptureMode) -> Result<sys::CUstreamCaptureMode> {
    // SAFETY: reads and writes one number.
    check("cuThreadExchangeStreamCaptureMode", unsafe {
        sys::cuThreadExchangeStreamCaptureMode(&mut mode)
    })?;
    Ok(mode)
}

/// Owned device memory.
pub struct DeviceBuffer {
    address: CUdeviceptr,
    bytes: usize,
    device: Arc<Device>,
}

impl DeviceBuffer {
    /// Allocates; 0 bytes allocate nothing. Blocks, and not during a capture.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<DeviceBuffer> {
        let _current = device.enter()?;
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: writes one address.
            let code = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
            check(&format!("cuMemAlloc of {bytes} bytes"), code)?;
        }
        Ok(DeviceBuffer { address, bytes, device: device.clone() })
    }

    /// First byte.
    pub fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// Size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // A garbage collector may come here while a stream captures, which freeing would end otherwise.
            let (_current, _relaxed) = (self.device.enter(), Relaxed::new());
            // SAFETY: owned; the driver waits for work that uses it.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Owned page-locked host memory, which copies run from and to without blocking the host.
pub struct PinnedBuffer {
    ptr: *mut u8,
    bytes: usize,
    device: Arc<Device>,
}

// SAFETY: owned memory.
unsafe impl Send for PinnedBuffer {}

impl PinnedBuffer {
    /// Allocates; 0 bytes allocate nothing. Blocks, and not during a capture.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<PinnedBuffer> {
        let _current = device.enter()?;
        let mut ptr = std::ptr::null_mut();
        if bytes > 0 {
            // SAFETY: writes one address. Flag 1: CU_MEMHOSTALLOC_PORTABLE, pinned for all contexts.
            let code = unsafe { sys::cuMemHostAlloc(&mut ptr, bytes, 1) };
            check(&format!("cuMemHostAlloc of {bytes} bytes"), code)?;
        }
        Ok(PinnedBuffer { ptr: ptr.cast(), bytes, device: device.clone() })
    }

    /// First byte; null when empty.
    pub fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let (_current, _relaxed) = (self.device.enter(), Relaxed::new());
            // SAFETY: owned; whoever copied from it has waited (see `staging`).
            unsafe { sys::cuMemFreeHost(self.ptr.cast()) };
        }
    }
}

/// A copy from page-locked host memory to the device, enqueued.
///
/// # Safety
/// Both ranges are valid until the copy is done; `stream` is a stream of the current device.
pub unsafe fn copy_to_device(
    to: CUdeviceptr,
    from: *const u8,
    bytes: usize,
    stream: CUstream,
) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream) })
}

/// A copy from the device to page-locked host memory, enqueued.
///
/// # Safety
/// As [`copy_to_device`].
pub unsafe fn copy_to_host(
    to: *mut u8,
    from: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuMemcpyDtoHAsync", unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream) })
}

/// A copy between device memories, of one device or of peers, enqueued.
///
/// # Safety
/// As [`copy_to_device`].
pub unsafe fn copy_on_device(
    to: CUdeviceptr,
    from: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream) })
}

/// Zeros, enqueued.
///
/// # Safety
/// As [`copy_to_device`].
pub unsafe fn clear(to: CUdeviceptr, bytes: usize, stream: CUstream) -> Result<()> {
    // SAFETY: the caller's promise.
    check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(to, 0, bytes, stream) })
}

/// Loaded device code. Never unloaded while its device lives on.
pub struct Module {
    handle: CUmodule,
}

// SAFETY: the handle is a token for the driver, which is thread-safe.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a fat binary for the device.
    ///
    /// # Safety
    /// `image` is a fat binary that the CUDA compiler made.
    pub unsafe fn load(device: &Device, name: &str, image: &[u8]) -> Result<Module> {
        let _current = device.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuModuleLoadData(&mut handle, image.as_ptr().cast()) };
        check(
            &format!("cuModuleLoadData of {name} on {} (sm_{})", device.name, device.arch),
            code,
        )?;
        Ok(Module { handle })
    }

    /// A kernel by name, if this module has it.
    pub fn function(&self, name: &str) -> Result<Option<Function>> {
        let c_name = CString::new(name).map_err(|_| Error::internal("a kernel's name"))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle.
        match unsafe { sys::cuModuleGetFunction(&mut handle, self.handle, c_name.as_ptr()) } {
            sys::CUresult::CUDA_ERROR_NOT_FOUND => Ok(None),
            code => check(&format!("cuModuleGetFunction {name}"), code)
                .map(|()| Some(Function { handle })),
        }
    }
}

/// A kernel.
#[derive(Clone, Copy)]
pub struct Function {
    handle: CUfunction,
}

// SAFETY: the handle is a token for the driver, which is thread-safe.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared: u32,
}

impl Function {
    /// Allows launches with this much dynamic shared memory.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of this process.
        let code = unsafe { sys::cuFuncSetAttribute(self.handle, which, bytes as c_int) };
        check(&format!("cuFuncSetAttribute of {bytes} bytes of shared memory"), code)
    }

    /// Blocks of a launch that one multiprocessor runs at once.
    pub fn blocks_per_multiprocessor(&self, block: u32, shared: u32) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes one number.
        check("cuOccupancyMaxActiveBlocksPerMultiprocessor", unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut count,
                self.handle,
                block as c_int,
                shared as usize,
            )
        })?;
        Ok(count as u32)
    }

    /// Enqueues a launch with one parameter struct, which is copied.
    ///
    /// # Safety
    /// `P` is the kernel's parameter; what it points to is valid until the kernel is done; `stream` is a stream of the current device.
    pub unsafe fn launch<P>(
        &self,
        name: &str,
        how: Launch,
        params: &P,
        stream: CUstream,
    ) -> Result<()> {
        let mut list = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the caller's promise.
        let code = unsafe {
            sys::cuLaunchKernel(
                self.handle,
                how.grid,
                1,
                1,
                how.block,
                1,
                1,
                how.shared,
                stream,
                list.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        if code == sys::CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        check(&format!("cuLaunchKernel {name} {how:?}"), code)
    }
}
