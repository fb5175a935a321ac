//! A convolution of 3 x 3 at stride 1 by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016): 16 products for four results a
//! channel, where the convolution itself takes 36.
//!
//! A tile of 4 x 4 inputs d becomes B^T d B, is multiplied with G g G^T of the kernel g, summed over the channels, and turned into
//! 2 x 2 results y by A^T m A. In f32 the result is as exact as the plain sum: the transforms only add, and halve.
//!
//! Each of the 16 places of a tile is a product of its own, [tiles, in] times [in, out]. Parts: blocks of tiles, whose
//! transforms stay in the second-level cache; the 16 places where there are few tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Window;
use super::super::arithmetic::{Arithmetic, Rows};
use super::super::matrix::Write;
use super::super::panels::Panels;
use super::super::patches::Geometry;
use super::super::single::Single;
use super::{Behind, CHANNELS_PER_RUN};
use crate::widest::widest;

/// Places of a tile: 4 x 4.
const PLACES: usize = 16;
/// Tiles below which the products have too few rows to pay for the larger weight.
const FEWEST_TILES: usize = 16;
/// f32 that the transforms of a block of tiles may take: half a second-level cache of 1 MiB.
const BLOCK_ELEMENTS: usize = 128 * 1024;
/// Tiles of a block, at least: fewer rows would read the weights more often than they multiply.
const FEWEST_BLOCK_TILES: usize = 24;
/// Blocks below which a block's own work is shared out instead.
const FEWEST_BLOCKS: usize = 4;

/// The transformed weight, times the scale of each output channel: a right operand [in, out] for each place.
pub(super) struct Winograd([Panels<Single>; PLACES]);

impl Winograd {
    pub(super) fn pays(geometry: &Geometry) -> bool {
        let tiles = geometry.batch * geometry.out_height.div_ceil(2) * geometry.out_width.div_ceil(2);
        geometry.window == Window { kernel: 3, stride: 1, padding: 1 } && tiles >= FEWEST_TILES
    }

    /// `weight` [out, in, 3, 3], `scale` [out].
    pub(super) fn new(geometry: &Geometry, weight: &[f32], scale: &[f32]) -> Self {
        let (channels, out) = (geometry.channels, geometry.out_channels);
        let runs = channels.div_ceil(CHANNELS_PER_RUN);
        let place = |place: usize| {
            Panels::filled((channels, out), runs, |run, out, put| {
                let first = run * CHANNELS_PER_RUN;
                for channel in first..(first + CHANNELS_PER_RUN).min(channels) {
                    let taps = &weight[(out * channels + channel) * 9..][..9];
                    put(channel, scale[out] * kernel_at(taps, place));
                }
            })
        };
        Winograd(std::array::from_fn(place))
    }

    pub(super) fn forward(
        &self,
        geometry: &Geometry,
        x: &[f32],
        behind: Behind<'_>,
        shortcut: Option<&[f32]>,
    ) -> Vec<f32> {
        let blocks = Blocks::of(geometry);
        let mut y = vec![0.0; geometry.positions() * geometry.out_channels];
        let parts = blocks.parts(&mut y, shortcut);
        let one = |room: &mut Room, (rows, y, shortcut): Part<'_>, shared_out| {
            room.transform_inputs(geometry, x, blocks.tiles(&rows));
            self.multiply(room, shared_out);
            room.transform_results(geometry, blocks.tiles(&rows), y);
            behind.apply(y, shortcut);
        };
        if parts.len() < FEWEST_BLOCKS {
            let mut room = Room::default();
            parts.into_iter().for_each(|part| one(&mut room, part, true));
        } else {
            parts.into_par_iter().for_each_init(Room::default, |room, part| one(room, part, false));
        }
        y
    }

    fn multiply(&self, room: &mut Room, shared_out: bool) {
        let Room { inputs, results, tiles, channels, out_channels } = room;
        let (tiles, channels, out) = (*tiles, *channels, *out_channels);
        let places = results.par_chunks_exact_mut(tiles * out).zip(inputs.par_chunks_exact(tiles * channels));
        let fewest_places = if shared_out { 1 } else { PLACES };
        places.zip(&self.0).with_min_len(fewest_places).for_each(|((results, inputs), weight)| {
            let left = Single::left(Rows::new(inputs, tiles, channels));
            Single::new().multiply(left, weight.right(), results, out, Write::Replace);
        });
    }
}

