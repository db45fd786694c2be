//! The boundary: panics become a status, errors become text, handles are checked, structs of other sizes are read.

use super::abi::{CP_OK, cp_status};
use crate::error::{Error, Result, Status};
use std::cell::RefCell;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, TryLockError};

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// This thread's last error text; the pointer stays valid until its next call that fails. Empty while the thread ends, when it has gone.
pub fn last_error() -> *const libc::c_char {
    LAST.try_with(|l| l.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Every exported function's body runs in here.
pub fn guard(f: impl FnOnce() -> Result<()>) -> cp_status {
    let error = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => return CP_OK,
        Ok(Err(e)) => e,
        Err(payload) => Error::from_panic(payload),
    };
    let text = format!("{}: {}", error.status.as_str(), error.text.replace('\0', " "));
    // A thread's last cleanup may call after its text has gone; the status must do then.
    let _ = LAST.try_with(|l| *l.borrow_mut() = CString::new(text).unwrap_or_default());
    error.status as cp_status
}

/// What an opaque pointer points to. The magic number is cleared on destruction, so that most stale pointers are noticed.
#[repr(C)]
struct Handle<T> {
    magic: u64,
    /// After `fork` the child may not use what the parent's threads and peers know nothing of.
    pid: u32,
    object: T,
}

/// A type that C knows only by pointer.
pub trait Opaque {
    /// What is behind the pointer. C may use it from any thread.
    type Object: Send + Sync;
    /// Marks live objects.
    const MAGIC: u64;
    /// Name in messages.
    const NAME: &'static str;
}

/// Hands an object to C.
pub fn create<H: Opaque>(object: H::Object) -> *mut H {
    Box::into_raw(Box::new(Handle { magic: H::MAGIC, pid: std::process::id(), object })).cast()
}

/// The object behind a handle.
///
/// # Safety
/// `handle` is null, or was made by `create`; if it was destroyed its memory may be gone (the check is best effort).
pub unsafe fn object<'a, H: Opaque>(handle: *const H) -> Result<&'a H::Object> {
    let bad =
        |what: &str| Err(Error::new(Status::InvalidHandle, format!("{}: got {what}", H::NAME)));
    let handle: *const Handle<H::Object> = handle.cast();
    if handle.is_null() {
        return bad("NULL");
    }
    if !handle.is_aligned() {
        return bad("a pointer that is no handle");
    }
    // SAFETY: not null and aligned; both kinds of handle start with the magic number, by the caller's promise.
    if unsafe { (*handle).magic } != H::MAGIC {
        return bad("a handle that was destroyed, or of another kind");
    }
    // SAFETY: the magic number says that it is a live handle of this kind.
    let this = unsafe { &*handle };
    if this.pid != std::process::id() {
        return Err(Error::new(
            Status::InvalidUsage,
            format!("{}: was made before fork; a child makes its own", H::NAME),
        ));
    }
    Ok(&this.object)
}

/// Frees the object. Null does nothing.
///
/// # Safety
/// As [`object`]; no other call uses the handle.
pub unsafe fn destroy<H: Opaque>(handle: *mut H) -> Result<()> {
    if handle.is_null() {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { object(handle.cast_const())? };
    // SAFETY: made by `Box::into_raw` in `create`, as the check says, and no call is inside.
    let mut owned = unsafe { Box::from_raw(handle.cast::<Handle<H::Object>>()) };
    // SAFETY: a field of a live object. Volatile, because the compiler drops a plain store to memory that is about to be freed.
    unsafe { (&raw mut owned.magic).write_volatile(0) };
    Ok(())
}

/// An object that one call at a time may use.
pub fn enter<'a, T>(name: &str, object: &'a Mutex<T>) -> Result<MutexGuard<'a, T>> {
    match object.try_lock() {
        Ok(object) => Ok(object),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            Status::InvalidUsage,
            format!("{name}: is in use by another thread; one call at a time"),
        )),
        Err(TryLockError::Poisoned(_)) => {
            Err(Error::internal(format!("{name}: an earlier call ended in a bug; destroy it")))
        }
    }
}

