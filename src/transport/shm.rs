//! Ranks are processes of one host: a sender copies into a ring in shared memory, the receiver copies out of it.
//!
//! A stream is a head of 16 bytes (a mark and the length) and its bytes. The sender is done when all bytes are in the ring and the
//! receiver has accepted the head. A receiver that expects another length gives up, and its reason reaches the sender.
//! Allgathers have rings of their own.
//! A waiting rank spins a little, unless there are more ranks than cores, then sleeps on a futex of its own in the segment, for a few
//! milliseconds at a time. When nothing moves it asks every 20 ms whether the ranks it waits for still live (`segment`).

use super::segment::{self, Lane, Segment};
use super::streams::{self, Streams};
use super::{Message, Transport};
use crate::error::{Error, Result, Status};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest sleep of one `wait`.
const NAP: Duration = Duration::from_millis(4);
const ASK_AFTER: Duration = Duration::from_millis(20);
/// Rounds of `test` before a sleep, if every rank can have a core.
const SPINS: u32 = 200;

const DATA_MARK: u64 = 0x6461_7461_6370_0001;
const HEAD: usize = 16;
const BLOB_HEAD: usize = 24;

struct Shm {
    segment: Arc<Segment>,
    sends: Streams,
    recvs: Streams,
    in_flight: bool,
    failed: Option<Error>,
    spins: u32,
    last_asked: Instant,
}

/// Makes a segment for a group of `size` ranks. Every rank attaches to a descriptor of it.
pub fn create(size: u32) -> Result<OwnedFd> {
    segment::create(size)
}

/// Takes the place of `rank` in a segment. A rank that waits for one that has not attached yet is not told when that one dies: after
/// attaching, all ranks meet once over another channel.
pub fn attach(fd: OwnedFd, rank: u32, size: u32) -> Result<Box<dyn Transport>> {
    if rank >= size {
        return Err(Error::argument(format!(
            "rank is {rank}; allowed is 0..{size}, the size of the group"
        )));
    }
    let segment = Arc::new(Segment::attach(fd, rank, size)?);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    Ok(Box::new(Shm {
        segment,
        sends: Streams::default(),
        recvs: Streams::default(),
        in_flight: false,
        failed: None,
        spins: if size as usize <= cores { SPINS } else { 0 },
        last_asked: Instant::now(),
    }))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
}

impl Shm {
    fn me(&self) -> u32 {
        self.segment.rank()
    }

