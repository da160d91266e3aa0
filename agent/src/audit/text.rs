//! Bytes that an agent chose, made harmless. What a process calls itself ends up in files, in
//! terminals and in other people's tools, so nothing that such a reader could take for a command
//! survives: no control characters, no escape sequences, nothing that reorders or hides text.

/// Longest process name kept, in bytes: the kernel's own bound is 15.
pub const NAME_BYTES: usize = 64;
/// Longest path kept, in bytes: PATH_MAX.
pub const PATH_BYTES: usize = 4_096;
/// Longest command line kept, in bytes.
pub const COMMAND_BYTES: usize = 1_024;

/// `bytes` as text: invalid UTF-8 and control characters become `\xNN`, characters that reorder
/// or hide text `\u{NN}`, and beyond `most` bytes of output there is only a `…`. Doing it twice
/// changes nothing.
pub fn clean(bytes: &[u8], most: usize) -> String {
    let mut out = String::with_capacity(bytes.len().min(most));
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            let fits = if c.is_control() && (c as u32) < 0x80 {
                push(&mut out, &format!("\\x{:02x}", c as u32), most)
            } else if c.is_control() || hides(c) {
                push(&mut out, &format!("\\u{{{:x}}}", c as u32), most)
            } else {
                push(&mut out, c.encode_utf8(&mut [0; 4]), most)
            };
            if !fits {
                return out;
            }
        }
        for byte in chunk.invalid() {
            if !push(&mut out, &format!("\\x{byte:02x}"), most) {
                return out;
            }
        }
    }
    out
}

/// Arguments with spaces in place of the NULs between them.
pub fn spaced(text: &str) -> String {
    text.replace('\0', " ")
}

/// The bytes up to the first NUL.
pub fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Appends `piece`, or marks the cut where it does not fit.
fn push(out: &mut String, piece: &str, most: usize) -> bool {
    const CUT: &str = "…";
    if out.len() + piece.len() <= most {
        out.push_str(piece);
        return true;
    }
    while !out.is_empty() && out.len() + CUT.len() > most {
        out.pop();
    }
    if out.len() + CUT.len() <= most {
        out.push_str(CUT);
    }
    false
}

/// Characters that are not control characters and yet change how the text around them is shown:
/// line separators, direction overrides, zero width, tags (Unicode Standard Annex 9; Unicode
/// Technical Report 36).
const fn hides(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_that_drives_a_terminal_survives() {
        assert_eq!(
            clean(b"\x1b[2J\x1b]0;pwned\x07", 99),
            "\\x1b[2J\\x1b]0;pwned\\x07"
        );
        assert_eq!(clean(b"a\r\nb\tc\0", 99), "a\\x0d\\x0ab\\x09c\\x00");
        assert_eq!(clean("\u{9b}31m".as_bytes(), 99), "\\u{9b}31m");
        assert_eq!(
            clean("exe\u{202e}gpj.x".as_bytes(), 99),
            "exe\\u{202e}gpj.x"
        );
        assert_eq!(clean(b"caf\xc3\xa9 \xff\xc3", 99), "café \\xff\\xc3");
    }

    #[test]
    fn the_cut_is_marked_and_inside_the_bound() {
        assert_eq!(clean(b"abcdefgh", 8), "abcdefgh");
        assert_eq!(clean(b"abcdefghi", 8), "abcde…");
        assert_eq!(clean("éééé".as_bytes(), 7), "éé…");
        assert_eq!(clean(b"abc", 2), "");
    }

    #[test]
    fn arguments_are_spaced_apart() {
        assert_eq!(spaced("python3\0-m\0recon"), "python3 -m recon");
        assert_eq!(until_nul(b"curl\0junk\0"), b"curl");
    }

    proptest! {
        #[test]
        fn any_bytes_come_out_harmless_bounded_and_stable(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            most in 0_usize..100,
        ) {
            let once = clean(&bytes, most);
            prop_assert!(once.len() <= most);
            prop_assert!(!once.chars().any(|c| c.is_control() || hides(c)));
            prop_assert_eq!(&clean(once.as_bytes(), most), &once);
        }
    }
}
