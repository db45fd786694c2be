//! Groups.

use super::abi::*;
use super::guard::{Opaque, create, destroy, extensible, guard, object, output, report, zero};
use crate::error::{Error, Result, Status};
use crate::group::Group;
use crate::transport::bootstrap::{self, Kind};
use crate::transport::{Transport, user};
use std::time::Duration;

/// Ranks that compute together. Use it from any thread, one call at a time; cp_group_abort may come from any other thread meanwhile.
/// Groups with the same parent are not used at the same time either.
pub struct cp_group {
    _opaque: [u8; 0],
}

impl Opaque for cp_group {
    type Object = Group;
    const MAGIC: u64 = u64::from_le_bytes(*b"cp_group");
    const NAME: &'static str = "group";
}

/// Makes the id of one new group. Call it in the process that will be rank 0 and give the 128 bytes to all ranks.
/// Not collective, not blocking.
///
/// # Safety
/// `id` has room for one cp_unique_id.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_get_unique_id(id: *mut cp_unique_id) -> cp_status {
    guard(|| {
        let id = output("id", id)?;
        id.write(cp_unique_id { bytes: bootstrap::unique_id()? });
        Ok(())
    })
}

/// Makes a group. Collective over its ranks; blocks until all have come, at most `timeout_ms`.
///
/// The ranks find each other through one of: `id` (all ranks give the same), `allgather` (the caller's own collective, called once
/// on every rank), `transport` (the caller's own transport), or CP_BOOTSTRAP_ENV. Size 1 needs none.
/// Errors: CP_ERR_INVALID_ARGUMENT, CP_ERR_MISMATCH (ranks disagree about size or kind), CP_ERR_UNSUPPORTED (ranks on several hosts without
/// a transport), CP_ERR_TIMEOUT naming a rank that has not come, CP_ERR_PEER_LOST.
///
/// # Safety
/// `config` points to `struct_size` bytes; its pointers are as its docs say; `group` has room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_init(
    config: *const cp_group_config,
    group: *mut *mut cp_group,
) -> cp_status {
    guard(|| {
        let out = output("group", group)?;
        // SAFETY: the caller's promise.
        let made = unsafe { init(config)? };
        out.write(create(made));
        Ok(())
    })
}

/// # Safety
/// As [`cp_group_init`].
unsafe fn init(config: *const cp_group_config) -> Result<Group> {
    // SAFETY: the caller's promise.
    let c = unsafe { extensible("config", config)? };
    zero("config.flags", c.flags.into())?;
    let timeout = Duration::from_millis(if c.timeout_ms == 0 { 300_000 } else { c.timeout_ms });
    if c.device_type == CP_DEVICE_CUDA {
        return Err(Error::unsupported(
            "config.device_type: got CP_DEVICE_CUDA (2); this build computes on the CPU only",
        ));
    }
    if c.device_type != 0 && c.device_type != CP_DEVICE_CPU || c.device_id != 0 {
        return Err(Error::argument(format!(
            "config.device: got type {} id {}, allowed CP_DEVICE_CPU (1) id 0",
            c.device_type, c.device_id
        )));
    }
    let kind = match c.transport_kind {
        CP_TRANSPORT_AUTO => Kind::Auto,
        CP_TRANSPORT_LOCAL => Kind::Local,
        CP_TRANSPORT_SHM => Kind::Shm,
        other => {
            return Err(Error::argument(format!(
                "config.transport_kind: got {other}, allowed CP_TRANSPORT_AUTO (0), _LOCAL (1), _SHM (2)"
            )));
        }
    };
    let doors = usize::from(!c.id.is_null())
        + usize::from(c.allgather.is_some())
        + usize::from(!c.transport.is_null());
    if doors > 1 {
        return Err(Error::argument("config: give one of id, allgather, transport"));
    }
    match c.bootstrap {
        CP_BOOTSTRAP_AUTO => {}
        CP_BOOTSTRAP_ENV if doors == 0 => {
            return Ok(Group::new(bootstrap::init_from_env(kind, timeout)?, timeout));
        }
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
    if c.size == 0 {
        return Err(Error::argument("config.size: got 0, need at least 1"));
    }
    if c.rank >= c.size {
        return Err(Error::argument(format!(
            "config.rank: got {} of size {}, allowed 0 … size-1",
            c.rank, c.size
        )));
    }
    let transport: Box<dyn Transport> = if !c.transport.is_null() {
        // SAFETY: the caller's promise.
        unsafe { user::from_ops(c.transport, c.rank, c.size)? }
    } else if !c.id.is_null() {
        // SAFETY: the caller's promise; bytes have no alignment.
        let id = unsafe { c.id.read_unaligned() };
        bootstrap::init(&id.bytes, c.rank, c.size, kind, timeout)?
    } else if let Some(call) = c.allgather {
        let size = c.size as usize;
        let mut gather = |mine: &[u8]| {
            let mut all = vec![0u8; mine.len() * size];
            // SAFETY: the callback's contract: `mine` has that many bytes, `all` room for size times as many.
            let status = unsafe {
                call(c.allgather_ctx, mine.as_ptr().cast(), all.as_mut_ptr().cast(), mine.len())
            };
            if status == 0 {
                Ok(all)
            } else {
                Err(Error::new(Status::Transport, format!("config.allgather: returned {status}")))
            }
        };
        bootstrap::init_from_allgather(c.rank, c.size, kind, timeout, &mut gather)?
    } else if c.size == 1 {
        return Ok(Group::solo());
    } else {
        return Err(Error::argument(format!(
            "config: size {} needs an id, an allgather, a transport, or CP_BOOTSTRAP_ENV",
            c.size
        )));
    };
    Ok(Group::new(transport, timeout))
}

/// The group of some ranks of a group, in the given order: `ranks[i]`, a rank of `group`, becomes rank i. Local: nothing is
/// communicated and no communicator is made; only members call it. The subset stays valid when `group` is destroyed.
/// Ranks that share several subsets call them in the same order, as in MPI.
///
/// # Safety
/// `group` is a handle; `ranks` points to `count` numbers; `subset` has room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_subset(
    group: *const cp_group,
    ranks: *const u32,
    count: usize,
    subset: *mut *mut cp_group,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let parent = unsafe { object(group)? };
        if ranks.is_null() || !ranks.is_aligned() || count > 1 << 20 {
            return Err(Error::argument(format!("ranks: got {ranks:p} with count {count}")));
        }
        let out = output("subset", subset)?;
        // SAFETY: `count` numbers, by the caller's promise.
        let made = parent.subset(unsafe { std::slice::from_raw_parts(ranks, count) })?;
        out.write(create(made));
        Ok(())
    })
}

