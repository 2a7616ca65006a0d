//! Stop strings: where a text ends that comes in pieces.

/// Looks for stop strings in a text, and holds back what may be the beginning of one.
///
/// The text ends before the stop string that is complete first, and before the longest one of those complete at the same place;
/// so where it ends does not depend on how it was cut into pieces.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    strings: Vec<String>,
    held: String,
}

/// What is known of a text after a piece of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Text that belongs to the result whatever comes.
    pub text: String,
    /// Whether a stop string followed: the text is over.
    pub stopped: bool,
}

impl StopMatcher {
    /// Ends a text before any of these. Empty ones are never found.
    pub fn new(strings: Vec<String>) -> StopMatcher {
        StopMatcher {
            strings: strings
                .into_iter()
                .filter(|string| !string.is_empty())
                .collect(),
            held: String::new(),
        }
    }

    /// Takes a piece of the text.
    pub fn push(&mut self, piece: &str) -> Cut {
        self.held += piece;
        let found = self.strings.iter().filter_map(|string| {
            let start = self.held.find(string)?;
            Some((start + string.len(), start))
        });
        if let Some((_, start)) = found.min() {
            self.held.truncate(start);
            return Cut {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let waiting = self.held.split_off(self.safe());
        Cut {
            text: std::mem::replace(&mut self.held, waiting),
            stopped: false,
        }
    }

    /// What was held back, when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the held text that no stop string can begin in.
    fn safe(&self) -> usize {
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let first = (self.held.len() + 1).saturating_sub(longest);
        let mut starts = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .skip_while(|&at| at < first);
        starts
            .find(|&at| {
                let rest = &self.held[at..];
                self.strings.iter().any(|string| string.starts_with(rest))
            })
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text before the stop string that is complete first, by looking at every end.
    fn naive(text: &str, stops: &[String]) -> (String, bool) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let longest = stops
                .iter()
                .filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()))
                .map(String::len)
                .max();
            if let Some(length) = longest {
                return (text[..end - length].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn pieces_stop_where_the_whole_text_does(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
        ) {
            let whole: String = pieces.concat();
            let mut matcher = StopMatcher::new(stops.clone());
            let (mut text, mut stopped) = (String::new(), false);
            for piece in &pieces {
                let cut = matcher.push(piece);
                text += &cut.text;
                stopped = cut.stopped;
                if stopped {
                    break;
                }
                // Nothing is held back longer than it has to be.
                let held = &matcher.held;
                prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held.as_str())));
            }
            if !stopped {
                text += &matcher.finish();
            }
            prop_assert_eq!((text, stopped), naive(&whole, &stops));
        }
    }
}
