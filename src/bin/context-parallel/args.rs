//! The command line: one table of options per command, from which it is parsed, helped and corrected.

use lexopt::prelude::*;
use std::collections::BTreeMap;
use std::ffi::OsString;

/// Why the tool stops early.
pub enum Failure {
    /// Help was asked for.
    Help(String),
    /// The command line is wrong: exit status 2.
    Usage(String),
    /// The work failed: exit status 1.
    Failed(String),
}

impl From<context_parallel::error::Error> for Failure {
    fn from(e: context_parallel::error::Error) -> Failure {
        Failure::Failed(e.to_string())
    }
}

/// A usage error.
pub fn usage(text: impl Into<String>) -> Failure {
    Failure::Usage(text.into())
}

/// A failure of the work itself.
pub fn failed(text: impl Into<String>) -> Failure {
    Failure::Failed(text.into())
}

/// An option: `--name VALUE`, or a flag when `value` is empty.
pub struct Opt {
    pub name: &'static str,
    pub value: &'static str,
    pub help: &'static str,
}

/// Shorthand for the tables.
pub const fn opt(name: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { name, value, help }
}

/// A command and everything that may follow it.
pub struct Command {
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Groups of options with their headings.
    pub options: &'static [(&'static str, &'static [Opt])],
    /// Command lines and what they show.
    pub examples: &'static [(&'static str, &'static str)],
    /// Last lines of the help.
    pub notes: &'static str,
}

/// What was given.
#[derive(Clone, Default)]
pub struct Given {
    values: BTreeMap<&'static str, String>,
    /// The words as they were given, to pass on.
    pub words: Vec<OsString>,
}

impl Command {
    fn all(&self) -> impl Iterator<Item = &'static Opt> {
        self.options.iter().flat_map(|(_, list)| list.iter())
    }

    /// Reads the rest of the command line.
    pub fn read(&self, parser: &mut lexopt::Parser) -> Result<Given, Failure> {
        let mut given = Given::default();
        let wrong = |e: lexopt::Error| usage(format!("{}: {e}", self.name));
        while let Some(arg) = parser.next().map_err(wrong)? {
            let name = match arg {
                Long("help") | Short('h') => return Err(Failure::Help(self.help())),
                Long(name) => name.to_string(),
                Short(letter) => return Err(self.unknown(&format!("-{letter}"))),
                Value(word) => {
                    let text = format!(
                        "{}: unexpected word {word:?}; options start with -- (try context-parallel {} --help)",
                        self.name, self.name
                    );
                    return Err(usage(text));
                }
            };
            let Some(option) = self.all().find(|o| o.name == name) else {
                return Err(self.unknown(&format!("--{name}")));
            };
            given.words.push(format!("--{name}").into());
            let value = match option.value {
                "" => String::new(),
                meta => {
                    let value = parser.value().map_err(|_| {
                        usage(format!("{}: --{name} needs a value ({meta})", self.name))
                    })?;
                    given.words.push(value.clone());
                    value.into_string().map_err(|v| {
                        usage(format!("{}: --{name}: {v:?} is not UTF-8", self.name))
                    })?
                }
            };
            given.values.insert(option.name, value);
        }
        Ok(given)
    }

    fn unknown(&self, word: &str) -> Failure {
        let near = nearest(word.trim_start_matches('-'), self.all().map(|o| o.name));
        let hint = near.map_or(String::new(), |n| format!("; did you mean --{n}?"));
        let name = self.name;
        usage(format!("{name}: unknown option {word}{hint} (try context-parallel {name} --help)"))
    }

    /// The help text.
    pub fn help(&self) -> String {
        let mut out =
            format!("{}\n\nusage: context-parallel {} [OPTIONS]\n", self.about, self.name);
        let left = |o: &Opt| format!("--{} {}", o.name, o.value);
        let width = self.all().map(|o| left(o).trim_end().chars().count()).max().unwrap_or(0);
        for (heading, list) in self.options {
            out += &format!("\n{heading}:\n");
            for o in *list {
                let mut lines = o.help.lines();
                out +=
                    &format!("  {:<width$}  {}\n", left(o).trim_end(), lines.next().unwrap_or(""));
                for more in lines {
                    out += &format!("  {:<width$}  {more}\n", "");
                }
            }
        }
        out += "\nexamples:\n";
        for (line, what) in self.examples {
            out += &format!("  context-parallel {line}\n      {what}\n");
        }
        if !self.notes.is_empty() {
            out += &format!("\n{}\n", self.notes);
        }
        out
    }
}

