use crate::args::{Command, Failure, Given, failed};
use crate::rank::Job;
pub const COMMAND: Command =
    Command { name: "perf", about: "", options: &[], examples: &[], notes: "" };
pub fn run(_: &Given) -> Result<(), Failure> {
    Ok(())
}
pub fn job(_: &Given) -> Result<Job, Failure> {
    Err(failed(""))
}
