//! The model against known answers: every fixture folder below `$SUPRA_GOLDEN`, or below `tests/golden` of the
//! repository. What the files hold and which errors are allowed stands in the README there.

mod convert;
mod fixture;
mod huggingface;
mod measure;
mod supra;

use fixture::{Family, Fixture};

/// Runs a check on every fixture of a family; there must be one.
fn each(family: Family, check: impl Fn(&Fixture)) {
    tch::set_num_threads(1);
    let fixtures: Vec<Fixture> = Fixture::all()
        .into_iter()
        .filter(|fixture| fixture.family == family)
        .collect();
    assert!(
        !fixtures.is_empty(),
        "no fixture of the family {family:?} below {}",
        fixture::root().display()
    );
    fixtures.iter().for_each(check);
}

#[test]
fn golden_folders_are_all_recognised() {
    assert!(!Fixture::all().is_empty());
}
