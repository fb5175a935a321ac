//! The picture of a benchmark: a panel a method, a line a period, kNN accuracy over the versions; mean and one standard deviation
//! either side, over seeds.
//!
//! Text is left to the viewer's fonts, so drawing needs none. Equal results give an equal file.

use plotters::coord::Shift;
use plotters::prelude::*;

use super::BenchError;
use super::results::{Probe, Results};
use super::statistics::Spread;

const PANEL_PX: (u32, u32) = (300, 260);
/// Room for the heading and, below it, the periods' names in their colours.
const TITLE_PX: u32 = 64;
/// Of a letter of the names; the viewer's font may be a little narrower.
const LETTER_PX: i32 = 8;
const COLUMNS: usize = 4;

/// Okabe and Ito's palette without yellow, which is too light for lines.
const PALETTE: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(60, 60, 60),
];

impl<E: std::error::Error + Send + Sync> From<DrawingAreaErrorKind<E>> for BenchError {
    fn from(error: DrawingAreaErrorKind<E>) -> Self {
        BenchError::Plot(error.to_string())
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A period's line: (version from 1, mean, deviation), in per cent.
type Line = Vec<(f64, f64, f64)>;

/// The SVG's text.
pub fn accuracy(results: &Results) -> Result<String, BenchError> {
    // Initial weights have no second version: a panel of theirs would say nothing and flatten all others.
    let drawn = |method: &&str| results.of(method).iter().any(|run| run.versions.len() > 1);
    let methods = results.methods().into_iter().filter(drawn);
    let panels: Vec<(&str, Vec<Line>)> = methods.map(|method| (method, lines(results, method))).collect();
    let values = || panels.iter().flat_map(|(_, lines)| lines).flatten();
    let lowest = values().map(|(_, mean, deviation)| mean - deviation).fold(100.0, f64::min);
    let highest = values().map(|(_, mean, deviation)| mean + deviation).fold(0.0, f64::max);
    let range = ((lowest - 2.0).max(0.0), (highest + 2.0).min(100.0));
    let columns = COLUMNS.min(panels.len().max(1));
    let rows = panels.len().div_ceil(columns).max(1);
    let size = (PANEL_PX.0 * columns as u32, TITLE_PX + PANEL_PX.1 * rows as u32);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        let (title, below) = root.split_vertically(TITLE_PX);
        let heading = format!("kNN accuracy on each period over the versions, {}", results.stream.name);
        title.draw_text(&heading, &TextStyle::from(("sans-serif", 20).into_font()), (20, 10))?;
        let mut left = 20;
        for (period, colour) in results.stream.periods.iter().zip(PALETTE.iter().cycle()) {
            let style = TextStyle::from(("sans-serif", 15).into_font()).color(colour);
            title.draw_text(&period.name, &style, (left, 40))?;
            left += LETTER_PX * (period.name.chars().count() as i32 + 3);
        }
        let areas = below.split_evenly((rows, columns));
        for (area, (method, lines)) in areas.iter().zip(&panels) {
            panel(area, method, lines, (results.stream.periods.len(), range))?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn lines(results: &Results, method: &str) -> Vec<Line> {
    let runs = results.of(method);
    let versions = runs.iter().map(|run| run.versions.len()).max().unwrap_or(0);
    let point = |period: usize, version: usize| {
        let scores = runs.iter().filter_map(|run| run.versions.get(version));
        let scores = scores.filter_map(|version| version.scores.iter().find(|one| one.period == period));
        let values: Vec<f64> = scores.map(|scores| 100.0 * Probe::Knn.of(scores)).collect();
        let spread = Spread::of(&values)?;
        Some((version as f64 + 1.0, spread.mean, spread.deviation.unwrap_or(0.0)))
    };
    let line = |period| (0..versions).filter_map(|version| point(period, version)).collect();
    (0..results.stream.periods.len()).map(line).collect()
}

fn panel(
    area: &Area,
    method: &str,
    lines: &[Line],
    (periods, (lowest, highest)): (usize, (f64, f64)),
) -> Result<(), BenchError> {
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(44)
        .caption(method, ("sans-serif", 15))
        .build_cartesian_2d(0.7..periods as f64 + 0.3, lowest..highest)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(BLACK.mix(0.5))
        .label_style(("sans-serif", 12))
        .axis_desc_style(("sans-serif", 12))
        .x_labels(periods + 1)
        .x_label_formatter(&|version| {
            if version.fract().abs() < 1e-9 { format!("v{version:.0}") } else { String::new() }
        })
        .y_desc("kNN, %")
        .y_label_formatter(&|percent| format!("{percent:.0}"))
        .draw()?;
    for (line, colour) in lines.iter().zip(PALETTE.iter().cycle()) {
        let upper = line.iter().map(|(x, mean, deviation)| (*x, mean + deviation));
        let lower = line.iter().rev().map(|(x, mean, deviation)| (*x, mean - deviation));
        let band: Vec<(f64, f64)> = upper.chain(lower).collect();
        let means = || line.iter().map(|(x, mean, _)| (*x, *mean));
        chart.draw_series(std::iter::once(Polygon::new(band, colour.mix(0.15))))?;
        chart.draw_series(LineSeries::new(means(), colour.stroke_width(2)))?;
        chart.draw_series(means().map(|point| Circle::new(point, 3, colour.filled())))?;
    }
    Ok(())
}
