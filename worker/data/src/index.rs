//! `supra data index`: builds the manifest of token parquet, reading every token once.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Mutex;

use crate::manifest::{Content, DATASET, DataFile, HELDOUT, RowGroup, Selection, Store, Totals};
use crate::scan::TokenFile;
use crate::select::{Ballot, Smallest};
use crate::stream::{Assembler, Checksum, Sieve};
use crate::survey::{Layout, Shape, Survey};
use crate::{DataError, Manifest, Progress, TextTokenizer, files, parallel};

/// A choice that may be left to the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Auto3 {
    /// Look, decide, and say what was found.
    #[default]
    Auto,
    /// No.
    Never,
    /// Yes.
    Always,
}

impl FromStr for Auto3 {
    type Err = String;

    fn from_str(text: &str) -> Result<Auto3, String> {
        match text {
            "auto" => Ok(Auto3::Auto),
            "never" => Ok(Auto3::Never),
            "always" => Ok(Auto3::Always),
            _ => Err(format!("{text:?} is none of auto, never, always")),
        }
    }
}

impl fmt::Display for Auto3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Auto3::Auto => "auto",
            Auto3::Never => "never",
            Auto3::Always => "always",
        })
    }
}

/// What `supra data index` is asked to do.
#[derive(Debug, Clone)]
pub struct IndexOptions {
    /// Directory of the token parquet files (`*.parquet`, taken in the order of their names).
    pub dir: PathBuf,
    /// Column of token ids, usually `input_ids`: a list of integers per row.
    pub column: String,
    /// Tokenizer that made the tokens: a directory with `tokenizer.json`, or that file.
    pub tokenizer: PathBuf,
    /// Whether the reader adds EOT after each document.
    pub append_eot: Auto3,
    /// Whether the reader adds BOS before each document.
    pub prepend_bos: Auto3,
    /// Exactly so many documents, chosen by their hash, go to `heldout.json`; 0 writes none.
    pub heldout: u64,
}

/// Builds `dataset.json`, and `heldout.json` if documents are held out, in the directory of the token parquet. What a
/// document is, and whether EOT and BOS are added, is in [`Manifest::findings`].
///
/// # Errors
/// For files that are missing, damaged or hold anything but token ids of the tokenizer; when `auto` cannot tell; when
/// there are not more documents than are to be held out.
pub fn index(options: &IndexOptions, progress: &dyn Progress) -> Result<Manifest, DataError> {
    let tokenizer = TextTokenizer::load(&options.tokenizer)?;
    let paths = files::parquet_files(&options.dir)?;
    let indexer = Indexer {
        directory: &options.dir,
        paths: &paths,
        column: &options.column,
        tokenizer: &tokenizer,
        heldout: options.heldout,
        threads: parallel::threads(0),
        progress,
    };
    indexer.check_files()?;
    let survey = Survey::of(&paths, &options.column, &tokenizer)?;
    let layout_for = |documents| {
        survey.layout(
            documents,
            &tokenizer,
            options.append_eot,
            options.prepend_bos,
        )
    };
    let mut layout = layout_for(survey.shape.documents())?;
    let mut pass = indexer.pass(&layout)?;
    if pass.shape.documents() != layout.rules.documents {
        // The sample misled: all rows together decide what a document is.
        progress.note("the rows are not what a sample of them looked like; reading them again");
        indexer.check_files()?;
        layout = layout_for(pass.shape.documents())?;
        pass = indexer.pass(&layout)?;
    }
    layout
        .findings
        .insert(0, pass.shape.finding(tokenizer.eot()));
    indexer.write(&layout, pass)
}

/// Token parquet on its way to a manifest.
pub(crate) struct Indexer<'a> {
    pub directory: &'a Path,
    pub paths: &'a [PathBuf],
    pub column: &'a str,
    pub tokenizer: &'a TextTokenizer,
    pub heldout: u64,
    pub threads: usize,
    pub progress: &'a dyn Progress,
}

/// What reading every token gave.
pub(crate) struct Pass {
    pub files: Vec<DataFile>,
    pub shape: Shape,
    pub smallest: Smallest,
}

