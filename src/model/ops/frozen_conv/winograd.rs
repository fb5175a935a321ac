//! A convolution of 3 x 3 at stride 1 by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016): 16 products for four results a
//! channel, where the convolution itself takes 36.
//!
//! A tile of 4 x 4 inputs d becomes B^T d B, is multiplied with G g G^T of the kernel g, summed over the channels, and turned into
//! 2 x 2 results y by A^T m A. In f32 the result is as exact as the plain sum: the transforms only add, and halve.
//!
//! Each of the 16 places of a tile is a product of its own, [tiles, in] times [in, out]. Parts: blocks of tiles, whose
//! transforms stay in the second-level cache; the 16 places where there are few tiles.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::Window;
use super::super::arithmetic::{Arithmetic, Rows};
use super::super::matrix::Write;
use super::super::panels::Panels;
use super::super::patches::Geometry;
use super::super::single::Single;
use super::{Behind, CHANNELS_PER_RUN};

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
        let outside = vec![0.0; geometry.width * geometry.channels];
        let one = |room: &mut Room, part: Part<'_>, shared_out| {
            room.transform_inputs(&blocks, geometry, x, (&part.rows, &outside));
            self.multiply(room, shared_out);
            room.transform_results(&blocks, geometry, behind, part);
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
        let one = |((results, inputs), weight): ((&mut [f32], &[f32]), &Panels<Single>)| {
            let left = Single::left(Rows::new(&inputs[..tiles * channels], tiles, channels));
            Single::new().multiply(left, weight.right(), &mut results[..tiles * out], out, Write::Replace);
        };
        let (results_len, inputs_len) = (place_len(tiles, out), place_len(tiles, channels));
        if shared_out {
            let places = results.par_chunks_exact_mut(results_len).zip(inputs.par_chunks_exact(inputs_len));
            places.zip(&self.0).for_each(one);
        } else {
            results
                .chunks_exact_mut(results_len)
                .zip(inputs.chunks_exact(inputs_len))
                .zip(&self.0)
                .for_each(one);
        }
    }
}

/// Elements from one place of a block to the next. A cache line more than there are: places at a distance of a power of two
/// would share a few sets of the cache.
fn place_len(tiles: usize, channels: usize) -> usize {
    tiles * channels + 16
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

/// Rows of tiles, their results, and the shortcut of those.
struct Part<'a> {
    rows: Range<usize>,
    y: &'a mut [f32],
    shortcut: Option<&'a [f32]>,
}

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
            parts.push(Part { rows, y: part, shortcut: beside.map(|(part, _)| part) });
        }
        parts
    }

    /// Image, and the first row of its results, of a row of tiles.
    fn corner(&self, row: usize) -> (usize, usize) {
        (row / self.image_rows, row % self.image_rows * 2)
    }
}

/// A block's tiles, transformed. Buffers of one thread; [`place_len`] is from one place to the next.
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

impl Room {
    /// `outside` is a row of zeros.
    fn transform_inputs(
        &mut self,
        blocks: &Blocks,
        geometry: &Geometry,
        x: &[f32],
        (rows, outside): (&Range<usize>, &[f32]),
    ) {
        let Geometry { height, width, channels, out_channels, .. } = *geometry;
        (self.tiles, self.channels, self.out_channels) =
            (rows.len() * blocks.columns, channels, out_channels);
        let place = place_len(self.tiles, channels);
        self.inputs.resize(PLACES * place, 0.0);
        self.results.resize(PLACES * place_len(self.tiles, out_channels), 0.0);
        let (row_len, line) = (blocks.columns * channels, width * channels);
        for (index, row) in rows.clone().enumerate() {
            let (image, top) = blocks.corner(row);
            // A tile begins one pixel above and left of its results.
            let pixels = std::array::from_fn(|down| match (top + down).checked_sub(1) {
                Some(y) if y < height => &x[(image * height + y) * line..][..line],
                _ => outside,
            });
            let mut places =
                self.inputs.chunks_exact_mut(place).map(|place| &mut place[index * row_len..][..row_len]);
            let places = std::array::from_fn(|_| places.next().expect("sixteen places"));
            pulp::Arch::new().dispatch(InputRow { pixels, places, channels, columns: blocks.columns });
        }
    }

