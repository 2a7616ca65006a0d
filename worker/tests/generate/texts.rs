//! Sequences that are forked, kept and batched go on as if they were alone.

use std::{cell::Cell, collections::BTreeMap, fs, path::Path};

use supra_worker::{
    inference::{
        compare::compare,
        completion::{Finish, Limits},
        engine::{Output, Piece, Slot, Want},
        generate::{End, Event, GenerateOptions, Generated, Start, generate},
        load::LoadedModel,
        sampler::Sampling,
        saved::{self, SavedError, SavedText},
    },
    model::AttentionKind,
};
use tch::{Device, Kind, Tensor};

use super::{SUPRA, engine, logits, model_dir, text};
use crate::fixture::World;

#[test]
fn sequences_that_are_forked_or_kept_in_files_go_on_bit_by_bit() {
    let world = World::new(40);
    let file = world.dir.path().join("kept.state");
    for (attention, kind) in [
        (SUPRA, Kind::Float),
        (SUPRA, Kind::BFloat16),
        (AttentionKind::Softmax, Kind::Float),
        (AttentionKind::Softmax, Kind::BFloat16),
    ] {
        let dir = world.dir.path().join(if attention == SUPRA {
            "supra-1"
        } else {
            "softmax-1"
        });
        if !dir.exists() {
            model_dir(&world, attention, 1);
        }
        let mut engine = engine(&dir, kind, 3);
        let first = engine.open().unwrap();
        let tokens = text(37, 5);
        let logits_v = logits(&mut engine, &first, &tokens);
        let forked = engine.fork(&first).unwrap();
        let text = SavedText {
            state: engine.save(&first),
            tokens: tokens.clone(),
            logits: logits_v,
        };
        saved::write(&file, engine.model(), &text).unwrap();
        let read = saved::read(&file, engine.model()).unwrap();
        assert_eq!((&read.tokens, &read.logits), (&text.tokens, &text.logits));
        let loaded = engine.load(&read.state).unwrap();
        assert_eq!(engine.free(), 0);
        assert!(engine.open().is_none() && engine.fork(&first).is_none());
        // A piece, then token by token.
        for part in [&self::text(11, 8)[..], &[7], &[9], &[7]] {
            let expected = logits(&mut engine, &first, part);
            for other in [&forked, &loaded] {
                assert_eq!(
                    logits(&mut engine, other, part),
                    expected,
                    "{attention:?} {kind:?}"
                );
                assert_eq!(engine.position(other), engine.position(&first));
                assert_eq!(engine.state_bytes(other), engine.state_bytes(&first));
            }
        }
        // A slot that comes back is empty.
        engine.close(forked);
        let empty = engine.open().unwrap();
        let alone = logits(&mut engine, &empty, &tokens);
        assert_eq!(alone, text.logits, "{attention:?} {kind:?}");
    }
    refuses_foreign_and_damaged_states(&world, &file);
}

/// `file` is of the softmax model in bf16.
fn refuses_foreign_and_damaged_states(world: &World, file: &Path) {
    let other = model_dir(world, AttentionKind::Softmax, 2);
    let foreign = |dir: &Path, kind| {
        let model = LoadedModel::open(dir, Device::Cpu, kind).unwrap();
        saved::read(file, &model).unwrap_err().to_string()
    };
    let same = world.dir.path().join("softmax-1");
    let supra = world.dir.path().join("supra-1");
    assert!(foreign(&other, Kind::BFloat16).contains("other weights"));
    assert!(foreign(&same, Kind::Float).contains("--dtype"));
    assert!(foreign(&supra, Kind::BFloat16).contains("softmax"));
    let model = LoadedModel::open(&same, Device::Cpu, Kind::BFloat16).unwrap();
    let whole = fs::read(file).unwrap();
    for at in [whole.len() - 1, whole.len() / 2] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(file, &bytes).unwrap();
        let error = saved::read(file, &model).unwrap_err();
        assert!(matches!(error, SavedError::Damaged { .. }), "{error}");
    }
    for length in [0, 7, 100, whole.len() - 1] {
        fs::write(file, &whole[..length]).unwrap();
        assert!(saved::read(file, &model).is_err(), "{length} bytes");
    }
}

