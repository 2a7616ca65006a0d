//! Bugs that are put in at the boundary of the cores, to see whether the net catches them.

/// One bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The records of voids do not reach the journal.
    SkipVoid,
    /// A step is committed twice.
    CommitTwice,
    /// The Hello of a worker that comes back is swallowed.
    LoseReconnect,
    /// The disk loses facts in a crash that it called synced.
    LoseSynced,
    /// Reports of old generations count for the one in hand.
    TakeOldReports,
    /// Heartbeats do not say that a rank only waits for others.
    HideWaits,
    /// Workers are told before the facts behind it are on disk.
    TellEarly,
    /// Every step is said to come to what it should.
    HideDrift,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Mutant; 8] = [
        Mutant::SkipVoid,
        Mutant::CommitTwice,
        Mutant::LoseReconnect,
        Mutant::LoseSynced,
        Mutant::TakeOldReports,
        Mutant::HideWaits,
        Mutant::TellEarly,
        Mutant::HideDrift,
    ];
}
