//! Pictures of plans, as SVG: [`attention_matrix`] shows who computes what and when it got the keys, [`lanes()`] how the steps of all ranks
//! fit into each other. Both are drawn from the steps of the plans, nothing else, in sizes that do not grow with the sequence.

mod lanes;
mod matrix;

pub use lanes::lanes;
pub use matrix::attention_matrix;

use super::{Pass, Plan};
use std::fmt::{Display, Write};

/// What elements are written into.
struct Canvas {
    body: String,
    width: f64,
    height: f64,
}

impl Canvas {
    fn new(width: f64) -> Canvas {
        Canvas { body: String::new(), width, height: 0.0 }
    }

    /// A rectangle; `style` is further attributes.
    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, style: impl Display) {
        let (x, y, width, height) = (px(x), px(y), px(width), px(height));
        let _ = writeln!(
            self.body,
            r#"<rect x="{x}" y="{y}" width="{width}" height="{height}" {style}/>"#
        );
    }

    /// Text that starts, is centred, or ends at x; `style` is further attributes.
    fn text(&mut self, x: f64, y: f64, style: impl Display, text: impl Display) {
        let text = text.to_string().replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(self.body, r#"<text x="{}" y="{}" {style}>{text}</text>"#, px(x), px(y));
    }

    fn path(&mut self, d: &str, style: impl Display) {
        if !d.is_empty() {
            let _ = writeln!(self.body, r#"<path d="{d}" {style}/>"#);
        }
    }

    fn finish(self) -> String {
        let (width, height) = (px(self.width), px(self.height));
        format!(
            concat!(
                r#"<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" "#,
                r#"font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12" fill="{ink}">"#,
                "\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
            ),
            w = width,
            h = height,
            ink = INK,
            body = self.body
        )
    }
}

const INK: &str = "#222222";
const FAINT: &str = "#777777";

/// A length with at most two decimals.
fn px(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// Colour of a rank in a stage: the rank's hue, paler with every stage. Hues and steps are even in OKLCH (Ottosson, 2020), so that none
/// stands out.
fn colour(rank: u32, ranks: u32, stage: u32, stages: u32) -> String {
    let turn = std::f64::consts::TAU * (f64::from(rank) / f64::from(ranks.max(3)) + 0.07);
    let pale = f64::from(stage) / f64::from(stages.max(1));
    oklch(0.56 + 0.32 * pale, 0.15 - 0.07 * pale, turn)
}

fn oklch(lightness: f64, chroma: f64, hue: f64) -> String {
    let (a, b) = (chroma * hue.cos(), chroma * hue.sin());
    let cube = |x: f64| x * x * x;
    let l = cube(lightness + 0.3963377774 * a + 0.2158037573 * b);
    let m = cube(lightness - 0.1055613458 * a - 0.0638541728 * b);
    let s = cube(lightness - 0.0894841775 * a - 1.2914855480 * b);
    let linear = [
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    ];
    let byte = |x: f64| {
        let x = x.clamp(0.0, 1.0);
        let gamma = if x <= 0.0031308 { 12.92 * x } else { 1.055 * x.powf(1.0 / 2.4) - 0.055 };
        (gamma * 255.0).round() as u8
    };
    let [r, g, b] = linear.map(byte);
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// A problem in a few words.
fn caption(plans: &[Plan]) -> String {
    let p = &*plans[0].problem;
    let mask = &p.mask;
    let mut out = match plans[0].pass {
        Pass::Forward => "forward".to_string(),
        Pass::Backward => "backward".to_string(),
        Pass::ToHeads => "sequence to heads".to_string(),
        Pass::ToSequence => "heads to sequence".to_string(),
    };
    let tokens: u64 = p.seqs.iter().map(|s| u64::from(s.q.padded)).sum();
    let _ = write!(out, " · {} rank{}", p.ranks, if p.ranks > 1 { "s" } else { "" });
    if p.inner > 1 {
        let _ = write!(out, " in {} teams of {}", p.teams(), p.inner);
    }
    let stages = plans[0].stages;
    if stages > 0 {
        let _ = write!(out, " · {stages} stage{}", if stages > 1 { "s" } else { "" });
    }
    if p.relay {
        out += " (relay)";
    }
    let _ = write!(out, " · {tokens} tokens");
    if p.seqs.len() > 1 {
        let kind = if p.packed { "documents" } else { "batch entries" };
        let _ = write!(out, " in {} {kind}", p.seqs.len());
    }
    out += match p.partition {
        crate::partition::Partition::Zigzag => " · zigzag",
        crate::partition::Partition::Contiguous => " · contiguous",
        crate::partition::Partition::Striped => " · striped",
        crate::partition::Partition::Balanced => " · balanced",
        crate::partition::Partition::List { .. } => " · own partition",
    };
    out += if mask.causal { " · causal" } else { " · not causal" };
    if mask.bottom_right {
        out += ", bottom right";
    }
    if mask.left.is_some() || (mask.right.is_some() && !mask.causal) {
        let side = |w: Option<u32>| w.map_or("∞".to_string(), |w| w.to_string());
        let right = if mask.causal { "0".to_string() } else { side(mask.right) };
        let _ = write!(out, ", window {} | {right}", side(mask.left));
    }
    match p.regions.list().len() {
        0 => {}
        1 => out += ", 1 slice",
        n => {
            let _ = write!(out, ", {n} slices");
        }
    }
    out
}
