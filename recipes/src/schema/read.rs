//! Reading recipes from text and files, and writing them back.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::position::{Malformed, Span};
use super::recipe::{Attention, DEFAULT_FRACTION, Recipe};
use super::report::{Finding, RecipeError};
use super::units::Fraction;
use super::{check, explain, paths, position, syntax};

impl Recipe {
    /// Reads a recipe from `text`; `file_name` appears in errors. Paths stay as written.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place and a remedy.
    pub fn parse(text: &str, file_name: &str) -> Result<Recipe, RecipeError> {
        read(text).map_err(|finding| finding.render(file_name, text))
    }

    /// Reads the recipe at `path`; relative paths in it are taken from the file's directory.
    ///
    /// # Errors
    /// As [`Recipe::parse`]; and when the file is missing, unreadable, a directory, not UTF-8, or too large.
    pub fn load(path: &Path) -> Result<Recipe, RecipeError> {
        let shown = path.display().to_string();
        let whole =
            |message: String, help: &str| Finding::new(None, message, help).render(&shown, "");
        let bytes = read_bounded(path)
            .map_err(|error| whole(format!("cannot read the recipe: {error}"), remedy(&error)))?;
        if bytes.len() > syntax::MAX_BYTES {
            return Err(syntax::too_large().render(&shown, ""));
        }
        let text = String::from_utf8(bytes).map_err(|error| not_utf8(&shown, &error))?;
        let recipe = Recipe::parse(&text, &shown)?;
        let absolute = std::path::absolute(path)
            .map_err(|error| whole(format!("cannot resolve the path: {error}"), remedy(&error)))?;
        let directory = absolute.parent().unwrap_or(Path::new("/"));
        if directory.to_str().is_none() {
            return Err(whole(
                "the path of the recipe is not UTF-8".into(),
                "move it to a directory with a UTF-8 name",
            ));
        }
        Ok(recipe.resolved(directory))
    }

    /// The recipe with every relative path taken from `base_dir`.
    #[must_use]
    pub fn resolved(mut self, base_dir: &Path) -> Recipe {
        let resolve = |path: &mut PathBuf| *path = base_dir.join(&*path);
        self.base = self.base.resolved(base_dir);
        resolve(&mut self.data.train);
        self.data.heldout.iter_mut().for_each(resolve);
        let to = self.checkpoint.to.iter_mut();
        to.filter(|to| !paths::is_url(to)).for_each(resolve);
        self
    }

    /// The recipe as YAML with every default that applies written out; reads back as the same recipe.
    pub fn to_yaml(&self) -> String {
        const PLAIN: &str = "invariant: a recipe is mappings of strings, numbers and booleans";
        let mut value = serde_yaml::to_value(self).expect(PLAIN);
        if self.attention == Attention::Softmax
            && let Some(model) = value
                .get_mut("model")
                .and_then(serde_yaml::Value::as_mapping_mut)
        {
            for key in check::SUPRA_ONLY {
                model.remove(key);
            }
        }
        serde_yaml::to_string(&value).expect(PLAIN)
    }
}

fn read(text: &str) -> Result<Recipe, Finding> {
    syntax::check(text)?;
    position::check_yaml(text).map_err(|malformed| match malformed {
        Malformed::Duplicate { span, key } => Finding::new(
            span,
            format!("the key `{key}` stands here twice"),
            "keep one of them",
        ),
        Malformed::Yaml(error) => explain::yaml(text, &error),
    })?;
    let mut recipe: Recipe =
        serde_yaml::from_str(text).map_err(|error| explain::recipe(text, &error))?;
    check::check(&recipe, text)?;
    if recipe.budget.pretraining_tokens.is_some() {
        recipe
            .budget
            .fraction
            .get_or_insert(Fraction(DEFAULT_FRACTION));
    }
    Ok(recipe)
}

/// The file's bytes, no more than one above the largest size that is parsed.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(syntax::MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "check the path, which is taken from the current directory",
        io::ErrorKind::IsADirectory => "name the YAML file inside the directory",
        io::ErrorKind::PermissionDenied => "make the file readable for this user",
        _ => "check the file and its file system",
    }
}

fn not_utf8(file: &str, error: &std::string::FromUtf8Error) -> RecipeError {
    let (bytes, valid) = (error.as_bytes(), error.utf8_error().valid_up_to());
    let utf16 = bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]);
    let message = match utf16 {
        true => "the file is UTF-16, not UTF-8".to_owned(),
        false => format!("byte {:#04x} is not UTF-8", bytes[valid]),
    };
    // The valid part is unchanged by the lossy reading, so the offset of the first bad byte stays right.
    let text = String::from_utf8_lossy(bytes);
    Finding::new(
        Some(Span::at(&text, valid)),
        message,
        "save the file as UTF-8",
    )
    .render(file, &text)
}
