//! From a cp_group_config to a group.

use super::abi::*;
use super::decode::Place;
use super::guard::{extensible, known_flags};
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::group::{Group, OnDevice};
use crate::transport::bootstrap::{self, Kind};
use crate::transport::device::join::{Way, join, join_by_gather};
use crate::transport::device::nccl;
use crate::transport::{Transport, user};
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// # Safety
/// As [`super::group::cp_group_init`].
pub unsafe fn init(config: *const cp_group_config) -> Result<Group> {
    // SAFETY: the caller's promise.
    let c = unsafe { extensible("config", config)? };
    known_flags("config.flags", c.flags, CP_GROUP_AGREE)?;
    let timeout = Duration::from_millis(if c.timeout_ms == 0 { 300_000 } else { c.timeout_ms });
    check_doors(&c)?;
    match Place::of("config", c.device_type, c.device_id)? {
        // SAFETY: the caller's promise.
        Place::Cpu => unsafe { on_cpu(&c, timeout) },
        // SAFETY: the caller's promise.
        Place::Cuda(ordinal) => unsafe { on_cuda(&c, ordinal, timeout) },
    }
}

/// # Safety
/// The configuration's pointers are as its docs say.
unsafe fn on_cpu(c: &cp_group_config, timeout: Duration) -> Result<Group> {
    let kind = match c.transport_kind {
        CP_TRANSPORT_AUTO => Kind::Auto,
        CP_TRANSPORT_LOCAL => Kind::Local,
        CP_TRANSPORT_SHM => Kind::Shm,
        CP_TRANSPORT_NCCL | CP_TRANSPORT_STAGED => {
            return Err(Error::unsupported(format!(
                "config.transport_kind: got {}, CP_TRANSPORT_NCCL (3) and _STAGED (4) are for device_type CP_DEVICE_CUDA",
                c.transport_kind
            )));
        }
        other => return Err(unknown_kind(other)),
    };
    if !c.nccl_comm.is_null() || !c.nccl_library.is_null() {
        return Err(Error::argument(
            "config.nccl_comm, nccl_library: given, must be NULL unless device_type is CP_DEVICE_CUDA",
        ));
    }
    // SAFETY: the caller's promise.
    let host = unsafe { host(c, (c.rank, c.size), kind, timeout, &mut Vec::new())? };
    let Some(host) = host else { return Ok(Group::solo()) };
    let group = Group::new(host.transport, timeout);
    host.owned.store(true, Ordering::SeqCst);
    Ok(group)
}

/// # Safety
/// As [`on_cpu`].
unsafe fn on_cuda(c: &cp_group_config, ordinal: u32, timeout: Duration) -> Result<Group> {
    let (way, kind) = match c.transport_kind {
        CP_TRANSPORT_AUTO => (Way::Auto, Kind::Auto),
        CP_TRANSPORT_LOCAL => (Way::Local, Kind::Local),
        CP_TRANSPORT_NCCL => (Way::Nccl, Kind::Auto),
        CP_TRANSPORT_STAGED => (Way::Staged, Kind::Auto),
        CP_TRANSPORT_SHM => {
            return Err(Error::unsupported(
                "config.transport_kind: got CP_TRANSPORT_SHM (2), which moves host memory; on CUDA allowed are CP_TRANSPORT_AUTO (0), _LOCAL (1), _NCCL (3), _STAGED (4)",
            ));
        }
        other => return Err(unknown_kind(other)),
    };
    // What is missing here is told to all ranks where they meet.
    // SAFETY: the caller's promise.
    let device = Device::get(ordinal).and_then(|device| unsafe {
        library(c)?;
        Ok(device)
    });
    let agree = c.flags & CP_GROUP_AGREE != 0;
    if !c.nccl_comm.is_null() {
        // SAFETY: the caller's promise.
        return unsafe { adopted(c, &device?, way, timeout) };
    }
    let mut gathered = Vec::new();
    // SAFETY: the caller's promise.
    let host = match unsafe { host(c, (c.rank, c.size), kind, timeout, &mut gathered) } {
        Ok(None) => return Ok(Group::solo_on(&device?)),
        Ok(Some(host)) => host,
        // All ranks come here: they see the same.
        Err(_)
            if way != Way::Local && way != Way::Staged && bootstrap::several_hosts(&gathered) =>
        {
            if agree {
                return Err(no_agreement());
            }
            // SAFETY: the caller's promise.
            let mut gather = |mine: &[u8]| unsafe { call_allgather(c, c.size, mine) };
            let transport = join_by_gather(device.clone(), c.rank, c.size, timeout, &mut gather)?;
            let on = OnDevice { device: device?, transport: Some(transport), agree };
            return Group::on_device(c.rank, c.size, None, on, timeout);
        }
        Err(e) => return Err(e),
    };
    let (rank, size) = (host.transport.rank(), host.transport.size());
    if size == 1 {
        // A table of the caller's is not needed then, but taken all the same.
        let device = device?;
        host.owned.store(true, Ordering::SeqCst);
        return Ok(Group::solo_on(&device));
    }
    let shared = Arc::new(Mutex::new(host.transport));
    let transport = join(device.clone(), &shared, way, timeout)?;
    let on = OnDevice { device: device?, transport: Some(transport), agree };
    let group = Group::on_device(rank, size, Some(shared), on, timeout)?;
    host.owned.store(true, Ordering::SeqCst);
    Ok(group)
}

