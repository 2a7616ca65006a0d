//! Workers that come and go.

use std::collections::HashSet;
use std::time::Duration;

use supra_proto::v1::{Hello, Refusal, Welcome, coordinator_message::Body as Down};

use super::aside::Blame;
use super::generation::Stage;
use super::muster::Muster;
use super::state::Run;
use super::worker::{Conn, Worker};
use super::{Action, Machine};

/// Workers that left and are still shown.
const MAX_DEPARTED: usize = 32;

/// Heartbeats that a worker may miss before another one may take its name.
const NAME_HELD_FOR: u32 = 3;

/// Time between two ticks that shows that the coordinator itself was asleep, so that silence proves nothing.
const ASLEEP: Duration = Duration::from_secs(3);

impl Machine {
    pub(super) fn attach(&mut self, conn: Conn, peer: String, hello: Hello) {
        if let Some(reason) = self.shutdown.clone().filter(|_| self.said_goodbye) {
            return self.dismiss(conn, &reason);
        }
        if let Err(message) = self.admit(&hello) {
            self.log(
                None,
                "WARN",
                format!("refused a worker from {peer}: {message}"),
            );
            let body = Down::Refusal(Refusal { message });
            self.out.push(Action::Send {
                conn,
                run: String::new(),
                generation: 0,
                body,
            });
            self.out.push(Action::Close(conn));
            return;
        }
        self.replace(&hello);
        let Hello {
            name,
            device,
            data_address,
            previous_exit,
            ..
        } = &hello;
        let run = self.state.queue.front().copied();
        self.log(
            run,
            "INFO",
            format!("worker {name} attached from {peer}: {device}, data plane {data_address}"),
        );
        if !previous_exit.is_empty() {
            self.log(
                run,
                "WARN",
                format!("worker {name} was restarted: {previous_exit}"),
            );
        }
        let welcome = Welcome {
            heartbeat_seconds: self.limits.heartbeat.as_secs_f64(),
            known_step: self.known_step(&hello.name, hello.place.as_deref()),
        };
        self.out.push(Action::Send {
            conn,
            run: String::new(),
            generation: 0,
            body: Down::Welcome(welcome),
        });
        self.take_back(&hello);
        self.departed.retain(|gone| gone.hello.name != hello.name);
        self.workers
            .insert(conn, Worker::new(hello, peer, self.moment.now));
        self.attached_at = self.moment.now;
        self.comes_back(conn);
    }

