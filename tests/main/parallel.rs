//! Devices that share the steps of a run.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use llama::model::TrainBackend;
use llama::train::log::{self, Line};
use llama::train::parallel::{Rendezvous, join};
use llama::train::{Group, Interrupter, PretrainConfig, RunOptions, RunReport, Stop, TrainError, checkpoint, pretrain};

use crate::behaviour::{run_config, small};
use crate::programs;
use crate::support::{close, device, device_test, tolerance};

type Outcome = Result<RunReport, TrainError>;

/// Lets every member run its configuration, on the same device.
pub fn run<B: TrainBackend>(
    groups: Vec<Group>,
    device: &B::Device,
    member: impl Fn(u64) -> (PretrainConfig, Option<PathBuf>, Interrupter) + Sync,
) -> Vec<Outcome> {
    let member = &member;
    std::thread::scope(|scope| {
        let spawn = |group: Group| {
            scope.spawn(move || {
                let (config, from, interrupter) = member(group.rank().index);
                let options = RunOptions { resume_from: from.as_deref(), interrupter, ..RunOptions::silent() };
                pretrain::<B>(&config, device, group, options).map(|(_, report)| report)
            })
        };
        let members: Vec<_> = groups.into_iter().map(spawn).collect();
        members.into_iter().map(|member| member.join().unwrap()).collect()
    })
}

/// A run of `count` members, from a checkpoint or from its beginning, in a folder of its own.
pub fn together<B: TrainBackend>(
    config: &PretrainConfig,
    device: &B::Device,
    groups: Vec<Group>,
    folder: &Path,
    from: Option<&Path>,
) -> RunReport {
    let mut config = config.clone();
    config.run.folder = folder.into();
    let outcomes = run::<B>(groups, device, |_| (config.clone(), from.map(Path::to_path_buf), Interrupter::new()));
    let reports: Vec<RunReport> = outcomes.into_iter().map(Result::unwrap).collect();
    for report in &reports {
        assert_eq!((report.stop, report.step, &report.checkpoint), (Stop::Finished, 9, &reports[0].checkpoint));
    }
    reports.into_iter().next().unwrap()
}

pub fn losses(run: &Path) -> Vec<f64> {
    let lines = log::read(&run.join(log::METRICS_FILE)).unwrap();
    let loss = |line| match line {
        Line::Train { loss, .. } | Line::Valid { loss, .. } => Some(loss),
        Line::Skipped { .. } => None,
    };
    lines.into_iter().filter_map(loss).collect()
}

pub fn assert_same(a: &Path, b: &Path) {
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
        assert!(read(a) == read(b), "{file} differs");
    }
}

/// Members of two processes, one and two of them, that meet on this machine.
fn processes() -> Vec<Group> {
    // A port that is free, since the system has just given it.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let meet = |node| Rendezvous { timeout: Duration::from_secs(100), ..Rendezvous::new(&address, node, 2) };
    let other = meet(1);
    let theirs = std::thread::spawn(move || join(2, Some(&other)).unwrap());
    // Others knock, too, as long as somebody opens, and say nonsense.
    let stranger = std::thread::spawn({
        let address = address.clone();
        move || {
            for _ in 0..100 {
                if let Ok(mut stream) = std::net::TcpStream::connect(&address) {
                    return std::io::Write::write_all(&mut stream, b"GET / HTTP/1.1\r\n\r\n").is_ok();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            false
        }
    });
    let mut groups = join(1, Some(&meet(0))).unwrap();
    groups.extend(theirs.join().unwrap());
    stranger.join().unwrap();
    groups
}

device_test! {
    fn members_with_one_micro_batch_each_train_as_one_alone<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut config = run_config(folder.path());
        config.batch.accumulation = 3;
        let one = together::<B>(&config, &device, vec![Group::alone()], &at("one"), None);
        let three = together::<B>(&config, &device, join(3, None).unwrap(), &at("three"), None);
        let apart = together::<B>(&config, &device, processes(), &at("apart"), None);
        // A run goes on with another number of members.
        let from = checkpoint::list(&at("three")).unwrap()[0].1.clone();
        let resumed = together::<B>(&config, &device, vec![Group::alone()], &at("resumed"), Some(&from));
        let resumed_apart = together::<B>(&config, &device, processes(), &at("resumed apart"), Some(&from));
        for other in [&three, &apart] {
            close("losses", &losses(other.curve.parent().unwrap()), &losses(&at("one")), tolerance(0.0, 5.0));
        }
        if device_is_flex() {
            for other in [&three, &apart, &resumed, &resumed_apart] {
                assert_same(&one.checkpoint, &other.checkpoint);
            }
        }
    }
}

device_test! {
    /// Sums of several micro-batches each are added in another order than one alone would.
    fn members_with_several_micro_batches_train_alike<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut config = run_config(folder.path());
        config.batch.accumulation = 4;
        together::<B>(&config, &device, vec![Group::alone()], &at("one"), None);
        let two = together::<B>(&config, &device, join(2, None).unwrap(), &at("two"), None);
        close("losses", &losses(&at("two")), &losses(&at("one")), tolerance(1e-5, 5.0));
        let again = together::<B>(&config, &device, join(2, None).unwrap(), &at("again"), None);
        if device_is_flex() {
            assert_same(&two.checkpoint, &again.checkpoint);
        }
    }
}

