//! How much the forward pass keeps: as much as the GPU has memory for, or what the recipe says.

use supra_recipes::{
    Recipe,
    plan::{
        Memory, ModelShape, Policy,
        memory::{fitting, gib},
    },
    schema::Activations,
};

use super::TrainError;

/// The policy for one of `world` ranks, whose GPU had `free` bytes or that computes on the processor (where memory is not
/// planned), and a sentence that says why.
///
/// CUDA's context was there already when free memory was asked for, and the plan counts it once more. What this leaves is
/// for gaps between the allocator's blocks.
///
/// # Errors
/// When nothing that the recipe allows fits.
pub fn choose(
    recipe: &Recipe,
    shape: &ModelShape,
    world: u32,
    free: Option<u64>,
) -> Result<(Policy, String), TrainError> {
    let plans = Memory::of_all(recipe, shape, world);
    let available = free.unwrap_or(u64::MAX);
    let Some(plan) = fitting(&plans, recipe, available) else {
        let mut allowed = plans.into_iter();
        let smallest = allowed
            .rfind(|plan| plan.policy.allowed_by(recipe.batch.activations))
            .expect("invariant: every recipe allows a policy");
        return Err(TrainError::NoRoom {
            free: available,
            smallest: Box::new(smallest),
            micro_batch: recipe.batch.micro_batch,
        });
    };
    let room = match free {
        Some(free) => format!("training takes {} of {} free", gib(plan.bytes), gib(free)),
        None => "on the processor".to_owned(),
    };
    let reason = match recipe.batch.activations {
        Activations::Auto => "the first of save, lean and recompute that fits",
        Activations::Save | Activations::Lean | Activations::Recompute => "as the recipe says",
    };
    let policy = plan.policy;
    Ok((policy, format!("activations: {policy} ({room}): {reason}")))
}

#[cfg(test)]
mod tests {
    use supra_agent::FaultKind;

    use super::*;

    fn recipe(more: &str) -> Recipe {
        let head = "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { tokens: 20B }\n";
        Recipe::parse(&format!("{head}{more}"), "t.yaml").unwrap()
    }

    fn mistral(more: &str, free: Option<u64>) -> Result<(Policy, String), TrainError> {
        choose(&recipe(more), &ModelShape::MISTRAL_7B, 1, free)
    }

    #[test]
    fn the_processor_keeps_everything_unless_the_recipe_says_otherwise() {
        assert_eq!(mistral("", None).unwrap().0, Policy::Save);
        let lean = mistral("batch: { activations: lean }", None).unwrap();
        assert_eq!(lean.0, Policy::Lean);
        assert!(lean.1.ends_with("as the recipe says"), "{}", lean.1);
    }

    #[test]
    fn the_choice_names_what_is_planned_and_what_is_free() {
        let (policy, why) = mistral("", Some(150_000_000_000)).unwrap();
        assert_eq!(policy, Policy::Recompute);
        for part in ["activations: recompute", "121.7 GiB", "of 139.7 GiB free"] {
            assert!(why.contains(part), "{part} is not in {why}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_numbers_and_remedies() {
        let error = mistral("", Some(85_000_000_000)).unwrap_err();
        assert_eq!(error.fault_kind(), FaultKind::Input);
        let text = error.to_string();
        for part in [
            "79.2 GiB free",
            "fp32 gradients 29.1 GiB",
            "Lower batch.micro_batch (it is 4)",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let save = "batch: { activations: save }";
        let text = mistral(save, Some(85_000_000_000)).unwrap_err().to_string();
        assert!(text.contains("write batch.activations: auto"), "{text}");
    }
}
