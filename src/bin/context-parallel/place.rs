//! Where ranks compute: on the CPU, or on CUDA devices. Tensors are made in host memory and go to the device and back around the timed calls.

use crate::args::{Failure, Given, usage};
use context_parallel::attention::{Attention, Config};
use context_parallel::backend::cpu::{Cpu, Simd};
use context_parallel::backend::cuda::Cuda;
use context_parallel::driver::{self, CUstream, Device, DeviceBuffer, Stream, device_count};
use context_parallel::error::Result;
use context_parallel::group::{Group, OnDevice};
use context_parallel::transport::Transport;
use context_parallel::transport::device::join::{Way, join};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Where all ranks of a job compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Cpu,
    /// Rank r has device r modulo their number: ranks may share one.
    Cuda {
        way: Way,
        /// Multiprocessors left to communication.
        margin: u32,
    },
}

/// Reads `--device`, `--transport` and `--sm-margin`.
pub fn place(given: &Given) -> std::result::Result<Place, Failure> {
    let way = match given.text("transport") {
        None | Some("auto") => Way::Auto,
        Some("local") => Way::Local,
        Some("nccl") => Way::Nccl,
        Some("staged") => Way::Staged,
        Some(other) => {
            return Err(usage(format!(
                "--transport: got {other:?}, allowed auto, local, nccl, staged"
            )));
        }
    };
    let margin = given.number("sm-margin", 0, 0..=1024)? as u32;
    match given.text("device") {
        None | Some("cpu") => {
            match ["transport", "sm-margin"].into_iter().find(|o| given.flag(o)) {
                Some(option) => Err(usage(format!("--{option}: is for --device cuda"))),
                None => Ok(Place::Cpu),
            }
        }
        Some("cuda") => {
            driver::open()?;
            Ok(Place::Cuda { way, margin })
        }
        Some(other) => Err(usage(format!("--device: got {other:?}, allowed cpu, cuda"))),
    }
}

impl Place {
    /// The device of a rank; `None` on the CPU.
    pub fn device(self, rank: u32) -> Result<Option<Arc<Device>>> {
        match self {
            Place::Cpu => Ok(None),
            Place::Cuda { .. } => Device::get(rank % device_count()?.max(1)).map(Some),
        }
    }

    /// What computes, in words.
    pub fn describe(self) -> Result<Option<String>> {
        let device = self.device(0)?;
        Ok(device
            .map(|d| format!("{}, sm_{}, {} multiprocessors", d.name, d.arch, d.multiprocessors)))
    }

    /// The group over a host transport. Collective.
    pub fn group(self, host: Box<dyn Transport>, timeout: Duration) -> Result<Group> {
        let Place::Cuda { way, .. } = self else { return Ok(Group::new(host, timeout)) };
        let (rank, size) = (host.rank(), host.size());
        let device =
            self.device(rank).map(|d| d.expect("a place on CUDA has a device for every rank"));
        let host = Arc::new(Mutex::new(host));
        let transport = match size {
            1 => None,
            _ => Some(join(device.clone(), &host, way, timeout)?),
        };
        let on = OnDevice { device: device?, transport, agree: false };
        Group::on_device(rank, size, Some(host), on, timeout)
    }

    /// A group of one.
    pub fn solo(self) -> Result<Group> {
        Ok(self.device(0)?.map_or_else(Group::solo, |d| Group::solo_on(&d)))
    }

    /// A layer on the group's device, or with so many threads on the CPU.
    pub fn layer(self, group: &Group, config: &Config, threads: usize) -> Result<Attention> {
        match (self, group.device()) {
            (Place::Cuda { margin, .. }, Some(device)) => {
                let mut cuda = Cuda::new(device.clone())?;
                cuda.set_margin(margin);
                Attention::on_device(config.clone(), cuda, None)
            }
            _ => Attention::new(config.clone(), Cpu::new(threads, Simd::from_env()?)?),
        }
    }
}

/// Copies of host tensors on a device, and the stream of all work on them.
pub struct Mirror {
    device: Arc<Device>,
    stream: Stream,
    buffers: Vec<DeviceBuffer>,
}

impl Mirror {
    /// Copies the tensors over.
    pub fn new(device: &Arc<Device>, tensors: &[&[u64]]) -> Result<Mirror> {
        let _current = device.enter()?;
        let stream = Stream::new(device, false)?;
        let mut buffers = Vec::new();
        for words in tensors {
            let bytes = size_of_val(*words);
            let buffer = DeviceBuffer::new(device, bytes)?;
            // SAFETY: of the same size; done before anything else happens to either.
            unsafe {
                let from = words.as_ptr().cast();
                driver::copy_to_device(buffer.address(), from, bytes, stream.raw())?;
                driver::synchronize(stream.raw())?;
            }
            buffers.push(buffer);
        }
        Ok(Mirror { device: device.clone(), stream, buffers })
    }

    /// Where a tensor is on the device.
    pub fn ptr(&self, index: usize) -> *mut u8 {
        self.buffers[index].address() as *mut u8
    }

    pub fn stream(&self) -> CUstream {
        self.stream.raw()
    }

    /// Waits until all work is done.
    pub fn finish(&self) -> Result<()> {
        let _current = self.device.enter()?;
        // SAFETY: an own stream.
        unsafe { driver::synchronize(self.stream.raw()) }
    }

    /// Copies a tensor back.
    pub fn read(&self, index: usize, words: &mut [u64]) -> Result<()> {
        let _current = self.device.enter()?;
        // SAFETY: of the same size; done before anyone looks.
        unsafe {
            let (to, from) = (words.as_mut_ptr().cast(), self.buffers[index].address());
            driver::copy_to_host(to, from, size_of_val(words), self.stream.raw())?;
            driver::synchronize(self.stream.raw())
        }
    }
}
