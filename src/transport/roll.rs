//! Which ranks of a group of threads are still there, why others left, and the bells that wake the ones that sleep.

use super::streams;
use crate::error::{Error, Result, Status};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const NOBODY: u32 = u32::MAX;

/// A rank sleeps on a bell of its own, which is rung for nobody else.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    wake: Condvar,
}

/// What the ranks of a group know of each other.
pub(super) struct Roll {
    bells: Vec<Bell>,
    here: Vec<AtomicBool>,
    /// Why a rank gave up; set before it is not here any more.
    reasons: Vec<Mutex<Option<Error>>>,
    /// The rank that aborted, or NOBODY.
    aborter: AtomicU32,
}

impl Roll {
    pub fn new(size: u32) -> Roll {
        Roll {
            bells: (0..size).map(|_| Bell::default()).collect(),
            here: (0..size).map(|_| AtomicBool::new(true)).collect(),
            reasons: (0..size).map(|_| Mutex::new(None)).collect(),
            aborter: AtomicU32::new(NOBODY),
        }
    }

    pub fn size(&self) -> u32 {
        self.bells.len() as u32
    }

    /// Wakes `rank`, now or as soon as it sleeps.
    pub fn ring(&self, rank: u32) {
        let bell = &self.bells[rank as usize];
        let mut rung = lock(&bell.rung);
        if !*rung {
            *rung = true;
            bell.wake.notify_one();
        }
    }

    pub fn ring_all(&self) {
        (0..self.size()).for_each(|rank| self.ring(rank));
    }

    /// `rank`, which is the caller, sleeps until rung, or for `longest`.
    pub fn sleep(&self, rank: u32, longest: Duration) {
        let bell = &self.bells[rank as usize];
        let (mut rung, _) = bell
            .wake
            .wait_timeout_while(lock(&bell.rung), longest, |r| !*r)
            .unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }

    pub fn is_here(&self, rank: u32) -> bool {
        self.here[rank as usize].load(Ordering::SeqCst)
    }

    /// `rank`, which is the caller, leaves. Only the first time counts.
    pub fn leave(&self, rank: u32, why: Option<Error>) {
        if self.is_here(rank) {
            *lock(&self.reasons[rank as usize]) = why;
            self.here[rank as usize].store(false, Ordering::SeqCst);
            self.ring_all();
        }
    }

    /// What `rank`, which waits for `peer`, reports when that is not here any more.
    pub fn lost(&self, rank: u32, peer: u32) -> Error {
        let reason = lock(&self.reasons[peer as usize]).clone();
        reason.unwrap_or_else(|| {
            Error::new(Status::PeerLost, format!("rank {rank}: rank {peer} left the group"))
        })
    }

    /// From any thread.
    pub fn abort(&self, rank: u32) {
        let _ = self.aborter.compare_exchange(NOBODY, rank, Ordering::SeqCst, Ordering::SeqCst);
        self.ring_all();
    }

    /// Fails once a rank has aborted.
    pub fn not_aborted(&self) -> Result<()> {
        match self.aborter.load(Ordering::SeqCst) {
            NOBODY => Ok(()),
            who => Err(streams::aborted_by(who)),
        }
    }
}

/// A panicking rank must not take the others along: what these locks guard is valid at every moment.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
