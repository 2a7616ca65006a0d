//! Wrong recipes, data and weights: whoever submits them learns which file, what is wrong and what to do.

use std::fs;
use std::path::Path;

use supra_tests::fixture::write_documents;
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

/// The fixture with other text, tokenized.
fn with_own_text(stage: &Stage, documents: impl IntoIterator<Item = String>) -> Result<Fixture> {
    let text = stage.directory.path().join("text");
    let fixture = Fixture {
        data: stage.directory.path().join("tokens"),
        ..stage.fixture.clone()
    };
    fs::create_dir_all(&text)?;
    write_documents(&text.join("part-00000.parquet"), documents)?;
    let mut tokenize = stage.programs.supra();
    tokenize
        .args(["data", "tokenize"])
        .arg(&text)
        .arg("--output")
        .arg(&fixture.data)
        .arg("--tokenizer")
        .arg(&fixture.base);
    run(tokenize, LIMIT)?.expect_code(0)?;
    Ok(fixture)
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
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&[
        "/nowhere/tokens",
        "no such dataset manifest",
        "supra data index",
    ])?;
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
    rejection(&stage, &stage.fixture, &TinyRecipe::default())?.expect_words(&[
        "part-0000",
        ".parquet",
        "changed after",
        "restore it",
    ])?;
    Ok(())
}

#[test]
fn a_base_with_another_tokenizer_is_refused() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_base(&stage)?;
    let path = fixture.base.join("tokenizer.json");
    let other = fs::read_to_string(&path)?.replace("\"w77\"", "\"another\"");
    fs::write(&path, other)?;
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&[
        "another tokenizer",
        &path.to_string_lossy(),
        "tokenize the text with this one",
    ])?;
    Ok(())
}

#[test]
fn a_base_with_fewer_tokens_than_the_data_is_refused() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_base(&stage)?;
    let path = fixture.base.join("config.json");
    let other = fs::read_to_string(&path)?.replace("\"vocab_size\": 128", "\"vocab_size\": 100");
    fs::write(&path, other)?;
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&[
        "dataset.json",
        "vocabulary of 128 tokens",
        "has 100",
        "tokenize the text with the model's own tokenizer",
    ])?;
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
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&[
        "model.safetensors",
        "model.norm.weight",
        "NaN",
        "download them again",
    ])?;
    Ok(())
}

#[test]
fn empty_documents_among_others_are_trained() -> Result<()> {
    let stage = Stage::new()?;
    let documents = (0..200).map(|document| match document % 4 {
        0 => "w5 w9 w70 w21 ".repeat(20),
        1 => " ".to_owned(),
        _ => String::new(),
    });
    let fixture = with_own_text(&stage, documents)?;
    let cluster = stage.cluster("cluster", 1)?;
    let recipe = TinyRecipe {
        budget: 4_000,
        workers: (1, 1),
        ..TinyRecipe::default()
    };
    let run = cluster.submit(&recipe.write(&fixture)?)?;
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!((end.tokens, end.skipped_steps), (recipe.tokens(), 0));
    cluster.audit(&run)?;
    Ok(())
}

#[test]
fn text_of_empty_documents_only_stops_the_run_with_its_cause() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_text(&stage, (0..5_000).map(|_| String::new()))?;
    let recipe = TinyRecipe {
        budget: 4_000,
        ..TinyRecipe::default()
    };
    rejection(&stage, &fixture, &recipe)?.expect_words(&[
        "4 steps in a row",
        "over 0 targets",
        "documents of one token",
    ])?;
    Ok(())
}

#[test]
fn truncated_weights_are_named() -> Result<()> {
    let stage = Stage::new()?;
    let fixture = with_own_base(&stage)?;
    let file = fixture.base.join("model.safetensors");
    let bytes = fs::read(&file)?;
    fs::write(&file, &bytes[..bytes.len() / 2])?;
    let words = ["model.safetensors", "truncated", "download it again"];
    refused_conversion(&stage, &fixture.base)?.expect_words(&words)?;
    rejection(&stage, &fixture, &TinyRecipe::default())?.expect_words(&words)?;
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
