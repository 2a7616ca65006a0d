//! `supra validate`: checks recipes with the code that the coordinator uses.

use std::path::PathBuf;

use clap::Args;
use supra_recipes::Recipe;

use super::failure::{Exit, Failure};
use super::runs::Json;
use super::{format, out};

/// Arguments of `supra validate`.
#[derive(Args, Debug)]
pub struct Validate {
    /// Recipes to check (YAML)
    #[arg(value_name = "RECIPE", required = true)]
    recipes: Vec<PathBuf>,
    #[command(flatten)]
    json: Json,
}

/// Checks every recipe, reports all that are wrong, and ends with 2 if there are any.
///
/// # Errors
/// When the answer cannot be written.
pub fn run(command: &Validate) -> Result<Exit, Failure> {
    let mut exit = Exit::Done;
    let mut answers = Vec::new();
    for path in &command.recipes {
        let file = path.display().to_string();
        let loaded = Recipe::load(path).map_err(|error| error.to_string());
        if loaded.is_err() {
            exit = Exit::Input;
        }
        match (command.json.json, loaded) {
            (true, Ok(recipe)) => {
                answers.push(serde_json::json!({ "file": file, "valid": true, "error": null, "recipe": recipe }));
            }
            (true, Err(error)) => {
                answers.push(serde_json::json!({ "file": file, "valid": false, "error": error, "recipe": null }));
            }
            (false, Ok(recipe)) => {
                let budget = format::tokens(recipe.budget.tokens());
                out::line(&format!(
                    "{file}: valid: {}, {budget}",
                    recipe.name.as_str()
                ))?;
                if let Some(chaos) = &recipe.chaos {
                    out::line(&format!("{file}: {}", chaos.warning()))?;
                }
            }
            (false, Err(error)) => out::complain(error.trim_end()),
        }
    }
    if command.json.json {
        out::json(&answers)?;
    }
    Ok(exit)
}
