//! The picture of accuracy and forgetting by version: one line a period's probe set, in SVG.
//!
//! Text is left to the viewer's fonts, so drawing needs none. Equal values give an equal file.

use std::collections::BTreeMap;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::types::{PeriodId, Version};

const WIDTH_PX: u32 = 960;
const HEIGHT_PX: u32 = 720;
/// Room for the legend's `20260131T000000Z`, or with milliseconds.
const LEGEND_PX: u32 = 220;
const TITLE_PX: u32 = 44;

/// Okabe and Ito's palette without yellow, which is too light for lines: told apart by the colour-blind too.
const PALETTE: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(60, 60, 60),
];

/// More labels than this on the x axis would touch.
const MAX_LABELS: usize = 12;

#[derive(Debug, thiserror::Error)]
#[error("the picture can't be drawn: {0}")]
pub struct PlotError(String);

impl<E: std::error::Error + Send + Sync> From<DrawingAreaErrorKind<E>> for PlotError {
    fn from(error: DrawingAreaErrorKind<E>) -> Self {
        Self(error.to_string())
    }
}

/// Ratios on one period's probe set by version; a version that was not measured is absent.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    pub period: PeriodId,
    pub accuracy: BTreeMap<Version, f64>,
    pub forgetting: BTreeMap<Version, f64>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The SVG's text. `versions` are the places of the x axis, evenly spaced whatever their numbers; `probe` names the
/// measure, such as `kNN`.
pub fn forgetting_by_version(
    probe: &str,
    versions: &[Version],
    series: &[Series],
) -> Result<String, PlotError> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH_PX, HEIGHT_PX)).into_drawing_area();
        root.fill(&WHITE)?;
        let (title, below) = root.split_vertically(TITLE_PX);
        let text = TextStyle::from(("sans-serif", 22).into_font());
        title.draw_text("Accuracy and forgetting by version", &text, (20, 12))?;
        let (charts, legend) = below.split_horizontally(WIDTH_PX - LEGEND_PX);
        let (upper, lower) = charts.split_vertically((HEIGHT_PX - TITLE_PX) / 2);
        let lines = |of: fn(&Series) -> &BTreeMap<Version, f64>| -> Vec<Vec<(usize, f64)>> {
            series.iter().map(|one| places(versions, of(one))).collect()
        };
        let accuracy = lines(|one| &one.accuracy);
        let forgetting = lines(|one| &one.forgetting);
        panel(&upper, versions, &format!("{probe} accuracy, %"), &accuracy, false)?;
        panel(&lower, versions, "forgetting, points", &forgetting, true)?;
        draw_legend(&legend, series)?;
        root.present()?;
    }
    Ok(svg)
}

/// (place on the x axis, per cent)
fn places(versions: &[Version], values: &BTreeMap<Version, f64>) -> Vec<(usize, f64)> {
    let value = |(place, version)| values.get(version).map(|ratio: &f64| (place, ratio * 100.0));
    versions.iter().enumerate().filter_map(value).filter(|(_, percent)| percent.is_finite()).collect()
}

