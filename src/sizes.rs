//! Sizes as people write and read them.

/// Reads a size: plain bytes, or with a binary suffix K, M, G or T (`10G`, `10GiB`).
pub fn parse(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let expected = "expected a whole number, then K, M, G or T or nothing";
    if number.is_empty() {
        return Err(expected.to_owned());
    }
    let given = &text[number.len()..];
    let shift = match given.to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("unknown suffix \"{given}\", expected K, M, G or T")),
    };
    let value: u64 = number.parse().map_err(|_| expected.to_owned())?;
    value.checked_mul(1 << shift).ok_or_else(|| "is too large".to_owned())
}

/// A size for people: `40 MiB (41943040 bytes)`.
pub fn show(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..units.len()).rev().find(|&unit| bytes >> (10 * unit) > 0).unwrap_or(0);
    if unit == 0 {
        return format!("{bytes} bytes");
    }
    let value = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    let digits = if bytes % (1 << (10 * unit)) == 0 { 0 } else { 1 };
    format!("{value:.digits$} {} ({bytes} bytes)", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_contract() {
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("10G"), Ok(10 << 30));
        assert_eq!(parse("2mib"), Ok(2 << 20));
        assert!(parse("").is_err() && parse("G").is_err() && parse("1X").is_err() && parse("-1").is_err());
        assert!(parse("99999999T").is_err());
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(show(500), "500 bytes");
        assert_eq!(show(40 << 20), "40 MiB (41943040 bytes)");
        assert_eq!(show(1536), "1.5 KiB (1536 bytes)");
    }
}
