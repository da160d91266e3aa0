//! Manual pages out of the documents that say the same: Markdown, and the settings file with its
//! comments. Only what these documents use is understood; nothing else of Markdown is kept.

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// What a page is called.
#[derive(Clone, Copy, Debug)]
pub struct Title<'t> {
    /// Its name: `remit-events`.
    pub name: &'t str,
    /// Its section of the manual.
    pub section: u8,
    /// One line on what it is.
    pub about: &'t str,
    /// Its date, `2026-11-26`.
    pub date: &'t str,
    /// The version of the program.
    pub version: &'t str,
}

/// A page of a Markdown document; the document's own title becomes the page's.
pub fn of_markdown(title: Title<'_>, text: &str) -> String {
    let mut page = Page::new(title);
    page.line(".SH DESCRIPTION");
    let mut writer = Markdown::default();
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        writer.take(&mut page, event);
    }
    page.text
}

/// A page of the settings file: comments become text, keys what is set in type.
pub fn of_settings(title: Title<'_>, text: &str) -> String {
    let mut page = Page::new(title);
    page.line(".SH DESCRIPTION");
    let mut keys = false;
    // A comment belongs to what follows it.
    let mut comment: Vec<&str> = Vec::new();
    for line in text.lines() {
        if let Some(table) = line.strip_prefix('[') {
            page.line(&format!(".SH [{}", escape(table)));
            page.paragraph(&comment.join(" "));
            comment.clear();
            keys = true;
        } else if let Some(words) = line.strip_prefix("# ") {
            comment.push(words);
        } else if let Some(key) = line.strip_prefix('#').filter(|key| !key.is_empty()) {
            page.line(".TP");
            page.line(&format!("\\fB{}\\fR", escape(key)));
            // A second key under one comment.
            let words = if comment.is_empty() {
                "The same.".to_owned()
            } else {
                comment.join(" ")
            };
            page.line(&inline(&words));
            comment.clear();
        } else if !keys || line == "#" {
            page.paragraph(&comment.join(" "));
            comment.clear();
        }
    }
    page.line(".SH SEE ALSO");
    page.line(".BR remit (1),\n.BR remit\\-registry (5)");
    page.text
}

struct Page {
    text: String,
}

impl Page {
    fn new(title: Title<'_>) -> Self {
        let Title {
            name,
            section,
            about,
            date,
            version,
        } = title;
        let mut page = Self {
            text: String::new(),
        };
        let upper = name.to_uppercase();
        page.line(&format!(
            ".TH {} {section} {date} \"remit {version}\" \"Remit\"",
            escape(&upper)
        ));
        // No hyphens into names that are to be copied, and lines that need not fill.
        page.line(".nh\n.ad l");
        page.line(".SH NAME");
        page.line(&format!("{} \\- {}", escape(name), escape(about)));
        page
    }

    fn line(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    fn paragraph(&mut self, words: &str) {
        if !words.is_empty() {
            self.line(".PP");
            self.line(&inline(words));
        }
    }
}

/// Text with `code` in it.
fn inline(words: &str) -> String {
    let mut out = String::new();
    for (number, part) in words.split('`').enumerate() {
        if number % 2 == 1 {
            out.push_str(&format!("\\fB{}\\fR", escape(part)));
        } else {
            out.push_str(&escape(part));
        }
    }
    guard(&out)
}

/// What troff would take for its own.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\\' => out.push_str("\\e"),
            '-' => out.push_str("\\-"),
            '\'' => out.push_str("\\(aq"),
            '`' => out.push_str("\\(ga"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            other => out.push(other),
        }
    }
    out
}

/// A line that begins like a request is none.
fn guard(line: &str) -> String {
    if line.starts_with(['.', '\'']) {
        format!("\\&{line}")
    } else {
        line.to_owned()
    }
}

/// Where in a document the writer is.
#[derive(Default)]
struct Markdown {
    /// The line being put together.
    line: String,
    /// The open lists, with the next number of those that have numbers.
    lists: Vec<Option<u64>>,
    code: bool,
    /// The heading that is being read: its text is collected.
    heading: Option<HeadingLevel>,
    /// Headings of the table's columns, and whether they are being read.
    columns: Vec<String>,
    in_head: bool,
    cell: usize,
    /// The first paragraph of an item goes beside its mark.
    item: bool,
}

impl Markdown {
    fn take(&mut self, page: &mut Page, event: Event<'_>) {
        match event {
            Event::Start(tag) => self.start(page, &tag),
            Event::End(tag) => self.end(page, tag),
            Event::Text(text) if self.code => {
                for line in text.lines() {
                    page.line(&guard(&escape(line)));
                }
            }
            Event::Text(text) => self.line.push_str(&escape(&text)),
            Event::Code(text) => {
                self.line.push_str(&format!("\\fB{}\\fR", escape(&text)));
            }
            Event::SoftBreak | Event::HardBreak => self.line.push(' '),
            // Documents have no HTML, notes, tasks or rules.
            _ => {}
        }
    }