#[test]
fn a_ragged_batch_gives_what_its_sequences_give_alone() {
    let world = World::new(40);
    for attention in [SUPRA, AttentionKind::Softmax] {
        let dir = model_dir(&world, attention, 3);
        let mut engine = engine(&dir, Kind::Float, 6);
        // Prompts of different lengths; then some go on by a piece, some by a token, some not at all.
        let rounds: [[u32; 5]; 4] = [
            [1, 2, 9, 16, 31],
            [1, 12, 1, 0, 1],
            [3, 1, 0, 8, 1],
            [1, 1, 1, 1, 1],
        ];
        let slots: Vec<Slot> = (0..5).map(|_| engine.open().unwrap()).collect();
        let mut together: BTreeMap<(usize, usize), Vec<f32>> = BTreeMap::new();
        let part = |round: usize, at: usize| text(rounds[round][at], (round * 7 + at * 3) as u32);
        for round in 0..rounds.len() {
            let parts: Vec<Vec<u32>> = (0..5).map(|at| part(round, at)).collect();
            let those: Vec<usize> = (0..5).filter(|&at| !parts[at].is_empty()).collect();
            let piece = |&at: &usize| Piece {
                slot: &slots[at],
                tokens: &parts[at],
                want: Want::Logits,
            };
            let pieces: Vec<Piece<'_>> = those.iter().map(piece).collect();
            for (at, output) in those.iter().zip(engine.advance(&pieces).unwrap()) {
                let Output::Logits(logits_v) = output else {
                    panic!("{output:?}")
                };
                together.insert((round, *at), logits_v);
            }
        }
        for at in 0..5 {
            let slot = engine.open().unwrap();
            for round in (0..rounds.len()).filter(|&round| rounds[round][at] > 0) {
                let alone = Tensor::from_slice(&logits(&mut engine, &slot, &part(round, at)));
                let batched = Tensor::from_slice(&together[&(round, at)]);
                let error = (&batched - &alone).abs().max().double_value(&[])
                    / alone.abs().max().double_value(&[]);
                assert!(
                    error <= 1e-5,
                    "{attention:?}, sequence {at}, round {round}: {error:e}"
                );
            }
            engine.close(slot);
        }
    }
}

/// What an engine with so many slots makes of prompts; text by text.
fn texts(
    dir: &Path,
    slots: usize,
    prompts: &[&[u32]],
    options: &GenerateOptions,
    interrupted: impl Fn() -> bool,
) -> Vec<Generated> {
    let mut engine = engine(dir, Kind::Double, slots);
    let tokenizer = engine.model().tokenizer().unwrap();
    let start = |tokens: &&'_ [u32]| tokens.to_vec();
    let owned: Vec<Vec<u32>> = prompts.iter().map(start).collect();
    let starts: Vec<Start<'_>> = owned
        .iter()
        .map(|tokens| Start { from: None, tokens })
        .collect();
    let mut running: BTreeMap<usize, String> = BTreeMap::new();
    let mut done: BTreeMap<usize, Generated> = BTreeMap::new();
    let tell = |event: Event<'_>| match event {
        Event::Text { text, piece } => *running.entry(text).or_default() += piece,
        Event::Done { text, generated } => drop(done.insert(text, *generated)),
    };
    generate(&mut engine, &tokenizer, &starts, options, interrupted, tell).unwrap();
    assert_eq!(engine.free(), slots, "every slot is given back");
    for (text, generated) in &done {
        assert_eq!(running.get(text).map_or("", String::as_str), generated.text);
    }
    done.into_values().collect()
}

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        limits: Limits {
            max_tokens,
            stop_tokens: vec![0],
            stop_strings: Vec::new(),
        },
        sampling: Sampling {
            seed: 5,
            ..Sampling::default()
        },
        continuations: 1,
        logprobs: None,
        save: false,
    }
}