    /// Whether a worker may come in, or why not.
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        let (ours, name) = (&self.identity, &hello.name);
        if hello.build != ours.build {
            return Err(format!(
                "worker {name} is build {}, the coordinator is build {}: install the same build on both machines",
                hello.build, ours.build,
            ));
        }
        if hello.plan_version != ours.plan_version || hello.plan_probe != ours.plan_probe {
            return Err(format!(
                "worker {name} would order the data in another way (plan version {}, the coordinator has {}): \
                 install the same build on both machines",
                hello.plan_version, ours.plan_version,
            ));
        }
        if name.is_empty() || hello.instance.is_empty() || hello.data_address.is_empty() {
            return Err("the hello names no worker, no instance or no data address".into());
        }
        let held = self.limits.heartbeat * NAME_HELD_FOR;
        let rival = self.workers.values().find(|worker| {
            worker.hello.name == *name
                && worker.hello.instance != hello.instance
                && self.moment.now.saturating_sub(worker.heard) < held
        });
        match rival {
            Some(rival) => Err(format!(
                "worker {name} is already attached from {}; choose --name",
                rival.peer
            )),
            None => Ok(()),
        }
    }

    /// Drops what the newcomer replaces: the old stream of its own supervisor, which may not have noticed yet that it is
    /// dead, or a silent worker of the same name.
    fn replace(&mut self, hello: &Hello) {
        let stale: Vec<Conn> = self
            .workers
            .iter()
            .filter(|(_, worker)| {
                worker.hello.instance == hello.instance || worker.hello.name == hello.name
            })
            .map(|(conn, _)| *conn)
            .collect();
        for conn in stale {
            self.drop_worker(conn, "it attached again");
        }
    }

    /// Forgets a worker; if it has a place in the generation in hand, that ends it.
    pub(super) fn drop_worker(&mut self, conn: Conn, cause: &str) {
        let Some(worker) = self.workers.remove(&conn) else {
            return;
        };
        self.out.push(Action::Close(conn));
        let run = self.state.queue.front().copied();
        self.log(
            run,
            "WARN",
            format!("worker {} is gone: {cause}", worker.hello.name),
        );
        let doing = worker.doing();
        self.departed.push_back(worker);
        if self.departed.len() > MAX_DEPARTED {
            self.departed.pop_front();
        }
        let Some(generation) = &self.generation else {
            return;
        };
        let Some(rank) = generation.rank(conn) else {
            return;
        };
        if self.strays(rank) {
            return;
        }
        let Some(generation) = &mut self.generation else {
            return;
        };
        let member = &mut generation.members[rank];
        let left = member.left.is_some();
        member.lost = true;
        if !left {
            let forming = generation.stage == Stage::Forming;
            let cause = format!(
                "rank {rank} ({}) was lost while {doing}: {cause}",
                member.name
            );
            self.accuse(rank, Blame::Lost, &cause);
            self.break_up(
                cause,
                super::ending::Severity::Lost { counts: !forming },
                Some(rank),
            );
        }
    }

    pub(super) fn tick(&mut self) {
        let now = self.moment.now;
        if now.saturating_sub(self.ticked_at) > ASLEEP {
            self.workers
                .values_mut()
                .for_each(|worker| worker.heard = now);
            self.watch.excuse(now);
        }
        self.ticked_at = now;
        let silence = self.limits.silence;
        let silent: Vec<Conn> = self.overdue(|worker| now.saturating_sub(worker.heard) > silence);
        for conn in silent {
            self.drop_worker(
                conn,
                &format!("silent for more than {} s", silence.as_secs_f64()),
            );
        }
        self.watch_over();
        self.watch_for_members();
        self.ask_for_checkpoint();
        self.tick_chaos();
        let Some(generation) = &self.generation else {
            return;
        };
        let Stage::Leaving { since, limit } = generation.stage else {
            return;
        };
        if now.saturating_sub(since) > limit {
            let number = generation.number;
            let stuck: Vec<Conn> = generation
                .members
                .iter()
                .filter(|member| !member.gone())
                .map(|member| member.conn)
                .collect();
            for conn in stuck {
                self.drop_worker(
                    conn,
                    &format!(
                        "did not leave generation {number} within {} s",
                        limit.as_secs_f64()
                    ),
                );
            }
        }
    }

    fn overdue(&self, late: impl Fn(&Worker) -> bool) -> Vec<Conn> {
        self.workers
            .iter()
            .filter(|(_, worker)| late(worker))
            .map(|(conn, _)| *conn)
            .collect()
    }

    /// Whether the first run in the queue gets its generation now, of how many workers, or why not.
    pub(super) fn muster(&self, run: &Run) -> Result<u32, String> {
        let attached: HashSet<&String> = self
            .workers
            .values()
            .filter(|worker| worker.place.is_none())
            .map(|worker| &worker.hello.name)
            .collect();
        let missing: Vec<String> = run
            .members
            .iter()
            .filter(|name| !attached.contains(name) && !self.is_aside(name))
            .cloned()
            .collect();
        let now = self.moment.now;
        Muster {
            min: run.workers.min,
            max: run.workers.max,
            idle: self.idle().count(),
            aside: &self.unable(),
            missing: &missing,
            quiet: now.saturating_sub(self.attached_at),
            free: now.saturating_sub(self.free_since),
            grace: run.workers.grace,
            rejoin: self.limits.rejoin,
        }
        .decide()
    }

    /// Attached workers that a generation may take and that have no place in any.
    pub(super) fn idle(&self) -> impl Iterator<Item = (Conn, &Worker)> {
        let placed = |conn| {
            let generation = self.generation.as_ref();
            generation.is_some_and(|generation| generation.rank(conn).is_some())
        };
        self.able()
            .map(|(conn, worker)| (*conn, worker))
            .filter(move |(conn, worker)| worker.place.is_none() && !placed(*conn))
    }
}