/// How the tiles of a batch are cut into blocks: whole rows of tiles, so that a block's results lie side by side.
struct Blocks {
    batch_rows: usize,
    image_rows: usize,
    columns: usize,
    rows_per_block: usize,
    /// f32 of one row of results, and rows of an image.
    result_row: usize,
    result_rows: usize,
}

/// Rows of tiles, their results, and those of the shortcut.
type Part<'a> = (Range<usize>, &'a mut [f32], Option<&'a [f32]>);

impl Blocks {
    fn of(geometry: &Geometry) -> Self {
        let Geometry { batch, channels, out_channels, out_height, out_width, .. } = *geometry;
        let (image_rows, columns) = (out_height.div_ceil(2), out_width.div_ceil(2));
        let tiles = (BLOCK_ELEMENTS / (PLACES * (channels + out_channels))).max(FEWEST_BLOCK_TILES);
        let wanted = tiles.div_ceil(columns);
        let batch_rows = batch * image_rows;
        // A few tiles are one block.
        let rows_per_block = if batch_rows < FEWEST_BLOCKS * wanted { batch_rows } else { wanted };
        Blocks {
            batch_rows,
            image_rows,
            columns,
            rows_per_block,
            result_row: out_width * out_channels,
            result_rows: out_height,
        }
    }

    /// Rows of results above the row of tiles `row`: an image of odd height ends in half a tile.
    fn results_before(&self, row: usize) -> usize {
        row / self.image_rows * self.result_rows + row % self.image_rows * 2
    }

    fn parts<'a>(&self, mut y: &'a mut [f32], mut shortcut: Option<&'a [f32]>) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        for first in (0..self.batch_rows).step_by(self.rows_per_block) {
            let rows = first..(first + self.rows_per_block).min(self.batch_rows);
            let results = self.results_before(rows.end) - self.results_before(rows.start);
            let (part, rest) = y.split_at_mut(results * self.result_row);
            y = rest;
            let beside = shortcut.map(|all| all.split_at(part.len()));
            shortcut = beside.map(|(_, rest)| rest);
            parts.push((rows, part, beside.map(|(part, _)| part)));
        }
        parts
    }

    /// Image, and row and column of the first result, of each tile.
    fn tiles(&self, rows: &Range<usize>) -> impl ExactSizeIterator<Item = Corner> + use<> {
        let (image_rows, columns) = (self.image_rows, self.columns);
        let first = rows.start;
        (0..rows.len() * columns).map(move |tile| {
            let row = first + tile / columns;
            Corner { image: row / image_rows, row: row % image_rows * 2, column: tile % columns * 2 }
        })
    }
}

struct Corner {
    image: usize,
    row: usize,
    column: usize,
}

/// A block's tiles, transformed. Buffers of one thread.
#[derive(Default)]
struct Room {
    /// [places, tiles, in]
    inputs: Vec<f32>,
    /// [places, tiles, out]
    results: Vec<f32>,
    tiles: usize,
    channels: usize,
    out_channels: usize,
}

/// Channels that are transformed together: one wide register for each place.
const LANES: usize = 16;
type Lanes = [f32; LANES];

impl Room {
    fn transform_inputs(
        &mut self,
        geometry: &Geometry,
        x: &[f32],
        tiles: impl ExactSizeIterator<Item = Corner>,
    ) {
        let Geometry { height, width, channels, out_channels, .. } = *geometry;
        (self.tiles, self.channels, self.out_channels) = (tiles.len(), channels, out_channels);
        let place_len = self.tiles * channels;
        self.inputs.resize(PLACES * place_len, 0.0);
        self.results.resize(PLACES * self.tiles * out_channels, 0.0);
        let outside = vec![0.0; channels];
        for (tile, Corner { image, row, column }) in tiles.enumerate() {
            // The tile begins one pixel above and left of its results.
            let pixels: [&[f32]; PLACES] = std::array::from_fn(|place| {
                let (y, x_at) = (row + place / 4, column + place % 4);
                let inside = (1..=height).contains(&y) && (1..=width).contains(&x_at);
                if !inside {
                    return &outside[..];
                }
                &x[((image * height + y - 1) * width + x_at - 1) * channels..][..channels]
            });
            let inputs = &mut self.inputs[tile * channels..];
            widest! {
                for start in (0..channels).step_by(LANES) {
                    let lanes = (channels - start).min(LANES);
                    let mut values = [[0.0; LANES]; PLACES];
                    for place in 0..PLACES {
                        values[place] = load(&pixels[place][start..start + lanes]);
                    }
                    let values = input_transform(values);
                    for place in 0..PLACES {
                        store(values[place], &mut inputs[place * place_len + start..][..lanes]);
                    }
                }
            }
        }
    }

