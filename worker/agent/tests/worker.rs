//! Whole workers in threads of this process, with a coordinator that does what the test says.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use supra_agent::supervisor::Birth;
use supra_agent::{
    AgentError, Exit, FaultKind, Formed, Held, Job, Outcome, Phase, StepReport, Timing, Unfinished,
    WorkerOptions, run_worker,
};
use supra_proto::Token;
use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{
    Assignment, Fault, Goodbye, LedgerHead, LeftReason, PublishCheckpoint, Refusal, RestoreFrom,
    Void, Welcome, WorkerMessage,
};

use crate::coordinator::{Attached, Coordinator, RECIPE};

type Thread = JoinHandle<Result<Exit, AgentError>>;

fn options(url: &str) -> WorkerOptions {
    let timing = Timing {
        first_contact: Duration::from_secs(10),
        connect: Duration::from_secs(10),
        abort: Duration::from_secs(5),
    };
    WorkerOptions {
        timing,
        ..WorkerOptions::new(url, "cpu", "test")
    }
}

fn start(options: WorkerOptions, train: impl FnMut(Job) -> Outcome + Send + 'static) -> Thread {
    std::thread::spawn(move || run_worker(options, train))
}

/// Adds numbers with its peers, until `last` or until void.
fn add(mut job: Job, last: u64) -> Outcome {
    let mut collective = match job.connect() {
        Ok(collective) => collective,
        Err(error) => {
            return Outcome::Fault {
                kind: FaultKind::Transient,
                message: error.to_string(),
            };
        }
    };
    job.link.formed(Formed::default());
    for step in 1..=last {
        if job.link.void() {
            return Outcome::Voided;
        }
        job.link.phase(Phase::Training, step);
        let mut sum = vec![(step * 10 + u64::from(job.rank)) as f32; 1000];
        if let Err(error) = collective.all_reduce_f32(&mut sum) {
            return Outcome::Fault {
                kind: FaultKind::Transient,
                message: error.to_string(),
            };
        }
        job.link.step(StepReport {
            step,
            loss_sum: f64::from(sum[999]),
            ..Default::default()
        });
    }
    Outcome::Finished
}

fn assign(workers: &mut [Attached], generation: u64, root: &Path, restore: Option<RestoreFrom>) {
    let world = workers.len();
    let addresses: Vec<_> = workers
        .iter()
        .map(|worker| worker.hello.data_address.clone())
        .collect();
    for (rank, worker) in workers.iter_mut().enumerate() {
        let assignment = Assignment {
            held: None,
            recipe: RECIPE.to_owned(),
            rank: rank as u32,
            world: world as u32,
            next_address: addresses[(rank + 1) % world].clone(),
            data_key: vec![generation as u8; 32],
            restore: restore.clone(),
            checkpoint_root: root.to_str().unwrap().to_owned(),
        };
        worker.say("run", generation, Down::Assignment(assignment));
    }
}

fn left(worker: &mut Attached, generation: u64) -> LeftReason {
    worker.hear(|message| match &message.body {
        Some(Up::Left(left)) if message.generation == generation => Some(left.reason()),
        _ => None,
    })
}

fn fault(worker: &mut Attached) -> Fault {
    worker.hear(|message| match &message.body {
        Some(Up::Fault(fault)) => Some(fault.clone()),
        _ => None,
    })
}

fn void() -> Down {
    Down::Void(Void {
        reason: "test".to_owned(),
    })
}

fn goodbye(worker: &mut Attached) {
    worker.say(
        "",
        0,
        Down::Goodbye(Goodbye {
            reason: "the test is over".to_owned(),
        }),
    );
}

