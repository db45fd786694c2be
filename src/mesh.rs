//! Megatron's rank grid: which ranks work together along an axis (tp, cp, ep, dp, pp) or several. Pure functions of sizes and an order.
//!
//! ```text
//! tp=2 cp=2 dp=2 pp=2, order tp-cp-ep-dp-pp: the leftmost axis has stride 1
//! rank = tp + 2·cp + 4·dp + 8·pp      cp [0,2][1,3][4,6] …      dp-cp [0,2,4,6][1,3,5,7] …
//! ```
//! A group's members come in the grid's order, which is ascending; groups come by their first member. Both are Megatron's
//! (`RankGenerator.get_ranks`), and so is the rule that a mesh has either cp > 1 or ep > 1: experts have a mesh of their own over the
//! same ranks, with cp = 1, which [`Mesh::expert`] makes.

use crate::error::{Error, Result};

/// The most ranks that a mesh may have.
pub const MOST_RANKS: u32 = 1 << 20;
/// Megatron's default order, leftmost axis fastest. With `--use-tp-pp-dp-mapping` it is `tp-cp-ep-pp-dp`.
pub const DEFAULT_ORDER: &str = "tp-cp-ep-dp-pp";

/// A way to split the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Tensor parallel: a layer's weights.
    Tp,
    /// Context parallel: the sequence.
    Cp,
    /// Expert parallel: the experts of a mixture.
    Ep,
    /// Data parallel: the batch.
    Dp,
    /// Pipeline parallel: the layers.
    Pp,
}

impl Axis {
    /// All axes.
    pub const ALL: [Axis; 5] = [Axis::Tp, Axis::Cp, Axis::Ep, Axis::Dp, Axis::Pp];

    /// Name in orders and combinations.
    pub fn name(self) -> &'static str {
        ["tp", "cp", "ep", "dp", "pp"][self as usize]
    }

    fn parse(name: &str) -> Option<Axis> {
        Axis::ALL.into_iter().find(|a| a.name() == name)
    }
}

/// One axis or several, in any order: `cp`, `tp-dp-cp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axes(u8);

impl Axes {
    /// Reads axis names joined by `-`.
    pub fn parse(text: &str) -> Result<Axes> {
        let list = names("axes", text)?;
        Ok(Axes(list.iter().fold(0, |set, a| set | 1 << *a as u8)))
    }

    /// Is this axis one of them?
    pub fn contains(self, axis: Axis) -> bool {
        self.0 >> axis as u8 & 1 == 1
    }
}

impl From<Axis> for Axes {
    fn from(axis: Axis) -> Axes {
        Axes(1 << axis as u8)
    }
}

/// Axis names joined by `-`, every one known and named once. Capitals are read too, as Megatron does.
fn names(argument: &str, text: &str) -> Result<Vec<Axis>> {
    let mut list = Vec::new();
    for word in text.split('-') {
        let Some(axis) = Axis::parse(&word.to_ascii_lowercase()) else {
            return Err(Error::argument(format!(
                "{argument}: got {text:?}, in which {word:?} is no axis; axes are tp, cp, ep, dp, pp, joined by -"
            )));
        };
        if list.contains(&axis) {
            return Err(Error::argument(format!(
                "{argument}: got {text:?}, which names {} twice",
                axis.name()
            )));
        }
        list.push(axis);
    }
    Ok(list)
}

/// Number of ranks along every axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Tensor parallel.
    pub tp: u32,
    /// Context parallel.
    pub cp: u32,
    /// Expert parallel.
    pub ep: u32,
    /// Data parallel; 0: what the world leaves.
    pub dp: u32,
    /// Pipeline parallel.
    pub pp: u32,
}

impl Default for Sizes {
    fn default() -> Sizes {
        Sizes { tp: 1, cp: 1, ep: 1, dp: 1, pp: 1 }
    }
}

impl Sizes {
    fn get(&self, axis: Axis) -> u32 {
        [self.tp, self.cp, self.ep, self.dp, self.pp][axis as usize]
    }
}

/// Ranks in a grid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// All five axes, fastest first.
    order: Vec<Axis>,
    sizes: Sizes,
    first: u32,
    world: u32,
}