/// The caller's NCCL communicator, and a way to agree if one is given as well.
///
/// # Safety
/// As [`on_cpu`].
unsafe fn adopted(
    c: &cp_group_config,
    device: &Arc<Device>,
    way: Way,
    timeout: Duration,
) -> Result<Group> {
    if way != Way::Auto && way != Way::Nccl {
        return Err(Error::argument(format!(
            "config.transport_kind: got {} with nccl_comm, allowed CP_TRANSPORT_AUTO (0), CP_TRANSPORT_NCCL (3)",
            c.transport_kind
        )));
    }
    // SAFETY: the caller's promise.
    let comm = unsafe { nccl::adopt(device, c.nccl_comm, timeout)? };
    let (rank, size) = (comm.rank(), comm.size());
    if (c.rank, c.size) != (rank, size) && (c.rank, c.size) != (0, 0) {
        return Err(Error::argument(format!(
            "config.rank, size: got {}, {}; nccl_comm is rank {rank} of {size} (0, 0 takes its word)",
            c.rank, c.size
        )));
    }
    let agree = c.flags & CP_GROUP_AGREE != 0;
    if size == 1 {
        return Ok(Group::solo_on(device));
    }
    let host = match doors(c) == 0 && c.bootstrap == CP_BOOTSTRAP_AUTO {
        true if agree => return Err(no_agreement()),
        true => None,
        // SAFETY: the caller's promise.
        false => unsafe { host(c, (rank, size), Kind::Auto, timeout, &mut Vec::new())? },
    };
    let same = |t: &dyn Transport| (t.rank(), t.size()) == (rank, size);
    if let Some(host) = host.as_ref().filter(|h| !same(&*h.transport)) {
        return Err(Error::argument(format!(
            "config.bootstrap: makes this rank {} of {}, nccl_comm makes it {rank} of {size}",
            host.transport.rank(),
            host.transport.size()
        )));
    }
    let (shared, owned) = match host {
        Some(host) => (Some(Arc::new(Mutex::new(host.transport))), host.owned),
        None => (None, Arc::default()),
    };
    let on = OnDevice { device: device.clone(), transport: Some(Box::new(comm)), agree };
    let group = Group::on_device(rank, size, shared, on, timeout)?;
    owned.store(true, Ordering::SeqCst);
    Ok(group)
}

fn no_agreement() -> Error {
    Error::unsupported(
        "config.flags: CP_GROUP_AGREE, but NCCL is all that connects these ranks; give an id or a transport as well",
    )
}

fn unknown_kind(got: u32) -> Error {
    Error::argument(format!(
        "config.transport_kind: got {got}, allowed CP_TRANSPORT_AUTO (0), _LOCAL (1), _SHM (2), _NCCL (3), _STAGED (4)"
    ))
}

/// Opens the NCCL library that is named, if one is.
///
/// # Safety
/// `nccl_library` is NULL or a text.
unsafe fn library(c: &cp_group_config) -> Result<()> {
    if c.nccl_library.is_null() {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(c.nccl_library) };
    let text = name.to_str().map_err(|_| {
        Error::argument(format!("config.nccl_library: got {name:?}, which is not UTF-8"))
    })?;
    let api = nccl::api::find_at(text)?;
    let file = |path: &OsStr| std::fs::canonicalize(path).ok();
    let (asked, open) = (file(OsStr::from_bytes(name.to_bytes())), file(OsStr::new(api.path())));
    if asked.is_some() && asked != open {
        return Err(Error::unsupported(format!(
            "config.nccl_library: got {text:?}, but this process uses {} already",
            api.path()
        )));
    }
    Ok(())
}