    fn transform_results(
        &self,
        geometry: &Geometry,
        tiles: impl ExactSizeIterator<Item = Corner>,
        y: &mut [f32],
    ) {
        let Geometry { out_height, out_width, out_channels: out, .. } = *geometry;
        let place_len = self.tiles * out;
        let mut first = None;
        for (tile, Corner { image, row, column }) in tiles.enumerate() {
            let at = (image * out_height + row) * out_width + column;
            let at = at - *first.get_or_insert(at);
            let results = &self.results[tile * out..];
            let places = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(down, right)| {
                let inside = row + down < out_height && column + right < out_width;
                inside.then_some((at + down * out_width + right) * out)
            });
            widest! {
                for start in (0..out).step_by(LANES) {
                    let lanes = (out - start).min(LANES);
                    let mut values = [[0.0; LANES]; PLACES];
                    for place in 0..PLACES {
                        values[place] = load(&results[place * place_len + start..][..lanes]);
                    }
                    let values = result_transform(values);
                    for (place, at) in places.iter().enumerate() {
                        if let Some(at) = at {
                            store(values[place], &mut y[at + start..][..lanes]);
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn load(values: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    match values.first_chunk::<LANES>() {
        Some(all) => lanes = *all,
        None => lanes[..values.len()].copy_from_slice(values),
    }
    lanes
}

#[inline(always)]
fn store(lanes: Lanes, out: &mut [f32]) {
    match out.first_chunk_mut::<LANES>() {
        Some(all) => *all = lanes,
        None => out.copy_from_slice(&lanes[..out.len()]),
    }
}

#[inline(always)]
fn add(a: Lanes, b: Lanes) -> Lanes {
    let mut sum = a;
    for lane in 0..LANES {
        sum[lane] += b[lane];
    }
    sum
}

#[inline(always)]
fn subtract(a: Lanes, b: Lanes) -> Lanes {
    let mut difference = a;
    for lane in 0..LANES {
        difference[lane] -= b[lane];
    }
    difference
}

/// B^T d B: each column of the tile, then each row.
#[inline(always)]
fn input_transform(mut d: [Lanes; PLACES]) -> [Lanes; PLACES] {
    for (start, step) in [(0, 4), (1, 4), (2, 4), (3, 4), (0, 1), (4, 1), (8, 1), (12, 1)] {
        let (a, b, c, e) = (d[start], d[start + step], d[start + 2 * step], d[start + 3 * step]);
        d[start] = subtract(a, c);
        d[start + step] = add(b, c);
        d[start + 2 * step] = subtract(c, b);
        d[start + 3 * step] = subtract(b, e);
    }
    d
}

/// A^T m A: four results, in rows.
#[inline(always)]
fn result_transform(m: [Lanes; PLACES]) -> [Lanes; 4] {
    let mut rows = [[0.0; LANES]; 8];
    for column in 0..4 {
        let (a, b, c, d) = (m[column], m[4 + column], m[8 + column], m[12 + column]);
        rows[column] = add(a, add(b, c));
        rows[4 + column] = subtract(subtract(b, c), d);
    }
    let mut results = [[0.0; LANES]; 4];
    for row in 0..2 {
        let (a, b, c, d) = (rows[4 * row], rows[4 * row + 1], rows[4 * row + 2], rows[4 * row + 3]);
        results[2 * row] = add(a, add(b, c));
        results[2 * row + 1] = subtract(subtract(b, c), d);
    }
    results
}

/// G g G^T at one place.
fn kernel_at(taps: &[f32], place: usize) -> f32 {
    const G: [[f32; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
    let (row, column) = (G[place / 4], G[place % 4]);
    (0..9).map(|tap| row[tap / 3] * taps[tap] * column[tap % 3]).sum()
}