impl Mesh {
    /// The grid of ranks `first`, `first` + 1, … `world`: how many they are, where that is known; it must be the sizes' product, or give
    /// dp. Axes that the order leaves out must have size 1.
    pub fn new(order: &str, sizes: Sizes, world: Option<u32>, first: u32) -> Result<Mesh> {
        let bad = |text: String| Err(Error::argument(text));
        let mut list = names("order", order)?;
        let mut sizes = sizes;
        for axis in Axis::ALL {
            if sizes.get(axis) == 0 && axis != Axis::Dp {
                return bad(format!("{}: got size 0, must be at least 1", axis.name()));
            }
        }
        let others: u64 = [sizes.tp, sizes.cp, sizes.ep, sizes.pp]
            .into_iter()
            .fold(1, |n: u64, s| n.saturating_mul(u64::from(s)));
        if sizes.dp == 0 {
            let Some(world) = world.map(u64::from) else {
                return bad(
                    "dp: got size 0, which means what the world leaves; give the world's size"
                        .into(),
                );
            };
            if world == 0 || world % others != 0 {
                return bad(format!(
                    "world size: got {world}, which tp {} × cp {} × ep {} × pp {} = {others} does not divide",
                    sizes.tp, sizes.cp, sizes.ep, sizes.pp
                ));
            }
            sizes.dp = (world / others) as u32;
        }
        let product = others.saturating_mul(u64::from(sizes.dp));
        if world.is_some_and(|w| u64::from(w) != product) {
            return bad(format!(
                "world size: got {}, but tp {} × cp {} × ep {} × dp {} × pp {} = {product}",
                world.unwrap_or_default(),
                sizes.tp,
                sizes.cp,
                sizes.ep,
                sizes.dp,
                sizes.pp
            ));
        }
        if product.saturating_add(u64::from(first)) > u64::from(MOST_RANKS) {
            return bad(format!(
                "world size: got {product} ranks from rank {first} on, at most {MOST_RANKS} are allowed"
            ));
        }
        for axis in Axis::ALL {
            if !list.contains(&axis) {
                if sizes.get(axis) > 1 {
                    return bad(format!(
                        "order: got {order:?}, which does not name {}, whose size is {}",
                        axis.name(),
                        sizes.get(axis)
                    ));
                }
                list.push(axis);
            }
        }
        if sizes.ep > 1 && sizes.cp > 1 {
            return bad(format!(
                "ep: got {} with cp {}; a mesh has one or the other, experts have a mesh of their own over the same ranks, with cp = 1 (the expert mesh of this one)",
                sizes.ep, sizes.cp
            ));
        }
        Ok(Mesh { order: list, sizes, first, world: product as u32 })
    }

    /// The grid of the experts over the same ranks, in the same order: cp = 1, its own tp and ep, dp what they leave. Pipeline stages must
    /// be the same ranks in both.
    pub fn expert(&self, tp: u32, ep: u32) -> Result<Mesh> {
        let sizes = Sizes { tp, cp: 1, ep, dp: 0, pp: self.sizes.pp };
        let made = Mesh::new(&self.order_text(), sizes, Some(self.world), self.first)?;
        if made.groups(Axis::Pp.into()) != self.groups(Axis::Pp.into()) {
            return Err(Error::argument(format!(
                "order: {} places pp before dp, so that experts with dp {} would have other pipeline stages than the rest with dp {}; choose sizes with equal dp, or an order that ends in pp",
                self.order_text(),
                made.sizes.dp,
                self.sizes.dp
            )));
        }
        Ok(made)
    }

    /// Number of ranks.
    pub fn world(&self) -> u32 {
        self.world
    }

    /// The first rank's number.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// Sizes, dp filled in.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// All five axes, fastest first.
    pub fn order_text(&self) -> String {
        self.order.iter().map(|a| a.name()).collect::<Vec<_>>().join("-")
    }

    /// Number of ranks in a group.
    pub fn size(&self, axes: Axes) -> u32 {
        self.order.iter().filter(|a| axes.contains(**a)).map(|a| self.sizes.get(*a)).product()
    }

