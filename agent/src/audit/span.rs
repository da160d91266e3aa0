//! Lengths of time as people write them: `5s`, `10m`, `190d`.

use std::time::Duration;

/// Units, longest first, with their milliseconds.
const UNITS: [(&str, u64); 6] = [
    ("ms", 1),
    ("w", 7 * 86_400_000),
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
];

/// Why a text is no length of time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// No number, or no unit behind it.
    #[error(
        "`{0}` is not a duration such as \"5s\", \"10m\" or \"190d\" (units: ms, s, m, h, d, w)"
    )]
    Syntax(String),
    /// More milliseconds than 64 bits hold.
    #[error("`{0}` is too long a duration")]
    TooLong(String),
}

/// Reads one whole number with one unit.
pub fn parse(text: &str) -> Result<Duration, SpanError> {
    let syntax = || SpanError::Syntax(text.to_owned());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let Some((_, millis)) = UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(syntax());
    };
    if number.is_empty() {
        return Err(syntax());
    }
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(*millis))
        .map(Duration::from_millis)
        .ok_or_else(|| SpanError::TooLong(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_and_a_unit_are_a_duration() {
        for (text, millis) in [
            ("250ms", 250),
            ("5s", 5_000),
            ("10m", 600_000),
            ("1h", 3_600_000),
            ("190d", 190 * 86_400_000),
            ("2w", 14 * 86_400_000),
            ("0s", 0),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn anything_else_is_not() {
        for text in [
            "", "5", "s", "-5s", "5 s", "1.5h", "5S", "1h30m", "+1s", "٣s",
        ] {
            assert!(matches!(parse(text), Err(SpanError::Syntax(_))), "{text}");
        }
        assert!(matches!(
            parse("99999999999999999d"),
            Err(SpanError::TooLong(_))
        ));
    }
}
