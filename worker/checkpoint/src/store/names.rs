//! Names of a run's checkpoints.

/// Name of the checkpoint of a step by a generation, relative to the checkpoint root.
pub fn directory_name(step: u64, generation: u64) -> String {
    format!("step-{step:08}-gen-{generation}")
}

/// Step and generation of a checkpoint directory's name.
pub fn parse_directory_name(name: &str) -> Option<(u64, u64)> {
    let (step, generation) = name.strip_prefix("step-")?.split_once("-gen-")?;
    Some((step.parse().ok()?, generation.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_step_and_generation() {
        assert_eq!(directory_name(123, 4), "step-00000123-gen-4");
        assert_eq!(parse_directory_name("step-00000123-gen-4"), Some((123, 4)));
        assert_eq!(parse_directory_name("step-123"), None);
        assert_eq!(parse_directory_name("notes"), None);
    }
}
