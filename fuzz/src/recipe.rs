//! Recipes.

use supra_recipes::{Plan, Recipe};

/// Windows of the data that a plan is made for.
const WINDOWS: u64 = 10_000;

/// A recipe. What is read, written with all defaults and read again is the same, and can be planned or is refused.
pub fn recipe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(recipe) = Recipe::parse(text, "recipe.yaml") else {
        return;
    };
    let written = recipe.to_yaml();
    let again = Recipe::parse(&written, "recipe.yaml").expect("written by us");
    assert_eq!(again, recipe, "{written}");
    if let Ok(plan) = Plan::new(&recipe, WINDOWS, [0; 32]) {
        let first = plan.step_samples(1);
        assert!(first.start == 0 && !first.is_empty());
        assert!(plan.window(0) < WINDOWS);
    }
}