/// Structs that may be shorter or longer than this library's: the first field is `uint32_t struct_size`.
///
/// Shorter: the rest is zero, which means default. Longer: accepted if the tail is zero, since then it asks for nothing unknown.
///
/// # Safety
/// `T` is plain data for which all zeros is valid. `ptr` is null or points to `struct_size` readable bytes.
pub unsafe fn extensible<T: Copy>(name: &str, ptr: *const T) -> Result<T> {
    if ptr.is_null() {
        return Err(Error::argument(format!("{name}: got NULL")));
    }
    if !ptr.is_aligned() {
        return Err(Error::argument(format!(
            "{name}: got a pointer that is not aligned to {}",
            align_of::<T>()
        )));
    }
    // SAFETY: the struct starts with its size, which the caller promises is readable.
    let size = unsafe { ptr.cast::<u32>().read() } as usize;
    if size < 8 {
        return Err(Error::argument(format!(
            "{name}.struct_size: got {size}, set it to sizeof the struct ({})",
            size_of::<T>()
        )));
    }
    let known = size.min(size_of::<T>());
    // SAFETY: all zeros is valid for T, by the caller's promise.
    let mut value: T = unsafe { std::mem::zeroed() };
    // SAFETY: `known` bytes are readable at `ptr` and fit in `value`.
    unsafe {
        std::ptr::copy_nonoverlapping(ptr.cast::<u8>(), (&raw mut value).cast::<u8>(), known)
    };
    for i in known..size {
        // SAFETY: within the size that the caller stated.
        if unsafe { ptr.cast::<u8>().add(i).read() } != 0 {
            let text = format!(
                "{name}: byte {i} beyond the {} that version {} knows is not 0",
                size_of::<T>(),
                env!("CARGO_PKG_VERSION")
            );
            return Err(Error::new(Status::Version, text));
        }
    }
    Ok(value)
}

/// Fills a caller's struct as far as its `struct_size` goes, which it keeps.
///
/// # Safety
/// `T` is plain data that starts with its size. `ptr` is null or points to `struct_size` writable bytes.
pub unsafe fn report<T: Copy>(name: &str, ptr: *mut T, value: T) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { extensible(name, ptr.cast_const())? };
    // SAFETY: read above.
    let size = unsafe { ptr.cast::<u32>().read() } as usize;
    let known = size.min(size_of::<T>());
    // SAFETY: `known` bytes are writable; the first four, the size, stay as they are.
    unsafe {
        std::ptr::copy_nonoverlapping(
            (&raw const value).cast::<u8>().add(4),
            ptr.cast::<u8>().add(4),
            known - 4,
        )
    };
    Ok(())
}

/// An output pointer, checked.
pub fn output<'a, T>(name: &str, ptr: *mut T) -> Result<&'a mut std::mem::MaybeUninit<T>> {
    if ptr.is_null() || !ptr.is_aligned() {
        return Err(Error::argument(format!("{name}: got {ptr:p}, a result is written there")));
    }
    // SAFETY: not null and aligned; the C caller promises room for one T, and MaybeUninit makes no claim about what is there.
    Ok(unsafe { &mut *ptr.cast() })
}

/// Fields that must be zero until they mean something.
pub fn zero(name: &str, got: u64) -> Result<()> {
    if got == 0 { Ok(()) } else { Err(Error::argument(format!("{name}: got {got:#x}, must be 0"))) }
}

/// Writes as much of a list as fits; null takes nothing.
///
/// # Safety
/// `ptr` is null or has room for `capacity` values.
pub unsafe fn fill<T: Copy>(name: &str, ptr: *mut T, capacity: usize, list: &[T]) -> Result<()> {
    if !ptr.is_null() {
        output(name, ptr)?;
        // SAFETY: aligned, and room for `capacity` values by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(list.as_ptr(), ptr, list.len().min(capacity)) };
    }
    Ok(())
}

/// Flags outside those known.
pub fn known_flags(name: &str, got: u32, known: u32) -> Result<()> {
    let unknown = got & !known;
    if unknown == 0 {
        Ok(())
    } else {
        Err(Error::argument(format!(
            "{name}: got unknown flag(s) {unknown:#x}, known are {known:#x}"
        )))
    }
}