    fn start(&mut self, page: &mut Page, tag: &Tag<'_>) {
        match tag {
            Tag::Paragraph if !self.item => page.line(".PP"),
            Tag::Heading { level, .. } => self.heading = Some(*level),
            Tag::CodeBlock(CodeBlockKind::Fenced(_) | CodeBlockKind::Indented) => {
                self.flush(page);
                self.code = true;
                page.line(".PP\n.RS 4\n.EX");
            }
            Tag::List(first) => {
                self.flush(page);
                if !self.lists.is_empty() {
                    page.line(".RS 4");
                }
                self.lists.push(*first);
            }
            Tag::Item => {
                match self.lists.last_mut() {
                    Some(Some(number)) => {
                        page.line(&format!(".IP {number}. 4"));
                        *number += 1;
                    }
                    _ => page.line(".IP \\(bu 2"),
                }
                self.item = true;
            }
            Tag::Table(_) => self.columns.clear(),
            Tag::TableHead => self.in_head = true,
            Tag::TableRow => self.cell = 0,
            Tag::Emphasis => self.line.push_str("\\fI"),
            Tag::Strong => self.line.push_str("\\fB"),
            _ => {}
        }
    }

    fn end(&mut self, page: &mut Page, tag: TagEnd) {
        match tag {
            TagEnd::Paragraph => {
                self.flush(page);
                self.item = false;
            }
            TagEnd::Heading(_) => {
                let words = std::mem::take(&mut self.line);
                match self.heading.take() {
                    // The page has a title of its own.
                    Some(HeadingLevel::H1) | None => {}
                    Some(HeadingLevel::H2) => page.line(&format!(".SH {words}")),
                    Some(_) => page.line(&format!(".SS {words}")),
                }
            }
            TagEnd::CodeBlock => {
                self.code = false;
                page.line(".EE\n.RE");
            }
            TagEnd::List(_) => {
                self.lists.pop();
                if !self.lists.is_empty() {
                    page.line(".RE");
                }
            }
            TagEnd::Item => {
                self.flush(page);
                self.item = false;
            }
            TagEnd::TableHead => self.in_head = false,
            TagEnd::TableCell => self.cell(page),
            TagEnd::Emphasis | TagEnd::Strong => self.line.push_str("\\fR"),
            _ => {}
        }
    }

    /// A row is an entry of its own: the first cell, and the others below with their columns' names.
    fn cell(&mut self, page: &mut Page) {
        let words = std::mem::take(&mut self.line);
        if self.in_head {
            self.columns.push(words);
            return;
        }
        let column = self.columns.get(self.cell).cloned().unwrap_or_default();
        match self.cell {
            0 => page.line(&format!(".TP\n{}", guard(&words))),
            // Two columns speak for themselves.
            1 if self.columns.len() == 2 => page.line(&guard(&words)),
            at => {
                if at > 1 {
                    page.line(".br");
                }
                page.line(&guard(&format!("\\fI{column}:\\fR {words}")));
            }
        }
        self.cell += 1;
    }

    fn flush(&mut self, page: &mut Page) {
        let words = std::mem::take(&mut self.line);
        if !words.trim().is_empty() {
            page.line(&guard(words.trim()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TITLE: Title<'_> = Title {
        name: "remit-x",
        section: 7,
        about: "what it is",
        date: "2026-11-26",
        version: "0.1.0",
    };

    fn body(page: &str) -> &str {
        page.split_once(".SH DESCRIPTION\n").unwrap().1
    }

    #[test]
    fn markdown_becomes_a_page() {
        let text = "# Title\n\nSome `code-x` and\n*more*.\n\n## A part\n\n- one\n- two\n\n\
                    | key | default | means |\n|---|---|---|\n| `a` | b | .c |\n\n```toml\n.x = 'y'\n```\n";
        let page = of_markdown(TITLE, text);
        assert!(page.starts_with(".TH REMIT\\-X 7 2026-11-26 \"remit 0.1.0\" \"Remit\"\n"));
        assert!(page.contains("remit\\-x \\- what it is\n"));
        assert_eq!(
            body(&page),
            ".PP\nSome \\fBcode\\-x\\fR and \\fImore\\fR.\n.SH A part\n.IP \\(bu 2\none\n\
             .IP \\(bu 2\ntwo\n.TP\n\\fBa\\fR\n\\fIdefault:\\fR b\n.br\n\\fImeans:\\fR .c\n\
             .PP\n.RS 4\n.EX\n\\&.x = \\(aqy\\(aq\n.EE\n.RE\n"
        );
    }

    #[test]
    fn settings_become_a_page() {
        let text = "# About.\n# More.\n#\n# End.\n\n# A table.\n[paths]\n# What `a` is.\n#a = \"-\"\n\
                    #b = 1\n";
        let page = of_settings(TITLE, text);
        assert!(body(&page).starts_with(
            ".PP\nAbout. More.\n.PP\nEnd.\n.SH [paths]\n.PP\nA table.\n.TP\n\\fBa = \"\\-\"\\fR\n\
             What \\fBa\\fR is.\n.TP\n\\fBb = 1\\fR\nThe same.\n"
        ));
    }
}
