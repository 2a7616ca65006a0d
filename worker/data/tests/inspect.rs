//! Showing windows as text.

use supra_data::{At, InspectOptions, inspect};
use supra_recipes::Plan;

use crate::loader::recipe;
use crate::support::{Place, assert_error, documents, tokenizer_json, write_json};

fn place() -> Place {
    let place = Place::new();
    place.write(
        "a.parquet",
        &[vec![1, 2, 3], vec![4, 5], documents(41, 1, 1)[0].repeat(20)],
    );
    place.index().unwrap();
    place
}

fn options(place: &Place, at: At) -> InspectOptions {
    InspectOptions {
        dataset: place.data(),
        tokenizer: Some(place.tokenizer()),
        at,
    }
}

#[test]
fn a_window_is_shown_with_its_document_boundaries() {
    let place = place();
    let at = |number| At::Window {
        number,
        sequence_length: 6,
    };
    let shown = inspect(&options(&place, at(0))).unwrap().to_string();
    assert_eq!(
        shown,
        "window 0 of 4 (7 tokens)\n\
         --- position 0: a document begins (4 tokens)\nw1 w2 w3 </s>\n\
         --- position 4: a document begins (3 tokens)\nw4 w5 </s>\n"
    );
    let next = inspect(&options(&place, at(1))).unwrap();
    assert_eq!(
        (
            next.passages[0].begins_document,
            next.passages[0].tokens.as_slice()
        ),
        (false, &[501][..])
    );
    assert_eq!(
        (next.passages[1].begins_document, next.passages[1].position),
        (true, 1)
    );
    let ids = inspect(&InspectOptions {
        tokenizer: None,
        ..options(&place, at(0))
    })
    .unwrap();
    assert!(ids.to_string().contains("[4, 5, 501]"));
    assert_error(
        inspect(&options(&place, at(4))),
        &["there is no window 4, it has 4"],
    );
}

#[test]
fn a_sample_is_the_window_of_the_plan() {
    let place = place();
    let recipe = Box::new(recipe(6, 4, 2));
    let manifest = supra_data::Manifest::load(&place.data()).unwrap();
    let plan = Plan::new(&recipe, 4, manifest.hash()).unwrap();
    let at = |number| At::Sample {
        number,
        recipe: recipe.clone(),
    };
    let found = inspect(&options(&place, at(2))).unwrap();
    assert_eq!((found.sample, found.window), (Some(2), plan.window(2)));
    assert_error(
        inspect(&options(&place, at(4))),
        &["there is no sample 4, the budget has 4"],
    );
}

#[test]
fn another_tokenizer_is_refused() {
    let place = place();
    let mut other = tokenizer_json();
    other["added_tokens"][0]["lstrip"] = true.into();
    write_json(&place.tokenizer().join("tokenizer.json"), &other);
    let result = inspect(&options(
        &place,
        At::Window {
            number: 0,
            sequence_length: 6,
        },
    ));
    assert_error(
        result,
        &["is not the tokenizer that the dataset was indexed with"],
    );
}