device_test! {
    fn an_interrupt_of_one_member_stops_all_at_the_same_step<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let config = run_config(folder.path());
        let outcomes = run::<B>(join(2, None).unwrap(), &device, |rank| {
            let interrupter = Interrupter::new();
            if rank == 1 {
                interrupter.stop(Some("test"));
            }
            (config.clone(), None, interrupter)
        });
        for outcome in outcomes {
            let report = outcome.unwrap();
            assert_eq!((report.stop, report.step), (Stop::Interrupted, 0));
        }
        assert_eq!(checkpoint::list(&config.run.folder).unwrap().len(), 1);
    }
}

device_test! {
    fn members_that_do_not_go_together_say_why<B>(device) {
        let folder = tempfile::tempdir().unwrap();
        let config = run_config(folder.path());
        let errors = |change: fn(&mut PretrainConfig)| {
            let outcomes = run::<B>(join(2, None).unwrap(), &device, |rank| {
                let mut config = config.clone();
                if rank == 1 {
                    change(&mut config);
                }
                (config, None, Interrupter::new())
            });
            outcomes.into_iter().map(|outcome| outcome.unwrap_err().to_string()).collect::<Vec<_>>()
        };
        for error in errors(|config| config.schedule.peak_lr = 1.0) {
            assert!(error.contains("schedule of member 1"), "{error}");
        }
        for error in errors(|config| config.run.eval_every = 0) {
            assert!(error.contains("run.eval_every of member 1"), "{error}");
        }
        // One fails by itself, and is missed by the other.
        let [missing, own] = <[String; 2]>::try_from(errors(|config| config.data.folder = "/no/data".into())).unwrap();
        assert!(own.contains("/no/data"), "{own}");
        assert!(missing.contains("member 1") && missing.contains("it left"), "{missing}");
        let uneven = run::<B>(join(3, None).unwrap(), &device, |_| (config.clone(), None, Interrupter::new()));
        for outcome in uneven {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("batch.accumulation is 2") && error.contains("multiple of 3"), "{error}");
        }
    }
}

#[test]
fn processes_that_do_not_meet_say_why() {
    let address = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let meet = |address: &str, node, nodes, timeout| {
        join(1, Some(&Rendezvous { timeout, ..Rendezvous::new(address, node, nodes) })).map(|groups| groups.len())
    };
    let (moment, while_) = (Duration::from_millis(50), Duration::from_secs(20));
    let place = address();
    let error = meet(&place, 0, 3, moment).unwrap_err().to_string();
    assert!(error.contains(&place) && error.contains("process 1 is missing"), "{error}");
    let error = meet(&address(), 1, 2, moment).unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
    let error = meet(&address(), 2, 2, moment).unwrap_err().to_string();
    assert!(error.contains("process 2, from 0, of 2"), "{error}");

    let place = address();
    let (first, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| meet(&place, 1, 3, while_));
        (meet(&place, 0, 2, while_), other.join().unwrap())
    });
    for error in [first.unwrap_err(), other.unwrap_err()] {
        assert!(error.to_string().contains("here are 2 processes, there 3"), "{error}");
    }
}

/// Steps of the run that a process is killed in.
const STEPS: u64 = 60;

#[test]
fn a_killed_process_ends_the_others_and_the_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let args = ["--accumulation", "2"];
    programs::run(programs::pretrain(&whole, STEPS).args(args));
    let shared = killed(folder.path(), &args);
    if device_is_flex() {
        assert_same(&last(&whole), &shared);
    }
}

/// The other is missed inside the model.
#[test]
fn a_killed_process_with_a_part_of_the_model_ends_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = PretrainConfig::preset("tiny").unwrap();
    config.model = small();
    config.data.folder = folder.path().join("shared/data");
    let file = folder.path().join("config.toml");
    std::fs::write(&file, config.to_toml()).unwrap();
    let last = killed(folder.path(), &["--config", file.to_str().unwrap(), "--tensor-parallel", "2"]);
    assert!(last.is_dir());
}

fn last(run: &Path) -> PathBuf {
    run.join(format!("checkpoints/step-{STEPS:08}"))
}

/// Lets two processes of the program share a run, kills the second, goes on without it, and returns the last checkpoint.
fn killed(folder: &Path, args: &[&str]) -> PathBuf {
    let at = |name: &str| folder.join(name);
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let process = |node: &str| {
        let mut command = programs::pretrain(&at("shared"), STEPS);
        command.args(args).args(["--nodes", "2", "--node", node, "--address", &address]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let error = programs::fails(&mut process("1"));
    assert!(error.contains("no shards of this text yet"), "{error}");
    let first = process("0").spawn().unwrap();
    let wait = |what: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !what() {
            assert!(Instant::now() < deadline, "it did not come so far");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    wait(&|| at("shared/data/prepared.json").is_file());
    let mut second = process("1").spawn().unwrap();
    wait(&|| checkpoint::latest(&at("shared")).is_ok());
    second.kill().unwrap();
    second.wait().unwrap();
    let first = first.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&first.stderr).into_owned();
    assert!(!first.status.success() && error.contains("member 1 of the group: it left"), "{error}");

    programs::run(&mut programs::resume(&at("shared")));
    last(&at("shared"))
}

pub fn device_is_flex() -> bool {
    device().to_string() == "flex"
}
