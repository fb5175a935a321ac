//! The picture of the loss in two precisions: a panel a network, a line a run.
//!
//! Text is left to the viewer's fonts, so drawing needs none.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::precision::Curves;
use super::spread::WINDOW;

const PANEL_PX: (u32, u32) = (560, 420);
const TITLE_PX: u32 = 44;
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(213, 94, 0);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub fn precisions(curves: &[Curves]) -> Result<String> {
    let size = (PANEL_PX.0 * curves.len() as u32, PANEL_PX.1 + TITLE_PX);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        let (title, below) = root.split_vertically(TITLE_PX);
        let heading =
            format!("NT-Xent, mean of {WINDOW} steps; a line a seed, equal seeds in both precisions");
        title.draw_text(&heading, &TextStyle::from(("sans-serif", 20).into_font()), (20, 14))?;
        for (area, curves) in below.split_evenly((1, curves.len())).iter().zip(curves) {
            panel(area, curves)?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn panel(area: &Area, curves: &Curves) -> Result<()> {
    let values = || curves.f32.iter().chain(&curves.bf16).flatten().copied();
    let (lowest, highest) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    let steps = curves.f32[0].len() + WINDOW;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(24)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .caption(format!("{}, {} frames a step", curves.architecture, curves.batch), ("sans-serif", 16))
        .build_cartesian_2d(0.0..steps as f64, lowest * 0.95..highest * 1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(BLACK.mix(0.5))
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .x_desc("step")
        .y_desc("loss")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .draw()?;
    for (name, colour, runs) in
        [("products in f32", BLUE, &curves.f32), ("products in bf16", ORANGE, &curves.bf16)]
    {
        for (seed, losses) in runs.iter().enumerate() {
            let points = losses.iter().enumerate().map(|(step, loss)| ((step + WINDOW) as f64, *loss));
            let drawn = chart.draw_series(LineSeries::new(points, colour.mix(0.8).stroke_width(1)))?;
            if seed == 0 {
                let legend = move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2));
                drawn.label(name).legend(legend);
            }
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 14))
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}
