//! Plots as SVG, drawn by hand: bars with their spread.

use std::fmt::Write;

use crate::stats::Summary;

const WIDTH: f64 = 520.0;
const LABEL: f64 = 170.0;
const VALUE: f64 = 90.0;
const BAR: f64 = 16.0;
const STEP: f64 = 24.0;
/// Height of a row of a histogram.
const ROW: f64 = 64.0;

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

/// Times by powers of two of nanoseconds: one row of columns for each of `rows`, all to the same scale of parts.
pub fn histogram(rows: &[(&str, Vec<u64>, String)]) -> String {
    let used =
        |of: fn(&[u64]) -> Option<usize>| rows.iter().filter_map(move |(_, counts, _)| of(counts));
    let first = used(|counts| counts.iter().position(|count| *count > 0)).min();
    let last = used(|counts| counts.iter().rposition(|count| *count > 0)).max();
    let (Some(first), Some(last)) = (first, last) else {
        return String::new();
    };
    let column = (WIDTH - LABEL) / (last - first + 1) as f64;
    let height = ROW * rows.len() as f64 + 20.0;
    let mut svg = format!(
        r#"<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">"#
    );
    for (number, (label, counts, class)) in rows.iter().enumerate() {
        let base = ROW * (number + 1) as f64;
        svg += &format!(
            r#"<text x="{}" y="{}" text-anchor="end">{label}</text>"#,
            LABEL - 8.0,
            base - 8.0
        );
        svg += &columns(counts, first, column, base, class);
    }
    for power in (first..=last).step_by(2) {
        let x = LABEL + column * (power - first) as f64;
        svg += &format!(
            r#"<text x="{x:.1}" y="{}">{}</text>"#,
            height - 4.0,
            time(power)
        );
    }
    svg + "</svg>"
}

/// The same with a title; nothing when there is nothing to show.
pub fn histogram_figure(title: &str, rows: &[(&str, Vec<u64>, String)]) -> String {
    match &histogram(rows)[..] {
        "" => String::new(),
        svg => format!("<figure><figcaption>{title}</figcaption>{svg}</figure>"),
    }
}

fn columns(counts: &[u64], first: usize, column: f64, base: f64, class: &str) -> String {
    let total = counts.iter().sum::<u64>().max(1) as f64;
    let one = |(power, count): (usize, &u64)| {
        let part = *count as f64 / total;
        let height = part * (ROW - 6.0);
        let (x, y) = (LABEL + column * (power - first) as f64, base - height);
        let (width, percent) = (column - 1.0, part * 100.0);
        format!(
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"><title>{percent:.2} % ({count})</title></rect>"#
        )
    };
    let rows = counts.iter().enumerate().skip(first);
    rows.filter(|(_, count)| **count > 0).map(one).collect()
}

/// The lower end of a power's range.
pub fn time(power: usize) -> String {
    let ns = 1_u64 << power;
    match ns {
        0..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{}us", ns / 1_000),
        _ => format!("{}ms", ns / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_begins_and_ends_where_there_is_something() {
        let svg = histogram(&[("a", vec![0, 0, 3, 1], "ours".to_owned())]);
        assert_eq!(svg.matches("<rect").count(), 2);
        assert!(svg.contains("75.00 % (3)"), "{svg}");
        assert_eq!(histogram(&[("a", vec![0, 0], "ours".to_owned())]), "");
    }

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