/// This rank's number in the group. Local.
///
/// # Safety
/// `group` is a handle; `rank` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_rank(group: *const cp_group, rank: *mut u32) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let group = unsafe { object(group)? };
        output("rank", rank)?.write(group.rank());
        Ok(())
    })
}

/// Number of ranks. Local.
///
/// # Safety
/// `group` is a handle; `size` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_size(group: *const cp_group, size: *mut u32) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let group = unsafe { object(group)? };
        output("size", size)?.write(group.size());
        Ok(())
    })
}

/// Ranks of the parent group, in this group's order. `capacity` must be at least the group's size. Local.
///
/// # Safety
/// `group` is a handle; `ranks` has room for `capacity` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_global_ranks(
    group: *const cp_group,
    ranks: *mut u32,
    capacity: usize,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let group = unsafe { object(group)? };
        let members = group.members();
        output("ranks", ranks)?;
        if capacity < members.len() {
            return Err(Error::argument(format!(
                "capacity: got {capacity}, the group has {} ranks",
                members.len()
            )));
        }
        // SAFETY: room for at least as many numbers.
        unsafe { std::ptr::copy_nonoverlapping(members.as_ptr(), ranks, members.len()) };
        Ok(())
    })
}

/// Waits until all ranks of the group have come. Collective, blocking.
///
/// # Safety
/// `group` is a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_barrier(group: *mut cp_group) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { object(group.cast_const())? }.barrier()
    })
}

/// Makes pending and future calls of the group and its relatives fail with CP_ERR_ABORTED, here and on the ranks that can be reached.
/// From any thread, also while another is inside a call. Not collective, not blocking. Afterwards the group can only be destroyed.
///
/// # Safety
/// `group` is a handle that is not being destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_abort(group: *mut cp_group) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { object(group.cast_const())? }.abort();
        Ok(())
    })
}

/// What the group and its relatives have moved so far on this rank. Local.
///
/// # Safety
/// `group` is a handle; `statistics` points to `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_statistics(
    group: *const cp_group,
    statistics: *mut cp_statistics,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let group = unsafe { object(group)? };
        let stats = group.stats();
        let filled = cp_statistics {
            sent_bytes: stats.sent,
            received_bytes: stats.received,
            exposed_ns: stats.exposed_ns,
            ..cp_statistics::default()
        };
        // SAFETY: the caller's promise.
        unsafe { report("statistics", statistics, filled) }
    })
}

/// Destroys the group's handle; NULL does nothing. Local. Layers that use the group keep it alive until they are destroyed. The transport
/// ends with the last group and layer that use it; a peer that still waits for this rank then sees CP_ERR_PEER_LOST.
///
/// # Safety
/// `group` is NULL or a handle that no other call uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_destroy(group: *mut cp_group) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { destroy(group) }
    })
}
