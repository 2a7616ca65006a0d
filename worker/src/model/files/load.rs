//! From a model directory to checked weights.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use tch::Tensor;

use super::layout::{Layout, Piece};
use super::meta;
use super::tensors::TensorFiles;
use crate::model::error::Difference;
use crate::model::{ModelConfig, ModelError, ParamSpec, Params, init_new};

/// Where weights come from that a softmax base lacks.
#[derive(Clone, Copy, Debug)]
pub enum NewWeights<'a> {
    /// From nowhere: the directory must be complete.
    Refuse,
    /// Drawn with this seed.
    Seeded(u64),
    /// From a safetensors file, under their published names.
    File(&'a Path),
}

/// What was found in a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Whose names and which files, as people say it.
    pub layout: String,
    /// Tensors of the files that are weights, or parts of weights.
    pub tensors: usize,
    /// How many of those were stacked, put in another order of rows, or joined from several files.
    pub reshaped: usize,
    /// Weights that were there (published names).
    pub matched: Vec<String>,
    /// Weights that were not, and were made as [`NewWeights`] says.
    pub missing: Vec<String>,
    /// Tensors that carry no information of their own: stored rotary tables, a tied output matrix.
    pub ignored: Vec<String>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} tensors matched, {} weights missing, 0 tensors unexpected, {} ignored, {} reshaped",
            self.layout,
            self.tensors,
            self.missing.len(),
            self.ignored.len(),
            self.reshaped
        )
    }
}

/// Reads the weights that `config` asks for: all that [`load_each`] reads.
pub fn load_params(
    model: &Path,
    config: &ModelConfig,
    new: NewWeights,
) -> Result<(Params, LoadReport), ModelError> {
    let mut named = Vec::new();
    let report = load_each(model, config, new, |spec, tensor| {
        named.push((spec.name.clone(), tensor));
    })?;
    Ok((Params::new(named), report))
}

/// Reads the weights that `config` asks for, from a directory in any layout or the file of weights that is named, and hands them
/// to `take` one by one: fp32, on the CPU, in canonical order. What was found goes to the log in one line.
///
/// It is an error, with every tensor listed, if one is missing, unexpected or of another shape, unless those missing
/// are exactly the new weights of a SUPRA model and `new` says where to take them from; so are NaN and infinity.
pub fn load_each(
    model: &Path,
    config: &ModelConfig,
    new: NewWeights,
    mut take: impl FnMut(&ParamSpec, Tensor),
) -> Result<LoadReport, ModelError> {
    let files = TensorFiles::open(model)?;
    let Some(layout) = Layout::of(&files) else {
        let reason = "no embedding matrix under a known name (model.embed_tokens.weight, tok_embeddings.weight)";
        return Err(ModelError::NoWeights {
            path: model.to_owned(),
            reason: reason.to_owned(),
        });
    };
    let specs = config.params();
    let (report, difference) = compare(&files, &layout, config, &specs);
    let may_be_missing = !matches!(new, NewWeights::Refuse);
    let all_new = specs
        .iter()
        .filter(|spec| spec.new)
        .map(|spec| &spec.name)
        .eq(&report.missing);
    if !difference.is_empty() || !(report.missing.is_empty() || all_new && may_be_missing) {
        let remedy = (all_new && difference.is_empty())
            .then_some("exactly SUPRA's own weights are missing: this is a softmax base; run `supra-worker convert` first");
        let difference = Difference {
            missing: report.missing,
            remedy,
            ..difference
        };
        return Err(ModelError::Tensors {
            path: model.to_owned(),
            layout: layout.describe(),
            matched: report.tensors,
            difference: Box::new(difference),
        });
    }
    tracing::info!("{}: {report}", model.display());
    if config.tied {
        check_tied_output(&files, &layout)?;
    }
    let source = match new {
        NewWeights::File(path) if !report.missing.is_empty() => Some(open_new(path, &specs)?),
        _ => None,
    };
    let missing: BTreeSet<&String> = report.missing.iter().collect();
    for spec in &specs {
        let tensor = match (missing.contains(&spec.name), &source, new) {
            (false, ..) => read_stacked(&files, &layout, config, spec)?,
            (true, Some(source), _) => source.read_weight(&spec.name)?,
            (true, None, NewWeights::Seeded(seed)) => Some(init_new(config, seed, spec)),
            (true, ..) => None,
        };
        let tensor = tensor.expect("invariant: compared with the headers above");
        take(spec, tensor);
    }
    Ok(report)
}