    fn usable(&self) -> Result<()> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        self.segment.aborter().map_or(Ok(()), |who| Err(streams::aborted_by(who)))
    }

    /// Remembers the error and gives up what is in flight. No peer touches this rank's pieces, so there is nothing to wait for.
    fn fail<T>(&mut self, e: Error) -> Result<T> {
        self.leave(&e);
        self.failed.get_or_insert(e.clone());
        Err(e)
    }

    fn leave(&mut self, why: &Error) {
        self.sends.clear();
        self.recvs.clear();
        self.in_flight = false;
        self.segment.leave(Some(why));
    }

    /// Moves what can be moved: (complete, something moved). A peer's presence is read before its ring: what it finished before it
    /// left still counts.
    fn progress(&mut self) -> Result<(bool, bool)> {
        let me = self.me();
        let segment = &*self.segment;
        let (mut gone, mut moved) = (None, false);
        for s in self.recvs.iter_mut().filter(|s| !s.done) {
            let here = segment.is_here(s.peer);
            let ring = segment.ring(Lane::Data, s.peer, me);
            let mut heard = 0;
            if s.begun.is_none()
                && let Some(head) = ring.peek::<HEAD>()?
            {
                let (mark, bytes) = (word(&head, 0), word(&head, 8));
                if mark != DATA_MARK {
                    return Err(damaged(s.peer, me));
                }
                if bytes != s.bytes as u64 {
                    return Err(streams::lengths_differ(s.peer, bytes as usize, me, s.bytes));
                }
                s.begun = Some(ring.consume(HEAD));
                heard = HEAD;
            }
            if s.begun.is_some() {
                // SAFETY: the caller of `start` keeps the pieces valid while in flight.
                heard += unsafe { ring.drain_into(s)? };
                s.done = s.moved == s.bytes;
            }
            if heard > 0 {
                moved = true;
                segment.wake(s.peer);
            }
            if !s.done && !here {
                gone = gone.or(Some(s.peer));
            }
        }
        for s in self.sends.iter_mut().filter(|s| !s.done) {
            let here = segment.is_here(s.peer);
            let ring = segment.ring(Lane::Data, me, s.peer);
            let mut told = 0;
            if s.begun.is_none() && ring.writable()? >= HEAD {
                let mut head = [0; HEAD];
                head[..8].copy_from_slice(&DATA_MARK.to_le_bytes());
                head[8..].copy_from_slice(&(s.bytes as u64).to_le_bytes());
                // SAFETY: a live array, and there is room.
                unsafe { ring.put(0, head.as_ptr(), HEAD) };
                s.begun = Some(ring.publish(HEAD));
                told = HEAD;
            }
            if let Some(end) = s.begun {
                // SAFETY: the caller of `start` keeps the pieces valid while in flight.
                told += unsafe { ring.fill_from(s)? };
                s.done = s.moved == s.bytes && ring.is_read_to(end);
            }
            if told > 0 {
                segment.wake(s.peer);
            }
            moved |= told > 0 || s.done;
            if !s.done && !here {
                gone = gone.or(Some(s.peer));
            }
        }
        match gone {
            Some(peer) => Err(segment.lost(peer)),
            None => Ok((self.recvs.all_done() && self.sends.all_done(), moved)),
        }
    }

    fn step(&mut self) -> Result<(bool, bool)> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if !self.in_flight {
            return Ok((true, false));
        }
        let stepped = self.progress();
        match stepped {
            Ok((done, moved)) => {
                self.in_flight = !done;
                if moved {
                    self.last_asked = Instant::now();
                } else if !done && self.last_asked.elapsed() > ASK_AFTER {
                    self.last_asked = Instant::now();
                    for s in self.recvs.iter().chain(self.sends.iter()).filter(|s| !s.done) {
                        self.segment.check_alive(s.peer);
                    }
                }
                Ok((done, moved))
            }
            Err(e) => self.fail(e),
        }
    }

    fn gather(&mut self, members: &[u32], mine: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        let me = self.me();
        let hash = streams::members_hash(members);
        let mut message = Vec::with_capacity(BLOB_HEAD + mine.len());
        for word in [!DATA_MARK, mine.len() as u64, hash] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(mine);
        let mut sent: Vec<bool> = members.iter().map(|&m| m == me).collect();
        let mut got: Vec<Option<Vec<u8>>> =
            members.iter().map(|&m| (m == me).then(|| mine.to_vec())).collect();
        loop {
            let seen = self.segment.drowsy();
            let moved = match self.exchange_blobs(members, hash, &message, &mut sent, &mut got) {
                Ok(moved) => moved,
                Err(e) => return self.fail(e),
            };
            let Some(i) = got.iter().zip(&sent).position(|(g, s)| g.is_none() || !s) else { break };
            if let Err(e) = self.usable() {
                return self.fail(e);
            }
            let now = Instant::now();
            if now >= deadline {
                return self.fail(streams::not_come(me, members[i], "an allgather"));
            }
            if moved {
                self.last_asked = now;
                continue;
            }
            if self.last_asked.elapsed() > ASK_AFTER {
                self.last_asked = now;
                for (&m, _) in members.iter().zip(&got).filter(|(_, g)| g.is_none()) {
                    self.segment.check_alive(m);
                }
            }
            self.segment.sleep(seen, NAP.min(deadline - now));
        }
        self.segment.awake();
        let mut all = Vec::with_capacity(members.len() * mine.len());
        for (&from, blob) in members.iter().zip(&got) {
            let bytes = blob.as_deref().unwrap_or(mine);
            if bytes.len() != mine.len() {
                return Err(streams::blobs_differ(me, mine.len(), from, bytes.len()));
            }
            all.extend_from_slice(bytes);
        }
        Ok(all)
    }

    /// Sends and collects the contributions that are missing; whether anything moved.
    fn exchange_blobs(
        &self,
        members: &[u32],
        hash: u64,
        message: &[u8],
        sent: &mut [bool],
        got: &mut [Option<Vec<u8>>],
    ) -> Result<bool> {
        let (me, segment) = (self.me(), &*self.segment);
        let (mut gone, mut moved) = (None, false);
        for (i, &peer) in members.iter().enumerate() {
            let here = segment.is_here(peer);
            let ring = segment.ring(Lane::Control, me, peer);
            if !sent[i] && ring.writable()? >= message.len() {
                // SAFETY: a live vector, and there is room.
                unsafe { ring.put(0, message.as_ptr(), message.len()) };
                ring.publish(message.len());
                segment.wake(peer);
                (sent[i], moved) = (true, true);
            }
            let ring = segment.ring(Lane::Control, peer, me);
            if got[i].is_none()
                && let Some(head) = ring.peek::<BLOB_HEAD>()?
            {
                let (mark, len) = (word(&head, 0), word(&head, 8));
                if mark != !DATA_MARK || len > streams::MAX_BLOB as u64 {
                    return Err(damaged(peer, me));
                }
                if word(&head, 16) != hash {
                    return Err(streams::members_differ(me, peer, members));
                }
                got[i] = ring.take::<BLOB_HEAD>(len as usize)?;
                moved |= got[i].is_some();
            }
            if (got[i].is_none() || !sent[i]) && !here {
                gone = gone.or(Some(peer));
            }
        }
        gone.map_or(Ok(moved), |peer| Err(segment.lost(peer)))
    }
}

