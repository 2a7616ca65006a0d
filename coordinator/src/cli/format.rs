//! Numbers, times and tables for people.

use jiff::{Timestamp, tz::TimeZone};

/// Three significant digits with a decimal prefix: `999`, `12.3 k`, `1.5 M`, `2 T`.
pub fn short(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T", "P"], "B")
}

/// A count of tokens: `1.5 M tokens`, `100 B tokens`.
pub fn tokens(count: u64) -> String {
    format!(
        "{} {}",
        short(count as f64),
        if count == 1 { "token" } else { "tokens" }
    )
}

/// A speed in tokens per second: `12.3 k tok/s`; a dash before it is known.
pub fn rate(tokens_per_second: f64) -> String {
    if tokens_per_second > 0.0 {
        format!("{} tok/s", short(tokens_per_second))
    } else {
        "-".to_owned()
    }
}

/// Binary sizes: `17 B`, `1.5 KiB`, `29.1 GiB`.
pub fn bytes(count: u64) -> String {
    scaled(
        count as f64,
        1024.0,
        &["B", "KiB", "MiB", "GiB", "TiB", "PiB"],
        "GiB",
    )
}

/// `value` in the largest unit that leaves it at least 1. The 10^9 prefix is `giga`: people count
/// tokens in billions and memory in GiB.
fn scaled(value: f64, base: f64, units: &[&str], giga: &str) -> String {
    if !value.is_finite() {
        return "-".to_owned();
    }
    let mut value = value;
    let mut unit = 0;
    // 999.5 and more would round to four digits.
    while unit + 1 < units.len() && value.abs() >= base.min(999.5) {
        value /= base;
        unit += 1;
    }
    let name = if unit == 3 { giga } else { units[unit] };
    let number = three_digits(value);
    if name.is_empty() {
        number
    } else {
        format!("{number} {name}")
    }
}

/// At most three significant digits, without trailing zeros.
fn three_digits(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// An exact count with its thousands apart: `47,684`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// An exact count with its noun: `1 worker`, `2 workers`.
pub fn counted(count: u64, noun: &str) -> String {
    format!(
        "{} {noun}{}",
        grouped(count),
        if count == 1 { "" } else { "s" }
    )
}

/// A duration in its two largest units: `42 s`, `3 min 5 s`, `2 h 10 min`, `12 d 3 h`. A dash when
/// unknown (negative or not a number).
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_owned();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A moment in local time: `2026-11-23 20:02:59`; a dash for 0.
pub fn moment(unix_ms: u64) -> String {
    moment_in(unix_ms, TimeZone::system())
}

fn moment_in(unix_ms: u64, zone: TimeZone) -> String {
    match i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
    {
        Some(at) if unix_ms > 0 => at
            .to_zoned_datetime(zone)
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
        _ => "-".to_owned(),
    }
}

/// A loss or norm with four digits after the point; a dash when it is not a number.
pub fn metric(value: f64) -> String {
    if value.is_finite() {
        format!("{value:.4}")
    } else {
        "-".to_owned()
    }
}

/// A learning rate: `2.9e-5`.
pub fn learning_rate(value: f64) -> String {
    let text = format!("{value:.3e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) if mantissa.contains('.') => {
            format!(
                "{}e{exponent}",
                mantissa.trim_end_matches('0').trim_end_matches('.')
            )
        }
        _ => text,
    }
}

/// Bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Rows of text under headers, columns aligned; headers that begin with `>` are right-aligned.
pub struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(headers: &[&'static str]) -> Table {
        Table {
            headers: headers.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row: one cell per header.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The lines, each with its newline and without trailing spaces.
    pub fn render(&self) -> String {
        let titles: Vec<&str> = self
            .headers
            .iter()
            .map(|h| h.trim_start_matches('>'))
            .collect();
        let widths: Vec<usize> = titles
            .iter()
            .enumerate()
            .map(|(column, title)| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                cells
                    .map(|cell| cell.chars().count())
                    .chain([title.chars().count()])
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        let render = |cells: Vec<&str>, text: &mut String| {
            let mut line = String::new();
            for ((cell, width), header) in cells.iter().zip(&widths).zip(&self.headers) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
                if header.starts_with('>') {
                    line.push_str(&padding);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    line.push_str(&padding);
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        };
        // Facts without titles need no header line.
        if titles.iter().any(|title| !title.is_empty()) {
            render(titles.clone(), &mut text);
        }
        for row in &self.rows {
            render(row.iter().map(String::as_str).collect(), &mut text);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_keep_three_digits() {
        for (value, text) in [
            (0.0, "0"),
            (7.0, "7"),
            (999.0, "999"),
            (1000.0, "1 k"),
            (12_345.0, "12.3 k"),
            (999_499.0, "999 k"),
            (999_999.0, "1 M"),
            (1_500_000.0, "1.5 M"),
            (100e9, "100 B"),
            (2e12, "2 T"),
            (f64::NAN, "-"),
        ] {
            assert_eq!(short(value), text, "{value}");
        }
    }

    #[test]
    fn sizes_are_binary() {
        for (count, text) in [
            (17, "17 B"),
            (1023, "1 KiB"),
            (1536, "1.5 KiB"),
            (31 << 30, "31 GiB"),
            (5 << 40, "5 TiB"),
        ] {
            assert_eq!(bytes(count), text, "{count}");
        }
    }

    #[test]
    fn thousands_stand_apart() {
        for (count, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (47_684, "47,684"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(count), text);
        }
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(counted(1, "file"), "1 file");
        assert_eq!(counted(1200, "file"), "1,200 files");
    }

    #[test]
    fn durations_show_two_units() {
        for (seconds, text) in [
            (-1.0, "-"),
            (f64::INFINITY, "-"),
            (0.4, "0 s"),
            (59.6, "1 min 0 s"),
            (185.0, "3 min 5 s"),
            (7800.0, "2 h 10 min"),
            (1_047_600.0, "12 d 3 h"),
        ] {
            assert_eq!(duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn moments_are_dates() {
        assert_eq!(
            moment_in(1_795_464_179_000, TimeZone::UTC),
            "2026-11-23 20:02:59"
        );
        assert_eq!(moment_in(0, TimeZone::UTC), "-");
        assert_eq!(moment_in(u64::MAX, TimeZone::UTC), "-");
    }

    #[test]
    fn learning_rates_are_short() {
        assert_eq!(learning_rate(3e-5), "3e-5");
        assert_eq!(learning_rate(2.95e-5), "2.95e-5");
        assert_eq!(learning_rate(0.0), "0e0");
    }

    #[test]
    fn tables_align() {
        let mut table = Table::new(&["RUN", ">STEP", "WHY"]);
        table.row(["a".to_owned(), "1,000".to_owned(), String::new()]);
        table.row(["long".to_owned(), "2".to_owned(), "x".to_owned()]);
        assert_eq!(
            table.render(),
            "RUN    STEP  WHY\na     1,000\nlong      2  x\n"
        );
    }

    #[test]
    fn bytes_become_hex() {
        assert_eq!(hex(&[0, 0xff, 0x1a]), "00ff1a");
    }
}
