//! The ratios as a plot, in an SVG written by hand: a line for each case, further right is faster than its reference.

use std::fmt::Write as _;

use crate::measure::{Goal, Row, Unit};

/// Points for a line, for the names on the left, and for the plot.
const LINE: f64 = 16.0;
const NAMES: f64 = 390.0;
const PLOT: f64 = 420.0;
/// What the plot shows of the ratios, as powers of two: what is beyond is drawn at the edge.
const LEAST: f64 = -5.0;
const MOST: f64 = 2.0;

/// Draws the rows of all cases that have something to be compared.
pub fn draw(rows: &[Row]) -> String {
    let mut cases: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| row.goals.iter().any(|(goal, _)| matches!(goal, Goal::Ratio(_)))) {
        if cases.last() != Some(&row.case.as_str()) {
            cases.push(&row.case);
        }
    }
    let height = LINE * (cases.len() + 3) as f64;
    let width = NAMES + PLOT + 20.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    let legend = [("#06c", "this project"), ("#e80", "others"), ("#393", "nothing of ours: the floor"), ("#c00", "the target")];
    for (index, (colour, meaning)) in legend.iter().enumerate() {
        let x = 10.0 + 190.0 * index as f64;
        let _ = writeln!(
            svg,
            "<circle cx=\"{x}\" cy=\"10\" r=\"4\" fill=\"{colour}\"/><text x=\"{}\" y=\"14\">{meaning}</text>",
            x + 9.0
        );
    }
    let bottom = height - LINE * 1.2;
    for power in LEAST as i32..=MOST as i32 {
        let x = place(f64::from(power).exp2());
        let (colour, label) = if power == 0 { ("#000", "1: the reference".into()) } else { ("#ccc", show_power(power)) };
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {LINE}V{bottom:.1}\" stroke=\"{colour}\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 12.0
        );
    }
    for (index, case) in cases.iter().enumerate() {
        let y = LINE * (index as f64 + 1.7);
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{case}</text>", NAMES - 8.0, y + 4.0);
        for row in rows.iter().filter(|row| row.case == *case) {
            mark(&mut svg, row, y);
        }
    }
    svg + "</svg>\n"
}

fn show_power(power: i32) -> String {
    if power < 0 { format!("1/{}", 1 << -power) } else { (1 << power).to_string() }
}

/// How much faster than the reference: a time counts the other way round.
fn speed(ratio: f64, unit: Unit) -> f64 {
    if unit == Unit::Seconds { 1.0 / ratio } else { ratio }
}

fn place(speed: f64) -> f64 {
    let power = speed.log2();
    let power = if power.is_nan() { LEAST } else { power.clamp(LEAST, MOST) };
    NAMES + (power - LEAST) / (MOST - LEAST) * PLOT
}

fn mark(svg: &mut String, row: &Row, y: f64) {
    let x = place(speed(row.ratio[0], row.unit));
    let target = row.goals.iter().find_map(|(goal, _)| if let Goal::Ratio(ratio) = goal { Some(*ratio) } else { None });
    if let Some(target) = target {
        let at = place(speed(target, row.unit));
        let _ = writeln!(svg, "<path d=\"M{at:.1} {:.1}v12\" stroke=\"#c00\" stroke-width=\"2\"/>", y - 6.0);
    }
    let (colour, radius) = match (row.is_floor, target) {
        (true, _) => ("#393", 3),
        (_, Some(_)) => ("#06c", 4),
        // The reference is the line at 1.
        _ if row.ratio == [1.0; 3] => return,
        _ => ("#e80", 3),
    };
    let _ = writeln!(
        svg,
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{colour}\"><title>{}: {:.2}</title></circle>",
        row.subject, row.ratio[0]
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Sample, Subject, alternate};

    #[test]
    fn faster_is_further_right_whatever_the_unit() {
        assert!(place(speed(0.5, Unit::Seconds)) > place(1.0) && place(speed(0.5, Unit::PerSecond)) < place(1.0));
        assert_eq!((place(1e-9), place(1e9)), (NAMES, NAMES + PLOT));
    }

    #[test]
    fn every_case_with_a_target_is_drawn() {
        let one = |name: &str, value| Subject::new(name, move || Ok(Sample::of(value)));
        let mut subjects = [one("reference", 2.0), one("own", 1.0).with_target(0.8), one("other", 3.0)];
        let rows = alternate("a case", Unit::Seconds, 3, &mut subjects).unwrap();
        let svg = draw(&rows);
        assert!(svg.contains(">a case<") && svg.contains("own: 0.50") && svg.contains("other: 1.50"), "{svg}");
        assert!(!svg.contains("<title>reference"));
    }
}
