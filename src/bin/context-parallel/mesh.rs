//! `info --mesh`: who works with whom in Megatron's rank grid, as a table.

use crate::args::{Failure, Given, usage};
use crate::json::{Object, array};
use crate::text::{self, bold, dim};
use context_parallel::mesh::{self, Axes, Axis, DEFAULT_ORDER, Mesh, Sizes};

/// Combinations beside the single axes, and what frameworks use them for.
const TOGETHER: [(&str, &str); 5] = [
    ("tp-cp", "the same samples and layers"),
    ("dp-cp", "gradients and loss are reduced; hybrid context parallelism"),
    ("tp-dp", "FP8 amax"),
    ("tp-dp-cp", "FP8 amax with context parallelism"),
    ("tp-pp", "one copy of the model"),
];

/// Columns that a row's groups may fill before the rest is only counted.
const WIDTH: usize = 96;
/// Members that are written out per group.
const SHOWN_MEMBERS: usize = 16;

/// A line of the table.
struct Row {
    name: String,
    what: String,
    groups: Vec<Vec<u32>>,
}

/// A mesh and its rows.
struct Table {
    name: &'static str,
    mesh: Mesh,
    rows: Vec<Row>,
}

/// Are there options of this table?
pub fn asked(given: &Given) -> bool {
    ["mesh", "order", "levels", "experts"].iter().any(|o| given.flag(o))
}

pub fn run(given: &Given) -> Result<(), Failure> {
    let Some(sizes) = given.text("mesh") else {
        return Err(usage("--order, --levels and --experts belong to --mesh"));
    };
    let order = given.text("order").unwrap_or(DEFAULT_ORDER);
    let (sizes, world) = read_sizes("mesh", sizes)?;
    let wrong = |e: context_parallel::error::Error| usage(format!("--mesh: {}", e.text));
    let mesh = Mesh::new(order, sizes, world, 0).map_err(wrong)?;
    let axes = [Axis::Tp, Axis::Cp, Axis::Ep, Axis::Dp, Axis::Pp];
    let rows = rows_of(&mesh, &axes, &TOGETHER);
    let mut tables = vec![Table { name: "", mesh, rows }];
    if let Some(sizes) = given.list("levels")? {
        for level in 0..sizes.len().max(1) {
            let of = |cp: &Vec<u32>| mesh::level_groups(cp, &sizes, level);
            let groups: Result<Vec<_>, _> =
                tables[0].mesh.groups(Axis::Cp.into()).iter().map(of).collect();
            let groups = groups.map_err(|e| usage(format!("--levels: {}", e.text)))?.concat();
            let what = match (level, sizes.len()) {
                (0, 2) => "inner: a2a",
                (1, 2) => "outer: p2p",
                _ => "",
            };
            let name = format!("cp L{level}");
            tables[0].rows.push(Row { name, what: what.into(), groups });
        }
    }
    if let Some(sizes) = given.text("experts") {
        let (sizes, _) = read_sizes("experts", sizes)?;
        if sizes.cp * sizes.pp != 1 || sizes.dp != 0 {
            return Err(usage("--experts: allowed are ep and tp; the rest follows from the mesh"));
        }
        let made = tables[0].mesh.expert(sizes.tp, sizes.ep);
        let expert = made.map_err(|e| usage(format!("--experts: {}", e.text)))?;
        let axes = [Axis::Tp, Axis::Ep, Axis::Dp];
        let rows = rows_of(&expert, &axes, &[("tp-ep", ""), ("tp-ep-pp", "")]);
        tables.push(Table { name: "experts", mesh: expert, rows });
    }
    text::out(&if given.flag("json") { json(&tables) } else { people(&tables) });
    Ok(())
}