fn panel(
    area: &Area,
    versions: &[Version],
    y_label: &str,
    lines: &[Vec<(usize, f64)>],
    with_zero: bool,
) -> Result<(), PlotError> {
    let (low, high) = value_range(lines, with_zero);
    // One segment a version, the last one included; its middle is where points stand.
    let places = (0..versions.len().saturating_sub(1)).into_segmented();
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(24)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(places, low..high)?;
    let name = |place: &SegmentValue<usize>| match place {
        SegmentValue::CenterOf(place) => versions.get(*place).map_or(String::new(), Version::to_string),
        SegmentValue::Exact(_) | SegmentValue::Last => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(BLACK.mix(0.5))
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .x_desc("version")
        .y_desc(y_label)
        .x_labels(MAX_LABELS)
        .y_labels(6)
        .x_label_formatter(&name)
        .y_label_formatter(&|percent| format!("{percent:.0}"))
        .draw()?;
    if with_zero {
        let zero = [(SegmentValue::Exact(0), 0.0), (SegmentValue::Last, 0.0)];
        chart.draw_series(LineSeries::new(zero, BLACK.mix(0.5)))?;
    }
    for (number, line) in lines.iter().enumerate() {
        let colour = colour(number);
        let points = || line.iter().map(|&(place, percent)| (SegmentValue::CenterOf(place), percent));
        chart.draw_series(LineSeries::new(points(), colour.stroke_width(2)))?;
        chart.draw_series(points().map(|point| Circle::new(point, 4, inside(number).filled())))?;
        chart.draw_series(points().map(|point| Circle::new(point, 4, colour.stroke_width(2))))?;
    }
    Ok(())
}

/// Whole tens around all values; 0..100 without any.
fn value_range(lines: &[Vec<(usize, f64)>], with_zero: bool) -> (f64, f64) {
    let values = lines.iter().flatten().map(|&(_, percent)| percent);
    let start = if with_zero { (0.0, 0.0) } else { (f64::INFINITY, f64::NEG_INFINITY) };
    let (low, high) = values.fold(start, |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return (0.0, 100.0);
    }
    // Steps of 5 for small differences, of 10 otherwise; a flat line gets one step.
    let step = if high - low < 20.0 { 5.0 } else { 10.0 };
    let (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
    if low == high { (low, low + step) } else { (low, high) }
}

fn colour(number: usize) -> RGBColor {
    PALETTE[number % PALETTE.len()]
}

/// Of a line's dots: hollow where the palette is used a second time.
fn inside(number: usize) -> RGBColor {
    if (number / PALETTE.len()).is_multiple_of(2) { colour(number) } else { WHITE }
}

fn draw_legend(area: &Area, series: &[Series]) -> Result<(), PlotError> {
    let heading = TextStyle::from(("sans-serif", 15).into_font());
    let entry = TextStyle::from(("sans-serif", 14).into_font());
    area.draw_text("probe set of period", &heading, (4, 14))?;
    for (number, one) in series.iter().enumerate() {
        let y = 46 + 24 * number as i32;
        let colour = colour(number);
        area.draw(&PathElement::new(vec![(4, y), (32, y)], colour.stroke_width(2)))?;
        area.draw(&Circle::new((18, y), 4, inside(number).filled()))?;
        area.draw(&Circle::new((18, y), 4, colour.stroke_width(2)))?;
        area.draw_text(&one.period.to_string(), &entry, (42, y - 7))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::EventTime;

    fn series() -> (Vec<Version>, Vec<Series>) {
        let versions: Vec<Version> = [1, 2, 4].map(Version).to_vec();
        let one = |day: i64, accuracy: &[(u64, f64)], forgetting: &[(u64, f64)]| {
            let map = |cells: &[(u64, f64)]| cells.iter().map(|&(v, x)| (Version(v), x)).collect();
            let period = PeriodId(EventTime(1_769_817_600_000 + day * 86_400_000));
            Series { period, accuracy: map(accuracy), forgetting: map(forgetting) }
        };
        let series = vec![
            one(0, &[(1, 0.91), (2, 0.88), (4, 0.86)], &[(2, 0.03), (4, 0.05)]),
            one(1, &[(2, 0.95), (4, 0.955)], &[(4, -0.005)]),
            one(2, &[(4, 0.82)], &[]),
        ];
        (versions, series)
    }

    #[test]
    fn every_version_and_period_is_named_and_every_measure_has_its_dot() {
        let (versions, series) = series();
        let svg = forgetting_by_version("kNN", &versions, &series).unwrap();
        for text in
            ["v000001", "v000002", "v000004", "20260131T000000Z", "kNN accuracy, %", "forgetting, points"]
        {
            assert!(svg.contains(text), "{text}");
        }
        // Six accuracies, three forgettings, three in the legend, each with its outline.
        assert_eq!(svg.matches("<circle").count(), 2 * 12);
        assert_eq!(svg, forgetting_by_version("kNN", &versions, &series).unwrap());
    }

    #[test]
    fn nothing_measured_still_draws() {
        let svg = forgetting_by_version("kNN", &[], &[]).unwrap();
        assert!(svg.ends_with("</svg>\n") || svg.ends_with("</svg>"));
    }

    #[test]
    fn ranges_are_whole_steps_around_the_values() {
        let lines = |values: &[f64]| vec![values.iter().map(|&value| (0, value)).collect::<Vec<_>>()];
        assert_eq!(value_range(&lines(&[86.0, 95.0]), false), (85.0, 95.0));
        assert_eq!(value_range(&lines(&[40.0, 95.0]), false), (40.0, 100.0));
        assert_eq!(value_range(&lines(&[3.0, -1.0]), true), (-5.0, 5.0));
        assert_eq!(value_range(&lines(&[90.0]), false), (90.0, 95.0));
        assert_eq!(value_range(&[], false), (0.0, 100.0));
        assert_eq!(value_range(&[], true), (0.0, 5.0));
    }

    #[test]
    fn many_versions_get_fewer_labels() {
        let versions: Vec<Version> = (1..=100).map(Version).collect();
        let svg = forgetting_by_version("kNN", &versions, &[]).unwrap();
        let labels = svg.matches("v0000").count();
        assert!((8..=2 * MAX_LABELS).contains(&labels), "{labels} in both panels");
    }
}
