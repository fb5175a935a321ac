//! The picture of cost over time: four panels by period, in SVG, with the allowed band where there is one.
//!
//! Text is left to the viewer's fonts, so drawing needs none.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::periods::Cost;

const WIDTH_PX: u32 = 1100;
const HEIGHT_PX: u32 = 760;
const TITLE_PX: u32 = 44;
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
/// Room above the highest value, for the legend.
const HEADROOM: f64 = 1.35;
const MIB: f64 = 1_048_576.0;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

struct Line<'a> {
    name: &'a str,
    colour: RGBColor,
    of: fn(&Cost) -> f64,
    /// Must stay within the band around its value at the base line.
    bounded: bool,
}

/// `base`: number of the period that the others are compared with. `tolerance`: half the band's width, as a ratio.
pub fn cost_over_time(costs: &[Cost], base: usize, tolerance: f64) -> Result<String> {
    let line = |name, colour, bounded, of| Line { name, colour, of, bounded };
    let panels: [(&str, Vec<Line>); 4] = [
        (
            "seconds",
            vec![
                line("close time, sealed to published", BLUE, true, |c| c.close_seconds),
                line("CPU time of the training process", ORANGE, true, |c| c.child_cpu_seconds),
            ],
        ),
        (
            "memory, MiB",
            vec![
                line("peak of the training process", ORANGE, true, |c| c.child_peak_bytes as f64 / MIB),
                line("resident, daemon", BLUE, true, |c| c.daemon_resident_bytes as f64 / MIB),
            ],
        ),
        (
            "storage of a period, MiB",
            vec![
                line("frames, checkpoints, candidates", BLUE, true, |c| c.stored.passing as f64 / MIB),
                line("kept for good by the period", GREEN, true, |c| c.kept_bytes as f64 / MIB),
            ],
        ),
        (
            "storage in all, MiB",
            vec![
                line("versions and probe sets (kept on purpose)", GREEN, false, |c| {
                    c.stored.kept as f64 / MIB
                }),
                line("registry", ORANGE, false, |c| c.stored.registry as f64 / MIB),
                line("frames, checkpoints, candidates", BLUE, false, |c| c.stored.passing as f64 / MIB),
            ],
        ),
    ];
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH_PX, HEIGHT_PX)).into_drawing_area();
        root.fill(&WHITE)?;
        let (title, below) = root.split_vertically(TITLE_PX);
        let heading = format!(
            "Cost of {} equal periods; bands: within {:.0} % of period {base}",
            costs.len(),
            tolerance * 100.0
        );
        title.draw_text(&heading, &TextStyle::from(("sans-serif", 22).into_font()), (20, 12))?;
        for (area, (unit, lines)) in below.split_evenly((2, 2)).iter().zip(&panels) {
            panel(area, costs, unit, lines, (base, tolerance))?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn panel(area: &Area, costs: &[Cost], unit: &str, lines: &[Line], band: (usize, f64)) -> Result<()> {
    let highest = lines.iter().flat_map(|line| costs.iter().map(line.of)).fold(0.0, f64::max);
    let mut chart: Chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(24)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..costs.len() as f64 + 1.0, 0.0..highest * HEADROOM)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(BLACK.mix(0.5))
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .x_desc("period")
        .y_desc(unit)
        .x_label_formatter(&|number| format!("{number:.0}"))
        .y_labels(6)
        .draw()?;
    for line in lines {
        draw(&mut chart, costs, line, band)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 14))
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}

fn draw(chart: &mut Chart, costs: &[Cost], line: &Line, (base, tolerance): (usize, f64)) -> Result<()> {
    let colour = line.colour;
    if line.bounded {
        let middle = (line.of)(&costs[base - 1]);
        let corners =
            [(base as f64, middle * (1.0 - tolerance)), (costs.len() as f64, middle * (1.0 + tolerance))];
        chart.draw_series([Rectangle::new(corners, colour.mix(0.15).filled())])?;
    }
    let points = || costs.iter().enumerate().map(|(index, cost)| (index as f64 + 1.0, (line.of)(cost)));
    let drawn = chart.draw_series(LineSeries::new(points(), colour.stroke_width(2)))?;
    drawn
        .label(line.name)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    chart.draw_series(points().map(|point| Circle::new(point, 2, colour.filled())))?;
    Ok(())
}

/// Of at least one value.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
