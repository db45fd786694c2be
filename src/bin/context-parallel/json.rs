//! JSON as text, one line.

use std::fmt::Display;

/// An object under construction.
#[derive(Default)]
pub struct Object(String);

impl Object {
    /// Adds a member whose value is JSON already: a number, an object, an array.
    pub fn raw(mut self, name: &str, value: impl Display) -> Object {
        if !self.0.is_empty() {
            self.0.push(',');
        }
        self.0 += &format!("{}:{value}", string(name));
        self
    }

    /// Adds a text.
    pub fn text(self, name: &str, value: &str) -> Object {
        self.raw(name, string(value))
    }

    /// Adds a text or null.
    pub fn maybe(self, name: &str, value: Option<&str>) -> Object {
        let value = value.map_or("null".into(), string);
        self.raw(name, value)
    }

    /// Adds a number; what is no number is null.
    pub fn float(self, name: &str, value: f64) -> Object {
        self.raw(name, float(value))
    }

    /// The text.
    pub fn end(self) -> String {
        format!("{{{}}}", self.0)
    }
}

/// A number as JSON allows it.
pub fn float(value: f64) -> String {
    if value.is_finite() { format!("{value}") } else { "null".into() }
}

/// An array of JSON values.
pub fn array(items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|i| i.to_string()).collect();
    format!("[{}]", items.join(","))
}

/// A text, quoted.
pub fn string(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out += "\\\"",
            '\\' => out += "\\\\",
            '\n' => out += "\\n",
            c if u32::from(c) < 0x20 => out += &format!("\\u{:04x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_and_nothing() {
        let made = Object::default()
            .text("a", "x\"\\\n\u{1}é")
            .float("b", f64::NAN)
            .maybe("c", None)
            .end();
        assert_eq!(made, "{\"a\":\"x\\\"\\\\\\n\\u0001é\",\"b\":null,\"c\":null}");
        assert_eq!(array([1, 2]), "[1,2]");
    }
}
