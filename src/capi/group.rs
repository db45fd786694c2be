//! Groups.

use super::abi::*;
use super::guard::{Opaque, create, destroy, guard, object, output, report};
use super::init::init;
use crate::error::Error;
use crate::group::Group;
use crate::transport::bootstrap;

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
/// Local. During a capture: allowed.
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

/// Makes a group. Collective over its ranks; blocks until all have come, at most `timeout_ms`. During a capture: not allowed.
///
/// The ranks find each other through one of: `id` (all ranks give the same), `allgather` (the caller's own collective), `transport` (the
/// caller's own transport), CP_BOOTSTRAP_ENV, or on CUDA `nccl_comm`. Size 1 needs none.
/// On CUDA the hosts agree through what these make, and devices exchange as CP_TRANSPORT_* says. Ranks on several hosts give `allgather` or
/// `nccl_comm` (NCCL then is all that connects them, and their hosts cannot agree), or `transport`, or `nccl_comm` with `transport`.
/// Errors: CP_ERR_INVALID_ARGUMENT, CP_ERR_MISMATCH (ranks disagree about size or kind, or one rank lacks its device or library), CP_ERR_UNSUPPORTED
/// (ranks on several hosts without a way to each other; no CUDA driver; no NCCL), CP_ERR_TIMEOUT naming a rank that has not come, CP_ERR_PEER_LOST,
/// CP_ERR_CUDA, CP_ERR_NCCL.
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

/// The group of some ranks of a group, in the given order: `ranks[i]`, a rank of `group`, becomes rank i. Local: nothing is
/// communicated and no communicator is made; only members call it. The subset stays valid when `group` is destroyed.
/// Ranks that share several subsets call them in the same order, as in MPI. During a capture: allowed.
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

/// This rank's number in the group. Local. During a capture: allowed.
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

/// Number of ranks. Local. During a capture: allowed.
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

/// Ranks of the parent group, in this group's order. `capacity` must be at least the group's size. Local. During a capture: allowed.
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

/// Waits until the hosts of all ranks of the group have come; devices may still be at work. Collective, blocking. CP_ERR_UNSUPPORTED where NCCL is
/// all that connects the ranks. During a capture: allowed, captures nothing.
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

/// Connects the group's ranks pair by pair and allocates what a transport needs for that, so that later calls do neither: NCCL does both at a
/// pair's first message. Elsewhere like a barrier. Collective, blocking, not capturable.
///
/// # Safety
/// `group` is a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_warm_up(group: *mut cp_group) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { object(group.cast_const())? }.warm_up()
    })
}

/// Makes pending and future calls of the group and its relatives fail with CP_ERR_ABORTED, here and on the ranks that can be reached.
/// From any thread, also while another is inside a call. Local. Afterwards the group can only be destroyed. What devices wait for from peers
/// over NCCL ends too. During a capture: not allowed.
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

/// What the group and its relatives have moved so far on this rank; on CUDA, what was enqueued. Local. During a capture: allowed.
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
/// ends with the last group and layer that use it; a peer that still waits for this rank then sees CP_ERR_PEER_LOST. On CUDA that end may block
/// until what was enqueued is done, at most `timeout_ms`; graphs that captured calls of the group are not launched afterwards. During a capture:
/// not allowed.
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