    fn transform_results(&self, blocks: &Blocks, geometry: &Geometry, behind: Behind<'_>, part: Part<'_>) {
        let Part { rows, mut y, mut shortcut } = part;
        let (line, out) = (blocks.result_row, geometry.out_channels);
        let (row_len, place) = (blocks.columns * out, place_len(self.tiles, out));
        for (index, row) in rows.enumerate() {
            let (_, top) = blocks.corner(row);
            let lines = (blocks.result_rows - top).min(2);
            let y = y.split_off_mut(..lines * line).expect("the part's results");
            let shortcut =
                shortcut.as_mut().map(|all| all.split_off(..lines * line).expect("the part's shortcut"));
            let mut places =
                self.results.chunks_exact(place).map(|place| &place[index * row_len..][..row_len]);
            let places = std::array::from_fn(|_| places.next().expect("sixteen places"));
            pulp::Arch::new().dispatch(ResultRow {
                places,
                y,
                shortcut,
                line,
                behind,
                columns: blocks.columns,
            });
        }
    }
}

/// B^T d B of a row of tiles. A column of pixels is transformed once, for both tiles that it belongs to.
struct InputRow<'a> {
    /// Rows of the tiles, [width, channels].
    pixels: [&'a [f32]; 4],
    /// [columns, channels]
    places: [&'a mut [f32]; PLACES],
    channels: usize,
    columns: usize,
}

impl WithSimd for InputRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let InputRow { pixels, mut places, channels, columns } = self;
        for start in (0..channels).step_by(S::F32_LANES) {
            let lanes = start..channels.min(start + S::F32_LANES);
            let mut a = [simd.splat_f32s(0.0); 4];
            let mut b = column(simd, &pixels, 0, channels, &lanes);
            for tile in 0..columns {
                let c = column(simd, &pixels, 2 * tile + 1, channels, &lanes);
                let d = column(simd, &pixels, 2 * tile + 2, channels, &lanes);
                let at = tile * channels + lanes.start..tile * channels + lanes.end;
                for row in 0..4 {
                    let [first, second, third, fourth] =
                        difference_and_sums(simd, [a[row], b[row], c[row], d[row]]);
                    let [into_first, into_second, into_third, into_fourth, ..] = &mut places[4 * row..]
                    else {
                        unreachable!("four places a row")
                    };
                    store(simd, &mut into_first[at.clone()], first);
                    store(simd, &mut into_second[at.clone()], second);
                    store(simd, &mut into_third[at.clone()], third);
                    store(simd, &mut into_fourth[at.clone()], fourth);
                }
                (a, b) = (c, d);
            }
        }
    }
}

/// The column of pixels `x` of the tiles' four rows, times B^T; beyond the image it is zero.
#[inline(always)]
fn column<S: Simd>(
    simd: S,
    pixels: &[&[f32]; 4],
    x: usize,
    channels: usize,
    lanes: &Range<usize>,
) -> [S::f32s; 4] {
    let at = x * channels;
    if at >= pixels[0].len() {
        return [simd.splat_f32s(0.0); 4];
    }
    let at = at + lanes.start..at + lanes.end;
    let [a, b, c, d] = pixels;
    let values = [
        load(simd, &a[at.clone()]),
        load(simd, &b[at.clone()]),
        load(simd, &c[at.clone()]),
        load(simd, &d[at]),
    ];
    difference_and_sums(simd, values)
}

/// B^T times a vector.
#[inline(always)]
fn difference_and_sums<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 4] {
    [simd.sub_f32s(a, c), simd.add_f32s(b, c), simd.sub_f32s(c, b), simd.sub_f32s(b, d)]
}

