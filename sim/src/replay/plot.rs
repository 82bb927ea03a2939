//! Plots as SVG, and a page that needs nothing else: hosts that are needed and that were there, and the longest waits.

use std::fmt::Write as _;

use super::{measure::BINS, report::Report};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 56.0;
const HOSTS_HEIGHT: f64 = 260.0;
const WAITS_HEIGHT: f64 = 140.0;
const GAP: f64 = 46.0;
const TOP: f64 = 40.0;
/// Told apart also by those who see few colours (Okabe and Ito, 2008).
const COLORS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999"];

/// Two diagrams over the trace's span: hosts, and the longest wait of the tasks that arrived at each point.
#[must_use]
pub fn svg(report: &Report, title: &str) -> String {
    let rows: Vec<_> = report.rows.iter().filter(|row| !row.points.is_empty()).collect();
    let legend = TOP + HOSTS_HEIGHT + GAP + WAITS_HEIGHT + 40.0;
    let height = legend + 22.0 * (rows.len() as f64 + 1.0) + 10.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {height:.0}\" width=\"{w}\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>\n",
        escaped(title),
        w = WIDTH + LEFT + 20.0,
    );
    // A rival that overshoots would flatten all others.
    let needed = report.demand.iter().copied().fold(1.0, f64::max);
    let own = rows.first().map_or(0.0, |row| row.points.iter().map(|point| point.hosts).fold(0.0, f64::max));
    let most_hosts = needed.max(own) * 1.3;
    let hosts = Frame { top: TOP, height: HOSTS_HEIGHT, most: most_hosts };
    hosts.axes(&mut out, "hosts", report);
    hosts.area(&mut out, &report.demand);
    for (at, row) in rows.iter().enumerate().rev() {
        hosts.line(&mut out, row.points.iter().map(|point| point.hosts), COLORS[at % COLORS.len()]);
    }
    let waits = rows.iter().flat_map(|row| row.points.iter().map(|point| point.wait.0 as f64 / 1_000.0));
    let longest = waits.fold(1.0, f64::max).min(600.0);
    let waits = Frame { top: TOP + HOSTS_HEIGHT + GAP, height: WAITS_HEIGHT, most: longest };
    waits.axes(&mut out, "longest wait, s (cut at 600)", report);
    for (at, row) in rows.iter().enumerate().rev() {
        waits.line(&mut out, row.points.iter().map(|point| point.wait.0 as f64 / 1_000.0), COLORS[at % COLORS.len()]);
    }
    let mut y = legend;
    key(&mut out, y, "#ddd", "needed if nobody waits (most within the point)");
    for (at, row) in rows.iter().enumerate() {
        y += 22.0;
        key(&mut out, y, COLORS[at % COLORS.len()], &row.name);
    }
    out.push_str("</svg>\n");
    out
}

struct Frame {
    top: f64,
    height: f64,
    most: f64,
}

impl Frame {
    fn y(&self, value: f64) -> f64 {
        self.top + self.height * (1.0 - (value / self.most).min(1.0))
    }

    fn axes(&self, out: &mut String, name: &str, report: &Report) {
        let bottom = self.top + self.height;
        let hours = report.span.0 as f64 / 3_600_000.0;
        write_line(out, format_args!("<text x=\"4\" y=\"{:.0}\">{name}</text>", self.top - 6.0));
        for step in 0..=4 {
            let value = self.most * f64::from(step) / 4.0;
            let y = self.y(value);
            write_line(
                out,
                format_args!("<path d=\"M{LEFT} {y:.1}H{:.0}\" stroke=\"#eee\" fill=\"none\"/>", LEFT + WIDTH),
            );
            write_line(
                out,
                format_args!(
                    "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{value:.0}</text>",
                    LEFT - 6.0,
                    y + 4.0
                ),
            );
        }
        for step in 0..=8 {
            let x = LEFT + WIDTH * f64::from(step) / 8.0;
            let at = hours * f64::from(step) / 8.0;
            let text = if hours > 96.0 { format!("{:.1} d", at / 24.0) } else { format!("{at:.1} h") };
            write_line(
                out,
                format_args!("<text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{text}</text>", bottom + 16.0),
            );
        }
    }

    fn area(&self, out: &mut String, values: &[f64]) {
        let mut path = format!("M{LEFT} {:.1}", self.y(0.0));
        for (at, value) in values.iter().enumerate() {
            let x = LEFT + WIDTH * at as f64 / BINS as f64;
            // A string takes all that is written to it.
            let _ = write!(path, "L{x:.1} {y:.1}h{:.1}", WIDTH / BINS as f64, y = self.y(*value));
        }
        write_line(out, format_args!("<path d=\"{path}L{:.1} {:.1}Z\" fill=\"#ddd\"/>", LEFT + WIDTH, self.y(0.0)));
    }

    fn line(&self, out: &mut String, values: impl Iterator<Item = f64>, color: &str) {
        let mut path = String::new();
        for (at, value) in values.enumerate() {
            let x = LEFT + WIDTH * (at as f64 + 0.5) / BINS as f64;
            let _ = write!(path, "{}{x:.1} {:.1}", if at == 0 { 'M' } else { 'L' }, self.y(value));
        }
        write_line(
            out,
            format_args!(
                "<path d=\"{path}\" stroke=\"{color}\" fill=\"none\" stroke-width=\"1.2\" stroke-opacity=\"0.85\"/>"
            ),
        );
    }
}

fn key(out: &mut String, y: f64, color: &str, name: &str) {
    write_line(
        out,
        format_args!("<rect x=\"{LEFT}\" y=\"{:.0}\" width=\"24\" height=\"10\" fill=\"{color}\"/>", y - 9.0),
    );
    write_line(out, format_args!("<text x=\"{:.0}\" y=\"{y:.0}\">{}</text>", LEFT + 32.0, escaped(name)));
}

fn write_line(out: &mut String, line: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(line);
    out.push('\n');
}

/// A page with the plots and a table, without a script and without anything from elsewhere.
#[must_use]
pub fn html(report: &Report, title: &str, table: &[Vec<String>]) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n<style>\
         body{{font-family:sans-serif;max-width:70em;margin:2em auto}}table{{border-collapse:collapse}}\
         td,th{{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}}td:first-child,th:first-child{{text-align:left}}\
         svg{{max-width:100%;height:auto}}</style></head>\n<body><h1>{title}</h1>\n{svg}\n<table>\n",
        title = escaped(title),
        svg = svg(report, title),
    );
    for (at, row) in table.iter().enumerate() {
        let tag = if at == 0 { "th" } else { "td" };
        let cells: String = row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell))).collect();
        write_line(&mut out, format_args!("<tr>{cells}</tr>"));
    }
    out.push_str("</table></body></html>\n");
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