#[test]
fn two_workers_lose_a_generation_and_finish_the_next() {
    let mut coordinator = Coordinator::start(None);
    let threads = [0, 1].map(|_| {
        start(options(&coordinator.url), |job| {
            let last = if job.generation == 1 { u64::MAX } else { 5 };
            add(job, last)
        })
    });
    let mut workers = [coordinator.welcome(), coordinator.welcome()];
    assign(&mut workers, 1, Path::new("/checkpoints"), None);
    for worker in &mut workers {
        let sum = worker.hear(|message| match &message.body {
            Some(Up::Step(step)) if step.step == 3 => Some(step.loss_sum),
            _ => None,
        });
        assert_eq!(sum, 61.0);
    }
    for worker in &mut workers {
        worker.say("run", 1, void());
    }
    for worker in &mut workers {
        assert_eq!(left(worker, 1), LeftReason::Void);
    }
    assign(&mut workers, 2, Path::new("/checkpoints"), None);
    for worker in &mut workers {
        assert_eq!(left(worker, 2), LeftReason::Finished);
        goodbye(worker);
    }
    for thread in threads {
        assert_eq!(thread.join().unwrap().unwrap(), Exit::Goodbye);
    }
}

#[test]
fn every_message_has_the_next_number_and_heartbeats_go_on() {
    let mut coordinator = Coordinator::start(None);
    let birth = Birth {
        instance: "i".to_owned(),
        previous_exit: "exit code 1: x".to_owned(),
    };
    let thread = start(
        WorkerOptions {
            birth,
            ..options(&coordinator.url)
        },
        |job| add(job, 3),
    );
    let mut workers = [coordinator.welcome()];
    assert_eq!(workers[0].hello.previous_exit, "exit code 1: x");
    assert_eq!(workers[0].hello.plan_probe, supra_recipes::plan::probe());
    assert!(
        workers[0].hello.name.ends_with("/cpu"),
        "{}",
        workers[0].hello.name
    );
    assign(&mut workers, 1, Path::new("/checkpoints"), None);
    let (mut sequence, mut idle_after) = (1, 0);
    workers[0].hear(|message| {
        sequence += 1;
        assert_eq!(message.sequence, sequence);
        let left = matches!(&message.body, Some(Up::Left(_)));
        let beat =
            matches!(&message.body, Some(Up::Heartbeat(beat)) if beat.phase() == Phase::Idle);
        idle_after += u32::from(left || (beat && idle_after > 0));
        (idle_after == 3).then_some(())
    });
    goodbye(&mut workers[0]);
    assert_eq!(thread.join().unwrap().unwrap(), Exit::Goodbye);
}

#[test]
fn a_worker_whose_stream_broke_works_on_and_says_again_what_may_be_lost() {
    let mut coordinator = Coordinator::start(None);
    let (release, released) = std::sync::mpsc::channel();
    let thread = start(options(&coordinator.url), move |job| {
        job.link.formed(Formed {
            step: 4,
            ..Default::default()
        });
        for step in 5..8 {
            job.link.step(StepReport {
                step,
                ..Default::default()
            });
            released.recv().unwrap();
        }
        match job.link.void() {
            true => Outcome::Voided,
            false => Outcome::Regrouped,
        }
    });
    let mut workers = [coordinator.welcome()];
    let instance = workers[0].hello.instance.clone();
    assign(&mut workers, 1, Path::new("/checkpoints"), None);
    workers[0].hear(|message| matches!(message.body, Some(Up::Step(_))).then_some(()));
    drop(workers);
    release.send(()).unwrap();
    let mut worker = coordinator.meet();
    assert_eq!(worker.hello.instance, instance);
    let place = worker.hello.place.clone().unwrap();
    assert_eq!((place.run.as_str(), place.generation), ("run", 1));
    assert!(place.formed.unwrap().step == 4 && !place.left);
    worker.say(
        "",
        0,
        Down::Welcome(Welcome {
            heartbeat_seconds: 0.1,
            known_step: 5,
        }),
    );
    let mut steps = || {
        worker.hear(|message| match &message.body {
            Some(Up::Step(report)) if message.generation == 1 => Some(report.step),
            _ => None,
        })
    };
    assert_eq!(steps(), 6, "step 5 is known");
    release.send(()).unwrap();
    assert_eq!(steps(), 7);
    release.send(()).unwrap();
    assert_eq!(left(&mut worker, 1), LeftReason::Regrouped);
    goodbye(&mut worker);
    assert_eq!(thread.join().unwrap().unwrap(), Exit::Goodbye);
}

