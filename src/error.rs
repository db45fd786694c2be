//! One status to branch on, one line of text to read.

use std::any::Any;
use std::ffi::CStr;
use std::fmt;

/// What went wrong, in at most sixteen words that a caller can branch on. The numbers are the C ABI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Status {
    /// Success.
    Ok = 0,
    /// An argument is wrong; nothing was changed, everything stays usable.
    InvalidArgument = 1,
    /// A handle is null, destroyed, or of another kind.
    InvalidHandle = 2,
    /// The calls came in an order that makes no sense (backward without forward, no group set).
    InvalidUsage = 3,
    /// Valid, but not offered here; the text says what is missing.
    Unsupported = 4,
    /// The call cannot be captured in a CUDA graph.
    NotCapturable = 5,
    /// Memory could not be allocated, or a given workspace or limit is too small.
    OutOfMemory = 6,
    /// A structure or library is of another version.
    Version = 7,
    /// The ranks disagree about what to compute; the text names the odd one.
    Mismatch = 8,
    /// The CUDA driver reported an error; the group is lost.
    Cuda = 9,
    /// NCCL reported an error; the group is lost.
    Nccl = 10,
    /// A transport failed; the group is lost.
    Transport = 11,
    /// A deadline passed; the text names the rank that was waited for. The group is lost.
    Timeout = 12,
    /// A peer died; the text names it. The group is lost.
    PeerLost = 13,
    /// The group was aborted.
    Aborted = 14,
    /// A bug in this library; the handle is poisoned.
    Internal = 15,
}

impl Status {
    /// Every status, in numeric order.
    pub const ALL: [Status; 16] = [
        Status::Ok,
        Status::InvalidArgument,
        Status::InvalidHandle,
        Status::InvalidUsage,
        Status::Unsupported,
        Status::NotCapturable,
        Status::OutOfMemory,
        Status::Version,
        Status::Mismatch,
        Status::Cuda,
        Status::Nccl,
        Status::Transport,
        Status::Timeout,
        Status::PeerLost,
        Status::Aborted,
        Status::Internal,
    ];

    /// The status as a short phrase.
    pub fn as_str(self) -> &'static str {
        self.as_c_str().to_str().unwrap_or_default()
    }

    /// The same for C.
    pub fn as_c_str(self) -> &'static CStr {
        match self {
            Status::Ok => c"success",
            Status::InvalidArgument => c"invalid argument",
            Status::InvalidHandle => c"invalid handle",
            Status::InvalidUsage => c"invalid usage",
            Status::Unsupported => c"not supported",
            Status::NotCapturable => c"not capturable",
            Status::OutOfMemory => c"out of memory",
            Status::Version => c"version mismatch",
            Status::Mismatch => c"ranks disagree",
            Status::Cuda => c"CUDA error",
            Status::Nccl => c"NCCL error",
            Status::Transport => c"transport error",
            Status::Timeout => c"timeout",
            Status::PeerLost => c"peer lost",
            Status::Aborted => c"aborted",
            Status::Internal => c"internal error",
        }
    }

    /// After this status the group it happened on can no longer be used.
    pub fn loses_group(self) -> bool {
        matches!(
            self,
            Status::Cuda
                | Status::Nccl
                | Status::Transport
                | Status::Timeout
                | Status::PeerLost
                | Status::Aborted
                | Status::Internal
        )
    }

    /// The status with this number.
    pub fn from_i32(number: i32) -> Option<Status> {
        Status::ALL.into_iter().find(|s| *s as i32 == number)
    }
}

/// A status and one line that names the argument, what was got, what is allowed, and the rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The word to branch on.
    pub status: Status,
    /// The line to read.
    pub text: String,
}

/// Result with this library's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with any status.
    pub fn new(status: Status, text: impl Into<String>) -> Error {
        Error { status, text: text.into() }
    }

    /// [`Status::InvalidArgument`].
    pub fn argument(text: impl Into<String>) -> Error {
        Error::new(Status::InvalidArgument, text)
    }

    /// [`Status::Unsupported`].
    pub fn unsupported(text: impl Into<String>) -> Error {
        Error::new(Status::Unsupported, text)
    }

    /// [`Status::Internal`]: a bug here, not in the caller.
    pub fn internal(text: impl Into<String>) -> Error {
        Error::new(Status::Internal, text)
    }

    /// What a caught panic said, as [`Status::Internal`].
    pub fn from_panic(payload: Box<dyn Any + Send>) -> Error {
        let text = payload
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| payload.downcast_ref::<&str>().map(|s| s.to_string()));
        Error::internal(text.unwrap_or_else(|| "panic".into()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.as_str(), self.text)
    }
}

impl std::error::Error for Error {}