/// Compares headers with the configuration, before anything large is read. Missing weights are in the report.
fn compare(
    files: &TensorFiles,
    layout: &Layout,
    config: &ModelConfig,
    specs: &[ParamSpec],
) -> (LoadReport, Difference) {
    let mut report = LoadReport {
        layout: format!("{} layout in {}", layout.describe(), files.describe()),
        ..LoadReport::default()
    };
    let mut difference = Difference::default();
    let mut known = BTreeSet::new();
    for spec in specs {
        let pieces = layout.pieces(config, spec).unwrap_or_default();
        let there = pieces
            .iter()
            .filter(|piece| files.contains(&piece.name))
            .count();
        for piece in &pieces {
            let Piece { name, shape, .. } = piece;
            match files.shape(name) {
                Some(found) if found != *shape => {
                    difference
                        .misshapen
                        .push((name.clone(), shape.clone(), found))
                }
                Some(_) => {
                    let reshaped = pieces.len() > 1 || piece.interleaved.is_some();
                    report.tensors += 1;
                    report.reshaped += usize::from(reshaped || files.is_cut(name));
                }
                // Of a weight that is there in part, name the part that is not.
                None if there > 0 => difference.missing.push(name.clone()),
                _ => {}
            }
        }
        let list = if there > 0 {
            &mut report.matched
        } else {
            &mut report.missing
        };
        list.push(spec.name.clone());
        known.extend(pieces.into_iter().map(|piece| piece.name));
    }
    let tied_output = config.tied.then(|| layout.output_name());
    for name in files.names().filter(|name| !known.contains(*name)) {
        let ignored = layout.ignores(name) || tied_output.as_deref() == Some(name);
        let list = if ignored {
            &mut report.ignored
        } else {
            &mut difference.unexpected
        };
        list.push(name.to_owned());
    }
    report.missing.append(&mut difference.missing);
    (report, difference)
}

/// Reads the tensors of one weight and stacks their rows.
fn read_stacked(
    files: &TensorFiles,
    layout: &Layout,
    config: &ModelConfig,
    spec: &ParamSpec,
) -> Result<Option<Tensor>, ModelError> {
    let mut parts = Vec::new();
    for piece in layout.pieces(config, spec).unwrap_or_default() {
        let Some(part) = files.read_weight(&piece.name)? else {
            return Ok(None);
        };
        parts.push(match piece.interleaved {
            Some(heads) => meta::half_split(&part, heads)?,
            None => part,
        });
    }
    Ok(if parts.len() > 1 {
        Some(Tensor::f_cat(&parts, 0)?)
    } else {
        parts.pop()
    })
}

/// A tied model may store its output matrix, but not a different one.
fn check_tied_output(files: &TensorFiles, layout: &Layout) -> Result<(), ModelError> {
    let output = layout.output_name();
    let embedding = files.read_weight(&layout.embedding_name())?;
    match (files.read_weight(&output)?, embedding) {
        (Some(stored), Some(embedding)) if stored != embedding => Err(ModelError::NoWeights {
            path: files.root().to_owned(),
            reason: format!(
                "the configuration ties the embeddings, but `{output}` differs from them; set it to untied"
            ),
        }),
        _ => Ok(()),
    }
}

/// Opens the file of new weights and checks that it holds exactly those.
fn open_new(path: &Path, specs: &[ParamSpec]) -> Result<TensorFiles, ModelError> {
    let files = TensorFiles::open_file(path)?;
    let mut difference = Difference::default();
    let mut known = BTreeSet::new();
    for spec in specs.iter().filter(|spec| spec.new) {
        known.insert(spec.name.as_str());
        match files.shape(&spec.name) {
            None => difference.missing.push(spec.name.clone()),
            Some(found) if found != spec.shape => {
                difference
                    .misshapen
                    .push((spec.name.clone(), spec.shape.clone(), found));
            }
            Some(_) => {}
        }
    }
    difference.unexpected = files
        .names()
        .filter(|name| !known.contains(name))
        .map(str::to_owned)
        .collect();
    match difference.is_empty() {
        true => Ok(files),
        false => Err(ModelError::Tensors {
            path: path.to_owned(),
            layout: Layout::PUBLISHED.describe(),
            matched: known.len() - difference.missing.len() - difference.misshapen.len(),
            difference: Box::new(difference),
        }),
    }
}