/// Reads `tp=2,cp=4`. Without dp it is what `world` leaves, or 1.
fn read_sizes(option: &str, text: &str) -> Result<(Sizes, Option<u32>), Failure> {
    let mut sizes = Sizes { dp: 0, ..Sizes::default() };
    let (mut world, mut seen) = (None, Vec::new());
    for word in text.split(',') {
        let (name, size) = word.split_once('=').unwrap_or((word, ""));
        let size = crate::args::number(size).and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
        let (Some(size), false) = (size, seen.contains(&name)) else {
            return Err(usage(format!(
                "--{option}: got {word:?} in {text:?}, want each of tp, cp, ep, dp, pp, world once, as in tp=2,cp=4"
            )));
        };
        seen.push(name);
        match name {
            "tp" => sizes.tp = size,
            "cp" => sizes.cp = size,
            "ep" => sizes.ep = size,
            "dp" => sizes.dp = size,
            "pp" => sizes.pp = size,
            "world" => world = Some(size),
            _ => {
                return Err(usage(format!(
                    "--{option}: got {name:?}, allowed tp, cp, ep, dp, pp, world"
                )));
            }
        }
    }
    if option == "mesh" && sizes.dp == 0 && world.is_none() {
        sizes.dp = 1;
    }
    Ok((sizes, world))
}

/// Rows of axes and of combinations.
fn rows_of(mesh: &Mesh, axes: &[Axis], together: &[(&str, &str)]) -> Vec<Row> {
    let one = |name: &str, what: &str| {
        let groups = mesh.groups(Axes::parse(name).expect("a known combination"));
        Row { name: name.into(), what: what.into(), groups }
    };
    let mut made: Vec<Row> = axes.iter().map(|a| one(a.name(), "")).collect();
    made.extend(together.iter().map(|(name, what)| one(name, what)));
    made
}

/// A group, shortened: `[0,2,4,6]`, `[0,1,2, … 63]`.
fn group(members: &[u32]) -> String {
    let list = |part: &[u32]| part.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    match members {
        [a, b, c, .., last] if members.len() > SHOWN_MEMBERS => format!("[{a},{b},{c} … {last}]"),
        _ => format!("[{}]", list(members)),
    }
}

fn people(tables: &[Table]) -> String {
    let mut out = String::new();
    for Table { name, mesh, rows } in tables {
        let s = mesh.sizes();
        let sizes = [("tp", s.tp), ("cp", s.cp), ("ep", s.ep), ("dp", s.dp), ("pp", s.pp)];
        let sizes: Vec<String> =
            sizes.iter().filter(|(_, n)| *n > 1).map(|(a, n)| format!("{a} {n}")).collect();
        let title = match (*name, mesh.world()) {
            ("", 1) => "1 rank".into(),
            ("", n) => format!("{n} ranks"),
            (name, _) => name.to_string(),
        };
        out += &format!(
            "{}  {} · order {}, leftmost fastest\n\n",
            bold(&title),
            if sizes.is_empty() { "all sizes 1".into() } else { sizes.join(" × ") },
            mesh.order_text()
        );
        let together = |row: &&Row| row.groups[0].len() > 1;
        let width = rows.iter().map(|r| r.name.len()).max().unwrap_or(0);
        out += &dim(&format!("{:<width$}  size  groups\n", "axes"));
        for row in rows.iter().filter(together) {
            let mut line = String::new();
            for (i, members) in row.groups.iter().enumerate() {
                let next = group(members);
                if i > 0 && line.chars().count() + next.chars().count() > WIDTH {
                    line += &format!(" … {} more", row.groups.len() - i);
                    break;
                }
                line += &next;
            }
            let name = bold(&format!("{:<width$}", row.name));
            let what =
                if row.what.is_empty() { "".into() } else { dim(&format!("   {}", row.what)) };
            out += &format!("{name}  {:>4}  {line}{what}\n", row.groups[0].len());
        }
        out += "\n";
    }
    out.pop();
    out
}

fn json(tables: &[Table]) -> String {
    let table = |Table { name, mesh, rows }: &Table| {
        let s = mesh.sizes();
        let groups = rows.iter().fold(Object::default(), |o, row| {
            o.raw(&row.name, array(row.groups.iter().map(|g| array(g.iter()))))
        });
        Object::default()
            .text("of", if name.is_empty() { "all" } else { name })
            .raw("world", mesh.world())
            .text("order", &mesh.order_text())
            .raw("tp", s.tp)
            .raw("cp", s.cp)
            .raw("ep", s.ep)
            .raw("dp", s.dp)
            .raw("pp", s.pp)
            .raw("groups", groups.end())
            .end()
    };
    array(tables.iter().map(table)) + "\n"
}
