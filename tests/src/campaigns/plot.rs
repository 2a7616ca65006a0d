//! Curves as SVG.

use std::path::Path;

use plotters::prelude::*;

use crate::failure::{Failure, Result};

/// One curve of a plot.
pub struct Curve {
    colour: usize,
    label: String,
    points: Vec<(f64, f64)>,
    /// Whether its points are few and measured, and get a dot each.
    dots: bool,
}

impl Curve {
    /// A thin line through many points. Curves of the same thing share a colour.
    pub fn line(colour: usize, label: &str, points: &[(f64, f64)]) -> Self {
        let (label, points) = (label.to_owned(), points.to_vec());
        Self {
            colour,
            label,
            points,
            dots: false,
        }
    }

    /// A line with a dot at each of its few points.
    pub fn dots(colour: usize, label: &str, points: &[(f64, f64)]) -> Self {
        Self {
            dots: true,
            ..Self::line(colour, label, points)
        }
    }
}

const SIZE: (u32, u32) = (960, 540);
/// Distinct for colour-blind readers too (Okabe and Ito).
const COLOURS: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(110, 110, 110),
];

/// What stands around the curves of a plot.
pub struct Frame<'a> {
    /// Above it.
    pub title: &'a str,
    /// Below it, and what a point's x is divided by.
    pub x: (&'a str, f64),
    /// Beside it.
    pub y: &'a str,
}

/// Draws curves into an SVG file.
pub fn write(path: &Path, frame: &Frame<'_>, curves: &[Curve]) -> Result<()> {
    // The drawing library's errors borrow the backend.
    draw(path, frame, curves).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn draw(
    path: &Path,
    frame: &Frame<'_>,
    curves: &[Curve],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (x_name, unit) = frame.x;
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
        .caption(frame.title, ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..right / unit, bottom - margin..top + margin)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc(x_name)
        .y_desc(frame.y)
        .label_style(("sans-serif", 15))
        .draw()?;
    for curve in curves {
        let colour = COLOURS[curve.colour % COLOURS.len()];
        let points = curve.points.iter().map(|(x, y)| (x / unit, *y));
        let style = colour.stroke_width(if curve.dots { 2 } else { 1 });
        let series = chart.draw_series(LineSeries::new(points.clone(), style))?;
        let dots = curve.dots;
        series.label(&curve.label).legend(move |(x, y)| {
            let line = PathElement::new([(0, 0), (24, 0)], style);
            let dot = Circle::new((12, 0), if dots { 4 } else { 0 }, colour.filled());
            EmptyElement::at((x, y)) + line + dot
        });
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
        let curve = Curve::dots(0, "uptrained", &[(0.0, 5.0), (1e6, 3.0)]);
        let frame = Frame {
            title: "Loss",
            x: ("tokens (millions)", 1e6),
            y: "nats",
        };
        write(&path, &frame, &[curve]).expect("drawn");
        let svg = std::fs::read_to_string(&path).expect("written");
        assert!(
            svg.starts_with("<svg") && svg.contains("uptrained"),
            "{svg}"
        );
    }
}
