//! What can be known of the kernels without a GPU: that they compile, for the oldest and the newest architecture that we
//! run on, and that none of them spills registers.

use super::{SOURCES, compile, cuda_libraries, nvrtc::Nvrtc};

const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];

fn nvrtc() -> Nvrtc {
    Nvrtc::open(&cuda_libraries()).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn every_kernel_compiles_and_keeps_its_numbers_in_registers() {
    let nvrtc = nvrtc();
    for source in &SOURCES {
        for architecture in ARCHITECTURES {
            let log = compile::compile(&nvrtc, source, architecture)
                .unwrap_or_else(|error| panic!("{error}"))
                .log;
            for kernel in source.kernels {
                let about = format!("Compiling entry function '{kernel}' for");
                assert!(
                    log.contains(&about),
                    "{}: no {kernel} in {log}",
                    source.name
                );
            }
            let spills = log.lines().filter(|line| line.contains("spill stores"));
            let (tidy, spilled): (Vec<_>, Vec<_>) =
                spills.partition(|line| line.contains(" 0 bytes spill stores"));
            assert!(tidy.len() >= source.kernels.len(), "{log}");
            assert!(spilled.is_empty(), "{} {architecture}: {log}", source.name);
        }
    }
}

#[test]
fn the_compiler_says_what_is_wrong_and_where() {
    let broken = compile::Source {
        name: "broken.cu",
        text: "#include \"common.cuh\"\n__global__ void f() { undeclared(); }",
        kernels: &[],
    };
    let error = compile::compile(&nvrtc(), &broken, "sm_90a")
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("broken.cu(2)") && error.contains("undeclared"),
        "{error}"
    );
    let error = compile::compile(&nvrtc(), &SOURCES[0], "sm_0")
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("sm_0"), "{error}");
}

#[test]
fn what_was_compiled_once_comes_from_the_cache_unless_it_is_damaged() {
    let (nvrtc, folder) = (nvrtc(), tempfile::tempdir().unwrap());
    let source = &super::reduce::SOURCE;
    let cubin =
        || compile::cubin(&nvrtc, source, "sm_90a", Some(folder.path())).expect("it compiles");
    let files = || -> Vec<_> {
        std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect()
    };
    let first = cubin();
    let [file] = &files()[..] else {
        panic!("{:?}", files())
    };
    let written = std::fs::metadata(file).unwrap().modified().unwrap();
    assert_eq!(cubin(), first);
    let modified = || std::fs::metadata(file).unwrap().modified().unwrap();
    assert_eq!(modified(), written, "it was read, not written again");

    std::fs::write(file, "damaged").unwrap();
    assert_eq!(cubin(), first);
    assert!(std::fs::read(file).unwrap().ends_with(&first), "repaired");

    compile::cubin(&nvrtc, source, "sm_80", Some(folder.path())).unwrap();
    assert_eq!(files().len(), 2, "another architecture, another file");
}

#[test]
fn a_missing_compiler_is_an_error_that_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let error = Nvrtc::open(folder.path())
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("libnvrtc.so.13") && error.contains("scripts/setup"),
        "{error}"
    );
}
