//! The model against known answers: every fixture folder below `$SUPRA_GOLDEN`, or below `tests/golden` of the
//! repository. What the files hold and which errors are allowed stands in the README there.

mod convert;
mod evaluate;
mod fixture;
mod huggingface;
mod measure;
mod parity;
mod run;
mod supra;

use fixture::{Family, Fixture};

/// Runs a check on every fixture of a family. The repository has some of each; a folder that is named by the
/// environment need not.
fn each(family: Family, check: impl Fn(&Fixture)) {
    tch::set_num_threads(1);
    let fixtures = Fixture::all();
    let mut fixtures = fixtures
        .iter()
        .filter(|fixture| fixture.family == family)
        .peekable();
    assert!(
        fixtures.peek().is_some() || fixture::named_root().is_some(),
        "no fixture of the family {family:?} among the repository's"
    );
    fixtures.for_each(check);
}

#[test]
fn golden_folders_are_all_recognised() {
    assert!(!Fixture::all().is_empty());
}
