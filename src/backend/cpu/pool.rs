//! A few parked threads that run the same closure as the calling thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A closure of the caller's, called with the number of the thread (1 …) by every worker.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(usize) + Sync));

// SAFETY: the closure is Sync, and `Pool::run` keeps it alive until every worker is done with it.
unsafe impl Send for Job {}

struct State {
    /// Counts jobs, so that a worker runs each one once.
    epoch: u64,
    job: Option<Job>,
    /// Workers that have not finished the current job.
    running: usize,
    /// What a worker panicked with.
    panic: Option<Box<dyn Any + Send>>,
    quit: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    done: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Worker threads, parked while there is nothing to do.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool with this many threads beside the calling one; 0 starts none.
    pub fn new(workers: usize) -> std::io::Result<Pool> {
        let state = State { epoch: 0, job: None, running: 0, panic: None, quit: false };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
            done: Condvar::new(),
        });
        let mut pool = Pool { shared, workers: Vec::new() };
        for thread in 1..=workers {
            let shared = pool.shared.clone();
            let name = format!("cp-cpu-{thread}");
            // On failure the pool is dropped, and with it the threads that did start.
            let worker =
                std::thread::Builder::new().name(name).spawn(move || work(&shared, thread))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Calls `job` on every worker and `mine` on this thread: once while they work, and then again, now and then, until the last
    /// of them is done. A panic on any thread is raised here, after all are done.
    pub fn run(&self, job: &(dyn Fn(usize) + Sync), mine: &mut dyn FnMut()) {
        // SAFETY: only the lifetime changes, and this function does not return before every worker is done with the job.
        let job: *const (dyn Fn(usize) + Sync) = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(job)
        };
        {
            let mut state = self.shared.lock();
            state.job = Some(Job(job));
            state.epoch += 1;
            state.running = self.workers.len();
            self.shared.wake.notify_all();
        }
        let mut outcome = catch_unwind(AssertUnwindSafe(&mut *mine));
        loop {
            let state = self.shared.lock();
            if state.running == 0 {
                break;
            }
            let pause = Duration::from_micros(100);
            drop(
                self.shared.done.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner),
            );
            if outcome.is_ok() {
                outcome = catch_unwind(AssertUnwindSafe(&mut *mine));
            }
        }
        let mut state = self.shared.lock();
        state.job = None;
        let worker_panic = state.panic.take();
        drop(state);
        if let Some(panic) = worker_panic.or(outcome.err()) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its jobs, so there is nothing to report.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        let job = {
            let mut state = shared.lock();
            while !state.quit && (state.epoch == seen || state.job.is_none()) {
                state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.quit {
                return;
            }
            seen = state.epoch;
            state.job
        };
        let Some(Job(job)) = job else { continue };
        // SAFETY: `Pool::run` keeps the closure alive until `running` is 0, and this thread still counts.
        let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*job)(thread) }));
        let mut state = shared.lock();
        if let Err(panic) = outcome {
            state.panic = Some(panic);
        }
        state.running -= 1;
        shared.done.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_thread_runs_every_job_once() {
        for workers in 0..4 {
            let pool = Pool::new(workers).unwrap();
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> = (0..=workers).map(|_| AtomicUsize::new(0)).collect();
                let job = |thread: usize| {
                    counts[thread].fetch_add(1, Ordering::Relaxed);
                };
                pool.run(&job, &mut || ());
                assert!(counts[1..].iter().all(|c| c.load(Ordering::Relaxed) == 1), "{counts:?}");
            }
        }
    }

    #[test]
    fn a_panic_is_raised_on_the_calling_thread_and_the_pool_survives_it() {
        let pool = Pool::new(2).unwrap();
        let fails = |thread: usize| assert!(thread != 2, "on purpose");
        let run = || pool.run(&fails, &mut || ());
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        let mine = || pool.run(&|_| (), &mut || panic!("on purpose"));
        assert!(catch_unwind(AssertUnwindSafe(mine)).is_err());
        pool.run(&|_| (), &mut || ());
    }
}
