//! Why a checkpoint is not published, and who has to act when a generation cannot start without it.

use supra_checkpoint::publish::PublishError;
use supra_checkpoint::{Store, StoredError, examine};
use supra_proto::v1::FaultKind;

/// Why a checkpoint is not published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpublished {
    /// Who has to act when nothing can start without it.
    pub kind: FaultKind,
    /// One line.
    pub message: String,
}

impl Unpublished {
    /// What an error means for a checkpoint below `root`. A manifest that is missing or another one is damage, unless no
    /// checkpoint at all is to be seen there: then the storage is missing, and an older checkpoint would not help.
    pub(crate) fn new(root: &Store, error: &PublishError) -> Unpublished {
        let mut message = error.to_string();
        let kind = match error {
            error if error.is_transient() => FaultKind::Transient,
            PublishError::Changed { .. } => FaultKind::CheckpointDamaged,
            PublishError::Store(StoredError::Damaged { .. }) => {
                if examine::any_published(root) {
                    FaultKind::CheckpointDamaged
                } else {
                    message.push_str(&format!(
                        ". No published checkpoint is to be seen in {}: is its storage mounted here?",
                        root.url()
                    ));
                    FaultKind::Input
                }
            }
            _ => FaultKind::Input,
        };
        Unpublished { kind, message }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use supra_checkpoint::PUBLISHED;

    use super::*;

    #[test]
    fn a_missing_manifest_is_damage_where_other_checkpoints_are_to_be_seen() {
        let root = tempfile::tempdir().unwrap();
        let damaged = root.path().join("step-8");
        fs::create_dir(&damaged).unwrap();
        let kind = || {
            let store = Store::open(root.path().to_str().unwrap()).unwrap();
            let error = store.publish("step-8", [7; 32]).unwrap_err();
            Unpublished::new(&store, &error)
        };
        let alone = kind();
        assert_eq!(alone.kind, FaultKind::Input);
        assert!(alone.message.contains("mounted"), "{}", alone.message);
        let other = root.path().join("step-4");
        fs::create_dir(&other).unwrap();
        fs::write(other.join(PUBLISHED), "{}").unwrap();
        assert_eq!(kind().kind, FaultKind::CheckpointDamaged);
        fs::write(damaged.join(PUBLISHED), "{}").unwrap();
        assert_eq!(kind().kind, FaultKind::CheckpointDamaged);
    }
}
