//! States of texts that were read before, in slots that nobody else needs: a prompt that begins like one of them goes on from
//! there.

/// A shorter text is read again sooner than its state is copied.
pub const SHORTEST: usize = 16;

/// A text's state.
struct Kept<S> {
    tokens: Vec<u32>,
    slot: S,
    used: u64,
}

/// The states that are kept.
pub struct Prefixes<S> {
    kept: Vec<Kept<S>>,
    /// Grows with every use.
    clock: u64,
}

impl<S> Default for Prefixes<S> {
    fn default() -> Self {
        Prefixes {
            kept: Vec::new(),
            clock: 0,
        }
    }
}

impl<S> Prefixes<S> {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.kept.len()
    }

    /// Keeps the state of a text; gives the slot back if the text is too short or is kept already.
    #[must_use]
    pub fn keep(&mut self, tokens: Vec<u32>, slot: S) -> Option<S> {
        let known = self.kept.iter().any(|kept| kept.tokens == tokens);
        if known || tokens.len() < SHORTEST {
            return Some(slot);
        }
        self.clock += 1;
        self.kept.push(Kept {
            tokens,
            slot,
            used: self.clock,
        });
        None
    }

    /// Tokens of the longest text that `prompt` begins with and goes beyond; 0 if there is none.
    pub fn covers(&self, prompt: &[u32]) -> usize {
        self.find(prompt).map_or(0, |at| self.kept[at].tokens.len())
    }

    /// That text's state, to copy, and its tokens.
    pub fn longest(&mut self, prompt: &[u32]) -> Option<(&S, usize)> {
        let at = self.find(prompt)?;
        self.clock += 1;
        let kept = &mut self.kept[at];
        kept.used = self.clock;
        Some((&kept.slot, kept.tokens.len()))
    }

    /// The state that was not used for longest, to be given up.
    pub fn oldest(&mut self) -> Option<(S, Vec<u32>)> {
        let (at, _) = (self.kept.iter().enumerate()).min_by_key(|(_, kept)| kept.used)?;
        let kept = self.kept.swap_remove(at);
        Some((kept.slot, kept.tokens))
    }

    /// All of them, to be given up.
    pub fn drain(&mut self) -> impl Iterator<Item = S> {
        self.kept.drain(..).map(|kept| kept.slot)
    }

    fn find(&self, prompt: &[u32]) -> Option<usize> {
        (0..self.kept.len())
            .filter(|&at| {
                let tokens = &self.kept[at].tokens;
                tokens.len() < prompt.len() && prompt.starts_with(tokens)
            })
            .max_by_key(|&at| self.kept[at].tokens.len())
    }
}

/// Tokens at the beginning that two texts have in common.
pub fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
