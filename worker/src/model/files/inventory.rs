//! The tensors that a model directory is to have, and whether it has them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use tch::Tensor;

use super::layout::Layout;
use crate::model::error::Difference;
use crate::model::{ModelConfig, ModelError, Params};

/// What was written, and read back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SaveReport {
    /// Weights (published names) that became one tensor.
    pub matched: Vec<String>,
    /// Weights whose rows became several tensors, and those.
    pub reshaped: BTreeMap<String, Vec<String>>,
    /// Tensors that were stored a second time under another name: the output matrix of a tied model.
    pub repeated: Vec<String>,
    /// Tensors in the files.
    pub tensors: usize,
}

/// Every tensor to write by name, in canonical order, and what to say about them. Views of the weights, nothing is copied.
///
/// `repeat_tied` stores the output matrix of a tied model, too.
pub fn list(
    config: &ModelConfig,
    params: &Params,
    layout: &Layout,
    repeat_tied: bool,
) -> Result<(Vec<(String, Tensor)>, SaveReport), ModelError> {
    let mut report = SaveReport::default();
    let mut tensors = Vec::new();
    for spec in config.params() {
        let pieces = layout.pieces(config, &spec).ok_or_else(|| {
            ModelError::Unfit(format!(
                "`{}` has no name in Hugging Face's layout of softmax models",
                spec.name
            ))
        })?;
        let weight = params.get(&spec.name);
        let mut row = 0;
        for piece in &pieces {
            let rows = piece.shape[0];
            tensors.push((piece.name.clone(), weight.narrow(0, row, rows)));
            row += rows;
        }
        if row != spec.shape[0] {
            return Err(ModelError::Unfit(format!(
                "the layout takes {row} of the {} rows of `{}`",
                spec.shape[0], spec.name
            )));
        }
        match pieces.len() {
            1 => report.matched.push(spec.name),
            _ => {
                let names = pieces.into_iter().map(|piece| piece.name).collect();
                report.reshaped.insert(spec.name, names);
            }
        }
    }
    if config.tied && repeat_tied {
        let name = layout.output_name();
        tensors.push((
            name.clone(),
            params.get("tok_embeddings.weight").shallow_clone(),
        ));
        report.repeated.push(name);
    }
    report.tensors = tensors.len();
    Ok((tensors, report))
}

/// Compares what a file system gives back, by name and shape, with what was to be written.
pub fn check(
    dir: &Path,
    expected: &BTreeMap<String, Vec<i64>>,
    found: &BTreeMap<String, Vec<i64>>,
) -> Result<(), ModelError> {
    let names = |map: &BTreeMap<String, Vec<i64>>| map.keys().cloned().collect::<BTreeSet<_>>();
    let (wanted, there) = (names(expected), names(found));
    let difference = Difference {
        missing: wanted.difference(&there).cloned().collect(),
        unexpected: there.difference(&wanted).cloned().collect(),
        misshapen: expected
            .iter()
            .filter_map(|(name, shape)| Some((name, shape, found.get(name)?)))
            .filter(|(_, shape, found)| shape != found)
            .map(|(name, shape, found)| (name.clone(), shape.clone(), found.clone()))
            .collect(),
        remedy: Some("this is what was read back after writing; is the disk in order?"),
    };
    match difference.is_empty() {
        true => Ok(()),
        false => Err(ModelError::Tensors {
            path: dir.to_owned(),
            layout: "written".to_owned(),
            matched: wanted.intersection(&there).count() - difference.misshapen.len(),
            difference: Box::new(difference),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::small;
    use crate::model::{AttentionKind, SupraConfig, init_all};

    #[test]
    fn every_weight_is_listed_once_and_whole() {
        for (attention, layout) in [
            (AttentionKind::Softmax, Layout::HuggingFace),
            (
                AttentionKind::Supra(SupraConfig::default()),
                Layout::Published {
                    prefix: "model.".to_owned(),
                },
            ),
        ] {
            let config = small(attention);
            let params = init_all(&config, 1);
            let (tensors, report) = list(&config, &params, &layout, true).unwrap();
            let elements: usize = tensors.iter().map(|(_, tensor)| tensor.numel()).sum();
            let wanted: i64 = config.params().iter().map(|spec| spec.elements()).sum();
            assert_eq!(elements as i64, wanted);
            let weights = report.matched.len() + report.reshaped.len();
            assert_eq!(weights, config.params().len());
            let cut: usize = report.reshaped.values().map(Vec::len).sum();
            assert_eq!(report.tensors, report.matched.len() + cut);
            assert!(report.repeated.is_empty(), "not tied");
        }
    }

    #[test]
    fn a_tied_output_is_repeated_where_its_readers_want_it() {
        let config = ModelConfig {
            tied: true,
            ..small(AttentionKind::Softmax)
        };
        let params = init_all(&config, 1);
        let layout = Layout::Published {
            prefix: String::new(),
        };
        let (tensors, report) = list(&config, &params, &layout, true).unwrap();
        assert_eq!(report.repeated, ["output.weight"]);
        assert_eq!(tensors.last().unwrap().0, "output.weight");
        let (_, report) = list(&config, &params, &layout, false).unwrap();
        assert!(report.repeated.is_empty());
    }

    #[test]
    fn what_comes_back_otherwise_is_named() {
        let named = |names: &[(&str, i64)]| -> BTreeMap<String, Vec<i64>> {
            let entry = |&(name, rows): &(&str, i64)| (name.to_owned(), vec![rows, 2]);
            names.iter().map(entry).collect()
        };
        let wanted = named(&[("a", 1), ("b", 2), ("c", 3)]);
        check(Path::new("out"), &wanted, &wanted).unwrap();
        let found = named(&[("a", 1), ("c", 4), ("d", 5)]);
        let complaint = check(Path::new("out"), &wanted, &found)
            .unwrap_err()
            .to_string();
        for word in [
            "missing (1)",
            "unexpected (1)",
            "wrong shape (1)",
            "c: [4, 2]",
        ] {
            assert!(complaint.contains(word), "{complaint}");
        }
    }
}
