//! Wrong recipes, data and weights: whoever submits them learns which file, what is wrong and what to do.

use std::fs;
use std::path::Path;

use supra_tests::process::{Output, run};
use supra_tests::{Failure, Fixture, Result, TinyRecipe, weights};

use crate::{LIMIT, Stage};

/// Submits a recipe that must fail, at once or when a worker looks at its input, and gives what the
/// user is told.
fn rejection(stage: &Stage, fixture: &Fixture, recipe: &TinyRecipe) -> Result<Output> {
    let cluster = stage.cluster("cluster", 1)?;
    let path = TinyRecipe {
        workers: (1, 1),
        ..recipe.clone()
    }
    .write(fixture)?;
    let submitted = cluster.supra(&["submit", &path.to_string_lossy(), "--json"])?;
    if submitted.code != 0 {
        return submitted.expect_code(2);
    }
    let answer: serde_json::Value = serde_json::from_str(&submitted.stdout)?;
    let id = answer["run"]
        .as_str()
        .ok_or_else(|| Failure::new("no run"))?;
    let stdout = cluster.wait_failed(id, LIMIT)?;
    cluster.supra(&["watch", id])?.expect_code(1)?;
    Ok(Output {
        code: 2,
        stdout,
        stderr: String::new(),
    })
}

/// The fixture with a copy of its base, to be damaged.
fn with_own_base(stage: &Stage) -> Result<Fixture> {
    let base = stage.directory.path().join("damaged");
    fs::create_dir_all(&base)?;
    for entry in fs::read_dir(&stage.fixture.base)? {
        let entry = entry?;
        fs::copy(entry.path(), base.join(entry.file_name()))?;
    }
    Ok(Fixture {
        base,
        ..stage.fixture.clone()
    })
}

/// `supra-worker convert` of a base that must be refused.
fn refused_conversion(stage: &Stage, base: &Path) -> Result<Output> {
    let mut convert = stage.programs.worker();
    convert
        .arg("convert")
        .arg("--base")
        .arg(base)
        .arg("--out")
        .arg(stage.directory.path().join("converted"));
    run(convert, LIMIT)?.expect_code(2)
}

#[test]
fn a_recipe_with_a_typo_is_refused_with_line_and_spelling() -> Result<()> {
    let stage = Stage::new()?;
    let recipe = TinyRecipe {
        more: "optimiser: {}\n".to_owned(),
        ..TinyRecipe::default()
    };
    rejection(&stage, &stage.fixture, &recipe)?.expect_words(&[
        "tiny.yaml",
        "optimiser",
        "optimizer",
    ])?;
    Ok(())
}

#[test]
fn data_smaller_than_the_budget_is_refused_unless_repeated() -> Result<()> {
    let stage = Stage::new()?;
    let recipe = TinyRecipe {
        budget: 1_000_000,
        ..TinyRecipe::default()
    };
    rejection(&stage, &stage.fixture, &recipe)?
        .expect_words(&["31250 samples", "data.repeat: true"])?;
    Ok(())
}

#[test]
fn a_missing_dataset_is_named() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = Fixture {
        data: "/nowhere/tokens".into(),
        ..stage.fixture.clone()
    };
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&["/nowhere/tokens"])?;
    Ok(())
}

#[test]
fn token_parquet_changed_after_indexing_is_refused() -> Result<()> {
    let stage = Stage::new()?;
    for entry in fs::read_dir(&stage.fixture.data)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "parquet")
        {
            let bytes = fs::read(&path)?;
            fs::write(&path, &bytes[..bytes.len() / 2])?;
        }
    }
    rejection(&stage, &stage.fixture, &TinyRecipe::default())?
        .expect_words(&["part-0000", ".parquet"])?;
    Ok(())
}

#[test]
fn a_base_with_another_tokenizer_is_refused() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_base(&stage)?;
    let path = fixture.base.join("tokenizer.json");
    let other = fs::read_to_string(&path)?.replace("\"w77\"", "\"another\"");
    fs::write(&path, other)?;
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&["tokenizer"])?;
    Ok(())
}

#[test]
fn nan_in_the_base_stops_the_run_with_its_cause() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_base(&stage)?;
    let file = fixture.base.join("model.safetensors");
    weights::alter(&file, "model.norm.weight", |bytes| {
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    })?;
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&["finite"])?;
    Ok(())
}

#[test]
fn truncated_weights_are_named() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_base(&stage)?;
    let file = fixture.base.join("model.safetensors");
    let bytes = fs::read(&file)?;
    fs::write(&file, &bytes[..bytes.len() / 2])?;
    refused_conversion(&stage, &fixture.base)?.expect_words(&["model.safetensors"])?;
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&["model.safetensors"])?;
    Ok(())
}

#[test]
fn weights_of_another_shape_are_named() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_base(&stage)?;
    let path = fixture.base.join("config.json");
    let other = fs::read_to_string(&path)?
        .replace("\"intermediate_size\": 64", "\"intermediate_size\": 96");
    fs::write(&path, other)?;
    refused_conversion(&stage, &fixture.base)?.expect_words(&["shape", "64", "96"])?;
    Ok(())
}

#[test]
fn a_model_feature_that_is_not_supported_is_refused_by_name() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_base(&stage)?;
    let path = fixture.base.join("config.json");
    let with = "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}, \"hidden_size\"";
    let other = fs::read_to_string(&path)?.replace("\"hidden_size\"", with);
    fs::write(&path, other)?;
    refused_conversion(&stage, &fixture.base)?.expect_words(&["rope_scaling"])?;
    Ok(())
}

#[test]
fn an_interrupted_tokenization_goes_on_where_it_stopped() -> Result<()> {
    let stage = Stage::new()?;
    let output = stage.directory.path().join("again");
    let tokenize = || {
        let mut command = stage.programs.supra();
        command
            .args(["data", "tokenize"])
            .arg(stage.fixture.root.join("text"))
            .arg("--output")
            .arg(&output);
        command.arg("--tokenizer").arg(&stage.fixture.base);
        run(command, LIMIT)?.expect_code(0)
    };
    tokenize()?;
    let manifest = fs::read(output.join("dataset.json"))?;
    fs::remove_file(output.join("dataset.json"))?;
    fs::remove_file(output.join("part-00001.parquet"))?;
    // What a killed call leaves behind.
    fs::write(output.join("part-00001.parquet.partial"), "half a file")?;
    tokenize()?;
    assert_eq!(fs::read(output.join("dataset.json"))?, manifest);
    Ok(())
}