    /// Axes, fastest first, with size and stride.
    fn strides(&self) -> impl Iterator<Item = (Axis, u32, u32)> + '_ {
        self.order.iter().scan(1, |stride, axis| {
            let (size, here) = (self.sizes.get(*axis), *stride);
            *stride *= size;
            Some((*axis, size, here))
        })
    }

    /// The place of a rank in the grid, counted from 0.
    fn at(&self, rank: u32) -> Result<u32> {
        match rank.checked_sub(self.first) {
            Some(at) if at < self.world => Ok(at),
            _ => Err(Error::argument(format!(
                "rank: got {rank}, the mesh has ranks {} … {}",
                self.first,
                self.first + self.world - 1
            ))),
        }
    }

    /// The number of a rank within its group along `axes`: its index in [`Mesh::members`].
    pub fn rank_in(&self, axes: Axes, rank: u32) -> Result<u32> {
        let at = self.at(rank)?;
        let (mut index, mut unit) = (0, 1);
        for (axis, size, stride) in self.strides() {
            if axes.contains(axis) {
                index += at / stride % size * unit;
                unit *= size;
            }
        }
        Ok(index)
    }

    /// The group of a rank along `axes`: ranks that differ from it in those coordinates only, itself included.
    pub fn members(&self, axes: Axes, rank: u32) -> Result<Vec<u32>> {
        let at = self.at(rank)?;
        let mut made = vec![at];
        for (axis, size, stride) in self.strides() {
            if axes.contains(axis) {
                let back = at / stride % size * stride;
                made = (0..size)
                    .flat_map(|i| made.iter().map(move |m| m - back + i * stride))
                    .collect();
            }
        }
        made.iter_mut().for_each(|m| *m += self.first);
        Ok(made)
    }

    /// All groups along `axes`, by their first member. Together they are all ranks.
    pub fn groups(&self, axes: Axes) -> Vec<Vec<u32>> {
        let leads = |at: &u32| {
            self.strides()
                .all(|(a, size, stride)| !axes.contains(a) || (at / stride).is_multiple_of(size))
        };
        let of = |at: u32| self.members(axes, self.first + at).expect("a rank of the mesh");
        (0..self.world).filter(leads).map(of).collect()
    }
}

/// Groups of level `level` of a hierarchy over `ranks`: `sizes[0]` ranks that are neighbours in the list on level 0, on every further
/// level ranks as far apart as all levels below are large. Any number of levels; the sizes' product is the number of ranks.
pub fn level_groups(ranks: &[u32], sizes: &[u32], level: usize) -> Result<Vec<Vec<u32>>> {
    let (size, stride) = level_shape(ranks.len(), sizes, level)?;
    let group = |i: usize| (0..size).map(|j| ranks[i + j * stride]).collect();
    Ok((0..ranks.len()).filter(|i| i / stride % size == 0).map(group).collect())
}

/// The one of [`level_groups`] that `rank` is in.
pub fn level_members(ranks: &[u32], sizes: &[u32], level: usize, rank: u32) -> Result<Vec<u32>> {
    let (size, stride) = level_shape(ranks.len(), sizes, level)?;
    let i = position(ranks, rank)?;
    let first = i - i / stride % size * stride;
    Ok((0..size).map(|j| ranks[first + j * stride]).collect())
}

/// Size and stride of a level.
fn level_shape(ranks: usize, sizes: &[u32], level: usize) -> Result<(usize, usize)> {
    let product = sizes.iter().fold(1u64, |n, s| n.saturating_mul(u64::from(*s)));
    if product != ranks as u64 || product == 0 {
        return Err(Error::argument(format!(
            "levels: got sizes {sizes:?} with product {product}, the group has {ranks} ranks"
        )));
    }
    let Some(size) = sizes.get(level) else {
        return Err(Error::argument(format!(
            "level: got {level}, there are levels 0 … {}",
            sizes.len() as i64 - 1
        )));
    };
    Ok((*size as usize, sizes[..level].iter().product::<u32>() as usize))
}

fn position(ranks: &[u32], rank: u32) -> Result<usize> {
    ranks.iter().position(|r| *r == rank).ok_or_else(|| {
        Error::argument(format!("rank: got {rank}, which is not in the group {ranks:?}"))
    })
}

/// The group of `size` that `rank` is in when `ranks` are cut into groups of consecutive members: hybrid and dynamic context parallelism,
/// over a dp-cp group. Any size: 1 is the rank alone, all is the whole group.
///
/// Where the size does not divide, the ranks left over are in no group of it, and asking for theirs is an error. (Megatron makes sizes
/// that are powers of two only, and files a shorter last group under the full size: with 6 ranks and size 4 ranks 4 and 5 are a pair that
/// calls itself four.)
pub fn consecutive_members(ranks: &[u32], size: u32, rank: u32) -> Result<Vec<u32>> {
    let (n, i) = (ranks.len(), position(ranks, rank)?);
    if size == 0 || size as usize > n {
        return Err(Error::argument(format!("group size: got {size}, allowed 1 … {n}")));
    }
    let size = size as usize;
    let start = i / size * size;
    if start + size > n {
        return Err(Error::argument(format!(
            "group size: got {size}, of which {n} ranks make {} groups and leave over {:?}, rank {rank} among them",
            n / size,
            &ranks[start..]
        )));
    }
    Ok(ranks[start..start + size].to_vec())
}