#[test]
fn a_checkpoint_is_published_between_two_steps() {
    let root = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(None);
    let thread = start(options(&coordinator.url), move |job| {
        let directory = job.checkpoint_root.local_path("step-1").unwrap();
        std::fs::create_dir_all(&directory).unwrap();
        job.link.checkpoint_filled(Unfinished {
            step: 1,
            path: "step-1".to_owned(),
            bytes: 0,
            manifest: Default::default(),
            seconds: 0.0,
        });
        match job.link.await_published(1) {
            Ok(()) if directory.join("manifest.json").exists() => Outcome::Finished,
            _ => Outcome::Voided,
        }
    });
    let mut workers = [coordinator.welcome()];
    assign(&mut workers, 1, root.path(), None);
    let begun = |message: &WorkerMessage| {
        matches!(message.body, Some(Up::CheckpointBegun(_))).then_some(())
    };
    // The second time, since it did not get the ledger.
    for _ in 0..2 {
        workers[0].hear(begun);
        let head = LedgerHead {
            step: 1,
            hash: vec![7; 32],
        };
        workers[0].say("run", 1, Down::LedgerHead(head));
    }
    let hash = workers[0].hear(|message| match &message.body {
        Some(Up::CheckpointWritten(written)) => Some(written.manifest_hash.clone()),
        _ => None,
    });
    workers[0].say(
        "run",
        1,
        Down::Publish(PublishCheckpoint {
            step: 1,
            manifest_hash: hash.clone(),
        }),
    );
    workers[0]
        .hear(|message| matches!(message.body, Some(Up::CheckpointPublished(_))).then_some(()));
    assert_eq!(left(&mut workers[0], 1), LeftReason::Finished);

    // What a crash left pending is published before the next generation starts from it.
    std::fs::rename(
        root.path().join("step-1/manifest.json"),
        root.path().join("step-1/manifest.pending"),
    )
    .unwrap();
    let restore = RestoreFrom {
        step: 1,
        path: "step-1".to_owned(),
        manifest_hash: hash,
    };
    assign(&mut workers, 2, root.path(), Some(restore));
    workers[0].hear(begun);
    assert!(root.path().join("step-1/manifest.json").exists());
    goodbye(&mut workers[0]);
    assert_eq!(thread.join().unwrap().unwrap(), Exit::Goodbye);
}

#[test]
fn a_panic_is_a_transient_fault_and_the_worker_lives_on() {
    let mut coordinator = Coordinator::start(None);
    let thread = start(options(&coordinator.url), |job| match job.generation {
        1 => panic!("index out of luck"),
        _ => add(job, 2),
    });
    let mut workers = [coordinator.welcome()];
    assign(&mut workers, 1, Path::new("/checkpoints"), None);
    let fault = fault(&mut workers[0]);
    assert_eq!(fault.kind(), FaultKind::Transient);
    assert!(
        fault.message.contains("index out of luck") && fault.message.contains("worker.rs"),
        "{}",
        fault.message
    );
    assert_eq!(left(&mut workers[0], 1), LeftReason::Fault);
    assign(&mut workers, 2, Path::new("/checkpoints"), None);
    assert_eq!(left(&mut workers[0], 2), LeftReason::Finished);
    goodbye(&mut workers[0]);
    assert_eq!(thread.join().unwrap().unwrap(), Exit::Goodbye);
}

#[test]
fn a_peer_with_a_wrong_address_is_named() {
    let mut coordinator = Coordinator::start(None);
    let mut quick = options(&coordinator.url);
    quick.timing.connect = Duration::from_millis(500);
    let threads = [quick.clone(), quick].map(|options| start(options, |job| add(job, 2)));
    let mut workers = [coordinator.welcome(), coordinator.welcome()];
    let wrong = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    workers[1].hello.data_address = wrong.clone();
    assign(&mut workers, 1, Path::new("/checkpoints"), None);
    let messages = workers.each_mut().map(|worker| fault(worker).message);
    for part in ["rank 1", wrong.as_str(), "--advertise"] {
        assert!(
            messages[0].contains(part),
            "{part:?} is not in {:?}",
            messages[0]
        );
    }
    assert!(
        messages[1].contains("rank 0") && messages[1].contains("--advertise"),
        "{:?}",
        messages[1]
    );
    workers.iter_mut().for_each(goodbye);
    for thread in threads {
        thread.join().unwrap().unwrap();
    }
}