/// Ways for ranks to find each other that are given.
fn doors(c: &cp_group_config) -> usize {
    usize::from(!c.id.is_null())
        + usize::from(c.allgather.is_some())
        + usize::from(!c.transport.is_null())
}

fn check_doors(c: &cp_group_config) -> Result<()> {
    let doors = doors(c);
    if doors > 1 {
        return Err(Error::argument("config: give one of id, allgather, transport"));
    }
    match c.bootstrap {
        CP_BOOTSTRAP_AUTO => {}
        CP_BOOTSTRAP_ENV if doors == 0 => return Ok(()),
        CP_BOOTSTRAP_ENV => {
            return Err(Error::argument(
                "config.bootstrap: CP_BOOTSTRAP_ENV with an id, allgather or transport; give one way",
            ));
        }
        other => {
            return Err(Error::argument(format!(
                "config.bootstrap: got {other}, allowed CP_BOOTSTRAP_AUTO (0), CP_BOOTSTRAP_ENV (1)"
            )));
        }
    }
    if !c.nccl_comm.is_null() && c.size == 0 {
        return Ok(());
    }
    if c.size == 0 {
        return Err(Error::argument("config.size: got 0, need at least 1"));
    }
    if c.rank >= c.size {
        return Err(Error::argument(format!(
            "config.rank: got {} of size {}, allowed 0 … size-1",
            c.rank, c.size
        )));
    }
    if doors == 0 && c.size > 1 && c.nccl_comm.is_null() {
        return Err(Error::argument(format!(
            "config: size {} needs an id, an allgather, a transport, or CP_BOOTSTRAP_ENV",
            c.size
        )));
    }
    Ok(())
}

/// A way to the other ranks' hosts.
struct Host {
    transport: Box<dyn Transport>,
    /// Set once the group is made: until then a table of the caller's is still the caller's.
    owned: Arc<AtomicBool>,
}

/// The host transport through the door that is given; none for a rank alone. `gathered` gets what an allgather gave.
///
/// # Safety
/// As [`on_cpu`].
unsafe fn host(
    c: &cp_group_config,
    (rank, size): (u32, u32),
    kind: Kind,
    timeout: Duration,
    gathered: &mut Vec<u8>,
) -> Result<Option<Host>> {
    let transport = if c.bootstrap == CP_BOOTSTRAP_ENV {
        bootstrap::init_from_env(kind, timeout)?
    } else if !c.transport.is_null() {
        // SAFETY: the caller's promise.
        let (transport, owned) = unsafe { user::lent(c.transport, rank, size)? };
        return Ok(Some(Host { transport, owned }));
    } else if !c.id.is_null() {
        // SAFETY: the caller's promise; bytes have no alignment.
        let id = unsafe { c.id.read_unaligned() };
        bootstrap::init(&id.bytes, rank, size, kind, timeout)?
    } else if c.allgather.is_some() {
        let mut gather = |mine: &[u8]| {
            // SAFETY: the caller's promise.
            let all = unsafe { call_allgather(c, size, mine)? };
            gathered.clone_from(&all);
            Ok(all)
        };
        bootstrap::init_from_allgather(rank, size, kind, timeout, &mut gather)?
    } else {
        return Ok(None);
    };
    Ok(Some(Host { transport, owned: Arc::default() }))
}

/// # Safety
/// As [`on_cpu`].
unsafe fn call_allgather(c: &cp_group_config, size: u32, mine: &[u8]) -> Result<Vec<u8>> {
    let call = c.allgather.ok_or_else(|| Error::internal("no allgather"))?;
    let mut all = vec![0u8; mine.len() * size as usize];
    // SAFETY: the callback's contract: `mine` has that many bytes, `all` room for size times as many.
    let status =
        unsafe { call(c.allgather_ctx, mine.as_ptr().cast(), all.as_mut_ptr().cast(), mine.len()) };
    match status {
        0 => Ok(all),
        _ => {
            let text = format!("config.allgather: returned {status}");
            Err(Error::new(Status::Transport, text))
        }
    }
}
