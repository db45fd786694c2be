//! What a layer computes with: the CPU backend or the CUDA backend, each with the memory that its calls use again.

use super::Config;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Scores, Shape, Staging};
use crate::driver::{self, CUstream, Device, DeviceBuffer, Event};
use crate::error::{Error, Result, Status};
use crate::exec::device::{self, DeviceLink, Target};
use crate::exec::{Memory, Scratch, Stats};
use crate::group::{Group, Prepared};
use crate::plan::account::ALIGN;
use libc::c_void;
use std::sync::Arc;

/// Gives device memory of `bytes` bytes, aligned to at least 64, that work on `stream` may use from now on; null on failure.
pub type AllocFn =
    unsafe extern "C" fn(ctx: *mut c_void, bytes: usize, stream: *mut c_void) -> *mut c_void;
/// Takes it back: work enqueued on `stream` so far still uses it.
pub type FreeFn =
    unsafe extern "C" fn(ctx: *mut c_void, ptr: *mut c_void, bytes: usize, stream: *mut c_void);

/// The caller's allocator of device memory.
#[derive(Clone, Copy)]
pub struct Allocator {
    /// Gives.
    pub alloc: AllocFn,
    /// Takes back.
    pub free: FreeFn,
    /// First argument of both.
    pub ctx: *mut c_void,
}

// SAFETY: the caller of `Attention::on_device` promises that the functions may be called from any thread that uses the layer.
unsafe impl Send for Allocator {}

/// What carries out a layer's calls.
#[allow(clippy::large_enum_variant)] // one per layer
pub(crate) enum Engine {
    /// The calling thread and the CPU backend's workers.
    Host { cpu: Cpu, scratch: Scratch, workspace: HostBuffer },
    /// Streams of a device.
    Device(OnDevice),
}

pub(crate) struct OnDevice {
    cuda: Cuda,
    scratch: device::Scratch,
    allocator: Option<Allocator>,
    /// Used when a call brings no workspace and there is no allocator.
    own: Option<DeviceBuffer>,
    /// Marks the end of the last call that used `own`: the next may be on another stream.
    own_used: Event,
}

impl Engine {
    pub fn on_host(cpu: Cpu) -> Engine {
        Engine::Host { cpu, scratch: Scratch::default(), workspace: HostBuffer::default() }
    }

    pub fn on_device(cuda: Cuda, allocator: Option<Allocator>) -> Result<Engine> {
        let scratch = device::Scratch::new(Staging::new(cuda.device().clone()));
        let own_used = Event::new(cuda.device())?;
        Ok(Engine::Device(OnDevice { cuda, scratch, allocator, own: None, own_used }))
    }

    /// Bytes of scratch memory that the kernels hold.
    pub fn kernel_bytes(&mut self) -> usize {
        match self {
            Engine::Host { cpu, .. } => cpu.scratch_bytes(),
            Engine::Device(_) => 0,
        }
    }

    /// Bytes of the layer's own workspace so far.
    pub fn workspace_held(&self) -> usize {
        match self {
            Engine::Host { workspace, .. } => workspace.bytes,
            Engine::Device(d) => d.own.as_ref().map_or(0, |b| b.bytes()),
        }
    }

    /// Where plans run.
    pub fn target(&self, config: &Config) -> Target {
        match self {
            Engine::Host { .. } => Target::Host,
            Engine::Device(d) => {
                Target::Device { shape: d.shape(config), deterministic: config.deterministic }
            }
        }
    }

    /// Does the group compute where the layer does?
    pub fn fits(&self, group: &Group) -> Result<()> {
        let place = |d: Option<&Arc<Device>>| {
            d.map_or("the CPU".into(), |d| format!("CUDA device {}", d.ordinal))
        };
        let mine = match self {
            Engine::Host { .. } => None,
            Engine::Device(d) => Some(d.cuda.device()),
        };
        if mine.map(|d| d.ordinal) == group.device().map(|d| d.ordinal) {
            return Ok(());
        }
        Err(Error::argument(format!(
            "group: computes on {}, the layer on {} (rank {})",
            place(group.device()),
            place(mine),
            group.parent_rank()
        )))
    }

    /// A workspace for a call that brings none.
    pub fn workspace(&mut self, bytes: usize, stream: CUstream) -> Result<Lease> {
        match self {
            Engine::Host { workspace, .. } => workspace.at_least(bytes).map(Lease::of_caller),
            Engine::Device(d) => d.workspace(bytes, stream),
        }
    }
}

