//! Metrics: the one answer that is no JSON.

/// Metrics as a scraper reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exposition {
    /// The text's media type.
    pub content_type: &'static str,
    /// The text.
    pub text: String,
}
