//! Megatron's rank grid, and communication types per layer. Pure functions: no group, no communication.

use super::abi::{
    CP_COMM_A2A, CP_COMM_A2A_P2P, CP_COMM_ALL_GATHER, CP_COMM_P2P, cp_comm_type, cp_status,
};
use super::abi_mesh::*;
use super::guard::{extensible, guard, known_flags, output, report, zero};
use crate::error::{Error, Result};
use crate::layers;
use crate::mesh::{self, Axes, DEFAULT_ORDER, Mesh, Sizes};
use crate::problem::CommType;
use libc::c_char;
use std::ffi::CStr;

/// Fills in what a mesh leaves to defaults: sizes, `world_size`, but not `order`. Checks all of it. Local. Any thread, any time.
///
/// # Safety
/// `mesh` points to `struct_size` bytes and its `order` is NULL or ends in 0; `filled`, which may be the same, points to `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_mesh_fill(mesh: *const cp_mesh, filled: *mut cp_mesh) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (given, made) = unsafe { read(mesh)? };
        // SAFETY: the caller's promise.
        unsafe { report("filled", filled, encode(&made, given.order)) }
    })
}

/// The mesh of the experts over the same ranks: cp = 1, `tp` and `ep` of its own, dp what they leave. Megatron makes such a second grid too.
/// Refuses sizes with which pipeline stages would be other ranks than in `mesh`. Local. Any thread, any time.
///
/// # Safety
/// `mesh` as for cp_mesh_fill, and `expert` uses its `order` too; `expert` points to `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_mesh_expert(
    mesh: *const cp_mesh,
    tp: u32,
    ep: u32,
    expert: *mut cp_mesh,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (given, made) = unsafe { read(mesh)? };
        // SAFETY: the caller's promise.
        unsafe { report("expert", expert, encode(&made.expert(tp, ep)?, given.order)) }
    })
}

/// The group of `rank` along one axis or several joined by - ("cp", "tp-dp-cp"): the ranks that differ from it in those coordinates only, in
/// ascending order. `index` is its own place among them. Writes at most `capacity` members and the full number to `count`; `members` and `index`
/// may be NULL. Local. Any thread, any time.
///
/// # Safety
/// `mesh` as for cp_mesh_fill; `axes` ends in 0; `members` is NULL or has room for `capacity` numbers, `index` is NULL or has room for one, `count`
/// for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_mesh_members(
    mesh: *const cp_mesh,
    axes: *const c_char,
    rank: u32,
    members: *mut u32,
    capacity: usize,
    count: *mut usize,
    index: *mut u32,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let ((_, mesh), axes) = unsafe { (read(mesh)?, Axes::parse(text("axes", axes)?)?) };
        // SAFETY: the caller's promise.
        unsafe { give(&mesh.members(axes, rank)?, rank, members, capacity, count, index) }
    })
}

/// All groups along `axes`, one after another, by their first member: as many numbers as the mesh has ranks, of which every `group_size` are a group.
/// Local. Any thread, any time.
///
/// # Safety
/// `mesh` as for cp_mesh_fill; `axes` ends in 0; `members` is NULL (for the size only) or has room for `capacity` numbers, `group_size` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_mesh_groups(
    mesh: *const cp_mesh,
    axes: *const c_char,
    members: *mut u32,
    capacity: usize,
    group_size: *mut usize,
) -> cp_status {
    guard(|| {
        let out = output("group_size", group_size)?;
        // SAFETY: the caller's promise.
        let ((_, mesh), axes) = unsafe { (read(mesh)?, Axes::parse(text("axes", axes)?)?) };
        if !members.is_null() {
            if capacity < mesh.world() as usize {
                return Err(Error::argument(format!(
                    "capacity: got {capacity}, the mesh has {} ranks",
                    mesh.world()
                )));
            }
            // SAFETY: the caller's promise.
            unsafe { copy("members", &mesh.groups(axes).concat(), members, capacity)? };
        }
        out.write(mesh.size(axes) as usize);
        Ok(())
    })
}

/// The group of `rank` on one level of a hierarchy over its group along `axes` (Megatron's hierarchical context parallelism, where `axes` is "cp"):
/// `sizes[0]` neighbours on level 0, on every further level ranks as far apart as the levels below are large. The sizes' product is the group's size;
/// any number of levels. For a2a+p2p, level 0 trades heads and level 1 keys and values. Outputs as cp_mesh_members. Local. Any thread, any time.
///
/// # Safety
/// As cp_mesh_members; `sizes` points to `level_count` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_mesh_level_members(
    mesh: *const cp_mesh,
    axes: *const c_char,
    sizes: *const u32,
    level_count: usize,
    level: u32,
    rank: u32,
    members: *mut u32,
    capacity: usize,
    count: *mut usize,
    index: *mut u32,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let ((_, mesh), axes) = unsafe { (read(mesh)?, Axes::parse(text("axes", axes)?)?) };
        if sizes.is_null() || !sizes.is_aligned() || level_count > 32 {
            return Err(Error::argument(format!(
                "sizes: got {sizes:p} with {level_count} levels, at most 32 are allowed"
            )));
        }
        // SAFETY: the caller's promise.
        let sizes = unsafe { std::slice::from_raw_parts(sizes, level_count) };
        let all = mesh.members(axes, rank)?;
        let made = mesh::level_members(&all, sizes, level as usize, rank)?;
        // SAFETY: the caller's promise.
        unsafe { give(&made, rank, members, capacity, count, index) }
    })
}

