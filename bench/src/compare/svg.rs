//! Plots as SVG, drawn by hand: bars with their spread.

use std::fmt::Write;

use crate::stats::Summary;

const WIDTH: f64 = 520.0;
const LABEL: f64 = 170.0;
const VALUE: f64 = 90.0;
const BAR: f64 = 16.0;
const STEP: f64 = 24.0;

/// One bar for each of `bars`: its label, what it shows, and the class that colours it.
pub fn bars(bars: &[(&str, Option<Summary>, String)]) -> String {
    let largest = bars
        .iter()
        .filter_map(|(_, value, _)| Some(value.as_ref()?.max))
        .fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABEL - VALUE) / largest;
    let height = STEP * bars.len() as f64 + 4.0;
    let mut svg = format!(
        r#"<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">"#
    );
    for (number, (label, value, class)) in bars.iter().enumerate() {
        let top = STEP * number as f64 + 4.0;
        let middle = top + BAR / 2.0;
        let text = middle + 4.0;
        let drawn = match value {
            Some(value) => bar(value, top, middle, text, scale, class),
            None => format!(r#"<text x="{LABEL}" y="{text}">not measured</text>"#),
        };
        write!(
            svg,
            r#"<text x="{}" y="{text}" text-anchor="end">{label}</text>{drawn}"#,
            LABEL - 8.0
        )
        .expect("writing to a String does not fail");
    }
    svg + "</svg>"
}

fn bar(value: &Summary, top: f64, middle: f64, text: f64, scale: f64, class: &str) -> String {
    let [width, low, high] = [value.median, value.min, value.max].map(|value| value * scale);
    let (from, to, end) = (LABEL + low, LABEL + high, LABEL + high.max(width) + 6.0);
    let digits = usize::from(value.max < 100.0) * 2;
    let shown = value.median;
    format!(
        r#"<rect class="{class}" x="{LABEL}" y="{top}" width="{width:.1}" height="{BAR}"/><line x1="{from:.1}" y1="{middle}" x2="{to:.1}" y2="{middle}"/><text x="{end:.1}" y="{text}">{shown:.digits$}</text>"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_bar_fills_the_width() {
        let summary = |value| {
            Some(Summary {
                median: value,
                min: value,
                max: value,
            })
        };
        let svg = bars(&[
            ("a", summary(10.0), "ours".to_owned()),
            ("b", summary(5.0), "criu".to_owned()),
            ("c", None, "criu".to_owned()),
        ]);
        assert!(svg.contains(r#"width="260.0""#), "{svg}");
        assert!(svg.contains(r#"width="130.0""#), "{svg}");
        assert!(svg.contains("not measured"));
    }
}