impl OnDevice {
    fn shape(&self, config: &Config) -> &'static Shape {
        let Config { dtype, dim_qk, dim_v, .. } = *config;
        let shape = self.cuda.supports(dtype, dim_qk, dim_v, Scores::of(&config.score));
        shape.expect("asked when the layer was made")
    }

    fn workspace(&mut self, bytes: usize, stream: CUstream) -> Result<Lease> {
        let device = self.cuda.device();
        let _current = device.enter()?;
        if let Some(allocator) = self.allocator {
            // SAFETY: the caller's own function, called as its docs say.
            let ptr = unsafe { (allocator.alloc)(allocator.ctx, bytes.max(1), stream.cast()) };
            let lease = Lease {
                ptr: ptr.cast(),
                give_back: Some((device.clone(), allocator, bytes.max(1), stream)),
                own: false,
            };
            if ptr.is_null() {
                return Err(Error::new(
                    Status::OutOfMemory,
                    format!("workspace: the allocator gave nothing for {bytes} bytes"),
                ));
            }
            if !(ptr as usize).is_multiple_of(ALIGN) {
                return Err(Error::argument(format!(
                    "alloc: gave {ptr:p}, which is not a multiple of {ALIGN}"
                )));
            }
            return Ok(lease);
        }
        // SAFETY: a stream of the current device, by the caller's promise.
        if unsafe { driver::is_capturing(stream)? } {
            return Err(Error::new(
                Status::NotCapturable,
                "workspace: got NULL; a call that is captured in a graph needs a workspace of the caller's, or an allocator, which live as long as the graph",
            ));
        }
        if self.own.as_ref().is_none_or(|own| own.bytes() < bytes) {
            self.own_used.synchronize()?;
            self.own = None;
            self.own = Some(DeviceBuffer::new(device, bytes)?);
        }
        let ptr = self.own.as_ref().map_or(0, |own| own.address()) as *mut u8;
        Ok(Lease { ptr, give_back: None, own: true })
    }

    /// # Safety
    /// As [`device::enqueue`].
    pub unsafe fn enqueue(
        &mut self,
        prepared: &Prepared,
        memory: &Memory,
        link: Option<DeviceLink>,
        stream: CUstream,
        workspace: &Lease,
    ) -> Result<Stats> {
        let Some(tables) = &prepared.tables else {
            return Err(Error::internal("a plan without tables on a device"));
        };
        // SAFETY: the caller's promise.
        unsafe {
            if workspace.own {
                driver::wait(stream, self.own_used.raw())?;
            }
            let (plan, scratch) = (&prepared.plan, &mut self.scratch);
            let result = device::enqueue(plan, tables, memory, &self.cuda, stream, link, scratch);
            if workspace.own {
                self.own_used.record(stream)?;
            }
            result
        }
    }
}

impl Drop for OnDevice {
    fn drop(&mut self) {
        // The last call may still be on its stream, and it uses the workspace. If the device is lost, nothing does any more.
        let (_current, _relaxed) = (self.cuda.device().enter(), driver::Relaxed::new());
        let _ = self.own_used.synchronize();
    }
}

/// A workspace for the length of a call.
pub(crate) struct Lease {
    ptr: *mut u8,
    give_back: Option<(Arc<Device>, Allocator, usize, CUstream)>,
    /// It is the layer's own device buffer.
    own: bool,
}

impl Lease {
    /// Memory that nobody gives back.
    pub fn of_caller(ptr: *mut u8) -> Lease {
        Lease { ptr, give_back: None, own: false }
    }

    pub fn ptr(&self) -> *mut u8 {
        self.ptr
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let given = self.give_back.take().filter(|_| !self.ptr.is_null());
        if let Some((device, allocator, bytes, stream)) = given {
            let _current = device.enter();
            // SAFETY: what `alloc` gave, once; work that uses it is on the stream.
            unsafe { (allocator.free)(allocator.ctx, self.ptr.cast(), bytes, stream.cast()) };
        }
    }
}

/// An aligned allocation that only grows.
pub(crate) struct HostBuffer {
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: the buffer is owned; nothing else points into it between calls.
unsafe impl Send for HostBuffer {}

impl Default for HostBuffer {
    fn default() -> HostBuffer {
        HostBuffer { ptr: std::ptr::null_mut(), bytes: 0 }
    }
}

impl HostBuffer {
    fn layout(bytes: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(bytes, ALIGN).expect("sizes of plans fit")
    }

    fn at_least(&mut self, bytes: usize) -> Result<*mut u8> {
        if bytes > self.bytes {
            self.free();
            // SAFETY: the size is not 0, being greater than another.
            let ptr = unsafe { std::alloc::alloc(HostBuffer::layout(bytes)) };
            if ptr.is_null() {
                return Err(Error::new(
                    Status::OutOfMemory,
                    format!("workspace: {bytes} bytes could not be allocated"),
                ));
            }
            (self.ptr, self.bytes) = (ptr, bytes);
        }
        Ok(self.ptr)
    }

    fn free(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated with this layout.
            unsafe { std::alloc::dealloc(self.ptr, HostBuffer::layout(self.bytes)) };
            (self.ptr, self.bytes) = (std::ptr::null_mut(), 0);
        }
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        self.free();
    }
}