/// The group of `group_size` consecutive members of the group along `axes` that `rank` is in: hybrid (dynamic) context parallelism, where `axes` is
/// "dp-cp". Any size up to the group's, not only powers of two. Where the size does not divide, ranks left over are in no such group:
/// CP_ERR_INVALID_ARGUMENT for them (Megatron files a shorter group under the full size). Outputs as cp_mesh_members. Local. Any thread, any time.
///
/// # Safety
/// As cp_mesh_members.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_mesh_consecutive_members(
    mesh: *const cp_mesh,
    axes: *const c_char,
    group_size: u32,
    rank: u32,
    members: *mut u32,
    capacity: usize,
    count: *mut usize,
    index: *mut u32,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let ((_, mesh), axes) = unsafe { (read(mesh)?, Axes::parse(text("axes", axes)?)?) };
        let made = mesh::consecutive_members(&mesh.members(axes, rank)?, group_size, rank)?;
        // SAFETY: the caller's promise.
        unsafe { give(&made, rank, members, capacity, count, index) }
    })
}

/// The communication type of each of `layers` layers. `names`, separated by commas or white space, is one name for all, one per layer, or a shorter
/// list whose length divides `layers` and which is repeated: p2p, all_gather (or allgather), a2a, a2a+p2p. Local. Any thread, any time.
///
/// # Safety
/// `names` ends in 0; `types` has room for `layers` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_comm_types_per_layer(
    names: *const c_char,
    layers: usize,
    types: *mut cp_comm_type,
) -> cp_status {
    guard(|| {
        output("types", types)?;
        if layers > 1 << 20 {
            return Err(Error::argument(format!("layers: got {layers}, allowed 1 … {}", 1 << 20)));
        }
        // SAFETY: the caller's promise.
        let names = layers::names(unsafe { text("names", names)? });
        let made: Vec<cp_comm_type> = layers::comm_types_per_layer(&names, layers)?
            .into_iter()
            .map(|comm| match comm {
                CommType::P2p => CP_COMM_P2P,
                CommType::AllGather => CP_COMM_ALL_GATHER,
                CommType::A2a => CP_COMM_A2A,
                CommType::A2aP2p => CP_COMM_A2A_P2P,
            })
            .collect();
        // SAFETY: the caller's promise.
        unsafe { copy("types", &made, types, layers) }
    })
}

/// # Safety
/// As cp_mesh_fill.
unsafe fn read(mesh: *const cp_mesh) -> Result<(cp_mesh, Mesh)> {
    // SAFETY: the caller's promise; all zeros is valid.
    let m = unsafe { extensible("mesh", mesh)? };
    known_flags("mesh.flags", m.flags, 0)?;
    zero("mesh.reserved", m.reserved.into())?;
    let order = if m.order.is_null() {
        DEFAULT_ORDER
    } else {
        // SAFETY: the caller's promise.
        unsafe { text("mesh.order", m.order)? }
    };
    let world = (m.world_size > 0).then_some(m.world_size);
    let dp = if world.is_some() { m.dp } else { m.dp.max(1) };
    let sizes = Sizes { tp: m.tp.max(1), cp: m.cp.max(1), ep: m.ep.max(1), dp, pp: m.pp.max(1) };
    Ok((m, Mesh::new(order, sizes, world, m.first_rank)?))
}

fn encode(mesh: &Mesh, order: *const c_char) -> cp_mesh {
    let Sizes { tp, cp, ep, dp, pp } = mesh.sizes();
    cp_mesh {
        struct_size: size_of::<cp_mesh>() as u32,
        flags: 0,
        tp,
        cp,
        ep,
        dp,
        pp,
        world_size: mesh.world(),
        first_rank: mesh.first(),
        reserved: 0,
        order,
    }
}

/// # Safety
/// `ptr` is null or ends in 0.
unsafe fn text<'a>(name: &str, ptr: *const c_char) -> Result<&'a str> {
    if ptr.is_null() {
        return Err(Error::argument(format!("{name}: got NULL")));
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { CStr::from_ptr(ptr) };
    bytes
        .to_str()
        .map_err(|_| Error::argument(format!("{name}: got {bytes:?}, which is not UTF-8")))
}

/// A group and the caller's place in it.
///
/// # Safety
/// As cp_mesh_members.
unsafe fn give(
    made: &[u32],
    rank: u32,
    members: *mut u32,
    capacity: usize,
    count: *mut usize,
    index: *mut u32,
) -> Result<()> {
    let out = output("count", count)?;
    let place = if index.is_null() { None } else { Some(output("index", index)?) };
    if !members.is_null() {
        // SAFETY: the caller's promise.
        unsafe { copy("members", made, members, capacity)? };
    }
    if let Some(place) = place {
        place.write(made.iter().position(|m| *m == rank).unwrap_or_default() as u32);
    }
    out.write(made.len());
    Ok(())
}

/// # Safety
/// `to` has room for `capacity` elements.
unsafe fn copy<T: Copy>(name: &str, from: &[T], to: *mut T, capacity: usize) -> Result<()> {
    output(name, to)?;
    // SAFETY: no more than fits, by the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len().min(capacity)) };
    Ok(())
}