#[test]
fn a_worker_that_lost_its_coordinator_says_in_its_next_hello_what_it_keeps() {
    let mut coordinator = Coordinator::start(None);
    let held = Held {
        run: "run".to_owned(),
        generation: 1,
        step: 7,
        replica_hash: vec![3; 32],
        ..Held::default()
    };
    let kept = held.clone();
    let thread = start(options(&coordinator.url), move |job| {
        while !job.link.void() {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Longer than the pause before the worker looks for the coordinator again.
        std::thread::sleep(Duration::from_millis(500));
        job.link.held(kept.clone());
        Outcome::Voided
    });
    let mut workers = [coordinator.welcome()];
    assert_eq!(workers[0].hello.held, None);
    assign(&mut workers, 1, Path::new("/checkpoints"), None);
    workers[0].hear(|message| {
        matches!(&message.body, Some(Up::Heartbeat(beat)) if beat.phase() == Phase::Forming)
            .then_some(())
    });
    drop(workers);
    let mut again = coordinator.welcome();
    assert_eq!(again.hello.held, Some(held));
    goodbye(&mut again);
    assert_eq!(thread.join().unwrap().unwrap(), Exit::Goodbye);
}

#[test]
fn a_refused_worker_ends_with_the_reason() {
    let mut coordinator = Coordinator::start(None);
    let thread = start(options(&coordinator.url), |job| add(job, 1));
    let mut worker = coordinator.meet();
    worker.say(
        "",
        0,
        Down::Refusal(Refusal {
            message: "another build".to_owned(),
        }),
    );
    let exit = thread.join().unwrap().unwrap();
    assert_eq!(exit, Exit::Refused("another build".to_owned()));
    assert_eq!(exit.exit_code(), 2);
}

#[test]
fn a_coordinator_that_was_never_there_is_unreachable() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut options = options(&format!("http://{gone}"));
    options.timing.first_contact = Duration::from_millis(500);
    let start = Instant::now();
    let error = run_worker(options, |job| add(job, 1)).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains(&gone.to_string()), "{error}");
    assert!(start.elapsed() >= Duration::from_millis(500));
}

#[test]
fn a_wrong_token_is_not_tried_again() {
    let token = |text| Some(Token::new(text).unwrap());
    let mut coordinator = Coordinator::start(token("the-right-token-of-all"));
    let wrong = WorkerOptions {
        token: token("a-wrong-token-for-sure"),
        ..options(&coordinator.url)
    };
    let error = run_worker(wrong, |job| add(job, 1)).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("token"), "{error}");

    let right = WorkerOptions {
        token: token("the-right-token-of-all"),
        ..options(&coordinator.url)
    };
    let thread = start(right, |job| add(job, 1));
    goodbye(&mut coordinator.welcome());
    assert_eq!(thread.join().unwrap().unwrap(), Exit::Goodbye);
}

/// Not a test of its own: the process of the next one.
#[test]
#[ignore = "runs as a process of another test"]
fn helper_that_hangs() {
    let Ok(url) = std::env::var("SUPRA_TEST_COORDINATOR") else {
        return;
    };
    let mut options = options(&url);
    options.timing.abort = Duration::from_millis(300);
    run_worker(options, |_job| {
        std::thread::sleep(Duration::from_secs(60));
        Outcome::Finished
    })
    .unwrap();
}

#[test]
fn a_loop_that_does_not_leave_ends_the_process() {
    use std::os::unix::process::ExitStatusExt;
    let mut coordinator = Coordinator::start(None);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["worker::helper_that_hangs", "--exact", "--ignored"])
        .env("SUPRA_TEST_COORDINATOR", &coordinator.url)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut workers = [coordinator.welcome()];
    assign(&mut workers, 1, Path::new("/checkpoints"), None);
    workers[0].hear(|message| {
        matches!(&message.body, Some(Up::Heartbeat(beat)) if beat.phase() == Phase::Forming)
            .then_some(())
    });
    workers[0].say("run", 1, void());
    let status = child.wait().unwrap();
    assert_eq!(
        status.signal(),
        Some(nix::sys::signal::Signal::SIGALRM as i32),
        "{status}"
    );
}
