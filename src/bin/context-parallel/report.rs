//! What a rank reports of a case, as a struct and as bytes for a pipe.

use context_parallel::plan::Tensor;

/// The results, in the order of a report.
pub const RESULTS: [Tensor; 5] = [Tensor::Out, Tensor::Lse, Tensor::DQ, Tensor::DK, Tensor::DV];

/// One pass of one rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassReport {
    /// Of every timed run.
    pub seconds: Vec<f64>,
    /// Seconds of all timed runs together in which the rank stood waiting for others' rows.
    pub exposed: f64,
    /// Bytes of one run.
    pub sent: u64,
    pub received: u64,
}

/// One rank, one case.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Forward, backward.
    pub passes: [PassReport; 2],
    /// Local rows of [`RESULTS`] in storage type, the LSE in fp32.
    pub results: Vec<Vec<u8>>,
    /// Bytes of workspace, of kernels' scratch, of the transport.
    pub memory: [u64; 3],
}

impl Report {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut word = |n: u64| out.extend_from_slice(&n.to_le_bytes());
        for pass in &self.passes {
            word(pass.seconds.len() as u64);
            pass.seconds.iter().for_each(|s| word(s.to_bits()));
            [pass.exposed.to_bits(), pass.sent, pass.received].into_iter().for_each(&mut word);
        }
        self.memory.into_iter().for_each(&mut word);
        word(self.results.len() as u64);
        for r in &self.results {
            out.extend_from_slice(&(r.len() as u64).to_le_bytes());
            out.extend_from_slice(r);
        }
        out
    }

    /// The inverse; `None` if the bytes are damaged.
    pub fn decode(bytes: &[u8]) -> Option<Report> {
        let mut left = bytes;
        let mut report = Report::default();
        for pass in &mut report.passes {
            let runs = word(&mut left)?;
            for _ in 0..runs {
                pass.seconds.push(f64::from_bits(word(&mut left)?));
            }
            pass.exposed = f64::from_bits(word(&mut left)?);
            (pass.sent, pass.received) = (word(&mut left)?, word(&mut left)?);
        }
        for n in &mut report.memory {
            *n = word(&mut left)?;
        }
        for _ in 0..word(&mut left)? {
            let len = word(&mut left)? as usize;
            let (one, rest) = left.split_at_checked(len)?;
            report.results.push(one.to_vec());
            left = rest;
        }
        left.is_empty().then_some(report)
    }
}

fn word(left: &mut &[u8]) -> Option<u64> {
    let (head, rest) = left.split_first_chunk::<8>()?;
    *left = rest;
    Some(u64::from_le_bytes(*head))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_damage_is_seen() {
        let pass = PassReport { seconds: vec![0.5, 2.0], exposed: 0.25, sent: 3, received: 4 };
        let report = Report {
            passes: [pass, PassReport::default()],
            results: vec![vec![1, 2], vec![]],
            memory: [5, 6, 7],
        };
        let bytes = report.encode();
        assert_eq!(Report::decode(&bytes), Some(report));
        assert_eq!(Report::decode(&bytes[..bytes.len() - 1]), None);
    }
}
