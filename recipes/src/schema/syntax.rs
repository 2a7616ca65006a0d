//! What is refused before the YAML parser sees it, because the parser's own words would help nobody, or because a recipe
//! needs none of it: byte order marks, tabs as indentation, anchors, aliases and tags, deep nesting, huge files.

use super::position::Span;
use super::report::Finding;

/// No recipe is near this size; the bound keeps a wrong file from being parsed for minutes.
pub(super) const MAX_BYTES: usize = 64 << 10;
/// Recipes nest two deep.
const MAX_FLOW_DEPTH: usize = 16;

/// Refuses `text` when it is not something that could be a recipe.
pub(super) fn check(text: &str) -> Result<(), Finding> {
    if text.len() > MAX_BYTES {
        return Err(too_large());
    }
    if text.starts_with('\u{feff}') {
        let help =
            "save the file as UTF-8 without byte order mark (its first three bytes are EF BB BF)";
        return Err(Finding::new(
            Some(Span::at(text, 0)),
            "the file begins with a byte order mark",
            help,
        ));
    }
    if text.lines().all(is_blank) {
        let help = "a recipe has at least the keys `name`, `base`, `data` and `budget`";
        return Err(Finding::new(None, "the recipe is empty", help));
    }
    check_lines(text)?;
    Scanner::default().run(text)
}

/// The finding for a file above [`MAX_BYTES`].
pub(super) fn too_large() -> Finding {
    let message = format!("the file is larger than {MAX_BYTES} bytes, which no recipe is");
    Finding::new(
        None,
        message,
        "name the recipe's YAML file, not data or a log",
    )
}

/// Refuses tabs as indentation, and a second document.
fn check_lines(text: &str) -> Result<(), Finding> {
    let (mut offset, mut content) = (0, false);
    for line in text.split_inclusive('\n') {
        let indentation = line.len() - line.trim_start().len();
        if let (Some(tab), false) = (line[..indentation].find('\t'), line.trim().is_empty()) {
            let help = "YAML allows only spaces there: replace the tab by spaces";
            return Err(Finding::new(
                Some(Span::at(text, offset + tab)),
                "a tab in the indentation",
                help,
            ));
        }
        if line.trim_end() == "---" && content {
            let help = "write one recipe per file";
            return Err(Finding::new(
                Some(Span::at(text, offset)),
                "a second YAML document begins here",
                help,
            ));
        }
        content |= !is_blank(line);
        offset += line.len();
    }
    Ok(())
}

fn is_blank(line: &str) -> bool {
    line.trim().is_empty() || line.trim_start().starts_with('#')
}

/// Finds indicators at the beginning of a node, outside comments, quotes and plain text.
#[derive(Default)]
struct Scanner {
    /// Open `[` and `{`.
    depth: usize,
    /// The quote that is open, and the byte at which it was opened.
    quote: Option<(char, usize)>,
    /// Inside a plain scalar, where indicators are text.
    plain: bool,
    comment: bool,
    /// The character before, a space at the beginning of a line.
    before: char,
}

impl Scanner {
    fn run(mut self, text: &str) -> Result<(), Finding> {
        self.before = ' ';
        let mut characters = text.char_indices().peekable();
        while let Some((offset, c)) = characters.next() {
            let after = characters.peek().map_or('\n', |(_, after)| *after);
            if let Some((message, help)) = self.step(offset, c, after) {
                return Err(Finding::new(Some(Span::at(text, offset)), message, help));
            }
            self.before = if c == '\n' { ' ' } else { c };
        }
        if let Some((quote, offset)) = self.quote {
            let help = format!("close it with {quote}");
            return Err(Finding::new(
                Some(Span::at(text, offset)),
                "a quote is opened here and never closed",
                help,
            ));
        }
        Ok(())
    }

    /// Takes one character; says what is wrong with it.
    fn step(
        &mut self,
        offset: usize,
        c: char,
        after: char,
    ) -> Option<(&'static str, &'static str)> {
        if let Some((quote, _)) = self.quote {
            let escaped = quote == '"' && self.before == '\\';
            if c == quote && !escaped {
                self.quote = None;
            }
            return None;
        }
        if c == '\n' {
            (self.comment, self.plain) = (false, false);
        }
        if self.comment || c.is_whitespace() {
            return None;
        }
        if c == '#' && self.before.is_whitespace() {
            self.comment = true;
            return None;
        }
        if self.plain {
            self.leave_plain(c, after);
            return None;
        }
        match c {
            '&' | '*' => Some((
                "anchors and aliases are not allowed in a recipe",
                "write the value out where it is used",
            )),
            '!' => Some((
                "tags are not allowed in a recipe",
                "remove the `!…`: the schema knows every type",
            )),
            '[' | '{' => {
                self.depth += 1;
                (self.depth > MAX_FLOW_DEPTH).then_some((
                    "brackets nested too deep",
                    "a recipe needs one level of them",
                ))
            }
            '\'' | '"' => {
                self.quote = Some((c, offset));
                None
            }
            _ => {
                let indicator = matches!(c, ',' | ']' | '}')
                    || (matches!(c, ':' | '-' | '?') && after.is_whitespace());
                self.plain = !indicator;
                self.close(c);
                None
            }
        }
    }

    /// A plain scalar ends at `: ` and, inside brackets, at what separates or closes them.
    fn leave_plain(&mut self, c: char, after: char) {
        let flow_end = self.depth > 0 && matches!(c, ',' | ']' | '}');
        if flow_end
            || (c == ':'
                && (after.is_whitespace() || (self.depth > 0 && matches!(after, '[' | '{' | ','))))
        {
            self.plain = false;
            self.close(c);
        }
    }

    fn close(&mut self, c: char) {
        if matches!(c, ']' | '}') {
            self.depth = self.depth.saturating_sub(1);
        }
    }
}
