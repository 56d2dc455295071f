//! Who works on what, without a coordinator.
//!
//! A process claims a task by creating a file beside the task's result, and says by the file's time that it is alive. A claim of a process
//! that is gone (known at once on the same machine, after ten silent minutes on another) is taken over. Claims only save
//! work: results are a function of the input and are renamed into place whole, so if two processes ever do the same task, both write
//! the same file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crate::{DataError, Progress};

/// Time between signs of life.
const BEAT: Duration = Duration::from_secs(20);
/// A claim that is silent for so long is nobody's.
const STALE: Duration = Duration::from_secs(600);
/// A claim that has had no name for so long is nobody's.
const NAMELESS: Duration = Duration::from_secs(5);

/// A piece of work with the file that stands for its result.
pub struct Task<'a> {
    /// The file that is there when the task is done.
    pub result: PathBuf,
    /// Units of progress.
    pub units: u64,
    /// Does the work; writes `result` last.
    pub work: Box<dyn Fn() -> Result<(), DataError> + Send + Sync + 'a>,
}

/// Runs tasks that are not done, on `threads` threads, and waits for those that other processes run. The first error stops the threads after
/// their current tasks.
///
/// # Errors
/// The first that a task returns.
pub fn run(name: &str, tasks: &[Task], threads: usize, progress: &dyn Progress) -> Result<(), DataError> {
    let (done, waiting): (Vec<&Task>, Vec<&Task>) = tasks.iter().partition(|task| task.result.exists());
    // A process that was killed between its result and the end of its claim.
    for claim in done.iter().map(|task| claim_path(&task.result)).filter(|claim| claim.exists() && abandoned(claim)) {
        let _ = std::fs::remove_file(claim);
    }
    if waiting.is_empty() {
        return Ok(());
    }
    progress.start(name, Some(waiting.iter().map(|task| task.units).sum()));
    let failed: Mutex<Option<DataError>> = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, waiting.len()) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Some(task) = waiting.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    if let Err(error) = attempt(task) {
                        stop.store(true, Ordering::Relaxed);
                        failed.lock().unwrap_or_else(|lock| lock.into_inner()).get_or_insert(error);
                    }
                    progress.advance(task.units);
                }
            });
        }
    });
    // What others had claimed: they finish it, or it is taken over.
    let mut result = failed.into_inner().unwrap_or_else(|lock| lock.into_inner()).map_or(Ok(()), Err);
    while result.is_ok() {
        let Some(task) = waiting.iter().find(|task| !task.result.exists()) else { break };
        result = attempt(task);
        if !task.result.exists() {
            std::thread::sleep(Duration::from_millis(300));
        }
    }
    progress.finish();
    result
}

/// Does a task unless it is done or somebody else's.
fn attempt(task: &Task) -> Result<(), DataError> {
    if task.result.exists() {
        return Ok(());
    }
    let Some(claim) = Claim::take(&task.result)? else { return Ok(()) };
    // It may have been finished between the look and the claim.
    let done = if task.result.exists() { Ok(()) } else { (task.work)() };
    drop(claim);
    done
}

/// A claim, given up when it is dropped.
struct Claim {
    path: PathBuf,
    alive: Arc<AtomicBool>,
}

impl Claim {
    /// `None` if somebody alive has it.
    fn take(result: &Path) -> Result<Option<Self>, DataError> {
        let path = claim_path(result);
        for _ in 0..2 {
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(mut file) => {
                    let me = format!("{} {}\n", host(), std::process::id());
                    file.write_all(me.as_bytes()).map_err(|error| DataError::io(&path, error))?;
                    return Ok(Some(Self::keep(path)));
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    if !abandoned(&path) {
                        return Ok(None);
                    }
                    // Another process may take it over at the same time: then one of the two finds it removed, or taken.
                    let _ = std::fs::remove_file(&path);
                }
                Err(error) => return Err(DataError::io(&path, error)),
            }
        }
        Ok(None)
    }

    /// Shows life until the claim is dropped.
    fn keep(path: PathBuf) -> Self {
        let alive = Arc::new(AtomicBool::new(true));
        let (flag, file) = (alive.clone(), path.clone());
        std::thread::spawn(move || {
            let mut waited = Duration::ZERO;
            while flag.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(500));
                waited += Duration::from_millis(500);
                if waited >= BEAT {
                    waited = Duration::ZERO;
                    // If this fails the claim grows old, and somebody does the task once more.
                    let _ = File::open(&file).and_then(|file| file.set_modified(SystemTime::now()));
                }
            }
        });
        Self { path, alive }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::Relaxed);
        // A claim that stays is taken over when it is stale.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The claim's file, beside the result.
fn claim_path(result: &Path) -> PathBuf {
    let mut name = result.file_name().unwrap_or_default().to_os_string();
    name.push(".claim");
    result.with_file_name(name)
}

/// Whether the process that made a claim is gone.
fn abandoned(path: &Path) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mut words = text.split_whitespace();
    if let (Some(machine), Some(process)) = (words.next(), words.next())
        && machine == host()
        && cfg!(target_os = "linux")
    {
        return !Path::new("/proc").join(process).exists();
    }
    let age = std::fs::metadata(path).and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
    // Whoever creates a claim writes its name at once, unless it is killed just then.
    age.is_some_and(|age| age > if text.is_empty() { NAMELESS } else { STALE })
}

/// A name of this machine.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
    name.map_or_else(|_| "unknown".into(), |name| name.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NoProgress;

    fn tasks<'a>(folder: &Path, count: &'a AtomicUsize) -> Vec<Task<'a>> {
        (0..20)
            .map(|index| {
                let result = folder.join(format!("{index}"));
                let path = result.clone();
                let work = Box::new(move || {
                    count.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(2));
                    std::fs::write(&path, "done").map_err(|error| DataError::io(&path, error))
                });
                Task { result, units: 1, work }
            })
            .collect()
    }

    #[test]
    fn several_workers_do_each_task_once_and_a_second_run_none() {
        let folder = tempfile::tempdir().unwrap();
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| run("test", &tasks(folder.path(), &count), 2, &NoProgress).unwrap());
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 20);
        run("test", &tasks(folder.path(), &count), 2, &NoProgress).unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 20);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 20, "claims are removed");
    }

    #[test]
    fn a_dead_process_loses_its_claim_and_a_living_one_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let result = folder.path().join("r");
        let claim = folder.path().join("r.claim");
        std::fs::write(&claim, format!("{} 4194999\n", host())).unwrap();
        assert!(Claim::take(&result).unwrap().is_some());
        std::fs::write(&claim, "elsewhere 1\n").unwrap();
        assert!(Claim::take(&result).unwrap().is_none());
        std::fs::write(&claim, "").unwrap();
        assert!(Claim::take(&result).unwrap().is_none());
        File::open(&claim).unwrap().set_modified(SystemTime::now() - 2 * NAMELESS).unwrap();
        assert!(Claim::take(&result).unwrap().is_some());
        std::fs::write(&claim, "elsewhere 1\n").unwrap();
        File::open(&claim).unwrap().set_modified(SystemTime::now() - 2 * STALE).unwrap();
        assert!(Claim::take(&result).unwrap().is_some());
    }

    #[test]
    fn the_first_error_is_returned() {
        let folder = tempfile::tempdir().unwrap();
        let work = Box::new(|| Err(DataError::Tokenizer("broken".into())));
        let task = Task { result: folder.path().join("x"), units: 1, work };
        assert!(run("test", &[task], 1, &NoProgress).unwrap_err().to_string().contains("broken"));
    }
}