fn damaged(from: u32, to: u32) -> Error {
    Error::new(
        Status::Transport,
        format!("what rank {from} wrote for rank {to} into shared memory is damaged"),
    )
}

impl Transport for Shm {
    fn rank(&self) -> u32 {
        self.me()
    }

    fn size(&self) -> u32 {
        self.segment.size()
    }

    fn name(&self) -> &'static str {
        "shm"
    }

    unsafe fn start(&mut self, sends: &[Message], recvs: &[Message]) -> Result<()> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if self.in_flight {
            return Err(streams::in_flight(self.me(), "start"));
        }
        streams::check_peers(self.me(), self.size(), sends, recvs)?;
        self.sends.fill(sends);
        self.recvs.fill(recvs);
        self.in_flight = true;
        self.last_asked = Instant::now();
        Ok(())
    }

    fn test(&mut self) -> Result<bool> {
        Ok(self.step()?.0)
    }

    fn wait(&mut self) -> Result<bool> {
        for _ in 0..=self.spins {
            let (done, moved) = self.step()?;
            if done || moved {
                return Ok(done);
            }
            std::hint::spin_loop();
        }
        let seen = self.segment.drowsy();
        let stepped = self.step();
        if !matches!(stepped, Ok((false, false))) {
            self.segment.awake();
            return Ok(stepped?.0);
        }
        self.segment.sleep(seen, NAP);
        Ok(self.step()?.0)
    }

    fn waiting_for(&self) -> Option<u32> {
        self.recvs.iter().chain(self.sends.iter()).find(|s| !s.done).map(|s| s.peer)
    }

    fn give_up(&mut self, why: Error) {
        let _ = self.fail::<()>(why);
    }

    fn cancel(&mut self) {
        self.leave(&streams::cancelled(Status::PeerLost, self.me()));
        self.failed.get_or_insert(streams::cancelled(Status::Aborted, self.segment.rank()));
    }

    fn allgather(&mut self, members: &[u32], mine: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if self.in_flight {
            return Err(streams::in_flight(self.me(), "allgather"));
        }
        streams::check_members(self.me(), self.size(), members, mine)?;
        self.gather(members, mine, deadline)
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        let segment = Arc::clone(&self.segment);
        Arc::new(move || segment.abort())
    }

    fn memory_bytes(&self) -> usize {
        self.segment.memory_bytes() + self.sends.memory_bytes() + self.recvs.memory_bytes()
    }
}

impl Drop for Shm {
    /// An aborter may keep the segment alive.
    fn drop(&mut self) {
        self.segment.leave(None);
    }
}
