//! A network that swallows packets: nothing is reset, nothing is refused, nothing comes. In network namespaces of its own.

use std::process::Command;
use std::time::{Duration, Instant};

use supra_tests::process::{POLL, run};
use supra_tests::proxy::Proxy;
use supra_tests::{Cluster, Failure, Result, TinyRecipe, weights};

use crate::{LIMIT, Stage};

/// Set for the process of a test that runs in its own network.
const INSIDE: &str = "SUPRA_TEST_INSIDE";

/// The coordinator's side of the link, and that of the worker which has a network of its own.
const HERE: &str = "10.77.0.1";
const THERE: &str = "10.77.0.2";

/// The coordinator gives up a silent worker after 10 s.
const SILENCE: Duration = Duration::from_secs(30);

/// Has the calling test run once more, in a network of its own, and says whether this is that process.
///
/// Where the system allows no network namespaces the test is skipped, except in CI, where nobody would see that.
fn in_own_network(test: &str) -> Result<bool> {
    if std::env::var_os(INSIDE).is_some() {
        return Ok(true);
    }
    let unshare = || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--map-root-user", "--net"]);
        unshare
    };
    let mut probe = unshare();
    probe.args([
        "sh",
        "-ec",
        "ip link add probe0 type veth peer name probe1; tc qdisc replace dev probe0 root blackhole",
    ]);
    let probed = run(probe, LIMIT);
    if !probed.as_ref().is_ok_and(|output| output.code == 0) {
        if std::env::var("CI").is_ok_and(|value| value == "true") {
            return Err(Failure::new(format!("no network namespaces: {probed:?}")));
        }
        eprintln!("skipped: this system does not allow network namespaces");
        return Ok(false);
    }
    let mut inside = unshare();
    inside.arg(std::env::current_exe()?);
    inside.args([test, "--exact", "--nocapture"]);
    inside.env(INSIDE, "1");
    run(inside, LIMIT)?.expect_code(0)?;
    Ok(false)
}

/// Runs `ip` or `tc` with arguments that hold no spaces.
fn configure(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    run(command, LIMIT)?.expect_code(0).map(drop)
}

/// A network of one worker, linked to this one.
struct FarNetwork {
    /// The worker's process.
    process: u32,
}

impl FarNetwork {
    /// Starts a worker in a network of its own, and lays the link. `control` is its way to the coordinator.
    fn start_worker(cluster: &mut Cluster, name: &str, control: &Proxy) -> Result<Self> {
        let url = format!("http://{}", control.address());
        let worker = cluster.worker_command_by(&url, "cpu", name);
        let mut far = Command::new("unshare");
        let link = format!(
            "ip link set lo up\n\
             ip link add inside type veth peer name outside netns {}\n\
             ip addr add {THERE}/24 dev inside\n\
             ip link set inside up\n\
             exec \"$@\"",
            std::process::id()
        );
        far.args(["--net", "sh", "-ec", &link, "sh"]);
        far.arg(worker.get_program()).args(worker.get_args());
        cluster.adopt_worker(name, far)?;
        let deadline = Instant::now() + LIMIT;
        while configure("ip link set outside up").is_err() {
            if Instant::now() > deadline {
                return Err(Failure::new(format!("no link\n{}", cluster.logs())));
            }
            std::thread::sleep(POLL);
        }
        configure(&format!("ip route add {THERE} dev outside src {HERE}"))?;
        let process = cluster.worker(name)?.pid();
        Ok(Self { process })
    }

    /// Swallows whatever is sent from either side, or lets it pass again.
    fn swallow(&self, everything: bool) -> Result<()> {
        let discipline = |device: &str| {
            if everything {
                format!("tc qdisc replace dev {device} root blackhole")
            } else {
                format!("tc qdisc del dev {device} root")
            }
        };
        configure(&discipline("outside"))?;
        let process = self.process;
        configure(&format!(
            "nsenter --net --target {process} {}",
            discipline("inside")
        ))
    }
}

#[test]
fn a_rank_whose_packets_are_swallowed_is_given_up_replaced_and_comes_back() -> Result<()> {
    let test = "silence::a_rank_whose_packets_are_swallowed_is_given_up_replaced_and_comes_back";
    if !in_own_network(test)? {
        return Ok(());
    }
    configure("ip link set lo up")?;
    configure(&format!("ip addr add {HERE}/32 dev lo"))?;
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 0)?;
    let near = |cluster: &mut Cluster, name: &str| {
        let mut worker = cluster.worker_command(name);
        worker.args(["--advertise", HERE]);
        cluster.adopt_worker(name, worker)
    };
    near(&mut cluster, "w0")?;
    near(&mut cluster, "w1")?;
    let recipe = TinyRecipe {
        budget: 100_010,
        repeat: true,
        ..TinyRecipe::default()
    };
    let quiet = stage.submit(&cluster, &recipe)?;
    cluster.wait_finished(&quiet, LIMIT)?;
    let expected = weights::hashes(&cluster.last_checkpoint(&quiet)?)?;

    cluster.remove_worker("w1")?;
    let coordinator = cluster.url().trim_start_matches("http://").parse()?;
    let control = Proxy::start_on(HERE.parse()?, coordinator)?;
    let far = FarNetwork::start_worker(&mut cluster, "far", &control)?;
    cluster.wait_attached(2, LIMIT)?;
    let run = stage.submit(&cluster, &recipe)?;
    cluster.wait(&run, "in training", LIMIT, |status| status.step >= 10)?;
    far.swallow(true)?;
    let dark = Instant::now();
    cluster.wait_attached(1, SILENCE)?;
    eprintln!("given up after {:.1} s", dark.elapsed().as_secs_f64());
    near(&mut cluster, "w2")?;
    cluster.wait_finished(&run, LIMIT)?;
    cluster.audit(&run)?;
    weights::expect(&expected, &cluster.last_checkpoint(&run)?)?;
    far.swallow(false)?;
    cluster.wait_attached(3, LIMIT)
}
