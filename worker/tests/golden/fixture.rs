//! Finding and reading fixture folders.

use std::path::{Path, PathBuf};
use std::{env, fs};

use supra_worker::model::files::tensors::TensorFiles;
use supra_worker::model::{Documents, ModelConfig, NewWeights, Params, load_params};
use tch::{Device, Kind, Tensor};

/// What a folder's answers are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A softmax model as Hugging Face saves it.
    HuggingFace,
    /// A SUPRA model.
    Supra,
    /// A softmax model turned into a SUPRA model.
    Convert,
}

/// One folder.
pub struct Fixture {
    pub dir: PathBuf,
    pub family: Family,
    pub config: ModelConfig,
    golden: TensorFiles,
}

const ANSWERS: &str = "golden.safetensors";
/// Folder of the models of other libraries, and the file of answers in each.
const PARITY: &str = "parity";
const PARITY_ANSWERS: &str = "parity.safetensors";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

/// The folder that `$SUPRA_GOLDEN` names.
pub fn named_root() -> Option<PathBuf> {
    env::var_os("SUPRA_GOLDEN").map(PathBuf::from)
}

impl Fixture {
    /// Every fixture folder below the root, sorted. There is one at least.
    pub fn all() -> Vec<Fixture> {
        named_root().map_or_else(Fixture::copies, |root| Fixture::below(&root))
    }

    /// The repository's own.
    pub fn copies() -> Vec<Fixture> {
        Fixture::below(&repository())
    }

    /// Models of other libraries with their own answers, in fp32: what `scripts/test-parity` makes.
    pub fn parity() -> Vec<Fixture> {
        let root = named_root().unwrap_or_else(repository);
        let mut found: Vec<Fixture> = fs::read_dir(root.join(PARITY))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|dir| dir.join(PARITY_ANSWERS).exists())
            .map(|dir| Fixture::open(&dir, PARITY_ANSWERS))
            .collect();
        found.sort_by(|a, b| a.dir.cmp(&b.dir));
        found
    }

    fn below(root: &Path) -> Vec<Fixture> {
        assert!(root.is_dir(), "no folder {}", root.display());
        let mut found = Vec::new();
        collect(root, &mut found);
        assert!(!found.is_empty(), "no fixture below {}", root.display());
        found.sort_by(|a, b| a.dir.cmp(&b.dir));
        found
    }

    fn open(dir: &Path, answers: &str) -> Fixture {
        let config = ModelConfig::load(dir).unwrap();
        let family = match config.supra() {
            None => Family::HuggingFace,
            Some(_) if dir.join("supra_init.safetensors").exists() => Family::Convert,
            Some(_) => Family::Supra,
        };
        let golden = TensorFiles::open_file(&dir.join(answers)).unwrap();
        Fixture {
            dir: dir.to_owned(),
            family,
            config,
            golden,
        }
    }

    pub fn name(&self) -> String {
        self.dir.file_name().unwrap().display().to_string()
    }

    /// The weights of the folder in some kind.
    pub fn params(&self, kind: Kind) -> Params {
        let (params, report) = load_params(&self.dir, &self.config, NewWeights::Refuse).unwrap();
        assert!(report.missing.is_empty() && report.ignored.is_empty());
        params.to(Device::Cpu, kind)
    }

    /// An answer.
    pub fn get(&self, key: &str) -> Tensor {
        self.find(key)
            .unwrap_or_else(|| panic!("{} has no `{key}`", self.dir.display()))
    }

    /// An answer that not every folder has.
    pub fn find(&self, key: &str) -> Option<Tensor> {
        self.golden.read(key).unwrap()
    }

    /// What follows the prefix in the names of the answers that have it.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        self.golden
            .names()
            .filter_map(|name| name.strip_prefix(prefix))
            .map(str::to_owned)
            .collect()
    }

    /// Where documents begin, one list per row; a single document in most folders.
    pub fn starts(&self) -> Option<Vec<Vec<u32>>> {
        let rows = Vec::<Vec<i64>>::try_from(self.find("document_starts")?).unwrap();
        Some(
            rows.into_iter()
                .map(|row| row.into_iter().map(|start| start as u32).collect())
                .collect(),
        )
    }

    /// Documents among the tokens `from..to` of each row.
    pub fn documents(&self, from: i64, to: i64) -> Option<Documents> {
        let inside = |start: &u32| start.checked_sub(from as u32);
        let rows: Vec<Vec<u32>> = self
            .starts()?
            .iter()
            .map(|row| row.iter().filter_map(inside).collect())
            .collect();
        Some(Documents::from_starts(&rows, (to - from) as usize))
    }
}

fn collect(dir: &Path, found: &mut Vec<Fixture>) {
    if dir.ends_with(PARITY) {
        return;
    }
    let files = ["config.json", ANSWERS].map(|file| dir.join(file).exists());
    match files {
        [true, true] => found.push(Fixture::open(dir, ANSWERS)),
        [false, false] => {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    collect(&path, found);
                }
            }
        }
        _ => panic!(
            "{} is half a fixture: config.json and golden.safetensors belong together",
            dir.display()
        ),
    }
}
