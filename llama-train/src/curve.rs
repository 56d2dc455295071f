//! The loss curve as a picture.

use std::path::Path;

use llama_model::weights::write_atomic;
use plotters::prelude::*;

use crate::TrainError;
use crate::log::Line;

const SIZE: (u32, u32) = (900, 540);
const TRAIN: RGBColor = RGBColor(31, 119, 180);
const VALID: RGBColor = RGBColor(214, 39, 40);

/// Draws training and validation loss over steps as an SVG.
///
/// # Errors
/// [`TrainError::Format`] if there is nothing to draw, [`TrainError::Io`].
pub fn write_svg(path: &Path, lines: &[Line]) -> Result<(), TrainError> {
    let pick = |f: fn(&Line) -> Option<(f64, f64)>| lines.iter().filter_map(f).filter(|(_, y)| y.is_finite()).collect();
    let train: Vec<(f64, f64)> = pick(|line| match line {
        Line::Train { step, loss, .. } => Some((*step as f64, *loss)),
        _ => None,
    });
    let valid: Vec<(f64, f64)> = pick(|line| match line {
        Line::Valid { step, loss, .. } => Some((*step as f64, *loss)),
        _ => None,
    });
    if train.is_empty() {
        return Err(TrainError::format(path, "there is no training step to draw"));
    }
    let mut svg = String::new();
    draw(&mut svg, &train, &valid).map_err(|error| TrainError::format(path, error))?;
    Ok(write_atomic(path, svg.as_bytes())?)
}

fn draw(svg: &mut String, train: &[(f64, f64)], valid: &[(f64, f64)]) -> Result<(), Box<dyn std::error::Error>> {
    let all = || train.iter().chain(valid);
    let last = all().map(|(x, _)| *x).fold(1.0, f64::max);
    let (low, high) = all().fold((f64::INFINITY, 0.0f64), |(low, high), (_, y)| (low.min(*y), high.max(*y)));
    let margin = ((high - low) * 0.05).max(0.05);

    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Loss (nats per token)", ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..last, (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_desc("optimizer step")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .label_style(("sans-serif", 14))
        .draw()?;

    chart.draw_series(LineSeries::new(train.iter().copied(), TRAIN.mix(0.25)))?;
    chart
        .draw_series(LineSeries::new(smoothed(train), TRAIN.stroke_width(2)))?
        .label("training (smoothed)")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], TRAIN.stroke_width(2)));
    if !valid.is_empty() {
        chart
            .draw_series(LineSeries::new(valid.iter().copied(), VALID.stroke_width(2)).point_size(3))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], VALID.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 14))
        .position(SeriesLabelPosition::UpperRight)
        .draw()?;
    root.present()?;
    Ok(())
}

/// Exponential mean over about twenty steps, corrected for its start.
fn smoothed(points: &[(f64, f64)]) -> impl Iterator<Item = (f64, f64)> {
    const KEEP: f64 = 0.95;
    points.iter().scan((0.0, 0.0), |(sum, weight), (x, y)| {
        *sum = KEEP * *sum + (1.0 - KEEP) * y;
        *weight = KEEP * *weight + (1.0 - KEEP);
        Some((*x, *sum / *weight))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StepOutput;

    #[test]
    fn draws_both_curves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        let output = |loss_sum| StepOutput { loss_sum, tokens: 1, ..Default::default() };
        let mut lines: Vec<Line> = (1..50).map(|step| Line::train(step, step, &output(9.0 / step as f64))).collect();
        lines.push(Line::valid(49, &output(1.0)));
        write_svg(&path, &lines).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("validation") && svg.matches("<polyline").count() >= 3);
        assert!(write_svg(&path, &[]).is_err());
    }
}
