//! Times and names as people read them. Pure.

/// RFC 3339 in UTC, in whole seconds.
pub(super) fn time(millis: i64) -> String {
    jiff::Timestamp::from_millisecond(millis)
        .map_or_else(|_| millis.to_string(), |time| format!("{time:.0}"))
}

/// The same, or `never` where there is no end.
pub(super) fn end(millis: Option<i64>) -> String {
    millis.map_or_else(|| "never".to_owned(), time)
}

/// `FILE:LINE`, or where there is no file, that it is built in.
pub(super) fn place(file: &str, line: u32) -> String {
    if file.is_empty() {
        "built in".to_owned()
    } else {
        format!("{file}:{line}")
    }
}

/// `1 file`, `2 files`.
pub(super) fn count(number: u64, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

/// A span: `3 s`, `5 min`, `7 h`, `4 d`. Cut, not rounded.
pub(super) fn span(millis: i64) -> String {
    match millis.max(0) / 1_000 {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7_200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_in_seconds() {
        assert_eq!(time(1_793_836_800_123), "2026-11-05T00:00:00Z");
        assert_eq!(end(None), "never");
        assert_eq!(time(i64::MAX), i64::MAX.to_string());
    }

    #[test]
    fn spans_have_one_unit() {
        let spans = [-5, 3_999, 119_000, 120_000, 7_200_000, 172_800_000];
        let said = spans.map(span);
        assert_eq!(said, ["0 s", "3 s", "119 s", "2 min", "2 h", "2 d"]);
    }

    #[test]
    fn numbers_agree_with_their_things() {
        assert_eq!(count(1, "file"), "1 file");
        assert_eq!(count(0, "file"), "0 files");
    }
}