impl Given {
    /// The text given for an option.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Was a flag given?
    pub fn flag(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// A whole number within limits; `k`, `m`, `g` multiply by 1024, 1024², 1024³.
    pub fn number(
        &self,
        name: &str,
        default: u64,
        allowed: std::ops::RangeInclusive<u64>,
    ) -> Result<u64, Failure> {
        let Some(text) = self.text(name) else { return Ok(default) };
        match number(text) {
            Some(n) if allowed.contains(&n) => Ok(n),
            _ => {
                let (least, most) = (allowed.start(), allowed.end());
                let upper =
                    if *most == u64::MAX { String::from("or more") } else { format!("to {most}") };
                Err(usage(format!(
                    "--{name}: got {text:?}, want a whole number, {least} {upper} (128k = 131072)"
                )))
            }
        }
    }

    /// As [`Given::number`], for 32 bits.
    pub fn small(
        &self,
        name: &str,
        default: u32,
        allowed: std::ops::RangeInclusive<u32>,
    ) -> Result<u32, Failure> {
        let allowed = u64::from(*allowed.start())..=u64::from(*allowed.end());
        self.number(name, u64::from(default), allowed).map(|n| n as u32)
    }

    /// A list of whole numbers, separated by commas.
    pub fn list(&self, name: &str) -> Result<Option<Vec<u32>>, Failure> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let one = |word: &str| number(word.trim()).and_then(|n| u32::try_from(n).ok());
        match text.split(',').map(one).collect() {
            Some(list) => Ok(Some(list)),
            None => Err(usage(format!(
                "--{name}: got {text:?}, want whole numbers separated by commas"
            ))),
        }
    }

    /// One of several words.
    pub fn word<T>(
        &self,
        name: &str,
        default: T,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, Failure> {
        let Some(text) = self.text(name) else { return Ok(default) };
        parse(text).ok_or_else(|| {
            let near = nearest(text, allowed.split([',', ' ']).filter(|w| !w.is_empty()));
            let hint = near.map_or(String::new(), |n| format!("; did you mean {n}?"));
            usage(format!("--{name}: got {text:?}, want one of {allowed}{hint}"))
        })
    }
}

/// A whole number with an optional binary suffix.
pub fn number(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let shift = match lower.chars().last()? {
        'k' => 10,
        'm' => 20,
        'g' => 30,
        _ => 0,
    };
    let digits = if shift > 0 { &lower[..lower.len() - 1] } else { &lower[..] };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The known name that was probably meant: at most a third of its letters wrong, or begun with.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |name: &str| {
        let starts = word.len() > 1 && (name.starts_with(word) || word.starts_with(name));
        if starts { 1 } else { edits(word, name) }
    };
    let best = known.map(|name| (distance(name), name)).min_by_key(|(d, _)| *d)?;
    (best.0 <= best.1.len().div_ceil(3)).then_some(best.1)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (corner + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_near_words() {
        assert_eq!(number("128k"), Some(131_072));
        assert_eq!(number("3G"), Some(3 << 30));
        assert_eq!(
            ["", "k", "-1", "1.5", "99999999999999999999", "17179869184g"].map(number),
            [None; 6]
        );
        let known = || ["cp", "comm", "heads", "kv-heads", "partition"].into_iter();
        assert_eq!(nearest("partitoin", known()), Some("partition"));
        assert_eq!(nearest("head", known()), Some("heads"));
        assert_eq!(nearest("zebra", known()), None);
        assert_eq!(edits("kitten", "sitting"), 3);
    }
}
