//! What is printed: colours where there is a terminal, aligned columns, numbers as people read them.

use std::io::{IsTerminal, Write};
use std::sync::OnceLock;

/// Writes to stdout; a reader that has gone away (`| head`) is no error.
pub fn out(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

/// May stdout be coloured? Only a terminal, and not with `NO_COLOR` (no-color.org).
pub fn coloured() -> bool {
    static COLOURED: OnceLock<bool> = OnceLock::new();
    *COLOURED.get_or_init(|| {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        std::io::stdout().is_terminal() && !refused && !dumb
    })
}

fn wrap(code: &str, text: &str) -> String {
    if coloured() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
}

/// Headings.
pub fn bold(text: &str) -> String {
    wrap("1", text)
}

/// What may be skipped.
pub fn dim(text: &str) -> String {
    wrap("2", text)
}

/// What is right.
pub fn good(text: &str) -> String {
    wrap("32", text)
}

/// What is wrong.
pub fn bad(text: &str) -> String {
    wrap("1;31", text)
}

/// The colour of a rank, the same everywhere; after eight ranks they repeat.
pub fn rank(rank: u32, text: &str) -> String {
    const COLOURS: [u32; 8] = [33, 208, 71, 170, 37, 178, 167, 99];
    wrap(&format!("38;5;{}", COLOURS[rank as usize % 8]), text)
}

/// Columns of the terminal, if there is one.
pub fn width() -> Option<usize> {
    // SAFETY: an all-zero winsize is valid.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: a live struct of the type that the request fills.
    let asked = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (asked == 0 && size.ws_col > 0).then_some(size.ws_col as usize)
}

/// `1,234,567`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

/// Bytes with three or four digits: `0`, `512 B`, `1.50 MiB`.
pub fn bytes(n: u64) -> String {
    if n < 1024 {
        return if n == 0 { "0".into() } else { format!("{n} B") };
    }
    let (mut x, mut unit) = (n as f64 / 1024.0, 0);
    while x >= 1000.0 && unit < 4 {
        (x, unit) = (x / 1024.0, unit + 1);
    }
    format!("{} {}", digits(x), ["KiB", "MiB", "GiB", "TiB", "PiB"][unit])
}

/// `1 rank`, `2 ranks`.
pub fn plural(n: u64, word: &str) -> String {
    format!("{n} {word}{}", if n == 1 { "" } else { "s" })
}

/// Large counts: `1.23 G`.
pub fn count(n: u64) -> String {
    if n < 10_000 {
        return n.to_string();
    }
    let (mut x, mut unit) = (n as f64 / 1000.0, 0);
    while x >= 1000.0 && unit < 5 {
        (x, unit) = (x / 1000.0, unit + 1);
    }
    format!("{} {}", digits(x), ["k", "M", "G", "T", "P", "E"][unit])
}

/// Seconds as `12.3 ms`, `1.23 s`.
pub fn seconds(s: f64) -> String {
    if s < 1e-3 {
        format!("{} µs", digits(s * 1e6))
    } else if s < 1.0 {
        format!("{} ms", digits(s * 1e3))
    } else {
        format!("{} s", digits(s))
    }
}

/// Three significant digits.
pub fn digits(x: f64) -> String {
    if x >= 100.0 || x == 0.0 {
        format!("{x:.0}")
    } else if x >= 10.0 {
        format!("{x:.1}")
    } else {
        format!("{x:.2}")
    }
}

/// An error: `0`, `1.2e-7`.
pub fn error(x: f64) -> String {
    if x == 0.0 { "0".into() } else { format!("{x:.1e}") }
}

/// Characters that are shown, colours not counted.
pub fn shown(text: &str) -> usize {
    let mut n = 0;
    let mut escape = false;
    for c in text.chars() {
        match c {
            '\x1b' => escape = true,
            'm' if escape => escape = false,
            _ if !escape => n += 1,
            _ => {}
        }
    }
    n
}

/// How a column is aligned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Columns of fixed width, for lines that are printed as they come. A cell that is wider moves the rest of its line.
pub struct Columns(Vec<(Align, usize)>);

impl Columns {
    /// Columns by heading, alignment and least width.
    pub fn new(columns: &[(&str, Align, usize)]) -> Columns {
        Columns(
            columns.iter().map(|(head, align, width)| (*align, shown(head).max(*width))).collect(),
        )
    }

    /// One line: two spaces before every column.
    pub fn line(&self, cells: &[impl AsRef<str>]) -> String {
        let mut out = String::new();
        for (cell, (align, width)) in cells.iter().zip(&self.0) {
            let cell = cell.as_ref();
            let pad = " ".repeat(width.saturating_sub(shown(cell)));
            match align {
                Align::Left => out += &format!("  {cell}{pad}"),
                Align::Right => out += &format!("  {pad}{cell}"),
            }
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
        out
    }
}

/// Rows of cells under each other, as wide as they need. All rows have as many cells as `align`.
pub fn columns(align: &[Align], rows: &[Vec<String>]) -> String {
    let width = |c: usize| rows.iter().map(|r| shown(&r[c])).max().unwrap_or(0);
    let columns = Columns(align.iter().enumerate().map(|(c, align)| (*align, width(c))).collect());
    rows.iter().map(|row| columns.line(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_people_read_them() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 512, 1536, 5 << 20].map(bytes), ["0", "512 B", "1.50 KiB", "5.00 MiB"]);
        assert_eq!(count(1_230_000_000), "1.23 G");
        assert_eq!([0.0000123, 0.0123, 1.5].map(seconds), ["12.3 µs", "12.3 ms", "1.50 s"]);
        assert_eq!(shown("\x1b[32mgreen\x1b[0m"), 5);
    }
}
