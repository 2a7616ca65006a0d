//! Loss curves as SVG.

use std::path::Path;

use plotters::prelude::*;

use crate::failure::{Failure, Result};

/// One curve of a plot.
pub struct Curve {
    /// What the legend calls it.
    pub label: String,
    /// Tokens and loss.
    pub points: Vec<(f64, f64)>,
    /// Whether its points are measured ones that deserve a dot.
    pub dots: bool,
}

const SIZE: (u32, u32) = (960, 540);
/// Distinct for colour-blind readers too (Okabe and Ito).
const COLOURS: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(110, 110, 110),
];

/// Draws curves over millions of tokens into an SVG file.
pub fn write(path: &Path, title: &str, curves: &[Curve]) -> Result<()> {
    // The drawing library's errors borrow the backend.
    draw(path, title, curves).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn draw(
    path: &Path,
    title: &str,
    curves: &[Curve],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    let top = points()
        .map(|point| point.1)
        .fold(f64::NEG_INFINITY, f64::max);
    let bottom = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let margin = (top - bottom).max(0.1) * 0.05;

    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..right / 1e6, bottom - margin..top + margin)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("tokens trained (millions)")
        .y_desc("loss per token (nats)")
        .label_style(("sans-serif", 15))
        .draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let points = curve
            .points
            .iter()
            .map(|(tokens, loss)| (tokens / 1e6, *loss));
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.clone(), style))?
            .label(&curve.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
        if curve.dots {
            chart.draw_series(points.map(|point| Circle::new(point, 4, colour.filled())))?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 15))
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_names_its_curves() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("plot.svg");
        let curve = Curve {
            label: "uptrained".to_owned(),
            points: vec![(0.0, 5.0), (1e6, 3.0)],
            dots: true,
        };
        write(&path, "Loss", &[curve]).expect("drawn");
        let svg = std::fs::read_to_string(&path).expect("written");
        assert!(
            svg.starts_with("<svg") && svg.contains("uptrained"),
            "{svg}"
        );
    }
}
