use crate::args::{Command, Failure, Given};
pub const COMMAND: Command =
    Command { name: "plan", about: "", options: &[], examples: &[], notes: "" };
pub fn run(_: &Given) -> Result<(), Failure> {
    Ok(())
}