/// A^T m A of a row of tiles, and what comes behind a product.
struct ResultRow<'a> {
    /// [columns, out]
    places: [&'a [f32]; PLACES],
    /// One or two lines of results of `line` elements, [width, out].
    y: &'a mut [f32],
    shortcut: Option<&'a [f32]>,
    line: usize,
    behind: Behind<'a>,
    columns: usize,
}

impl WithSimd for ResultRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ResultRow { places, y, shortcut, line, behind: Behind { bias, floor }, columns } = self;
        let out = bias.len();
        let floor = simd.splat_f32s(floor);
        for start in (0..out).step_by(S::F32_LANES) {
            let lanes = start..out.min(start + S::F32_LANES);
            let bias = load(simd, &bias[lanes.clone()]);
            for tile in 0..columns {
                let at = tile * out + lanes.start..tile * out + lanes.end;
                let a = result_column(simd, &places, 0, &at);
                let b = result_column(simd, &places, 1, &at);
                let c = result_column(simd, &places, 2, &at);
                let d = result_column(simd, &places, 3, &at);
                for (down, y) in y.chunks_exact_mut(line).enumerate() {
                    let [left, right] = sum_and_difference(simd, [a[down], b[down], c[down], d[down]]);
                    let at = 2 * tile * out + lanes.start..2 * tile * out + lanes.end;
                    let beside = shortcut.map(|all| &all[down * line..][..line]);
                    store(simd, &mut y[at.clone()], finish(simd, left, (bias, floor), beside, &at));
                    // An image of odd width ends in half a tile.
                    let at = at.start + out..at.end + out;
                    if at.end <= line {
                        store(simd, &mut y[at.clone()], finish(simd, right, (bias, floor), beside, &at));
                    }
                }
            }
        }
    }
}

/// A column of the places, times A^T.
#[inline(always)]
fn result_column<S: Simd>(simd: S, places: &[&[f32]; PLACES], x: usize, at: &Range<usize>) -> [S::f32s; 2] {
    let values = [
        load(simd, &places[x][at.clone()]),
        load(simd, &places[4 + x][at.clone()]),
        load(simd, &places[8 + x][at.clone()]),
        load(simd, &places[12 + x][at.clone()]),
    ];
    sum_and_difference(simd, values)
}

/// What [`Behind`] does, to one vector. Written so that NaN passes through: a later check must see it.
#[inline(always)]
fn finish<S: Simd>(
    simd: S,
    value: S::f32s,
    (bias, floor): (S::f32s, S::f32s),
    shortcut: Option<&[f32]>,
    at: &Range<usize>,
) -> S::f32s {
    let mut value = simd.add_f32s(value, bias);
    if let Some(shortcut) = shortcut {
        value = simd.add_f32s(value, load(simd, &shortcut[at.clone()]));
    }
    simd.select_f32s(simd.less_than_f32s(value, floor), floor, value)
}

/// A^T times a vector.
#[inline(always)]
fn sum_and_difference<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 2] {
    let sum = simd.add_f32s(a, simd.add_f32s(b, c));
    [sum, simd.sub_f32s(simd.sub_f32s(b, c), d)]
}

/// `values` in the first lanes.
#[inline(always)]
fn load<S: Simd>(simd: S, values: &[f32]) -> S::f32s {
    match S::as_simd_f32s(values).0 {
        [lanes] => *lanes,
        _ => simd.partial_load_f32s(values),
    }
}

#[inline(always)]
fn store<S: Simd>(simd: S, out: &mut [f32], lanes: S::f32s) {
    match S::as_mut_simd_f32s(out).0 {
        [all] => *all = lanes,
        _ => simd.partial_store_f32s(out, lanes),
    }
}

/// G g G^T at one place.
fn kernel_at(taps: &[f32], place: usize) -> f32 {
    const G: [[f32; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
    let (row, column) = (G[place / 4], G[place % 4]);
    (0..9).map(|tap| row[tap / 3] * taps[tap] * column[tap % 3]).sum()
}