impl Indexer<'_> {
    /// Opens every file, so that a bad one is found before the long read, and announces the work.
    pub(crate) fn check_files(&self) -> Result<(), DataError> {
        if self.paths.is_empty() {
            return Err(DataError::content(
                self.directory,
                "holds no *.parquet file",
                "name the directory in which the token parquet lies",
            ));
        }
        let rows = parallel::in_order(self.paths.len(), self.threads, |file| {
            Ok(self.open(file)?.file().rows())
        })?;
        self.progress.begin(self.paths.len(), rows.iter().sum());
        Ok(())
    }

    fn open(&self, file: usize) -> Result<TokenFile, DataError> {
        TokenFile::open(&self.paths[file], self.column, self.tokenizer.vocabulary())
    }

    /// Reads every token.
    pub(crate) fn pass(&self, layout: &Layout) -> Result<Pass, DataError> {
        let smallest = Mutex::new(Smallest::new(self.heldout as usize));
        let scanned = parallel::in_order(self.paths.len(), self.threads, |file| {
            self.scan_file(file, layout, &smallest)
        })?;
        let mut shape = Shape::default();
        let mut files = Vec::with_capacity(scanned.len());
        for (file, file_shape) in scanned {
            shape.merge(&file_shape);
            files.push(file);
        }
        let smallest = smallest
            .into_inner()
            .expect("invariant: no thread panics while it holds this lock");
        Ok(Pass {
            files,
            shape,
            smallest,
        })
    }

    fn scan_file(
        &self,
        number: usize,
        layout: &Layout,
        smallest: &Mutex<Smallest>,
    ) -> Result<(DataFile, Shape), DataError> {
        let file = self.open(number)?;
        let path = file.file().path();
        let mut shape = Shape::default();
        let hollow = [
            self.tokenizer.eot(),
            self.tokenizer.bos().unwrap_or(self.tokenizer.eot()),
        ];
        let mut ballot =
            (self.heldout > 0).then(|| Ballot::new(self.heldout as usize, number, hollow));
        let mut row_groups = Vec::with_capacity(file.file().row_groups());
        // Every file begins a document: nothing says that it goes on where the file before ends.
        let mut continues = false;
        for group in 0..file.file().row_groups() {
            let mut assembler = Assembler::new(layout.rules, continues);
            let mut checksum = Checksum::default();
            if let Some(ballot) = &mut ballot {
                ballot.begin_group(group, continues);
            }
            file.scan(group, |rows| {
                shape.observe(rows, layout.rules.eot);
                let chunk = assembler.assemble(rows);
                if let Some(ballot) = &mut ballot {
                    ballot.feed(chunk);
                }
                checksum.update(chunk);
                true
            })?;
            let rows = file.file().group_rows(group);
            self.progress.advance(rows, checksum.tokens());
            row_groups.push(row_group(group, rows, continues, Selection::All, checksum));
            continues = assembler.next_continues();
        }
        shape.end_file();
        if let Some(ballot) = ballot {
            smallest
                .lock()
                .expect("invariant: no thread panics while it holds this lock")
                .merge(ballot.finish());
        }
        row_groups.retain(|group| group.tokens > 0);
        let bytes = fs::metadata(path)
            .map_err(DataError::io("read", path))?
            .len();
        let blake3 = files::hash_file(path)?.to_hex().to_string();
        self.progress.file_done(path, false);
        Ok((
            DataFile {
                name: files::name_of(path)?,
                bytes,
                blake3,
                row_groups,
            },
            shape,
        ))
    }

    /// Holds documents out and writes the manifests.
    pub(crate) fn write(&self, layout: &Layout, mut pass: Pass) -> Result<Manifest, DataError> {
        let (dataset, heldout) = (self.directory.join(DATASET), self.directory.join(HELDOUT));
        layout
            .findings
            .iter()
            .for_each(|finding| self.progress.note(finding));
        let eligible = pass.smallest.eligible();
        if self.heldout > 0 && eligible <= self.heldout {
            return Err(DataError::content(
                self.directory,
                format!(
                    "holds {eligible} documents with text, of which {} were to be held out",
                    self.heldout
                ),
                "hold out fewer, so that at least one is left",
            ));
        }
        // An old manifest beside a new one of the other kind could train on what is held out.
        for stale in [&dataset, &heldout] {
            remove(stale)?;
        }
        if self.heldout > 0 {
            let held = self.split(layout, &mut pass.files, pass.smallest.into_places())?;
            Manifest::write(self.content(layout, held), heldout)?;
        }
        Manifest::write(self.content(layout, pass.files), dataset)
    }

    /// Takes the documents at `places` out of `files` and returns the files with only them.
    fn split(
        &self,
        layout: &Layout,
        files: &mut [DataFile],
        places: BTreeMap<(usize, usize), Vec<u32>>,
    ) -> Result<Vec<DataFile>, DataError> {
        let mut held: Vec<_> = files
            .iter()
            .map(|file| DataFile {
                row_groups: Vec::new(),
                ..file.clone()
            })
            .collect();
        let places: Vec<_> = places.into_iter().collect();
        let halves = parallel::in_order(places.len(), self.threads, |place| {
            let ((file, group), numbers) = &places[place];
            let continues = files[*file]
                .row_groups
                .iter()
                .any(|known| known.number == *group as u32 && known.continues);
            self.halves(layout, *file, *group, continues, numbers)
        })?;
        for (((file, group), _), (taken, left)) in places.iter().zip(halves) {
            held[*file].row_groups.push(taken);
            let groups = &mut files[*file].row_groups;
            if let Some(known) = groups
                .iter_mut()
                .find(|known| known.number == *group as u32)
            {
                *known = left;
            }
        }
        for file in files.iter_mut().chain(&mut held) {
            file.row_groups.retain(|group| group.tokens > 0);
        }
        Ok(held)
    }

    /// Row group `group` of `file` with only the documents `numbers`, and with all but them.
    fn halves(
        &self,
        layout: &Layout,
        file: usize,
        group: usize,
        continues: bool,
        numbers: &[u32],
    ) -> Result<(RowGroup, RowGroup), DataError> {
        let file = self.open(file)?;
        let (only, except) = (
            Selection::Only(numbers.to_vec()),
            Selection::Except(numbers.to_vec()),
        );
        let mut assembler = Assembler::new(layout.rules, continues);
        let (mut taken, mut left) = (Sieve::new(&only), Sieve::new(&except));
        let (mut taken_sum, mut left_sum) = (Checksum::default(), Checksum::default());
        file.scan(group, |rows| {
            let chunk = assembler.assemble(rows);
            taken_sum.update(taken.select(chunk));
            left_sum.update(left.select(chunk));
            true
        })?;
        let rows = file.file().group_rows(group);
        let taken = row_group(group, rows, continues, only.clone(), taken_sum);
        let left = row_group(group, rows, continues, except.clone(), left_sum);
        Ok((taken, left))
    }

    fn content(&self, layout: &Layout, files: Vec<DataFile>) -> Content {
        Content {
            format: Content::format(),
            plan_version: supra_recipes::plan::VERSION,
            store: Store::Parquet,
            column: self.column.to_owned(),
            documents: layout.rules.documents,
            append_eot: layout.rules.append.is_some(),
            prepend_bos: layout.rules.prepend.is_some(),
            eot: self.tokenizer.eot(),
            bos: self.tokenizer.bos(),
            vocabulary: self.tokenizer.vocabulary(),
            tokenizer: self.tokenizer.hash().to_owned(),
            findings: layout.findings.clone(),
            totals: Totals::default(),
            files,
        }
    }
}

fn row_group(
    number: usize,
    rows: u64,
    continues: bool,
    selection: Selection,
    checksum: Checksum,
) -> RowGroup {
    RowGroup {
        number: number as u32,
        rows,
        first_token: 0,
        tokens: checksum.tokens(),
        documents: checksum.documents(),
        continues,
        selection,
        checksum: checksum.finish(),
    }
}

fn remove(path: &Path) -> Result<(), DataError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(DataError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}
