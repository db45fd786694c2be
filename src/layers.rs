//! One communication type per layer, from what a user writes: one name for all, one per layer, or a pattern to repeat.

use crate::error::{Error, Result};
use crate::problem::CommType;

/// The communication type of each of `layers` layers.
///
/// `names` is one name, as many as layers, or a shorter list whose length divides their number and which then repeats. (Megatron's users
/// expect the last; its code wants one name or one per layer.)
pub fn comm_types_per_layer(names: &[&str], layers: usize) -> Result<Vec<CommType>> {
    if layers == 0 {
        return Err(Error::argument("layers: got 0, must be at least 1"));
    }
    let mut types = Vec::with_capacity(names.len());
    for (i, name) in names.iter().enumerate() {
        let Some(comm) = CommType::parse(name) else {
            let at = if names.len() > 1 { format!("name {i} is ") } else { "got ".into() };
            return Err(Error::argument(format!(
                "communication types: {at}{name:?}, allowed p2p, all_gather (or allgather), a2a, a2a+p2p"
            )));
        };
        types.push(comm);
    }
    if types.is_empty() || !layers.is_multiple_of(types.len()) {
        return Err(Error::argument(format!(
            "communication types: got {} names for {layers} layers; allowed are one for all layers, one per layer, or a number that divides {layers}, to be repeated",
            types.len()
        )));
    }
    Ok(types.iter().copied().cycle().take(layers).collect())
}

/// The names in one text, separated by commas or white space.
pub fn names(text: &str) -> Vec<&str> {
    text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty()).collect()
}