#[test]
fn texts_do_not_depend_on_their_neighbours_and_end_where_they_should() {
    let world = World::new(40);
    let dir = model_dir(&world, SUPRA, 4);
    let prompts = [text(3, 1), text(20, 2), text(1, 3), text(9, 4)];
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let never = || false;
    let three = GenerateOptions {
        continuations: 3,
        ..options(15)
    };
    let together = texts(&dir, 7, &prompts, &three, never);
    assert_eq!(together.len(), 12);
    for (at, generated) in together.iter().enumerate() {
        let mut alone = options(15);
        alone.sampling.seed += (at % 3) as u64;
        let alone = texts(&dir, 1, &prompts[at / 3..=at / 3], &alone, never);
        assert_eq!(
            (&alone[0].text, alone[0].end),
            (&generated.text, generated.end),
            "text {at}"
        );
    }
    assert!(together.windows(2).any(|pair| pair[0].text != pair[1].text));

    // The longest text, cut at a string inside it, across the border of two tokens.
    let longest = together
        .iter()
        .max_by_key(|generated| generated.tokens.len())
        .unwrap();
    let at = together
        .iter()
        .position(|generated| std::ptr::eq(generated, longest))
        .unwrap();
    let words: Vec<&str> = longest.text.split(' ').collect();
    let (second, third) = (words[2], words[3]);
    let stop = format!("{second} {}", &third[..1]);
    let mut cut = options(15);
    cut.sampling.seed += (at % 3) as u64;
    cut.limits.stop_strings = vec!["never said".to_owned(), stop.clone()];
    let cut = &texts(&dir, 1, &prompts[at / 3..=at / 3], &cut, never)[0];
    assert_eq!(cut.end, End::Finished(Finish::Stop));
    assert_eq!(cut.text, longest.text[..longest.text.find(&stop).unwrap()]);

    let nothing = &texts(&dir, 1, &prompts[..1], &options(0), never)[0];
    assert_eq!(
        (nothing.text.as_str(), nothing.end),
        ("", End::Finished(Finish::Length))
    );

    let asked = Cell::new(0);
    let soon = || asked.replace(asked.get() + 1) == 4;
    let interrupted = texts(&dir, 2, &prompts, &options(1000), soon);
    assert_eq!(interrupted.len(), 2, "the others have not begun");
    assert!(interrupted.iter().all(|text| text.tokens.len() <= 4));
    assert!(interrupted.iter().any(|text| text.end == End::Interrupted));
}

#[test]
fn probabilities_are_those_of_the_model() {
    let world = World::new(40);
    let dir = model_dir(&world, SUPRA, 6);
    let mut told = options(8);
    told.logprobs = Some(3);
    told.sampling = Sampling {
        temperature: 0.3,
        repetition_penalty: 1.5,
        top_k: 2,
        ..told.sampling
    };
    let prompt = text(6, 1);
    let generated = &texts(&dir, 1, &[&prompt], &told, || false)[0];
    assert!(!generated.tokens.is_empty());
    let mut engine = engine(&dir, Kind::Double, 1);
    let slot = engine.open().unwrap();
    let tokens = &generated.all_tokens[..generated.all_tokens.len() - 1];
    let next: Vec<u32> = generated.tokens.iter().map(|token| token.id).collect();
    let want = Want::Scores {
        next: &next,
        top: 3,
    };
    let outputs = engine
        .advance(&[Piece {
            slot: &slot,
            tokens,
            want,
        }])
        .unwrap();
    let [Output::Scores(scores)] = &outputs[..] else {
        panic!("{outputs:?}")
    };
    for (token, score) in generated.tokens.iter().zip(scores) {
        assert!((token.logprob.unwrap() - score.logprob).abs() < 1e-5);
        let ids = |top: &[(u32, f64)]| top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(&token.top), ids(&score.top));
    }
}

#[test]
fn forms_of_one_model_agree_in_every_format() {
    let world = World::new(40);
    for attention in [SUPRA, AttentionKind::Softmax] {
        let dir = model_dir(&world, attention, 7);
        for kind in [Kind::Float, Kind::BFloat16] {
            let mut engine = engine(&dir, kind, 1);
            let comparison = compare(&mut engine, &text(60, 3)).unwrap();
            assert!(comparison.agree(), "{kind:?}: {comparison}");
            let told = (comparison.tokens, comparison.to_fp32.is_some());
            assert_eq!(told, (60, kind == Kind::BFloat16));
        }
    }
}
