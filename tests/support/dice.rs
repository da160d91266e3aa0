//! Chance that can be repeated: the same seed makes the same policies and questions.

use anyhow::{Context as _, Result};

/// A splitmix64 generator.
pub struct Dice(u64);

impl Dice {
    /// Starts from the number in the environment variable `variable`, or else from the clock.
    pub fn new(variable: &str) -> Result<(Self, u64)> {
        let seed = match std::env::var(variable) {
            Ok(text) => text
                .parse()
                .with_context(|| format!("{variable} is no number"))?,
            Err(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)?
                .subsec_nanos()
                .into(),
        };
        Ok((Self(seed), seed))
    }

    /// 64 bits.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// 128 bits.
    pub fn wide(&mut self) -> u128 {
        u128::from(self.roll()) << 64 | u128::from(self.roll())
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        (self.roll() % end as u64) as usize
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}
